"""The command line: occfeat-targets synth, build, status, info, verify, preview, probe.

Exit codes: 0 success; 1 error, or a failed build or verification; 2 wrong usage; 3, of build and status:
keyframes were skipped or cameras masked; 3, of status and verify: the cache is sound, but shards are missing; 130: Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from occfeat_targets.build_command import build
from occfeat_targets.common.command_line import (
    SETTINGS,
    VARIABLES,
    WorkOrder,
    describe_variables,
    examples,
)
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from occfeat_targets.options import (
    DIRECTORY,
    EXIT_INCOMPLETE,
    Size,
    cache_options,
    reports_errors,
)
from occfeat_targets.probe_command import probe

SOURCE_OPTION = click.option(
    "--dataroot",
    type=DIRECTORY,
    help="The data set, if it was moved.  [default: where the cache was built from]",
)


@click.group(
    cls=WorkOrder,
    context_settings=SETTINGS,
    epilog=describe_variables({"NUSCENES_ROOT": "default of build's --dataroot", **VARIABLES}),
)
@click.version_option(package_name="occfeat")
def main() -> None:
    """Build and inspect caches of OccFeat targets from a data set: occupancy, teacher features, images, labels.

    The commands are listed in the order of work. 'occfeat-targets COMMAND --help' shows the options, with examples.
    """


@main.command(
    short_help="Write a licence-free synthetic city to try everything with.",
    epilog=examples(
        "occfeat-targets synth --out data/city --scenes 2 --val-scenes 1 --keyframes 5 --image-size 270x480"
    ),
)
@click.option("--out", type=DIRECTORY, required=True, help="New directory for the data set.")
@click.option("--scenes", metavar="N", default=2, help="Training scenes.")
@click.option("--val-scenes", metavar="N", default=0, help="Validation scenes, in another town.")
@click.option("--keyframes", metavar="N", default=10, help="Keyframes per scene, at 2 Hz.")
@click.option("--image-size", type=Size("HEIGHTxWIDTH"), default="900x1600", help="Size of the images.")
@click.option("--sweeps", metavar="N", default=10, help="LiDAR sweeps per keyframe, at up to 20 Hz.")
@click.option(
    "--version",
    metavar="VERSION",
    help="v1.0-mini or v1.0-trainval.  [default: v1.0-mini if it has enough scene names]",
)
@click.option("--seed", metavar="N", default=0, help="Seed of the city and its traffic.")
@click.option("--workers", metavar="N", type=int, help="Threads.  [default: one per core]")
@reports_errors
def synth(out: Path, scenes: int, val_scenes: int, keyframes: int, image_size: tuple[int, int], sweeps: int,
          version: str | None, seed: int, workers: int | None) -> None:  # fmt: skip
    """Write a licence-free synthetic city as a nuScenes data set."""
    from occfeat_targets.synth import write_city

    write_city(
        out, scenes=scenes, val_scenes=val_scenes, keyframes=keyframes, image_size=image_size,
        sweeps_per_keyframe=sweeps, version=version, seed=seed, workers=workers,
    )  # fmt: skip


main.add_command(build)


def _open(cache: Path, split: str) -> Any:
    from occfeat_targets.cache.opening import open_cache

    return open_cache(cache / f"{split}.zarr")


@main.command(
    short_help="List finished, failed, skipped and missing parts of a cache.",
    epilog=examples("occfeat-targets status --cache cache --split train"),
)
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


@main.command(
    short_help="Print the contents of a cache, its options and its source.",
    epilog=examples("occfeat-targets info --split train", "occfeat-targets info --split train --json"),
)
@cache_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reports_errors
def info(cache: Path, split: str, as_json: bool) -> None:
    """Print the contents of a cache, its options and its source."""
    from occfeat_targets.messages import describe_info, info_as_json

    opened = _open(cache, split)
    echo(info_as_json(opened) if as_json else "\n".join(describe_info(opened)))
    opened.require_files()


@main.command(
    short_help="Check the checksums of a cache, and recompute random keyframes.",
    epilog=examples(
        "occfeat-targets verify --split train", "occfeat-targets verify --split train --samples 0  # only checksums"
    ),
)
@cache_options
@SOURCE_OPTION
@click.option("--samples", type=click.IntRange(0), metavar="N", default=3,
              help="Random keyframes to recompute from the data set by independent code; 0: checksums only.")  # fmt: skip
@click.option(
    "--tables",
    is_flag=True,
    help="Read paths, transforms and boxes of these keyframes from the data set's tables, instead of the build's plan.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0), help="Seed of the random choice of keyframes.  [default: random]"
)
@reports_errors
def verify(cache: Path, split: str, dataroot: Path | None, samples: int, tables: bool, seed: int | None) -> None:
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
        findings.append(verify_source(opened, source, samples, seed, echo, tables=tables))
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


@main.command(
    short_help="Draw keyframes of a cache as PNGs and an index.html.",
    epilog=examples(
        "occfeat-targets preview --split train", "occfeat-targets preview --split train --keyframes 0,5,9 --points"
    ),
)
@cache_options
@click.option("--out", type=DIRECTORY, default=Path("preview"), help="Directory of the pictures.")
@click.option(
    "--keyframes",
    "numbers",
    metavar="0,5,9",
    help="Keyframes to draw, by number.  [default: evenly spread]",
)
@click.option(
    "--token",
    "tokens",
    metavar="TOKEN",
    multiple=True,
    help="A keyframe to draw, by its sample token; may be repeated.",
)
@click.option(
    "--samples", type=click.IntRange(1), metavar="N", default=4, help="Number of evenly spread keyframes to draw."
)
@click.option("--frame", metavar="FRAME", help="Reference frame of the grid.  [default: the cache's first]")
@click.option("--points", is_flag=True, help="Also draw the LiDAR returns, from the cache or the data set.")
@SOURCE_OPTION
@reports_errors
def preview(cache: Path, split: str, out: Path, frame: str | None, points: bool, dataroot: Path | None,
            **choice: Any) -> None:  # fmt: skip
    """Draw keyframes as PNGs and an index.html: voxels in the images, features, bird's-eye occupancy and labels."""
    from occfeat_targets.pictures.page import choose_keyframes, write_preview

    opened = _open(cache, split)
    chosen = choose_keyframes(opened, **choice)
    echo(f"written to {write_preview(opened, out, chosen, frame=frame, points=points, dataroot=dataroot)}")


main.add_command(probe)
