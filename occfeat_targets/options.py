"""Types of options, and options of the command line that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import DYNAMIC
from occfeat_targets.common import command_line
from occfeat_targets.common.command_line import LocalPath, names_of, options
from occfeat_targets.sources.source import SOURCES

reports_errors = command_line.reports_errors("targets")
EXIT_INCOMPLETE = 3  # keyframes were skipped or cameras masked, or shards are missing
DIRECTORY = LocalPath(path_type=Path, file_okay=False)


class Size(click.ParamType[tuple[int, ...]]):
    """Numbers joined by x, such as 224x392."""

    def __init__(self, metavar: str) -> None:
        self.name = metavar

    def get_metavar(self, *_: Any, **__: Any) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(n) for n in str(value).lower().split("x"))
        except ValueError:
            numbers = ()
        if len(numbers) != self.name.count("x") + 1 or min(numbers, default=0) < 1:
            self.fail(f"{value!r} is not of the form {self.name}: whole numbers joined by x expected")
        return numbers


class ShardOf(click.ParamType[tuple[int, int]]):
    """k/n, counted from 0."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        k, _, n = str(value).partition("/")
        if not (k.isdigit() and n.isdigit() and int(k) < int(n)):
            self.fail(f"{value!r} is not K/N with 0 <= K < N, such as 0/3 for the first of three array tasks")
        return int(k), int(n)


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--split",
        metavar="SPLIT",
        required=True,
        help="Split of the data set; nuScenes has train, val, test, mini_train, mini_val.",
    )(command)
    return click.option(
        "--cache", type=DIRECTORY, default=Path("cache"), envvar="OCCFEAT_CACHE", show_envvar=True,
        help="Directory of the caches; a split is in CACHE/SPLIT.zarr.",
    )(command)  # fmt: skip


def dataroot_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--dataroot", type=DIRECTORY, default=Path("data/nuscenes"),
        envvar="NUSCENES_ROOT", show_envvar=True, help="Root directory of the data set.",
    )(command)  # fmt: skip


build_options = options(
    click.option("--source", type=names_of(SOURCES), default="nuscenes", help="Kind of data set."),
    dataroot_option,
    cache_options,
    click.option(
        "--version", metavar="VERSION", help="v1.0-trainval, v1.0-mini, ...  [default: derived from the split]"
    ),
    click.option(
        "--scenes",
        metavar="A,B,...",
        help="Build only these scenes: names, or a file with one name per line.  [default: all of the split]",
    ),
    click.option(
        "--grid", "grid_shape", type=Size("ZxHxW"), default="8x200x200", help="Number of voxels up, forward, right."
    ),
    click.option(
        "--range",
        "grid_range",
        type=float,
        nargs=6,
        default=(-5, 5, -50, 50, -50, 50),
        metavar="U0 U1 F0 F1 R0 R1",
        help="Bounds [m] up, forward, right, relative to the origin.",
    ),
    click.option(
        "--frames",
        type=click.Choice(["ego", "cameras", "both"]),
        default="ego",
        help="Reference frames with a grid: ego, each camera (Simple-BEV's protocol), or both.",
    ),
    click.option("--sweeps", metavar="N", default=1, help="LiDAR sweeps in the occupancy, including the keyframe's."),
    click.option(
        "--dynamic",
        type=click.Choice(DYNAMIC),
        help="Moving objects in earlier sweeps. carve: empty the voxels that the keyframe's own rays pass; boxes: move returns with "
        "annotated boxes, which uses labels; smear: leave them.  [default: carve]",
    ),
    click.option("--image-size", type=Size("HEIGHTxWIDTH"), default="270x480", help="Size of the student images."),
    click.option(
        "--teacher",
        metavar="MODEL",
        default="facebook/dinov2-small",
        help="Hub id or folder of a DINOv2, DINOv3, RADIO or SigLIP model, a .pth of DINOv2's torch.hub, random:ID for random weights, or none.",
    ),
    click.option(
        "--teacher-layer",
        type=click.Choice(["post-norm", "pre-norm"]),
        default="post-norm",
        help="Features after or before the teacher's final LayerNorm.",
    ),
    click.option(
        "--teacher-dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        help="auto: the existing cache's; for a new one, bfloat16 where the hardware supports it natively.",
    ),
    click.option(
        "--teacher-batch",
        type=click.IntRange(1),
        metavar="N",
        help="Keyframes per batch.  [default: 1 on a CPU; on a GPU 8, or fewer if its free memory is short]",
    ),
    click.option(
        "--feature-size",
        type=Size("HEIGHTxWIDTH"),
        help="Teacher input, multiples of the patch size.  [default: the largest within 224x400]",
    ),
    click.option(
        "--feature-dtype",
        type=click.Choice(["float16", "int8"]),
        default="float16",
        help="int8: with a scale per token, half the size.",
    ),
    click.option(
        "--label-kinds",
        metavar="A,B,...",
        help=f"Some of {','.join(LABEL_KINDS)}.  [default: all that the data set has]",
    ),
    click.option("--no-labels", is_flag=True, help="Build no label arrays."),
    click.option(
        "--dividers",
        type=click.Choice(["road", "road+lane"]),
        default="road",
        help="Map layers used for the divider class.",
    ),
    click.option(
        "--compat",
        type=click.Choice(["simple-bev"]),
        help="Draw vehicle labels as Simple-BEV does.  [default: at their true size]",
    ),
    click.option(
        "--instances",
        is_flag=True,
        help="Also store centres and offsets of single vehicles, for Simple-BEV's other heads; with --compat simple-bev.",
    ),
    click.option("--points", is_flag=True, help="Also store the LiDAR returns of each keyframe."),
    click.option("--rays", is_flag=True, help="Also store which voxels the LiDAR's rays have passed: free or unknown."),
    click.option(
        "--workers",
        type=click.IntRange(0),
        metavar="N",
        help="Local worker processes; 0 builds in this process.  [default: one per core; on GPUs at most 16 per GPU, and no "
        "more than its free memory holds]",
    ),
    click.option(
        "--scheduler",
        metavar="TCP://...",
        help="Address of an existing Dask cluster.  [default: none, --workers]",
    ),
    click.option(
        "--scheduler-file",
        type=LocalPath(path_type=Path, dir_okay=False),
        help="File that 'dask scheduler --scheduler-file' wrote, instead of the address.  [default: none]",
    ),
    click.option(
        "--shard",
        type=ShardOf(),
        help="Build every N-th shard, starting with the K-th, in this process.  [default: all]",
    ),
    click.option(
        "--plan-only",
        is_flag=True,
        help="Only create the cache and its plan, from which the tasks of an array job then build.",
    ),
    click.option("--shard-size", type=click.IntRange(1), metavar="N", default=16, help="Keyframes per shard."),
    click.option(
        "--on-error",
        type=click.Choice(["fail", "skip", "mask-camera"]),
        default="fail",
        help="If a keyframe cannot be built: stop; mask it; or mask only its unusable cameras. The last two record it and exit with 3.",
    ),
    click.option(
        "--overwrite", is_flag=True, help="Replace the cache in CACHE/SPLIT.zarr, instead of continuing its build."
    ),
    click.option(
        "--retry-skipped",
        is_flag=True,
        help="Rebuild skipped keyframes, and those with masked cameras, of finished shards.",
    ),
    click.option(
        "--device",
        metavar="DEVICE",
        default="auto",
        help="Device of the teacher: auto, cpu, cuda, cuda:1. With cuda, local workers are spread over all GPUs; with cuda:1 "
        "they use only this GPU.",
    ),
)


def parse_label_kinds(labels: str | None) -> tuple[str, ...] | None:
    """Kinds of labels from "a,b"; None for all that the data set has."""
    if labels is None:
        return None
    kinds = tuple(kind.strip() for kind in labels.split(","))
    if not set(kinds) <= set(LABEL_KINDS):
        raise click.UsageError(
            f"--label-kinds {labels}: one or more of {','.join(LABEL_KINDS)} expected, joined by commas"
        )
    return kinds
