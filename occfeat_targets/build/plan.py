"""Planning a build: from options to a spec, a cache and a list of independent tasks.

Errors that can be found before the build are raised here: a missing version, a teacher that is not available, a cache with
another fingerprint, a full disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from occfeat_targets.build.assemble import fitted_sizes, grids_from_ego, image_sizes
from occfeat_targets.build.cluster import ask_worker
from occfeat_targets.build.contents import Contents, read_contents
from occfeat_targets.build.corrupted import CorruptionInput
from occfeat_targets.build.estimate import check_disk
from occfeat_targets.build.options import BuildOptions, make_spec
from occfeat_targets.build.planned import StoredPlan, open_plan, write_plan
from occfeat_targets.build.shard import ShardTask
from occfeat_targets.cache.create import create_cache, require_keyframes, require_options
from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.opening import open_cache, require_folder_of_caches
from occfeat_targets.cache.records import CacheError, digest
from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache, is_whole
from occfeat_targets.common.plural import count
from occfeat_targets.sources.keyframe import Keyframe, require_dataroot
from occfeat_targets.sources.keyframe_files import keyframes_to_bytes
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.sources.scenes import Files, Problems, note_problem
from occfeat_targets.sources.source import Source, open_source
from occfeat_targets.targets.images import black_images, require_not_enlarged
from occfeat_targets.targets.labels import map_window

_FEW = 100  # keyframes whose files are looked for one by one


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run. teacher: the cache's teacher; its name is where the weights are now.

    stored: keyframes and maps, in the cache; None if nothing is left to build. problems: of the keyframes left to build.
    missing_labels: {kind of labels: why the data set has none}, of those that were not asked for by name.
    rows: {shard: its keyframes that this process or cluster still has to build}. corruption: what a corrupted cache is made from.
    """

    options: BuildOptions
    cache: Cache
    teacher: TeacherSpec | None
    stored: StoredPlan | None
    rows: dict[int, tuple[int, ...]]
    problems: Problems = field(default_factory=Problems)
    missing_labels: dict[str, str] = field(default_factory=dict)
    corruption: CorruptionInput | None = None

    @property
    def shards(self) -> tuple[int, ...]:
        """Shards that this process or cluster has to build."""
        return tuple(self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether no finished shard of this process or cluster has skipped keyframes or masked cameras."""
        return all(is_whole(r) for r in self.cache.finished_shards(self.options.shards_of(self.cache)).values())

    @property
    def num_keyframes(self) -> int:
        """Number of keyframes still to be built."""
        return sum(len(rows) for rows in self.rows.values())

    def task(
        self, shard: int, *, device: str, keyframes_per_batch: int | None = None, num_threads: int | None = None
    ) -> ShardTask:
        """The task of a shard, with only the keyframes and the parts of the maps that it needs."""
        assert self.stored is not None
        files, mask_cameras = Files(list_folders=False), self.options.on_error == "mask-camera"
        keyframes = list(self.stored.keyframes(self.cache, shard))
        for row in self.rows[shard] if self.corruption is None else ():
            keyframes[row] = note_problem(keyframes[row], files, mask_cameras=mask_cameras)
        return ShardTask(
            cache=self.cache.path.absolute(),
            shard=shard,
            keyframes=tuple(keyframes),
            rows=self.rows[shard],
            maps=self._maps_near(self.stored, keyframes) if self.corruption is None else {},
            teacher=self.teacher,
            on_error=self.options.on_error,
            device=device,
            keyframes_per_batch=keyframes_per_batch,
            num_threads=num_threads,
            corruption=self.corruption,
        )

    def _maps_near(self, stored: StoredPlan, keyframes: Sequence[Keyframe]) -> dict[str, MapGeometry]:
        spec = self.cache.spec
        corners: dict[str, list[Any]] = {}
        for keyframe in keyframes:
            if stored.has_map(keyframe.location) and keyframe.problem is None:
                ego_from_global = inverse_rigid(keyframe.global_from_ego)
                frames = grids_from_ego(keyframe, spec)
                for frame in frames[frames.any(axis=(1, 2))]:
                    window = map_window(
                        spec.grid, frame @ ego_from_global, keyframe.global_from_ego[2, 3], spec.divider_width
                    )
                    corners.setdefault(keyframe.location, []).extend(window)
        return {
            location: stored.map(location).near(np.min(points, axis=0), np.max(points, axis=0))
            for location, points in corners.items()
        }


def make_plan(
    options: BuildOptions, *, scheduler: str | None = None, print_line: Callable[[str], None] = lambda line: None
) -> Plan:
    """Determine the spec, create or open the cache, and list what is left to build.

    The data set's tables are read only if the cache is new, was made by an earlier release, or they have changed since. Options and
    teacher are checked before. scheduler: address of the Dask cluster that will build, whose workers choose the teacher's type.
    Raises DatasetError, TeacherError, CacheError or ValueError with a remedy.
    """
    source = open_source(options.source)
    cache = open_cache(options.path) if options.path.exists() else None
    if cache is None:  # before a teacher is downloaded
        require_folder_of_caches(options.cache)
        require_dataroot(options.dataroot)
    wanted = tuple(LABEL_KINDS) if options.labels is None else options.labels  # at most; the tables are not read yet
    make_spec(options, source, None, wanted)  # refuses options that do not fit each other
    teacher = _teacher(options, cache, scheduler, print_line)
    if cache is None:
        return _begin(options, source, teacher, print_line)
    labels = cache.spec.labels if options.labels is None else options.labels
    require_options(cache, make_spec(options, source, teacher, labels), options.keyframes_per_shard)
    _require_scenes(cache, options.scenes)
    cache.require_files(among=options.shards_of(cache))
    rows = rows_to_build(cache, options)
    if not rows:
        return Plan(options, cache, teacher, None, rows)
    stored = open_plan(cache, options.dataroot)
    if stored is None or not stored.is_current(options.version) or not stored.is_intact(rows):
        stored = _plan_again(options, source, cache, stored, print_line)
    keyframes = (stored.keyframes(cache, shard)[row] for shard, chosen in rows.items() for row in chosen)
    number = sum(map(len, rows.values()))
    problems = _check(keyframes, options, cache.spec, list_folders=number > _FEW)
    return Plan(options, cache, teacher, stored, rows, problems, cache.provenance.get("missing_labels", {}))


def _begin(
    options: BuildOptions, source: Source, teacher: TeacherSpec | None, print_line: Callable[[str], None]
) -> Plan:
    """Read the tables, and create the cache with its plan."""
    contents = read_contents(options, source, options.labels, print_line)
    spec = make_spec(options, source, teacher, contents.labels)
    first = [view for keyframe in contents.split.keyframes[:1] for view in keyframe.cameras if view.problem is None]
    if warning := black_images([view.source_size for view in first], spec.image_size):
        print_line(warning)
    problems = _check(contents.split.keyframes, options, spec, list_folders=True)
    # Only after the checks, so that a failed command leaves no cache with other keyframes behind.
    check_disk(options.cache, spec, len(contents.split.keyframes))
    cache = create_cache(
        options.path,
        spec,
        contents.identity,
        keyframes_per_shard=options.keyframes_per_shard,
        provenance=contents.provenance(options, teacher),
        add=lambda draft: write_plan(draft, contents, options),
    )
    stored = open_plan(cache, options.dataroot)
    assert stored is not None
    return Plan(options, cache, teacher, stored, rows_to_build(cache, options), problems, contents.missing_labels)


def _plan_again(
    options: BuildOptions, source: Source, cache: Cache, old: StoredPlan | None, print_line: Callable[[str], None]
) -> StoredPlan:
    """Read the tables again for a cache without a plan, or with an outdated or damaged one.

    Raises CacheError if keyframes that are built already would be others.
    """
    version = options.version or cache.provenance.get("version")  # that of its first plan, whatever else is there now
    contents = read_contents(replace(options, version=version), source, cache.spec.labels, print_line)
    require_keyframes(cache, contents.identity)
    _require_unchanged(cache, old, contents)
    write_plan(cache.path, contents, options)
    stored = open_plan(cache, options.dataroot)
    assert stored is not None
    return stored


def _require_unchanged(cache: Cache, old: StoredPlan | None, contents: Contents) -> None:
    """Raises CacheError if finished shards were built from other maps or, as far as the old plan says, other keyframes."""
    finished, digests = cache.finished_shards(), cache.provenance.get("maps_sha256", {})
    changed = []
    for location, file in contents.map_files.items() if finished else ():
        if old is not None and old.has_map(location):
            is_same = old.is_same_map(location, contents.maps[location])
        else:
            is_same = digests.get(location) in (None, digest(file))
        changed += [] if is_same else [f"the map {file}"]
    for shard, record in finished.items() if old is not None and old.is_intact(finished) else ():
        assert old is not None
        again = {*record["skipped"], *record["masked"]}
        for before, index in zip(old.keyframes(cache, shard), cache.shard_range(shard), strict=True):
            after = contents.split.keyframes[index]
            same = keyframes_to_bytes([before], old.data) == keyframes_to_bytes([after], contents.split.dataroot)
            if not same and after.token not in again:
                changed.append(f"sample {after.token} of {after.scene}")
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise CacheError(
            f"the tables at {contents.split.dataroot} have changed since keyframes of {cache.path} were built from them "
            f"({changed[0]}{more}): restore the tables, choose another --cache, or pass --overwrite to replace it"
        )


def _require_scenes(cache: Cache, names: Sequence[str] | None) -> None:
    """Raises CacheError if --scenes names others than the cache holds."""
    there = set(cache.identity.scenes)
    if set(names) != there if names is not None else cache.provenance.get("left_out_scenes"):
        raise CacheError(
            f"cache {cache.path} holds the keyframes of {count(len(there), 'scene')}, and not those of "
            f"{'all' if names is None else 'these'} scenes: pass the same --scenes as at its first build, choose another --cache, "
            "or pass --overwrite to replace it"
        )


def _check(keyframes: Iterable[Keyframe], options: BuildOptions, spec: TargetSpec, *, list_folders: bool) -> Problems:
    """Problems of the keyframes to build that show before anything is built.

    Raises DatasetError if there are some and --on-error is fail, and ValueError if an image would be enlarged.
    """
    problems, files, sizes = Problems(), Files(list_folders=list_folders), set()
    for keyframe in keyframes:
        noted = note_problem(keyframe, files, mask_cameras=options.on_error == "mask-camera")
        problems.add(noted)
        for view in noted.cameras if noted.problem is None else ():
            if view.problem is None and view.source_size not in sizes:
                sizes.add(view.source_size)
                require_not_enlarged(view.path, view.source_size, fitted_sizes(view.source_size, image_sizes(spec)))
    if options.on_error == "fail":
        problems.require_none()
    return problems


def _teacher(
    options: BuildOptions, cache: Cache | None, scheduler: str | None, print_line: Callable[[str], None]
) -> TeacherSpec | None:
    """The spec of the teacher. Its type, if the user left it open, is the cache's, or what suits the machine that computes."""
    if options.teacher is None:
        return None
    from occfeat_targets.targets.teacher import native_dtype, teacher_spec
    from occfeat_targets.targets.teacher_dinov2_hub import describe_file

    print_line(f"reading the weights of {options.teacher} ...")
    dtype, is_here = options.teacher_dtype, scheduler is None and not options.plan_only
    if dtype == "auto":
        if cache is not None and cache.spec.teacher is not None:
            dtype = cache.spec.teacher.dtype
        elif scheduler is not None:
            print_line(f"asking a worker of {scheduler} for the type in which it computes fastest ...")
            dtype = ask_worker(scheduler, native_dtype, options.device)
        elif options.plan_only:
            dtype = native_dtype("cpu" if options.device == "cpu" else "auto")
            print_line(
                f"the teacher computes in {dtype}, which suits this machine; --teacher-dtype sets what suits the tasks'"
            )
        else:
            dtype = native_dtype(options.device)
    if dtype == "bfloat16" and is_here and native_dtype(options.device) != dtype:
        print_line(
            "this machine has no native bfloat16, in which the cache was begun or is asked for: the teacher is slow here"
        )
    spec = teacher_spec(options.teacher, input_size=options.feature_size, layer=options.teacher_layer, dtype=dtype)
    if (summary := describe_file(options.teacher)) is not None:
        print_line(f"{options.teacher} is {summary}")
    return spec


def rows_to_build(cache: Cache, options: BuildOptions) -> dict[int, tuple[int, ...]]:
    """{shard: its keyframes left to build}.

    All, or with --retry-skipped those keyframes of a finished shard that were skipped or have masked cameras.
    """
    mine = options.shards_of(cache)
    cache.settle_drafts(mine)
    finished = cache.finished_shards(mine)
    rows = {}
    for shard in mine:
        tokens = [cache.identity.tokens[i] for i in cache.shard_range(shard)]
        if shard not in finished:
            rows[shard] = tuple(range(len(tokens)))
        elif options.retry_skipped and not is_whole(finished[shard]):
            again = {*finished[shard]["skipped"], *finished[shard]["masked"]}
            rows[shard] = tuple(i for i, token in enumerate(tokens) if token in again)
    return rows
