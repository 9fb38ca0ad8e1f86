"""The command occfeat-targets probe."""

from __future__ import annotations

import json
from pathlib import Path

import click

from occfeat_targets.common.command_line import LocalPath, examples
from occfeat_targets.common.terminal import echo
from occfeat_targets.options import cache_options, reports_errors


@click.command(
    short_help="Test how well features separate the classes of labels.",
    epilog=examples(
        "occfeat-targets probe --split train",
        "occfeat-targets probe --split train --test-split val --samples 300 --json probe.json",
    ),
)
@cache_options
@click.option(
    "--test-split",
    metavar="SPLIT",
    help="Split that the probes are tested on.  [default: half of the scenes of --split]",
)
@click.option(
    "--samples", type=click.IntRange(1), metavar="N", default=100, help="Largest number of keyframes of each half."
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0), default=0, help="Seed of the choice of scenes, keyframes and voxels."
)
@click.option("--frame", metavar="FRAME", help="Reference frame of the grid.  [default: the cache's first]")
@click.option(
    "--json",
    "file",
    type=LocalPath(path_type=Path, dir_okay=False),
    help="File for the result as JSON.  [default: none]",
)
@reports_errors
def probe(
    cache: Path, split: str, test_split: str | None, samples: int, seed: int, frame: str | None, file: Path | None
) -> None:
    """Test how well the teacher's features separate the classes of the labels, before a pretraining on them.

    For each class, a linear probe (ridge regression) is fitted to the target features of occupied voxels that a camera sees,
    and tested on other scenes. The result is the area under the ROC curve: 0.5 for a random order of the voxels, 1 if all of
    the class come first. The same is done with the voxels' colours, and with their heights and distances.

    Labels are bird's-eye cells and have no height: every occupied voxel above a cell has its classes. A treetop above the road is
    road, and all voxels in a vehicle's cells are vehicle. Cells that are not valid are left out.
    """
    from occfeat_targets.cache.reader import CacheReader
    from occfeat_targets.cache.records import write_file, writing
    from occfeat_targets.probe.probe import probe_cache
    from occfeat_targets.probe.table import describe_result

    if file is not None and not file.parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {file.parent}")
    train, *test = (
        CacheReader(cache / f"{name}.zarr", allow_incomplete=True) for name in (split, test_split) if name is not None
    )
    result = probe_cache(train, *test, samples=samples, seed=seed, frame=frame, print_line=echo)
    echo("\n".join(describe_result(result)))
    if file is not None:
        with writing(str(file)):
            write_file(file, json.dumps(result.to_dict(), indent=1).encode() + b"\n")
        echo(f"written to {file}")
