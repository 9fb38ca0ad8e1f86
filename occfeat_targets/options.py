"""Types of options, and options of the command line that several commands share."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from occfeat_targets.cache.paths import local_path


class LocalPath(click.Path):
    """A path as `local_path` makes it: absolute, and no URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(value), param, ctx)
        except ValueError as err:
            self.fail(str(err), param, ctx)


class Size(click.ParamType[tuple[int, ...]]):
    """Numbers joined by x, such as 224x392."""

    def __init__(self, metavar: str) -> None:
        self.name = metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(n) for n in str(value).lower().split("x"))
        except ValueError:
            numbers = ()
        if len(numbers) != self.name.count("x") + 1 or min(numbers, default=0) < 1:
            self.fail(f"{value!r} is not of the form {self.name}: whole numbers joined by x expected")
        return numbers


class ShardOf(click.ParamType[tuple[int, int]]):
    """k/n, counted from 0."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        k, _, n = str(value).partition("/")
        if not (k.isdigit() and n.isdigit() and int(k) < int(n)):
            self.fail(f"{value!r} is not K/N with 0 <= K < N, such as 0/3 for the first of three array tasks")
        return int(k), int(n)


def names_of(table: dict[str, Any]) -> click.Choice[str]:
    """The name of a row of a table, which may get rows after the command was defined."""
    choice = click.Choice(list(table))
    choice.choices = table.keys()  # type: ignore[assignment]
    return choice


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print ValueError, OSError and a missing package as one line and exit with 1; OCCFEAT_TRACEBACK=1 shows the traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as err:
            message = str(err)
            if isinstance(err, ModuleNotFoundError):
                package = (err.name or "").split(".")[0]
                if package.startswith("occfeat_"):
                    raise
                message = f"the Python package {package} is missing: pip install 'occfeat[targets]'"
            if os.environ.get("OCCFEAT_TRACEBACK"):
                raise
            click.echo(f"error: {message}", err=True)
            sys.exit(1)

    return wrapper


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--split", required=True, help="Split of the data set; nuScenes has train, val, test, mini_train, mini_val."
    )(command)
    return click.option(
        "--cache", type=LocalPath(path_type=Path), default=Path("cache"), show_default=True, envvar="OCCFEAT_CACHE",
        help="Directory of the caches; a split is in CACHE/SPLIT.zarr.",
    )(command)  # fmt: skip


def dataroot_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--dataroot", type=LocalPath(path_type=Path), default=Path("data/nuscenes"), show_default=True,
        envvar="NUSCENES_ROOT", help="Root directory of the data set.",
    )(command)  # fmt: skip
