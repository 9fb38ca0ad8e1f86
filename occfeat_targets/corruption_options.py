"""Options of 'occfeat-targets build' that make corrupted caches of a clean one."""

from __future__ import annotations

import click
from click.core import ParameterSource

from occfeat_targets.cache.corruption import CORRUPTIONS
from occfeat_targets.common.command_line import options
from occfeat_targets.options import DIRECTORY

corruption_options = options(
    click.option(
        "--corruption",
        metavar="NAME",
        type=click.Choice([*CORRUPTIONS, "all"]),
        help=f"Make corrupted caches of the finished cache in CACHE/SPLIT.zarr, for evaluations: its images corrupted as in nuScenes-C, "
        f"everything else copied, into CACHE/corruptions/NAME-SEVERITY. One of {', '.join(CORRUPTIONS)}; or all.  [default: none]",
    ),
    click.option(
        "--severity",
        type=click.IntRange(1, 3),
        metavar="N",
        help="1 (easy), 2 (mid) or 3 (hard) of --corruption.  [default: all three]",
    ),
    click.option(
        "--corruption-seed",
        type=click.IntRange(0),
        metavar="N",
        default=0,
        help="Seed of --corruption; the images also depend on their file names.",
    ),
    click.option(
        "--corrupt-at",
        type=click.Choice(["native", "network"]),
        default="native",
        help="native: corrupt the full image, write it as JPEG, then resize, as published; network: corrupt the resized image.",
    ),
    click.option(
        "--nuscenes-c",
        type=DIRECTORY,
        metavar="DIR",
        help="Read the images of --corruption from a downloaded nuScenes-C: DIR/Fog/mid/CAMERA/FILE.jpg.  [default: make them]",
    ),
    click.option(
        "--mask-lost",
        is_flag=True,
        help="Mask views that camera-crash and frame-lost lose, so that networks leave them out. Otherwise they are black, as published.",
    ),
)
# Options that say which cache is made and where it runs. All others are those of the clean cache.
_WITH_CORRUPTION = {
    "cache", "dataroot", "overwrite", "plan_only", "scheduler", "scheduler_file", "shard", "split", "workers",
}  # fmt: skip
_OF_CORRUPTION = {"severity", "corruption_seed", "corrupt_at", "nuscenes_c", "mask_lost"}


def require_fitting_options(context: click.Context, corruption: str | None) -> None:
    """Raises UsageError on options that --corruption does not use, or that need it."""
    given = [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    for parameter in given:
        option, name = max(parameter.opts, key=len), parameter.name
        if corruption is None and name in _OF_CORRUPTION:
            raise click.UsageError(f"{option} is an option of --corruption: pass both, or leave it out")
        if corruption is not None and name not in _WITH_CORRUPTION | _OF_CORRUPTION | {"corruption"}:
            raise click.UsageError(f"{option} is that of the clean cache: leave it out with --corruption")
    names = {parameter.name for parameter in given}
    if "nuscenes_c" in names and (other := names & {"corrupt_at", "corruption_seed"}):
        raise click.UsageError(
            f"--{other.pop().replace('_', '-')} is for images that are made: leave it out with --nuscenes-c"
        )
