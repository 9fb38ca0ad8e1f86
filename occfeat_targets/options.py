"""Types of options, and options of the command line that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.common import command_line
from occfeat_targets.common.command_line import LocalPath

reports_errors = command_line.reports_errors("targets")


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


def parse_label_kinds(labels: str | None) -> tuple[str, ...] | None:
    """Kinds of labels from "a,b"; None for all that the data set has."""
    if labels is None:
        return None
    kinds = tuple(kind.strip() for kind in labels.split(","))
    if not set(kinds) <= set(LABEL_KINDS):
        raise click.UsageError(
            f"--label-kinds {labels}: one or more of {','.join(LABEL_KINDS)} expected, joined by commas"
        )
    return kinds
