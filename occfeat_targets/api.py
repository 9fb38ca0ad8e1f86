"""The Python API of occfeat_targets: build a cache, voxelize points.

`import occfeat_targets` loads none of this; the names in `occfeat_targets.__all__` are looked up here at their first use, and
heavy libraries are imported when a function is called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, GRID_FROM_EGO_AXES
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_targets.common.paths import local_path
from occfeat_targets.common.plural import count

__all__ = ["GRID_FROM_CAMERA_AXES", "GRID_FROM_EGO_AXES", "VoxelGrid", "build_cache", "voxelize"]

Frames = Literal["ego", "cameras", "both"]
TeacherDtype = Literal["auto", "float32", "bfloat16"]
Dynamic = Literal["carve", "boxes", "smear"]
OnError = Literal["fail", "skip", "mask-camera"]


def build_cache(
    dataroot: str | Path,
    cache: str | Path,
    split: str,
    *,
    source: str = "nuscenes",
    version: str | None = None,
    scenes: Sequence[str] | None = None,
    grid: VoxelGrid = VoxelGrid(),  # noqa: B008, a frozen value
    frames: Frames = "ego",
    sweeps: int = 1,
    dynamic: Dynamic | None = None,
    image_size: tuple[int, int] = STUDENT_SIZE,
    teacher: str | None = "facebook/dinov2-small",
    teacher_layer: str = "post-norm",
    teacher_dtype: TeacherDtype = "auto",
    teacher_batch: int | None = None,
    feature_size: tuple[int, int] | None = None,
    feature_dtype: str = "float16",
    label_kinds: Sequence[str] | None = None,
    dividers: str = "road",
    compat: str | None = None,
    instances: bool = False,
    points: bool = False,
    rays: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    plan_only: bool = False,
    shard_size: int = 16,
    on_error: OnError = "fail",
    overwrite: bool = False,
    retry_skipped: bool = False,
    device: str = "auto",
    log: Callable[[str], None] | None = print,
    progress: bool = True,
) -> Path:
    """Build the cache of a split, or continue it, as 'occfeat-targets build' does; returns its path, CACHE/SPLIT.zarr.

    Options and defaults are the command's; environment variables are not read. What differs from the command:
    grid: its --grid and --range. teacher: None for none. label_kinds: some of "vehicles" and "map", () for none
    (--no-labels), None for what the data set has. shard: (k, n), k from 0; of an array job the cache is finished when all its tasks are. plan_only: only create the cache and its plan, for
    such tasks.
    workers: local processes, by default one a core, on GPUs at most 16 a GPU and no more than its memory holds; 0 for this
    process alone. In a script, call with workers only under
    `if __name__ == "__main__":`, since new processes import the script.
    scheduler: address of an existing Dask cluster. scheduler_file: the file that 'dask scheduler --scheduler-file' wrote, instead.
    log: gets what the command prints, line by line; None for silence. progress: show a progress bar.

    Raises ValueError or OSError, saying what to do: on options that don't fit, a data set or teacher that is not there, a
    cache of other options, and shards that failed; finished shards stay, and the same call continues.
    """
    dataroot, cache = _local("dataroot", dataroot), _local("cache", cache)
    _require(isinstance(split, str), f"split={split!r}: its name expected, such as 'train'")
    _require_grid(grid)
    numbers = {"workers": workers, "teacher_batch": teacher_batch, "sweeps": sweeps, "shard_size": shard_size}
    for name, number in numbers.items():
        _require(number is None or isinstance(number, Integral), f"{name}={number!r}: a whole number expected")
    for name, size in {"image_size": image_size, "feature_size": feature_size}.items():
        _require(size is None or _is_pair(size), f"{name}={size!r}: (height, width) [px] expected, such as (270, 480)")
    _require(frames in get_args(Frames), f"frames={frames!r}: one of {', '.join(get_args(Frames))} expected")
    _require(
        dynamic is None or dynamic in get_args(Dynamic),
        f"dynamic={dynamic!r}: one of {', '.join(get_args(Dynamic))} expected, or None",
    )
    _require(on_error in get_args(OnError), f"on_error={on_error!r}: one of {', '.join(get_args(OnError))} expected")
    dtypes = get_args(TeacherDtype)
    _require(teacher_dtype in dtypes, f"teacher_dtype={teacher_dtype!r}: one of {', '.join(dtypes)} expected")
    _require(
        label_kinds is None or (_is_list_of_names(label_kinds) and set(label_kinds) <= set(LABEL_KINDS)),
        f"label_kinds={label_kinds!r}: a list of some of {', '.join(LABEL_KINDS)} expected",
    )
    _require(scenes is None or _is_list_of_names(scenes), f"scenes={scenes!r}: a list of names expected")
    _require(workers is None or workers >= 0, f"workers={workers}: at least 0 expected")
    _require(teacher_batch is None or teacher_batch >= 1, f"teacher_batch={teacher_batch}: at least 1 expected")
    _require(
        shard is None or (_is_pair(shard) and 0 <= shard[0] < shard[1]),
        f"shard={shard!r}: (k, n) with 0 <= k < n expected",
    )
    ways = plan_only + sum(x is not None for x in (workers, scheduler, scheduler_file, shard))
    _require(ways <= 1, "workers, scheduler, scheduler_file, shard and plan_only are ways to run a build: choose one")
    _require(not (overwrite and shard), "overwrite and shard: each task would delete what the others have built")

    from occfeat_targets.build.cluster import read_scheduler_file
    from occfeat_targets.build.options import BuildOptions
    from occfeat_targets.build.plan import make_plan
    from occfeat_targets.build.run import run
    from occfeat_targets.build.workers import choose_workers, find_build_devices
    from occfeat_targets.cache.overwrite import replaced
    from occfeat_targets.messages import describe_outcome, describe_plan, describe_tasks

    def write(line: str) -> None:
        if log is not None:
            log(line)

    if scheduler_file is not None:
        scheduler = read_scheduler_file(_local("scheduler_file", scheduler_file))
    started = time.monotonic()
    options = BuildOptions(
        dataroot=dataroot, cache=cache, split=split, source=source, version=version,
        scenes=None if scenes is None else tuple(scenes), grid=grid, frames=frames, num_sweeps=sweeps,
        dynamic=dynamic, image_size=image_size, teacher=None if teacher == "none" else teacher, teacher_layer=teacher_layer,
        teacher_dtype=teacher_dtype, feature_size=feature_size, feature_dtype=feature_dtype,
        labels=None if label_kinds is None else tuple(label_kinds), dividers=dividers, compat=compat,
        instances=instances, points=points, rays=rays, keyframes_per_shard=shard_size, on_error=on_error, shard=shard, plan_only=plan_only, retry_skipped=retry_skipped, device=device,
        keyframes_per_batch=teacher_batch,
    )  # fmt: skip
    devices = find_build_devices(options, scheduler)
    with replaced(options.path, overwrite):
        plan = make_plan(options, scheduler=scheduler, print_line=write)
    chosen = choose_workers(plan, devices, workers=workers, scheduler=scheduler)
    for line in describe_plan(plan, chosen):
        write(line)
    if plan_only:
        write(describe_tasks(plan))
        return plan.cache.path
    outcome = run(plan, chosen, print_line=write, progress=progress)
    for line in describe_outcome(plan, outcome, time.monotonic() - started):
        write(line)
    if outcome.failed:
        first, error = next(iter(outcome.failed.items()))
        raise ValueError(
            f"{count(len(outcome.failed), 'shard')} of {plan.cache.path} failed (shard {first}: {error}); finished ones are intact. Mend "
            "the cause, or pass on_error='mask-camera' or 'skip', and call again: it continues"
        )
    return plan.cache.path


def voxelize(
    points: ArrayLike,
    grid: VoxelGrid = VoxelGrid(),  # noqa: B008, a frozen value
    *,
    grid_from_points: NDArray[Any] | None = None,
    ego_box: float = 0.0,
) -> NDArray[np.bool_]:
    """Voxels that hold at least one point (paper 3.2), as a bool volume (Z, H, W) = (up, forward, right).

    points: (n, 3 or more), taken as float32, with x, y, z [m] first, such as the (n, 5) of a nuScenes sweep; other columns
    are ignored. A point with a NaN lies in no voxel.
    grid_from_points: (4, 4) from the points' frame to the grid's (right, forward, up) [m]; points are in the grid's by
    default. For points in the ego frame it is GRID_FROM_EGO_AXES, with the grid's origin 0.5 m above the ego's.
    ego_box: points with abs(x) and abs(y) below it [m], in their own frame, are dropped; a build uses 2.2 with a sweep in
    the sensor's frame, for the vehicle's own returns.

    Index 0 is the lowest, rearmost, leftmost cell, and cells are half-open; float32 decides where a point lies within
    0.1 mm of a border. Raises ValueError on other shapes and on what holds no numbers, such as paths.
    """
    from occfeat_targets.targets.occupancy import voxelize as voxelize_packed

    _require_grid(grid)
    returns = _numbers("points", points, np.float32)
    transform = np.eye(4) if grid_from_points is None else _numbers("grid_from_points", grid_from_points, np.float64)
    if transform.shape != (4, 4):
        raise ValueError(f"grid_from_points of shape {transform.shape}: expected (4, 4)")
    return grid.unpack_volume(voxelize_packed(returns, transform, grid, ego_box=ego_box))


def _require(is_met: bool, message: str) -> None:
    if not is_met:
        raise ValueError(message)


def _local(name: str, path: Any) -> Path:
    _require(isinstance(path, str | os.PathLike), f"{name}={path!r}: one string or Path expected")
    try:
        return local_path(path)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err


def _require_grid(grid: Any) -> None:
    _require(
        isinstance(grid, VoxelGrid),
        f"grid={grid!r}: an occfeat_targets.VoxelGrid expected, such as VoxelGrid((8, 200, 200))",
    )


def _is_pair(value: Any) -> bool:
    return np.shape(value) == (2,) and all(isinstance(n, Integral) for n in value)


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(v, str) for v in value)


def _numbers(name: str, value: ArrayLike, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """An array, or a tensor on the CPU, as an array of numbers. ValueError if it is neither."""
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError, RuntimeError) as err:
        raise ValueError(
            f"{name} of type {type(value).__name__} cannot be read as an array of numbers ({err}): expected a NumPy array; "
            "read a file into one, and pass a tensor as tensor.detach().cpu().numpy()"
        ) from err
