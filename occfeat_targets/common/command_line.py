"""Parts of both command lines: errors as one line, paths, and choices from a table."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from occfeat_targets.common.paths import local_path
from occfeat_targets.common.terminal import echo


class LocalPath(click.Path):
    """A path as `local_path` makes it: absolute, and no URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(value), param, ctx)
        except ValueError as err:
            self.fail(str(err), param, ctx)


def names_of(table: dict[str, Any]) -> click.Choice[str]:
    """The name of a row of a table, which may get rows after the command was defined."""
    choice = click.Choice(list(table))
    choice.choices = table.keys()  # type: ignore[assignment]
    return choice


def reports_errors(extra: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Print ValueError, OSError and a missing package as one line and exit with 1; OCCFEAT_TRACEBACK=1 shows the traceback.

    extra: of the package occfeat, with which a missing package is installed.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
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
                    message = f"the Python package {package} is missing: pip install 'occfeat[{extra}]'"
                if os.environ.get("OCCFEAT_TRACEBACK"):
                    raise
                echo(f"error: {message}", err=True)
                sys.exit(1)

        return wrapper

    return decorate
