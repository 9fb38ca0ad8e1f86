"""Opening a cache: its metadata are checked against their record, and what is no cache is refused with what was probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from occfeat_targets.cache.drafts import PROGRESS
from occfeat_targets.cache.rebuild import require_format
from occfeat_targets.cache.records import CacheError, digest, read_record
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.cache.store import CREATED, Cache, Identity
from occfeat_targets.common.plural import count
from occfeat_targets.common.suggest import did_you_mean


def _zarr_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array), name
    return array


def _require_lengths(path: Path, group: zarr.Group) -> None:
    """Raises CacheError if an array of the identity claims more or fewer keyframes than there are bytes of timestamps."""
    file = path / "timestamp_us" / "c" / "0"
    length = (file.stat().st_size - 4) // 8  # of int64 with a CRC-32C behind
    for name in ("sample_token", "scene", "timestamp_us"):
        shape = _zarr_array(group, name).shape
        if shape != (length,):
            raise CacheError(
                f"{path / name / 'zarr.json'} says that the array's shape is {shape}, but {file} has {count(length, 'keyframe')}: "
                "the metadata were made up; delete the cache and build it again"
            )


def require_folder_of_caches(folder: Path) -> None:
    """Raises CacheError if the folder is a cache itself, such as CACHE/train.zarr."""
    if (folder / PROGRESS / f"{CREATED}.json").is_file():
        raise CacheError(f"{folder} is a cache itself: pass the folder above it, {folder.absolute().parent}")


def open_cache(path: Path) -> Cache:
    """Open a cache, finished or not. Raises CacheError if there is none, its metadata are damaged, or its format is another."""
    path = Path(path)
    if not (path / "zarr.json").is_file():
        require_folder_of_caches(path.parent)
        if (path / PROGRESS).is_dir():
            raise CacheError(
                f"{path / 'zarr.json'} is missing: restore it, or pass --overwrite to 'occfeat-targets build' to replace the cache"
            )
        there = sorted(p.stem for p in path.parent.glob("*.zarr")) if path.parent.is_dir() else []
        raise CacheError(
            f"no cache at {path}" + (f" (splits there: {', '.join(there)})" if there else "") + (did_you_mean(path.stem, there) or ":")
            + " build it with 'occfeat-targets build', or correct --cache and --split"
        )  # fmt: skip
    require_format(path)
    record = path / PROGRESS / f"{CREATED}.json"
    created = read_record(record)
    for name, sha256 in created["files"].items():
        if not (path / name).is_file() or digest(path / name) != sha256:
            raise CacheError(
                f"{path / name} is missing or was changed since the cache was created: restore or rebuild it"
            )
    group = zarr.open_group(path, mode="r", use_consolidated=False)
    attributes: dict[str, Any] = group.attrs["occfeat"]  # type: ignore[assignment]
    _require_lengths(path, group)
    identity = Identity(
        tuple(str(t) for t in np.asarray(_zarr_array(group, "sample_token")[:])),
        tuple(str(s) for s in np.asarray(_zarr_array(group, "scene")[:])),
        tuple(int(t) for t in np.asarray(_zarr_array(group, "timestamp_us")[:])),
    )
    spec = TargetSpec.from_dict(attributes["spec"])
    if spec.fingerprint != attributes["fingerprint"]:
        raise CacheError(
            f"{path / 'zarr.json'} says fingerprint {attributes['fingerprint']}, its spec has {spec.fingerprint}: it was edited; "
            "restore it, or delete the cache and build it again"
        )
    return Cache(path, spec, identity, int(attributes["keyframes_per_shard"]), attributes["provenance"], digest(record))
