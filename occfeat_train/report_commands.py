"""The commands `occfeat-train report` and `occfeat-train figures`: pages with pictures of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from occfeat_targets.common.command_line import examples
from occfeat_train.options import (
    COUNT,
    DEVICE_OPTION,
    DIRECTORY,
    NUMBERS,
    PATH,
    POINT,
    PROGRESS_OPTION,
    cache_option,
    reports_errors,
)


@click.command(
    short_help="Write one HTML page about runs.",
    epilog=examples("occfeat-train report runs/* --out report.html"),
)
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@cache_option
@click.option("--split", metavar="SPLIT", default="val", help="Split to evaluate and to draw keyframes from.")
@click.option("--out", type=PATH, metavar="FILE", default=Path("report.html"), help="Output file.")
@click.option("--samples", type=COUNT, metavar="N", default=3, help="Number of keyframes to draw.")
@DEVICE_OPTION
@reports_errors
def report(runs: tuple[Path, ...], cache: Path, split: str, out: Path, samples: int, device: str) -> None:
    """Write one HTML file about RUNs: training curves, metrics, and predictions for a few keyframes.

    Existing results of 'evaluate' are used. Runs without results are evaluated first.
    """
    from occfeat_train.distributed import processes
    from occfeat_train.report.page import write_report

    with processes(device) as process:
        write_report(runs, cache, split, out, process, process.print, samples)


@click.command(
    short_help="Draw the features that pretraining runs predict.",
    epilog=examples(
        "occfeat-train figures runs/pretrained --split val --out figures",
        "occfeat-train figures runs/pretrained --keyframes 0,400 --fit-split train --fit-on scene-0061",
        "occfeat-train figures runs/pretrained --of vehicles --voxel 0,12,-0.4",
    ),
)
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@cache_option
@click.option("--split", metavar="SPLIT", default="val", help="Split to draw keyframes from.")
@click.option("--out", type=DIRECTORY, default=Path("figures"), help="Directory of the PNGs and of index.html.")
@click.option(
    "--keyframes",
    type=NUMBERS,
    metavar="LIST",
    help="Numbers of the keyframes to draw, joined by commas.  [default: --samples]",
)
@click.option("--samples", type=COUNT, metavar="N", default=2, help="Keyframes to draw, evenly spread over the split.")
@click.option("--fit-split", metavar="SPLIT", help="Split with the scene of --fit-on.  [default: that of --split]")
@click.option(
    "--fit-on",
    metavar="SCENE",
    help="Scene to whose predicted features the colours are fitted; its first keyframe is drawn, too.  [default: the first keyframe's, or the first of another --fit-split]",
)
@click.option(
    "--voxel",
    "voxels",
    type=POINT,
    multiple=True,
    metavar="R,F,U",
    help="Correlation map of the voxel at this point of the first keyframe drawn: metres to the right, forward and up in the grid. Repeatable.",
)
@click.option(
    "--of",
    "classes",
    multiple=True,
    metavar="CLASS",
    help="Correlation map of the mean of a class, such as vehicles or road, in the first keyframe drawn that has it. Repeatable.  [default: road and vehicles, without --voxel and where the cache has them]",
)
@click.option(
    "--rerun",
    type=PATH,
    metavar="FILE",
    help="Also record images, voxels and their colours for the viewer rerun, such as figures.rrd; needs the extra 'rerun'.  [default: none]",
)
@DEVICE_OPTION
@PROGRESS_OPTION
@reports_errors
def figures(runs: tuple[Path, ...], cache: Path, out: Path, device: str, **given: Any) -> None:
    """Draw what pretrained networks predict for voxels: features as colours, fitted to one scene and used for all (paper, Figure 5), correlation maps (Figure 6), and occupancy."""
    from occfeat_train.distributed import processes
    from occfeat_train.report.feature_page import write_figures
    from occfeat_train.report.feature_runs import FigureOptions

    with processes(device) as process:
        write_figures(runs, cache, out, FigureOptions(**given), process, process.print)
