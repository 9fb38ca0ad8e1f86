"""The command occfeat-targets build."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from occfeat_targets.cache.corruption import LOST_VIEWS, CorruptionSpec, wanted_corruptions
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.common.command_line import examples
from occfeat_targets.common.terminal import echo
from occfeat_targets.corruption_options import corruption_options, require_fitting_options
from occfeat_targets.options import EXIT_INCOMPLETE, build_options, parse_label_kinds, reports_errors

if TYPE_CHECKING:  # heavy libraries are imported when a build begins
    from occfeat_targets.build.options import BuildOptions
    from occfeat_targets.build.plan import Plan

EXIT_INTERRUPTED = 130


@click.command(
    short_help="Build the cache of a split, or continue to build it.",
    epilog=examples(
        "occfeat-targets build --dataroot data/nuscenes --cache cache --split train",
        "occfeat-targets build --split mini_train --teacher dinov2-small  # a local folder, without internet",
        "occfeat-targets build --split val --teacher none --frames cameras",
        "occfeat-targets build --split train --plan-only  # then, as an array job:",
        "occfeat-targets build --split train --shard $SLURM_ARRAY_TASK_ID/20",
        "occfeat-targets build --split val --corruption fog --severity 2  # into CACHE/corruptions/fog-2, when val is built",
    ),
)
@build_options
@corruption_options
@reports_errors
def build(
    source: str, dataroot: Path, cache: Path, split: str, version: str | None, scenes: str | None, grid_shape: tuple[int, int, int],
    grid_range: tuple[float, ...], frames: str, sweeps: int, dynamic: str | None, image_size: tuple[int, int], teacher: str,
    teacher_layer: str, teacher_dtype: str, teacher_batch: int | None, feature_size: tuple[int, int] | None,
    feature_dtype: str, label_kinds: str | None, no_labels: bool, dividers: str, compat: str | None, instances: bool, points: bool, rays: bool, workers: int | None,
    scheduler: str | None, scheduler_file: Path | None, shard: tuple[int, int] | None, plan_only: bool, shard_size: int, on_error: str,
    overwrite: bool, retry_skipped: bool, device: str, **corrupting: Any,
) -> None:  # fmt: skip
    """Build the cache of a split. If the build is killed, the same command resumes it."""
    from occfeat_targets.build.cluster import read_scheduler_file
    from occfeat_targets.build.options import BuildOptions
    from occfeat_targets.build.plan import make_plan
    from occfeat_targets.build.workers import find_build_devices
    from occfeat_targets.sources.scenes import parse_scenes

    if plan_only + sum(x is not None for x in (workers, scheduler, scheduler_file, shard)) > 1:
        raise click.UsageError(
            "--workers, --scheduler, --scheduler-file, --shard and --plan-only are ways to run a build: choose one of them"
        )
    if overwrite and shard is not None:
        raise click.UsageError(
            "--overwrite and --shard: each task would delete what the others have built; delete the cache first"
        )
    if scheduler_file is not None:
        scheduler = read_scheduler_file(scheduler_file)
    if no_labels and label_kinds is not None:
        raise click.UsageError("--label-kinds and --no-labels contradict each other: pass one of them")
    require_fitting_options(click.get_current_context(), corrupting["corruption"])
    options = BuildOptions(
        dataroot=dataroot, cache=cache, split=split, source=source, version=version,
        scenes=None if scenes is None else parse_scenes(scenes),
        grid=VoxelGrid(grid_shape, grid_range[0::2], grid_range[1::2]),  # type: ignore[arg-type]
        frames=frames, num_sweeps=sweeps, dynamic=dynamic, image_size=image_size, teacher=None if teacher == "none" else teacher,
        teacher_layer=teacher_layer, teacher_dtype=teacher_dtype, feature_size=feature_size,
        feature_dtype=feature_dtype, labels=() if no_labels else parse_label_kinds(label_kinds), dividers=dividers,
        compat=compat, instances=instances, points=points, rays=rays, keyframes_per_shard=shard_size, on_error=on_error, shard=shard, plan_only=plan_only, retry_skipped=retry_skipped,
        device=device, keyframes_per_batch=teacher_batch,
    )  # fmt: skip
    if corrupting["corruption"] is not None:
        code = _build_corrupted(options, workers, scheduler, overwrite, **corrupting)
    else:
        devices = find_build_devices(options, scheduler)
        code = _build(
            options, devices, workers, scheduler, overwrite,
            lambda: make_plan(options, scheduler=scheduler, print_line=echo),
        )  # fmt: skip
    if code:
        sys.exit(code)


def _build(
    options: BuildOptions,
    devices: tuple[str, ...],
    workers: int | None,
    scheduler: str | None,
    overwrite: bool,
    make_plan: Callable[[], Plan],
) -> int:
    """Plan and build one cache. Returns the exit code."""
    from occfeat_targets.build.run import run
    from occfeat_targets.build.workers import choose_workers
    from occfeat_targets.cache.overwrite import replaced
    from occfeat_targets.messages import describe_outcome, describe_plan, describe_tasks

    started = time.monotonic()
    try:
        with replaced(options.path, overwrite):
            plan = make_plan()
        chosen = choose_workers(plan, devices, workers=workers, scheduler=scheduler)
        echo("\n".join(describe_plan(plan, chosen)))
        if options.plan_only:
            echo(describe_tasks(plan))
            return 0
        outcome = run(plan, chosen, print_line=echo)
    except KeyboardInterrupt:
        echo(
            f"interrupted: finished shards are kept; run the same command again{' without --overwrite' * overwrite} to continue",
            err=True,
        )
        return EXIT_INTERRUPTED
    echo("\n".join(describe_outcome(plan, outcome, time.monotonic() - started)))
    if outcome.failed:
        return 1
    return 0 if plan.is_whole else EXIT_INCOMPLETE


def _build_corrupted(
    options: BuildOptions,
    workers: int | None,
    scheduler: str | None,
    overwrite: bool,
    *,
    corruption: str,
    severity: int | None,
    corruption_seed: int,
    corrupt_at: str,
    nuscenes_c: Path | None,
    mask_lost: bool,
) -> int:
    """Build one corrupted cache after the other, until one fails. Returns the exit code.

    options: of the clean cache; without --dataroot, its images are where it was built from.
    """
    from occfeat_targets.build.corrupted_plan import make_corrupted_plan, open_clean
    from occfeat_targets.messages import describe_corrupted
    from occfeat_targets.targets.corrupted_views import downloaded_folder

    clean = open_clean(options.path)
    if click.get_current_context().get_parameter_source("dataroot") is ParameterSource.DEFAULT:
        options = replace(options, dataroot=Path(clean.provenance["dataroot"]))
    protocol = "downloaded" if nuscenes_c is not None else corrupt_at
    specs = [
        CorruptionSpec(name, level, corruption_seed, protocol, mask_lost and name in LOST_VIEWS)
        for name, level in wanted_corruptions(corruption, severity)
    ]
    if mask_lost and not any(spec.masks_lost for spec in specs):
        raise click.UsageError(f"--mask-lost is for {' and '.join(LOST_VIEWS)}: leave it out")
    if nuscenes_c is not None:  # before hours of work
        for spec in specs:
            downloaded_folder(nuscenes_c, spec)
    if len(specs) > 1:
        echo(describe_corrupted(clean, options.cache, specs, workers))
    code = 0
    for number, spec in enumerate(specs, 1):
        echo(f"[{number}/{len(specs)}] {spec.describe()}")
        one = replace(options, cache=options.cache / spec.folder, teacher=None)
        made = _build(
            one, ("cpu",), workers, scheduler, overwrite, partial(make_corrupted_plan, one, clean, spec, nuscenes_c)
        )
        if made not in (0, EXIT_INCOMPLETE):
            return made
        code = max(code, made)
    return code
