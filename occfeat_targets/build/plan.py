"""Planning a build: from options to a spec, a cache and a list of independent tasks.

Errors that can be found before the build are raised here: a missing version, a teacher that is not available, a cache with
another fingerprint, a full disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.build.assemble import fitted_sizes, grids_from_ego, image_sizes
from occfeat_targets.build.estimate import check_disk
from occfeat_targets.build.shard import ShardTask
from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.records import digest
from occfeat_targets.cache.spec import EGO_FRAME, STUDENT_SIZE, TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache, Identity, is_whole
from occfeat_targets.common.provenance import describe_origin
from occfeat_targets.sources.keyframe import DatasetError, Keyframe, Split
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.sources.scenes import choose_scenes, note_problems, require_no_problems
from occfeat_targets.sources.source import Source, open_source
from occfeat_targets.targets.images import require_not_enlarged
from occfeat_targets.targets.labels import map_window

RANDOM_TEACHER = "the teacher's weights are random"
SYNTHETIC_DATA = "the data set is a synthetic city"


@dataclass(frozen=True)
class BuildOptions:
    """Options of 'occfeat-targets build'. labels: None for all that the data set has.

    source: a name in SOURCES. scenes: build only these scenes. teacher: a name, or None for a cache without features. shard: (k, n) to build every n-th
    shard, starting with the k-th.
    """

    dataroot: Path
    cache: Path
    split: str
    source: str = "nuscenes"
    version: str | None = None
    scenes: tuple[str, ...] | None = None
    grid: VoxelGrid = field(default_factory=VoxelGrid)
    frames: str = "ego"
    num_sweeps: int = 1
    image_size: tuple[int, int] = STUDENT_SIZE
    teacher: str | None = "facebook/dinov2-small"
    teacher_layer: str = "post-norm"
    teacher_dtype: str = "auto"
    feature_size: tuple[int, int] | None = None
    feature_dtype: str = "float16"
    labels: tuple[str, ...] | None = None
    dividers: str = "road"
    compat: str | None = None
    keyframes_per_shard: int = 16
    on_error: str = "fail"
    shard: tuple[int, int] | None = None
    points: bool = False
    retry_skipped: bool = False
    device: str = "auto"
    keyframes_per_batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run. teacher: the cache's teacher; its name is where the weights are now.

    missing_labels: {kind of labels: why the data set has none}, of those that were not asked for by name.
    rows: {shard: its keyframes that this process or cluster still has to build}.
    """

    options: BuildOptions
    split: Split
    cache: Cache
    teacher: TeacherSpec | None
    maps: dict[str, MapGeometry]
    missing_labels: dict[str, str]
    rows: dict[int, tuple[int, ...]]

    @property
    def shards(self) -> tuple[int, ...]:
        """Shards that this process or cluster has to build."""
        return tuple(self.rows)

    @property
    def num_keyframes(self) -> int:
        """Number of keyframes still to be built."""
        return sum(len(rows) for rows in self.rows.values())

    @property
    def left_to_build(self) -> list[int]:
        """Indices of the split's keyframes that are still to be built."""
        return _indices(self.cache, self.rows)

    def task(
        self, shard: int, *, device: str, keyframes_per_batch: int | None = None, num_threads: int | None = None
    ) -> ShardTask:
        """The task of a shard, with only the keyframes and the parts of the maps that it needs."""
        keyframes = tuple(self.split.keyframes[i] for i in self.cache.shard_range(shard))
        return ShardTask(
            cache=self.cache.path.absolute(),
            shard=shard,
            keyframes=keyframes,
            rows=self.rows[shard],
            maps=self._maps_near(keyframes),
            teacher=self.teacher,
            on_error=self.options.on_error,
            device=device,
            keyframes_per_batch=keyframes_per_batch,
            num_threads=num_threads,
        )

    def _maps_near(self, keyframes: Sequence[Keyframe]) -> dict[str, MapGeometry]:
        spec = self.cache.spec
        corners: dict[str, list[Any]] = {}
        for keyframe in keyframes:
            if keyframe.location in self.maps and keyframe.problem is None:
                ego_from_global = inverse_rigid(keyframe.global_from_ego)
                frames = grids_from_ego(keyframe, spec)
                for frame in frames[frames.any(axis=(1, 2))]:
                    window = map_window(
                        spec.grid, frame @ ego_from_global, keyframe.global_from_ego[2, 3], spec.divider_width
                    )
                    corners.setdefault(keyframe.location, []).extend(window)
        return {
            location: self.maps[location].near(np.min(points, axis=0), np.max(points, axis=0))
            for location, points in corners.items()
        }


def make_plan(options: BuildOptions) -> Plan:
    """Read the tables, determine the spec, create or open the cache, and list what is left to build.

    Raises DatasetError, TeacherError, CacheError or ValueError with a remedy.
    """
    source = open_source(options.source)
    split = source.read_split(
        options.dataroot,
        options.split,
        version=options.version,
        num_sweeps=options.num_sweeps,
        with_boxes=_need("annotations", LABEL_KINDS if options.labels is None else options.labels),
    )
    if options.scenes is not None:
        split = choose_scenes(split, options.scenes)
    labels, missing_labels = _labels(options.labels, source, split)
    teacher = _teacher(options)
    frames = {"ego": (EGO_FRAME,), "cameras": source.cameras, "both": (EGO_FRAME, *source.cameras)}
    spec = TargetSpec(
        source=options.source,
        cameras=source.cameras,
        grid=options.grid,
        frames=frames[options.frames],
        image_size=options.image_size,
        teacher=teacher,
        feature_dtype=options.feature_dtype,
        num_sweeps=options.num_sweeps,
        ego_box=source.ego_box,
        max_points=source.max_returns * options.num_sweeps if options.points else 0,
        labels=labels,
        dividers=options.dividers,
        compat=options.compat,
    )
    maps = {}
    if _need("maps", labels):
        maps = {location: source.read_map(split, location, options.dividers) for location in split.locations}
    identity = Identity(
        tuple(k.token for k in split.keyframes),
        tuple(k.scene for k in split.keyframes),
        tuple(k.timestamp_us for k in split.keyframes),
    )
    path = options.cache / f"{options.split}.zarr"
    create = partial(
        create_cache,
        path,
        spec,
        identity,
        keyframes_per_shard=options.keyframes_per_shard,
        provenance=_provenance(options, source, split, maps, teacher),
    )
    left: Collection[int] = range(len(identity))  # files of finished shards may have been removed
    if path.exists():
        cache = create()
        cache.require_files()
        left = _indices(cache, _rows_to_build(cache, options))
    split = note_problems(split, left, mask_cameras=options.on_error == "mask-camera")
    if options.on_error == "fail":
        require_no_problems(split, left)
    _require_large_images((split.keyframes[index] for index in left), spec)
    if not path.exists():  # only after the checks, so that a failed command leaves no cache with other keyframes behind
        check_disk(options.cache, spec, len(identity))
        cache = create()
    return Plan(options, split, cache, teacher, maps, missing_labels, _rows_to_build(cache, options))


def _require_large_images(keyframes: Iterable[Keyframe], spec: TargetSpec) -> None:
    """Raises ValueError if an image of these keyframes would be enlarged, by the sizes in the tables."""
    views = [view for keyframe in keyframes if keyframe.problem is None for view in keyframe.cameras]
    for view in {view.source_size: view for view in views if view.problem is None}.values():
        require_not_enlarged(view.path, view.source_size, fitted_sizes(view.source_size, image_sizes(spec)))


def _need(what: str, labels: Iterable[str]) -> bool:
    return any(what in LABEL_KINDS[name].needs for name in labels)


def _labels(asked: tuple[str, ...] | None, source: Source, split: Split) -> tuple[tuple[str, ...], dict[str, str]]:
    """The kinds of labels to build, and {other kind: why it is missing} if none was asked for by name."""
    lacks = {}
    if not split.has_annotations:
        lacks["annotations"] = f"{split.version} has no annotations"
    if (why_no_maps := source.why_no_maps(split)) is not None:
        lacks["maps"] = why_no_maps
    missing = {name: lacks[need] for name, kind in LABEL_KINDS.items() for need in kind.needs if need in lacks}
    there = [name for name in LABEL_KINDS if name not in missing]
    if asked is None:
        return tuple(there), missing
    for name in asked:
        if name in missing:
            options = f"--label-kinds {','.join(there)} or --no-labels" if there else "--no-labels"
            raise DatasetError(f"no {name} labels: {missing[name]}; or build with {options}")
    return tuple(name for name in LABEL_KINDS if name in asked), {}


def _teacher(options: BuildOptions) -> TeacherSpec | None:
    if options.teacher is None:
        return None
    from occfeat_targets.targets.teacher import teacher_spec

    return teacher_spec(
        options.teacher, input_size=options.feature_size, layer=options.teacher_layer, dtype=options.teacher_dtype
    )


def _provenance(
    options: BuildOptions, source: Source, split: Split, maps: dict[str, MapGeometry], teacher: TeacherSpec | None
) -> dict[str, Any]:
    simulated = [SYNTHETIC_DATA] if split.is_synthetic else []
    if teacher is not None and teacher.is_random:
        simulated.append(RANDOM_TEACHER)
    names = ("numpy", "zarr", "simplejpeg", "torch", "transformers")
    return {
        "simulated": simulated,
        "split": split.name,
        "version": split.version,
        "dataroot": str(options.dataroot.absolute()),
        "missing_scenes": list(split.missing_scenes),
        "left_out_scenes": list(split.left_out_scenes),
        "maps_sha256": {location: digest(source.map_file(split, location)) for location in maps},
        **describe_origin(names, _gpus(teacher)),
    }


def _gpus(teacher: TeacherSpec | None) -> list[str]:
    """Names of the GPUs that this process sees; none are looked for without a teacher."""
    if teacher is None:
        return []
    from occfeat_targets.targets.teacher_devices import gpu_names

    return gpu_names()


def _rows_to_build(cache: Cache, options: BuildOptions) -> dict[int, tuple[int, ...]]:
    """{shard: its keyframes left to build}.

    All, or with --retry-skipped those keyframes of a finished shard that were skipped or have masked cameras.
    """
    k, n = options.shard or (0, 1)
    mine = range(k, cache.num_shards, n)
    cache.settle_drafts(mine)
    finished = cache.finished_shards()
    rows = {}
    for shard in mine:
        tokens = [cache.identity.tokens[i] for i in cache.shard_range(shard)]
        if shard not in finished:
            rows[shard] = tuple(range(len(tokens)))
        elif options.retry_skipped and not is_whole(finished[shard]):
            again = {*finished[shard]["skipped"], *finished[shard]["masked"]}
            rows[shard] = tuple(i for i, token in enumerate(tokens) if token in again)
    return rows


def _indices(cache: Cache, rows: dict[int, tuple[int, ...]]) -> list[int]:
    return [cache.shard_range(shard)[row] for shard, chosen in rows.items() for row in chosen]
