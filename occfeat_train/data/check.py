"""Is a cache ready to be trained on? Read random keyframes the way training does, and say what a step would get."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.ops.sampling import sample_voxel_features_numpy


@dataclass(frozen=True)
class Readiness:
    """What `check_cache` measured, means over the keyframes it read.

    occupied: voxels of the first reference frame; seen: their share with a view, whose features are distilled.
    views: cameras that see a seen voxel. read_seconds, target_seconds: a keyframe's reading, and the sampling of its targets.
    """

    num_keyframes: int
    num_skipped: int
    occupied: float
    seen: float
    views: float
    megabytes: float
    read_seconds: float
    target_seconds: float

    def describe(self) -> list[str]:
        lines = [
            f"{self.num_keyframes} keyframes read, {self.num_skipped} of the cache are masked (skipped by the build)",
            f"occupied voxels: {self.occupied:.0f} a keyframe",
            f"reading: {self.read_seconds * 1e3:.2f} ms and {self.megabytes:.2f} MB a keyframe, checksums included",
        ]
        if self.views:
            lines.insert(2, f"  {self.seen:.1%} of them seen by a camera, {self.views:.2f} views each: distilled")
            lines.append(f"sampling target features: {self.target_seconds * 1e3:.2f} ms a keyframe on one core")
        return lines


def check_cache(reader: CacheReader, num_keyframes: int, seed: int = 0) -> Readiness:
    """Read random keyframes, every array of them, and sample their target features.

    Raises CacheError if a chunk is damaged or lost, ValueError if every keyframe of the cache is masked, or a target is not finite.
    """
    reader.cache.require_files()
    valid = np.flatnonzero(reader.is_valid)
    if not len(valid):
        raise ValueError(f"{reader.cache.path} has no valid keyframe: every one was skipped by the build")
    spec = reader.cache.spec
    names = [array.name for array in spec.arrays()]
    chosen = np.random.default_rng(seed).permutation(valid)[:num_keyframes]
    occupied, seen, views, reading, sampling = [], [], [], [], []
    for keyframe in [chosen[0], *chosen]:  # the first one twice: it pays for indices and compilation
        start = time.perf_counter()
        arrays = reader.read_all(names, int(keyframe))
        reading.append(time.perf_counter() - start)
        start = time.perf_counter()
        volume = spec.grid.unpack_volume(arrays["occupancy"][0])
        centers = spec.grid.centers_of(np.flatnonzero(volume))
        occupied.append(len(centers))
        if spec.teacher is not None:
            ego_from_grid = inverse_rigid(arrays["grid_from_ego"][0].astype(np.float64))
            targets, num_views = sample_voxel_features_numpy(
                arrays["features"],
                arrays.get("feature_scale"),
                arrays["cam_from_ego"] @ ego_from_grid,
                arrays["intrinsics"],
                spec.image_size,
                centers,
            )
            if not np.isfinite(targets).all():
                raise ValueError(
                    f"sample {reader.cache.identity.tokens[keyframe]}: a target feature is not finite: rebuild the cache"
                )
            seen.append(float((num_views > 0).mean()))
            views.append(float(num_views[num_views > 0].mean()))
        sampling.append(time.perf_counter() - start)
    return Readiness(
        num_keyframes=len(chosen),
        num_skipped=len(reader) - len(valid),
        occupied=float(np.mean(occupied[1:])),
        seen=float(np.mean(seen[1:])) if seen else 0.0,
        views=float(np.mean(views[1:])) if views else 0.0,
        megabytes=sum(array.nbytes for array in spec.arrays()) / 1e6,
        read_seconds=float(np.mean(reading[1:])),
        target_seconds=float(np.mean(sampling[1:])),
    )
