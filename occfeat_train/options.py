"""Options of the command line that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from occfeat_targets.common import command_line
from occfeat_targets.common.command_line import LocalPath, names_of
from occfeat_train.config import LIFTINGS, Backbone

reports_errors = command_line.reports_errors("train")
PATH = LocalPath(path_type=Path)
DIRECTORY = LocalPath(path_type=Path, file_okay=False)
NETWORK = names_of(LIFTINGS)
BACKBONE = click.Choice(get_args(Backbone))


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several decorators as one, in their order in --help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


cache_option = click.option(
    "--cache", type=DIRECTORY, default=Path("cache"), show_default=True, envvar="OCCFEAT_CACHE",
    help="Directory of the caches; a split is in CACHE/SPLIT.zarr.",
)  # fmt: skip


def initial_option(help: str) -> Callable[..., Any]:
    return options(
        click.option("--from", "initial", type=PATH, help=help),
        click.option("--allow-unfinished", is_flag=True, help="Let --from be a run whose training has not finished."),
    )


set_option = functools.partial(click.option, "--set", "overrides", multiple=True, metavar="KEY=VALUE")
machine_options = options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--loader-threads",
        "workers",
        type=click.IntRange(1),
        default=4,
        show_default=True,
        help="Threads that load batches ahead.",
    ),
    click.option(
        "--progress/--no-progress", default=True, help="Progress bars; a line a minute if stderr is no terminal."
    ),
)
training_options = options(
    click.option("--split", default="train", show_default=True, help="Split to train on."),
    click.option("--out", type=DIRECTORY, help="Run directory; a run in it is continued.  [default: runs/NAME]"),
    click.option("--overwrite", is_flag=True, help="Delete the run in --out and start again, instead of continuing it."),
    set_option(help="Change a field of the config; 'config show' lists them."),
    click.option("--network", type=NETWORK, help="Lifting from image features to the BEV grid; overrides the preset."),
    click.option("--backbone", type=BACKBONE, help="Backbone of the image encoder; overrides the preset."),
    click.option("--backbone-weights", metavar="WEIGHTS", help="Initial weights of the backbone: default, a hub id, a local folder, a MoCo .pth.tar, or none (from scratch)."),
    click.option("--epochs", type=float, help="Number of epochs; overrides the preset."),
    click.option("--batch", type=click.IntRange(1), help="Samples per forward pass, over all ranks."),
    click.option("--seed", type=click.IntRange(0), help="Seed of the initial weights, the sample order and the augmentation."),
    click.option("--compile/--no-compile", default=None, help="Compile image encoder and decoder with torch.compile; by default for long runs on a GPU."),
    click.option("--validate", metavar="SPLIT", help="Evaluate this split at every checkpoint."),
    click.option("--save-every", type=click.IntRange(0), default=0, help="Steps between checkpoints.  [default: an epoch]"),
    click.option("--tensorboard/--no-tensorboard", default=True, help="Write RUN/tensorboard in addition to RUN/log.jsonl."),
)  # fmt: skip
