"""Options of commands that submit batch jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from occfeat_targets.common.command_line import LocalPath
from pipelines.slurm.site import read_site
from pipelines.slurm.submit import run_on_slurm
from pipelines.steps import Step

site_option = click.option(
    "--site",
    type=LocalPath(path_type=Path, exists=True, dir_okay=False),
    help="What jobs ask of the cluster: a TOML file like pipelines/slurm/site.toml.  [default: the values there, without partition and account]",
)
print_option = click.option(
    "--print", "print_only", is_flag=True, help="Write and print the scripts of the batch jobs, and submit nothing."
)


def submit_steps(steps: Sequence[Step], out: Path, site: Path | None, *, print_only: bool) -> None:
    """`run_on_slurm` with the values of these options. Raises click.ClickException instead of ValueError."""
    try:
        run_on_slurm(steps, read_site(site), out, print_only=print_only)
    except ValueError as err:
        raise click.ClickException(str(err)) from err
