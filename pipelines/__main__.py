"""The paper's tables and figures: `python -m pipelines run table3 --cache DIR --out DIR`.

`run` trains and evaluates what is missing, `status` shows what is done, `report` writes the tables. Recipes are in recipes/tables.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from occfeat_targets.build_command import EXIT_INTERRUPTED
from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from occfeat_targets.sources.nuscenes import find_dataroot
from occfeat_train.config import DEFAULT_TEACHER
from pipelines.processes import Job, run_jobs
from pipelines.recipes.data import RANDOM_TEACHER, Settings, check_caches
from pipelines.recipes.estimate import describe, estimates
from pipelines.recipes.graph import steps_of, trainings_of
from pipelines.recipes.robustness import check_corrupted_caches
from pipelines.recipes.tables import RECIPES
from pipelines.slurm.options import print_option, site_option, submit_steps
from pipelines.steps import Step

SETTINGS_FILE = "settings.json"
recipes_argument = click.argument(
    "names", nargs=-1, required=True, type=click.Choice(list(RECIPES)), metavar="RECIPE..."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("paper"), help="Directory of runs, logs and reports."
)


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run the recipes of the paper's tables and figures, and put the results beside the paper's numbers."""


@main.command(epilog=f"Recipes: {', '.join(RECIPES)}.")
@recipes_argument
@out_option
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    envvar="OCCFEAT_CACHE",
    help="Directory of caches.  [default: with --dataroot and --miniature OUT/cache]",
)
@click.option(
    "--dataroot",
    type=click.Path(path_type=Path, exists=True),
    envvar="NUSCENES_ROOT",
    help="nuScenes; missing caches are built from it.  [default: the caches are there]",
)
@click.option("--teacher", default=DEFAULT_TEACHER, help="Teacher of the builds.")
@click.option("--seeds", type=click.IntRange(1), default=1, help="Number of seeds of all trainings.")
@click.option(
    "--miniature",
    is_flag=True,
    help="SIMULATED: a small synthetic city, a teacher of random weights and tiny networks.",
)
@click.option("--dry-run", is_flag=True, help="Only print the steps with their sizes, times and disk; needs no data.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Steps at a time on this machine.")
@click.option(
    "--slurm", is_flag=True, help="Submit the steps as batch jobs of Slurm; scripts and logs are in OUT/slurm."
)
@site_option
@print_option
def run(names: tuple[str, ...], out: Path, cache: Path | None, dataroot: Path | None, teacher: str, seeds: int, miniature: bool,
        dry_run: bool, jobs: int, slurm: bool, site: Path | None, print_only: bool) -> None:  # fmt: skip
    """Run what is missing of RECIPEs. Finished steps are not repeated, and a failed step stops only those that need it."""
    if not slurm and (site is not None or print_only):
        raise click.UsageError("--site and --print are about batch jobs: add --slurm")
    recipes = [RECIPES[name] for name in names]
    if miniature:  # variables of the environment name the user's own data
        cache, dataroot = unless_from_environment("cache", cache), unless_from_environment("dataroot", dataroot)
    if dry_run and cache is None and dataroot is None and not miniature:
        dataroot = Path("nuscenes")  # no file of it is read; the builds of a first run are listed, too
    settings = make_settings(out, cache, dataroot, teacher, seeds, miniature=miniature)
    require_same_settings(settings)
    steps = steps_of(recipes, settings)
    if miniature:
        echo(
            "SIMULATED: a synthetic city, a teacher of random weights and networks of a few channels: the numbers mean nothing"
        )
    if dry_run:
        echo("\n".join(describe(estimates(steps, recipes, settings), miniature=miniature)))
        return
    try:
        if settings.dataroot is not None and any(step.kind == "build" and not step.is_finished for step in steps):
            require_large_version(settings.dataroot)
        if settings.dataroot is None and not miniature:
            check_caches(settings, trainings_of(recipes), [each for recipe in recipes for each in recipe.drawn])
            if any(recipe.corrupted for recipe in recipes):
                check_corrupted_caches(settings)
    except ValueError as err:
        raise click.ClickException(str(err)) from err
    save_settings(settings)
    if slurm:
        submit_steps(steps, settings.out, site, print_only=print_only)
        return
    threads = 1 if miniature else max((os.cpu_count() or 1) // jobs, 1)  # tiny networks gain nothing from more
    try:
        run_steps(steps, settings.out, jobs, threads, " ".join(names))
    except KeyboardInterrupt:
        echo("interrupted: finished steps are kept; the same command continues", err=True)
        sys.exit(EXIT_INTERRUPTED)
    echo(
        f"finished: {count(len(steps), 'step')} of {', '.join(names)}; 'python -m pipelines report --out {out}' writes the tables"
    )


def run_steps(steps: Sequence[Step], out: Path, jobs: int, threads: int, title: str) -> None:
    """Run the steps that are not finished, `jobs` at a time. Raises click.ClickException that names those that failed."""
    left = [step for step in steps if not step.is_finished]
    echo(f"{len(steps) - len(left)} of {count(len(steps), 'step')} finished; logs in {out / 'logs'}")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    found = [Job(step.name, step.commands, log_file(out, step), step.after, step.done) for step in left]
    run_jobs(found, jobs, title=title, unit="step", threads=threads)


@main.command()
@recipes_argument
@out_option
def status(names: tuple[str, ...], out: Path) -> None:
    """Show which steps of RECIPEs are finished, with the settings of the last `run` in OUT."""
    settings = read_settings(out)
    steps = steps_of([RECIPES[name] for name in names], settings)
    for step in steps:
        logs = [log_file(settings.out, step), *sorted((settings.out / "slurm").glob(f"{step.name}.*.log"))]
        begun = [log for log in logs if log.exists()]
        state = "finished" if step.is_finished else f"begun, see {begun[-1]}" if begun else "not begun"
        echo(f"{step.name:100} {state}")
    echo(f"{sum(step.is_finished for step in steps)} of {count(len(steps), 'step')} finished")


@main.command()
@out_option
def report(out: Path) -> None:
    """Write the paper's Tables 1-4 and Figures 1 and 4 from the finished runs in OUT, beside the paper's numbers."""
    from pipelines.recipes.report import write_report

    write_report(read_settings(out), echo)


def require_large_version(root: Path) -> None:
    """Raises ValueError if a data set lacks nuScenes' large version, of whose splits the recipes build caches."""
    try:
        find_dataroot(root, "train", "v1.0-trainval")
    except ValueError as err:
        raise ValueError(
            f"--dataroot (or NUSCENES_ROOT) {root} holds no v1.0-trainval, of which caches are built: pass another one, or finished "
            "caches with --cache alone"
        ) from err


def unless_from_environment(option: str, value: Path | None) -> Path | None:
    """The value of an option of the current command, or None if it comes from an environment variable."""
    source = click.get_current_context().get_parameter_source(option)
    return None if source is ParameterSource.ENVIRONMENT else value


def log_file(out: Path, step: Step) -> Path:
    return out / "logs" / f"{step.name}.log"


def make_settings(
    out: Path, cache: Path | None, dataroot: Path | None, teacher: str, seeds: int, *, miniature: bool
) -> Settings:
    """Raises click.UsageError on options that exclude each other, or without any data."""
    if miniature and dataroot is not None:
        raise click.UsageError("--miniature makes its own data set: leave --dataroot out")
    if cache is None and dataroot is None and not miniature:
        raise click.UsageError("pass --cache DIR with caches, --dataroot DIR with nuScenes, or --miniature")
    out = out.resolve()
    if miniature:
        teacher = RANDOM_TEACHER
    return Settings(out, (cache or out / "cache").resolve(), dataroot and dataroot.resolve(), teacher, seeds, miniature)


def save_settings(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    write_file(settings.out / SETTINGS_FILE, json.dumps(values, indent=1).encode())


def read_settings(out: Path) -> Settings:
    """Raises click.ClickException if nothing was run in OUT."""
    file = out.resolve() / SETTINGS_FILE
    if not file.is_file():
        raise click.ClickException(f"{file} is missing: nothing was run there with 'python -m pipelines run'")
    values: dict[str, Any] = json.loads(file.read_text())
    paths = {name: Path(values[name]) for name in ("cache", "dataroot") if values[name] is not None}
    return Settings(**{**values, **paths, "out": out.resolve()})


def require_same_settings(settings: Settings) -> None:
    """Raises click.ClickException if OUT was begun with other settings: its runs would be of different data."""
    if not (settings.out / SETTINGS_FILE).is_file():
        return
    before = read_settings(settings.out)
    names = [field.name for field in fields(Settings) if field.name not in ("seeds", "dataroot")]
    changed = [f"{n}: {getattr(before, n)} there, {getattr(settings, n)} here" for n in names if getattr(before, n) != getattr(settings, n)]  # fmt: skip
    if changed:
        raise click.ClickException(
            f"{settings.out} was begun with other settings ({'; '.join(changed)}): choose another --out"
        )


if __name__ == "__main__":
    main()
