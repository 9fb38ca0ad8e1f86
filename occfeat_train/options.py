"""Options of the command line that several commands share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from occfeat_targets.common import command_line
from occfeat_targets.common.command_line import LocalPath, names_of, options
from occfeat_train.config import LIFTINGS, Backbone

reports_errors = command_line.reports_errors("train")
PATH = LocalPath(path_type=Path)
DIRECTORY = LocalPath(path_type=Path, file_okay=False)
COUNT = click.IntRange(1)
NETWORK = names_of(LIFTINGS)
BACKBONE = click.Choice(get_args(Backbone))


def numbers(
    kind: type[int] | type[float], example: str, length: int | None = None
) -> Callable[[str], tuple[float, ...]]:
    """The type of an option that takes numbers joined by commas. length: how many are expected; None for any."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or len(found) != (length or len(found)) or not all(map(math.isfinite, found)):
            amount = "" if length is None else f"{length} "
            raise click.BadParameter(f"{text!r}: {amount}numbers joined by commas expected, such as {example}")
        return found

    return parse


NUMBERS = numbers(int, "0,5,9")
POINT = numbers(float, "0,12,-0.4", length=3)
cache_option = click.option(
    "--cache", type=DIRECTORY, default=Path("cache"), envvar="OCCFEAT_CACHE", show_envvar=True,
    help="Directory of the caches; a split is in CACHE/SPLIT.zarr.",
)  # fmt: skip


class WholePath(LocalPath):
    """A path of an option that may be repeated: its environment variable holds one, which may contain a colon."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


caches_option = click.option(
    "--cache", "caches", type=WholePath(path_type=Path, file_okay=False), default=(Path("cache"),), envvar="OCCFEAT_CACHE",
    multiple=True, show_envvar=True,
    help="Directory of the caches; a split is in CACHE/SPLIT.zarr. A pretraining takes several: --cache A --cache B mixes "
    "their keyframes, and --validate is a split of the first.",
)  # fmt: skip


def initial_option(help: str) -> Callable[..., Any]:
    return options(
        click.option("--from", "initial", type=PATH, metavar="RUN", help=f"{help}  [default: none]"),
        click.option("--allow-unfinished", is_flag=True, help="Let --from be a run whose training has not finished."),
    )


set_option = functools.partial(click.option, "--set", "overrides", multiple=True, metavar="KEY=VALUE")
DEVICE_OPTION = click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
UPSAMPLING_OPTION = click.option(
    "--allow-upsampling", is_flag=True, help="Let a cache's images be enlarged if they are smaller than the network's. Otherwise that is an error."
)  # fmt: skip
PROGRESS_OPTION = click.option(
    "--progress/--no-progress", default=True, help="Progress bars; a line a minute if stderr is no terminal."
)
machine_options = options(
    DEVICE_OPTION,
    click.option(
        "--loader-threads",
        "workers",
        type=COUNT,
        metavar="N",
        default=4,
        help="Threads that load batches ahead.",
    ),
    PROGRESS_OPTION,
)
training_options = options(
    click.option("--split", default="train", metavar="SPLIT", help="Split to train on."),
    click.option("--out", type=DIRECTORY, help="Run directory; a run in it is continued.  [default: runs/NAME, after the preset and --from]"),
    click.option("--overwrite", is_flag=True, help="Delete the run in --out and start again, instead of continuing it."),
    set_option(help="Change a field of the config; 'config show' lists them."),
    click.option("--network", type=NETWORK, help="Lifting from image features to the BEV grid.  [default: the preset's, simplebev]"),
    click.option("--backbone", type=BACKBONE, help="Backbone of image encoder and decoder.  [default: the preset's, efficientnet-b0]"),
    click.option("--backbone-weights", metavar="WEIGHTS", help="Initial weights of the backbone: a hub id, a local folder, a file of torchvision, timm or MoCo, or none (from scratch).  [default: the preset's, trained on ImageNet]"),
    click.option("--epochs", type=float, metavar="N", help="Number of epochs.  [default: the preset's]"),
    click.option("--batch", type=COUNT, metavar="N", help="Samples per forward pass, over all ranks.  [default: the preset's]"),
    click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of the initial weights, the sample order and the augmentation.  [default: the preset's, 0]"),
    UPSAMPLING_OPTION,
    click.option("--compile/--no-compile", default=None, help="Compile image encoder and decoder with torch.compile.  [default: in runs of at least 20,000 steps on a GPU]"),
    click.option("--validate", metavar="SPLIT", help="Evaluate this split at every checkpoint, and keep the best.  [default: none]"),
    click.option("--save-every", type=click.IntRange(0), metavar="N", default=0, show_default=False, help="Steps between checkpoints.  [default: an epoch]"),
    click.option("--tensorboard/--no-tensorboard", default=True, help="Write RUN/tensorboard in addition to RUN/log.jsonl."),
)  # fmt: skip
