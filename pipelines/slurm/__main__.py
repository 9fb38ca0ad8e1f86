"""One command as batch jobs of Slurm: python -m pipelines.slurm NAME [--site FILE] [--print] -- PACKAGE COMMAND [OPTIONS]."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import click

from occfeat_targets.common.command_line import SETTINGS, examples
from occfeat_targets.common.suggest import did_you_mean
from occfeat_targets.options import DIRECTORY
from pipelines.slurm.options import print_option, site_option, submit_steps
from pipelines.steps import Kind, Step

KINDS: dict[str, Kind] = {
    "build": "build", "pretrain": "train", "finetune": "train", "evaluate": "evaluate", "figures": "evaluate",
}  # fmt: skip


@click.command(
    context_settings=SETTINGS,
    epilog=examples(
        "python -m pipelines.slurm targets -- occfeat_targets build --split train",
        "python -m pipelines.slurm pretraining --site site.toml -- occfeat_train pretrain --no-progress",
    ),
)
@click.argument("name")
@click.argument("command", nargs=-1, required=True)
@click.option(
    "--out",
    type=DIRECTORY,
    default=Path(),
    show_default=False,
    help="Scripts and logs are in OUT/slurm.  [default: this directory]",
)
@site_option
@print_option
def main(name: str, command: tuple[str, ...], out: Path, site: Path | None, print_only: bool) -> None:
    """Submit one command as the job NAME: a build as an array of shards, a training that is requeued at its time limit."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise click.UsageError(f"NAME is {name!r}: letters, digits and ._- are expected, because it names files")
    if len(command) < 2 or command[0] not in ("occfeat_targets", "occfeat_train"):
        raise click.UsageError(f"{' '.join(command)!r}: occfeat_targets or occfeat_train and its command are expected")
    known = resolve_name(f"{command[0]}.cli:main").commands
    if command[1] not in known:
        raise click.UsageError(
            f"{command[0]} has no command {command[1]!r}{did_you_mean(command[1], known) or ':'} one of {', '.join(known)} expected"
        )
    step = Step(name, (command,), out / "slurm" / f"{name}.done", KINDS.get(command[1], "cpu"))
    if step.is_finished:
        raise click.ClickException(
            f"{name} has finished, {step.done} exists: pass another NAME, or delete this file to run it again"
        )
    submit_steps([step], out, site, print_only=print_only)


if __name__ == "__main__":
    main(prog_name="python -m pipelines.slurm")
