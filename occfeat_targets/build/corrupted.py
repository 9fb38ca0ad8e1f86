"""One shard of a corrupted cache: corrupted student images, and all other arrays as they are in the clean cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.build.assemble import KeyframeError
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.store import Cache
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.targets.corrupted_views import load_corrupted


@dataclass(frozen=True)
class CorruptionInput:
    """What a corrupted cache is made from. clean: the clean cache. downloaded: folder of nuScenes-C for its corruption, or None."""

    clean: Path
    downloaded: Path | None = None


@dataclass(frozen=True)
class CorruptedShard:
    """arrays: {name: (keyframes of the shard, ...)}. skipped, masked: as in the shard's record, with those of the clean cache."""

    arrays: dict[str, NDArray[Any]]
    skipped: dict[str, str]
    masked: dict[str, dict[str, str]]


def corrupted_shard(cache: Cache, given: CorruptionInput, shard: int, keyframes: Sequence[Keyframe]) -> CorruptedShard:
    """Copies calibration and labels of a shard of the clean cache, and corrupts its images.

    If lost views are masked, at least one camera of a keyframe stays: one that lost all of them has six black images, as published,
    because no network can do without any.
    Raises KeyframeError that names the sample and the file, and CacheError if the clean shard was changed.
    """
    spec, corruption = cache.spec, cache.spec.corruption
    assert corruption is not None
    clean = open_cache(given.clean)
    arrays = clean.read_shard(shard, [array.name for array in spec.arrays() if array.name != "images"])
    record = clean.shard_record(shard)
    masked = {token: dict(reasons) for token, reasons in record["masked"].items()}
    of_cameras = [array.name for array in spec.arrays() if array.dims[:1] == ("camera",)]
    arrays["images"] = np.zeros((len(keyframes), len(spec.cameras), *spec.image_size, 3), np.uint8)
    for row, keyframe in enumerate(keyframes):
        if not arrays["is_valid"][row]:
            continue
        is_seen = arrays["camera_valid"][row].copy()
        try:
            images, lost = load_corrupted(keyframe.cameras, is_seen, spec.image_size, corruption, given.downloaded)
        except (ValueError, OSError) as err:
            raise KeyframeError(f"sample {keyframe.token} of {keyframe.scene}: {err}") from err
        arrays["images"][row] = images
        if corruption.masks_lost and lost.any() and (is_seen & ~lost).any():
            for name in of_cameras:
                arrays[name][row, lost] = 0
            reasons = masked.setdefault(keyframe.token, {})
            reasons.update({spec.cameras[i]: f"lost by {corruption.name}" for i in np.flatnonzero(lost)})
    return CorruptedShard(arrays, dict(record["skipped"]), masked)
