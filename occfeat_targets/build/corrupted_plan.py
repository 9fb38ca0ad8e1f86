"""Planning a corrupted cache: its spec, keyframes and labels are those of a finished clean cache, and no table is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from occfeat_targets.build.contents import RANDOM_TEACHER
from occfeat_targets.build.corrupted import CorruptionInput
from occfeat_targets.build.estimate import check_disk
from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build.plan import Plan, rows_to_build
from occfeat_targets.build.planned import StoredPlan, open_plan
from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import EGO_FRAME, TargetSpec
from occfeat_targets.cache.store import Cache
from occfeat_targets.common.plural import count
from occfeat_targets.common.provenance import describe_origin
from occfeat_targets.targets.corrupted_views import downloaded_folder


def open_clean(path: Path) -> Cache:
    """The cache that corrupted ones are made from. Raises CacheError if it is absent, unfinished or corrupted itself."""
    clean = open_cache(path)
    if clean.spec.corruption is not None:
        raise CacheError(f"{path} holds corrupted images: pass the --cache of clean ones")
    if pending := clean.pending_shards():
        raise CacheError(
            f"{path} is not finished, {count(len(pending), 'shard')} missing: finish its build, without --corruption, first"
        )
    return clean


def corrupted_spec(clean: TargetSpec, corruption: CorruptionSpec) -> TargetSpec:
    """The spec of a corrupted cache, without teacher features and LiDAR returns, which no evaluation of labels reads.

    Raises ValueError if lost views are masked and some grid lies in the frame of a camera.
    """
    if corruption.masks_lost and set(clean.frames) != {EGO_FRAME}:
        raise ValueError(
            f"--mask-lost with grids in {', '.join(clean.frames)}: a lost camera has no frame, so its keyframes could not be evaluated: "
            "leave --mask-lost out, or pass the --cache of a clean one built with --frames ego"
        )
    return replace(clean, teacher=None, feature_dtype="float16", max_points=0, corruption=corruption)


def make_corrupted_plan(
    options: BuildOptions, clean: Cache, corruption: CorruptionSpec, nuscenes_c: Path | None = None
) -> Plan:
    """Create or open the corrupted cache in options.path, and list what is left to build.

    options: of the build's options only those that say where it runs, and `dataroot`, are used. nuscenes_c: folder of the downloaded
    images, if the corruption's protocol is that. Raises CacheError or ValueError with a remedy.
    """
    downloaded = None if nuscenes_c is None else downloaded_folder(nuscenes_c, corruption)
    stored = _stored_plan(clean, options.dataroot)
    spec = corrupted_spec(clean.spec, corruption)
    if not options.path.exists():
        check_disk(options.cache, spec, len(clean))
    origin = describe_origin(("numpy", "zarr", "simplejpeg", "pillow"), [])
    inherited = {name: value for name, value in clean.provenance.items() if name not in origin}
    cache = create_cache(
        options.path,
        spec,
        clean.identity,
        keyframes_per_shard=clean.keyframes_per_shard,
        provenance={
            **inherited,
            "simulated": [what for what in clean.simulated if what != RANDOM_TEACHER],
            "clean": {"path": str(clean.path), "metadata": clean.metadata},
            "nuscenes_c": None if nuscenes_c is None else str(nuscenes_c),
            **origin,
        },
        add=stored.copy_to,
    )
    if cache.provenance["clean"]["metadata"] != clean.metadata:
        raise CacheError(
            f"{cache.path} was made from another clean cache than {clean.path} is now: pass --overwrite to make it again"
        )
    cache.require_files(among=options.shards_of(cache))
    given = CorruptionInput(clean.path.absolute(), downloaded)
    return Plan(options, cache, None, stored, rows_to_build(cache, options), corruption=given)


def _stored_plan(clean: Cache, dataroot: Path) -> StoredPlan:
    stored = open_plan(clean, dataroot)
    if stored is None or not stored.is_intact(range(clean.num_shards)):
        raise CacheError(
            f"{clean.path} has no plan, or a damaged one, to find its images by: delete one record of a shard in its folder progress and "
            "run its build again, which reads the data set's tables again"
        )
    return stored
