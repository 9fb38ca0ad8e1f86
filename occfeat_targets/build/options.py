"""Options of a build, and the spec that they ask for. Nothing here reads the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import EGO_FRAME, STUDENT_SIZE, TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache
from occfeat_targets.sources.source import Source


@dataclass(frozen=True)
class BuildOptions:
    """Options of 'occfeat-targets build'. labels: None for all that the data set has.

    dynamic: what is done about moving objects in earlier sweeps; None for carve, if there are some.
    source: a name in SOURCES. scenes: build only these scenes. teacher: a name, or None for a cache without features. shard: (k, n) to build every n-th
    shard, starting with the k-th. plan_only: build nothing; the tasks run later, and maybe on other machines.
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
    dynamic: str | None = None
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
    plan_only: bool = False
    points: bool = False
    rays: bool = False
    instances: bool = False
    retry_skipped: bool = False
    device: str = "auto"
    keyframes_per_batch: int | None = None

    @property
    def moving_objects(self) -> str:
        """`dynamic` of the spec. Raises ValueError if it is given without earlier sweeps."""
        if self.num_sweeps > 1:
            return self.dynamic or "carve"
        if self.dynamic not in (None, "smear"):
            raise ValueError(f"--dynamic {self.dynamic} is about earlier sweeps: pass it with --sweeps of at least 2")
        return "smear"

    @property
    def path(self) -> Path:
        """Of the cache of the split."""
        return self.cache / f"{self.split}.zarr"

    def shards_of(self, cache: Cache) -> range:
        """Shards of this task of an array job; otherwise all."""
        k, n = self.shard or (0, 1)
        return range(k, cache.num_shards, n)


def make_spec(options: BuildOptions, source: Source, teacher: TeacherSpec | None, labels: Sequence[str]) -> TargetSpec:
    """The spec of a build with these kinds of labels. Raises ValueError if the options do not fit each other."""
    frames = {"ego": (EGO_FRAME,), "cameras": source.cameras, "both": (EGO_FRAME, *source.cameras)}
    return TargetSpec(
        source=options.source,
        cameras=source.cameras,
        grid=options.grid,
        frames=frames[options.frames],
        image_size=options.image_size,
        teacher=teacher,
        feature_dtype=options.feature_dtype,
        num_sweeps=options.num_sweeps,
        dynamic=options.moving_objects,
        ego_box=source.ego_box,
        max_points=source.max_returns * options.num_sweeps if options.points else 0,
        rays=options.rays,
        instances=options.instances,
        labels=tuple(name for name in LABEL_KINDS if name in labels),
        dividers=options.dividers,
        compat=options.compat,
    )
