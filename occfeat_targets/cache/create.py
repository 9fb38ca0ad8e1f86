"""Creating an empty cache: the Zarr group with its attributes and arrays, or an existing cache with exactly the same spec."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from occfeat_targets.cache.drafts import PROGRESS
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import CacheError, sync, sync_and_digest, unique_suffix, write_record, writing
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.cache.store import CREATED, Cache, Identity
from occfeat_targets.common.plural import count

KEYFRAME_DIM = "keyframe"


def create_cache(
    path: Path,
    spec: TargetSpec,
    identity: Identity,
    *,
    keyframes_per_shard: int,
    provenance: Mapping[str, Any],
    add: Callable[[Path], None] | None = None,
) -> Cache:
    """Create an empty cache, or open an existing one with exactly these keyframes and this spec.

    Several processes may call this at once (array jobs): the group is created under another name and renamed when complete.
    add: writes more files into the folder of a new cache before it is renamed.
    Raises CacheError that names both fingerprints if the existing cache differs.
    """
    if keyframes_per_shard < 1:
        raise ValueError(f"{keyframes_per_shard} keyframes per shard: at least 1 expected")
    if len(identity) == 0:
        raise ValueError("no keyframes to build a cache of")
    wanted = Cache(path, spec, identity, keyframes_per_shard, provenance)
    prefix = f".{path.name}.creating-"
    if not path.exists():
        with writing(str(path)):
            _create(path.with_name(prefix + unique_suffix()), wanted, add)
    # Drafts of killed processes, or of live ones, which find the cache when their own draft is gone.
    for draft in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        shutil.rmtree(draft, ignore_errors=True)
    return _open_matching(wanted)


def _create(draft: Path, cache: Cache, add: Callable[[Path], None] | None) -> None:
    """Write the cache under the name of a draft and rename it, unless another process was faster."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_skeleton(draft, cache)
        if add is not None:
            add(draft)
        draft.rename(cache.path)
        sync(draft.parent)
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        if not cache.path.exists():
            raise


def _write_skeleton(draft: Path, cache: Cache) -> None:
    spec, n, k = cache.spec, len(cache), cache.keyframes_per_shard
    attributes = {
        "occfeat": {
            "fingerprint": spec.fingerprint,
            "spec": spec.to_dict(),
            "keyframes_per_shard": k,
            "provenance": dict(cache.provenance),
        }
    }
    group = zarr.create_group(draft, zarr_format=3, attributes=attributes)
    group.create_group(PROGRESS, attributes={"description": "one record a finished shard; see occfeat-targets status"})
    identity: list[tuple[str, Sequence[Any], Any]] = [
        ("sample_token", cache.identity.tokens, str),
        ("scene", cache.identity.scenes, str),
        ("timestamp_us", cache.identity.timestamps_us, np.int64),
    ]
    for name, values, dtype in identity:
        array = group.create_array(
            name, shape=(n,), chunks=(n,), dtype=dtype, dimension_names=[KEYFRAME_DIM], compressors=(Crc32cCodec(),)
        )
        array[:] = np.array(values, dtype=object if dtype is str else dtype)
    if spec.labels:
        group.create_group("labels")
    for spec_array in spec.arrays():
        shape = spec_array.shape
        codecs = (ZstdCodec(level=3), Crc32cCodec()) if spec_array.compress else (Crc32cCodec(),)
        group.create_array(
            spec_array.name,
            shape=(n, *shape),
            chunks=(1, *shape) if spec_array.per_keyframe else (k, *shape),
            shards=(k, *shape) if spec_array.per_keyframe else None,
            dtype=spec_array.dtype,
            dimension_names=[KEYFRAME_DIM, *spec_array.dims],
            compressors=codecs,
            fill_value=0,
            attributes={"description": spec_array.description},
        )
    with warnings.catch_warnings():  # zarr warns that consolidated metadata are not part of the v3 specification yet
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(draft)
    files = {str(f.relative_to(draft)): sync_and_digest(f) for f in sorted(draft.rglob("*")) if f.is_file()}
    for folder in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
        sync(folder)
    write_record(draft / PROGRESS / f"{CREATED}.json", {"files": files})


def require_options(cache: Cache, spec: TargetSpec, keyframes_per_shard: int) -> None:
    """Raises CacheError that names both values if a build with this spec or number of keyframes does not fit the cache."""
    if cache.spec != spec:
        raise CacheError(
            f"cache {cache.path} has fingerprint {cache.spec.fingerprint}, this build has {spec.fingerprint} "
            f"({'; '.join(cache.spec.differences(spec))} [cache != build]): "
            "pass the options the cache was built with, choose another --cache, or pass --overwrite to replace it"
        )
    if cache.keyframes_per_shard != keyframes_per_shard:
        raise CacheError(
            f"cache {cache.path} has {count(cache.keyframes_per_shard, 'keyframe')} per shard, "
            f"this build asks for {keyframes_per_shard}: pass --shard-size {cache.keyframes_per_shard}"
        )


def require_keyframes(cache: Cache, identity: Identity) -> None:
    """Raises CacheError if the cache holds other keyframes."""
    if cache.identity != identity:
        raise CacheError(
            f"cache {cache.path} holds {count(len(cache), 'other keyframe')} than the {len(identity)} of this data set: "
            "point --dataroot at the data set it was built from, pass the same --scenes as at its first build, choose another --cache, "
            "or pass --overwrite to replace it"
        )


def _open_matching(wanted: Cache) -> Cache:
    found = open_cache(wanted.path)
    require_options(found, wanted.spec, wanted.keyframes_per_shard)
    require_keyframes(found, wanted.identity)
    return found
