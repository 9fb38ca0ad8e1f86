"""The command line: occfeat-targets synth, build, status, info, verify, preview.

Exit codes: 0 success; 1 error, or a failed build or verification; 2 wrong usage; 3, of build and status:
keyframes were skipped or cameras masked; 3, of status and verify: the cache is sound, but shards are missing.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.common.command_line import LocalPath, names_of
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from occfeat_targets.options import ShardOf, Size, cache_options, dataroot_option, reports_errors
from occfeat_targets.sources.source import SOURCES

EXIT_INCOMPLETE = 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="occfeat")
def main() -> None:
    """Build and inspect caches of OccFeat targets from a data set: occupancy, teacher features, images, labels."""


@main.command()
@click.option("--out", type=LocalPath(path_type=Path), required=True, help="New directory for the data set.")
@click.option("--scenes", default=2, show_default=True, help="Training scenes.")
@click.option("--val-scenes", default=0, show_default=True, help="Validation scenes, in another town.")
@click.option("--keyframes", default=10, show_default=True, help="Keyframes per scene, at 2 Hz.")
@click.option("--image-size", type=Size("HEIGHTxWIDTH"), default="900x1600", show_default=True)
@click.option("--sweeps", default=10, show_default=True, help="LiDAR sweeps per keyframe, at up to 20 Hz.")
@click.option(
    "--version", default=None, help="v1.0-mini or v1.0-trainval. By default v1.0-mini if it has enough scene names."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=None, type=int, help="Threads; one per core by default.")
@reports_errors
def synth(out: Path, scenes: int, val_scenes: int, keyframes: int, image_size: tuple[int, int], sweeps: int,
          version: str | None, seed: int, workers: int | None) -> None:  # fmt: skip
    """Write a licence-free synthetic city as a nuScenes data set."""
    from occfeat_targets.synth import write_city

    write_city(
        out, scenes=scenes, val_scenes=val_scenes, keyframes=keyframes, image_size=image_size,
        sweeps_per_keyframe=sweeps, version=version, seed=seed, workers=workers,
    )  # fmt: skip


@main.command()
@click.option("--source", type=names_of(SOURCES), default="nuscenes", show_default=True, help="Kind of data set.")
@dataroot_option
@cache_options
@click.option("--version", default=None, help="v1.0-trainval, v1.0-mini, ...; derived from the split by default.")
@click.option(
    "--scenes",
    default=None,
    metavar="A,B,...",
    help="Build only these scenes: names, or a file with one name per line.",
)
@click.option("--grid", "grid_shape", type=Size("ZxHxW"), default="8x200x200", show_default=True,
              help="Number of voxels up, forward, right.")  # fmt: skip
@click.option("--range", "grid_range", type=float, nargs=6, default=(-5, 5, -50, 50, -50, 50), show_default=True,
              metavar="U0 U1 F0 F1 R0 R1", help="Bounds [m] up, forward, right, relative to the origin.")  # fmt: skip
@click.option("--frames", type=click.Choice(["ego", "cameras", "both"]), default="ego", show_default=True,
              help="Reference frames with a grid: ego, each camera (Simple-BEV's protocol), or both.")  # fmt: skip
@click.option("--sweeps", default=1, show_default=True, help="LiDAR sweeps in the occupancy, including the keyframe's.")
@click.option(
    "--image-size", type=Size("HEIGHTxWIDTH"), default="270x480", show_default=True, help="Size of the student images."
)
@click.option("--teacher", default="facebook/dinov2-small", show_default=True,
              help="Hub id or folder of a DINOv2, DINOv3, RADIO or SigLIP model, random:ID for random weights, or none.")  # fmt: skip
@click.option("--teacher-layer", type=click.Choice(["post-norm", "pre-norm"]), default="post-norm", show_default=True)
@click.option("--teacher-dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="auto: bfloat16 where the hardware supports it natively.")  # fmt: skip
@click.option(
    "--teacher-batch",
    type=click.IntRange(1),
    default=None,
    help="Keyframes per batch.  [default: 1 on a CPU; on a GPU 8, or fewer if its free memory is short]",
)
@click.option("--feature-size", type=Size("HEIGHTxWIDTH"), default=None,
              help="Teacher input, multiples of the patch size; the largest within 224x400 by default.")  # fmt: skip
@click.option("--feature-dtype", type=click.Choice(["float16", "int8"]), default="float16", show_default=True)
@click.option(
    "--label-kinds", default=None, help=f"Some of {','.join(LABEL_KINDS)}; all that the data set has by default."
)
@click.option("--no-labels", is_flag=True, help="Build no label arrays.")
@click.option("--dividers", type=click.Choice(["road", "road+lane"]), default="road", show_default=True,
              help="Map layers used for the divider class.")  # fmt: skip
@click.option(
    "--compat", type=click.Choice(["simple-bev"]), default=None, help="Draw vehicle labels as Simple-BEV does."
)
@click.option("--points", is_flag=True, help="Also store the LiDAR returns of each keyframe.")
@click.option("--workers", type=click.IntRange(0), default=None,
              help="Local worker processes; 0 builds in this process.  [default: one per core; on GPUs at most 16 per GPU, and no "
              "more than its free memory holds]")  # fmt: skip
@click.option("--scheduler", default=None, metavar="TCP://...", help="Address of an existing Dask cluster.")
@click.option(
    "--scheduler-file",
    type=LocalPath(path_type=Path),
    default=None,
    help="File that 'dask scheduler --scheduler-file' wrote, instead of the address.",
)
@click.option(
    "--shard", type=ShardOf(), default=None, help="Build every N-th shard, starting with the K-th, in this process."
)
@click.option("--shard-size", type=click.IntRange(1), default=16, show_default=True, help="Keyframes per shard.")
@click.option("--on-error", type=click.Choice(["fail", "skip", "mask-camera"]), default="fail", show_default=True,
              help="If a keyframe cannot be built: stop; mask it; or mask only its unusable cameras. The last two record it and exit with 3.")  # fmt: skip
@click.option(
    "--retry-skipped",
    is_flag=True,
    help="Rebuild skipped keyframes, and those with masked cameras, of finished shards.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device of the teacher: auto, cpu, cuda, cuda:1. With cuda, local workers are spread over all GPUs; with cuda:1 "
    "they use only this GPU.",
)
@reports_errors
def build(
    source: str, dataroot: Path, cache: Path, split: str, version: str | None, scenes: str | None, grid_shape: tuple[int, int, int],
    grid_range: tuple[float, ...], frames: str, sweeps: int, image_size: tuple[int, int], teacher: str,
    teacher_layer: str, teacher_dtype: str, teacher_batch: int | None, feature_size: tuple[int, int] | None,
    feature_dtype: str, label_kinds: str | None, no_labels: bool, dividers: str, compat: str | None, points: bool, workers: int | None,
    scheduler: str | None, scheduler_file: Path | None, shard: tuple[int, int] | None, shard_size: int, on_error: str, retry_skipped: bool,
    device: str,
) -> None:  # fmt: skip
    """Build the cache of a split. If the build is killed, the same command resumes it."""
    from occfeat_targets.build.cluster import read_scheduler_file
    from occfeat_targets.build.plan import BuildOptions, make_plan
    from occfeat_targets.build.run import run
    from occfeat_targets.build.workers import choose_workers, find_build_devices
    from occfeat_targets.cache.store import is_whole
    from occfeat_targets.messages import describe_outcome, describe_plan
    from occfeat_targets.sources.scenes import parse_scenes

    if sum(x is not None for x in (workers, scheduler, scheduler_file, shard)) > 1:
        raise click.UsageError(
            "--workers, --scheduler, --scheduler-file and --shard are ways to run a build: choose one of them"
        )
    if scheduler_file is not None:
        scheduler = read_scheduler_file(scheduler_file)
    if no_labels and label_kinds is not None:
        raise click.UsageError("--label-kinds and --no-labels contradict each other: pass one of them")
    started = time.monotonic()
    options = BuildOptions(
        dataroot=dataroot, cache=cache, split=split, source=source, version=version,
        scenes=None if scenes is None else parse_scenes(scenes),
        grid=VoxelGrid(grid_shape, grid_range[0::2], grid_range[1::2]),  # type: ignore[arg-type]
        frames=frames, num_sweeps=sweeps, image_size=image_size, teacher=None if teacher == "none" else teacher,
        teacher_layer=teacher_layer, teacher_dtype=teacher_dtype, feature_size=feature_size,
        feature_dtype=feature_dtype, labels=() if no_labels else _label_kinds(label_kinds), dividers=dividers,
        compat=compat, points=points, keyframes_per_shard=shard_size, on_error=on_error, shard=shard, retry_skipped=retry_skipped,
        device=device, keyframes_per_batch=teacher_batch,
    )  # fmt: skip
    devices = find_build_devices(options, scheduler)
    weights = "" if teacher == "none" else f" and the weights of {teacher}"
    echo(f"reading the tables of {dataroot}{weights} ...")
    plan = make_plan(options)
    chosen = choose_workers(plan, devices, workers=workers, scheduler=scheduler)
    echo("\n".join(describe_plan(plan, chosen)))
    outcome = run(plan, chosen, print_line=echo)
    echo("\n".join(describe_outcome(plan, outcome, time.monotonic() - started)))
    if outcome.failed:
        sys.exit(1)
    if not all(is_whole(record) for record in plan.cache.finished_shards().values()):
        sys.exit(EXIT_INCOMPLETE)


def _label_kinds(labels: str | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    kinds = tuple(kind.strip() for kind in labels.split(","))
    if not set(kinds) <= set(LABEL_KINDS):
        raise click.UsageError(
            f"--label-kinds {labels}: one or more of {','.join(LABEL_KINDS)} expected, joined by commas"
        )
    return kinds


def _open(cache: Path, split: str) -> Any:
    from occfeat_targets.cache.store import open_cache

    return open_cache(cache / f"{split}.zarr")


@main.command()
@cache_options
@reports_errors
def status(cache: Path, split: str) -> None:
    """List the finished, failed, skipped and missing parts of a cache. Exits with 3 unless it is complete."""
    from occfeat_targets.messages import describe_status, is_complete

    opened = _open(cache, split)
    echo("\n".join(describe_status(opened)))
    opened.require_files()
    if not is_complete(opened):
        sys.exit(EXIT_INCOMPLETE)


@main.command()
@cache_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reports_errors
def info(cache: Path, split: str, as_json: bool) -> None:
    """Print the contents of a cache, its options and its source."""
    from occfeat_targets.messages import describe_info, info_as_json

    opened = _open(cache, split)
    echo(info_as_json(opened) if as_json else "\n".join(describe_info(opened)))
    opened.require_files()


@main.command()
@cache_options
@click.option("--dataroot", type=LocalPath(path_type=Path), default=None, envvar="NUSCENES_ROOT",
              help="The data set; the one the cache was built from by default.")  # fmt: skip
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True,
              help="Random keyframes to recompute from the data set by independent code; 0: checksums only.")  # fmt: skip
@click.option("--seed", default=None, type=int, help="Seed of the random choice of keyframes; random by default.")
@reports_errors
def verify(cache: Path, split: str, dataroot: Path | None, samples: int, seed: int | None) -> None:
    """Check all checksums of a cache, and recompute random keyframes from the data set."""
    from occfeat_targets.messages import describe_skipped
    from occfeat_targets.verify.verify import verify_checksums, verify_source

    opened = _open(cache, split)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    findings = [verify_checksums(opened)]
    echo("\n".join([*findings[0].notes, *findings[0].problems]))
    if samples and not findings[0].problems:
        source = dataroot or Path(opened.provenance["dataroot"])
        if not source.is_dir():
            raise ValueError(
                f"there is no data set at {source}: pass --dataroot, or --samples 0 to check checksums only"
            )
        findings.append(verify_source(opened, source, samples, seed, echo))
    for line in opened.warnings:
        echo(line)
    problems = [problem for found in findings for problem in found.problems]
    if problems:
        for problem in findings[1].problems if len(findings) > 1 else []:
            echo(problem)
        echo(f"{count(len(problems), 'problem')} found", err=True)
        sys.exit(1)
    pending, skipped = opened.pending_shards(), describe_skipped(opened)
    without = f"; {skipped}" if skipped else ""
    if pending:
        echo(f"sound so far: {len(pending)} of {opened.num_shards} shards are not built yet{without}")
        sys.exit(EXIT_INCOMPLETE)
    echo(f"{opened.path} is sound{without}")


@main.command()
@cache_options
@click.option("--out", type=LocalPath(path_type=Path), default=Path("preview"), show_default=True)
@click.option(
    "--keyframes",
    "numbers",
    default=None,
    metavar="0,5,9",
    help="Keyframes to draw, by number.  [default: evenly spread]",
)
@click.option("--token", "tokens", multiple=True, help="A keyframe to draw, by its sample token; may be repeated.")
@click.option(
    "--samples", type=click.IntRange(1), default=4, show_default=True, help="Number of evenly spread keyframes to draw."
)
@click.option("--frame", default=None, help="Reference frame of the grid; the cache's first by default.")
@click.option("--points", is_flag=True, help="Also draw the LiDAR returns, from the cache or the data set.")
@click.option("--dataroot", type=LocalPath(path_type=Path), default=None, envvar="NUSCENES_ROOT",
              help="The data set; the one the cache was built from by default.")  # fmt: skip
@reports_errors
def preview(cache: Path, split: str, out: Path, frame: str | None, points: bool, dataroot: Path | None,
            **choice: Any) -> None:  # fmt: skip
    """Draw keyframes as PNGs and an index.html: voxels in the images, features, bird's-eye occupancy and labels."""
    from occfeat_targets.pictures.page import choose_keyframes, write_preview

    opened = _open(cache, split)
    chosen = choose_keyframes(opened, **choice)
    echo(f"written to {write_preview(opened, out, chosen, frame=frame, points=points, dataroot=dataroot)}")
