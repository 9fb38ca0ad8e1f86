"""Parts of both command lines: help in the order of work, with examples; errors as one line; paths; choices from a table."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from occfeat_targets.common.memory import describe_shortage
from occfeat_targets.common.paths import local_path
from occfeat_targets.common.terminal import echo

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
# Variables that both command lines read, for the end of their help.
VARIABLES = {
    "OCCFEAT_CACHE": "default of --cache",
    "OCCFEAT_TRACEBACK": "1 shows the Python traceback of an error",
    "HF_HOME, HF_HUB_OFFLINE": "where Hugging Face keeps models; 1 uses only those",
    "CUDA_VISIBLE_DEVICES": "the GPUs that are used",
    "NUMBA_CACHE_DIR": "where compiled functions are kept",
}


class WorkOrder(click.Group):
    """A group that lists its commands in the order of their definition, which is the order of work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def examples(*lines: str) -> str:
    """The end of a command's help: lines that can be copied."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def describe_variables(variables: Mapping[str, str]) -> str:
    """The end of a group's help: {environment variable: meaning}."""
    width = max(map(len, variables))
    return "\b\nEnvironment variables:\n" + "\n".join(f"  {name:{width}}  {text}" for name, text in variables.items())


class LocalPath(click.Path):
    """A path as `local_path` makes it: absolute, and no URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(value), param, ctx)
        except ValueError as err:
            self.fail(str(err), param, ctx)


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several decorators as one, in their order in --help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def names_of(table: dict[str, Any]) -> click.Choice[str]:
    """The name of a row of a table, which may get rows after the command was defined."""
    choice = click.Choice(list(table))
    choice.choices = table.keys()  # type: ignore[assignment]
    return choice


def reports_errors(extra: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Print errors that users can meet as one line and exit with 1; OCCFEAT_TRACEBACK=1 shows the traceback.

    extra: of the package occfeat, with which a missing package is installed.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **kwargs)
            except Exception as err:
                message = _describe(err, extra)
                if message is None or os.environ.get("OCCFEAT_TRACEBACK"):
                    raise
                echo(f"error: {message}", err=True)
                sys.exit(1)

        return wrapper

    return decorate


def _describe(err: Exception, extra: str) -> str | None:
    """A ValueError, an OSError, a missing package or too little memory; None for a fault of the program."""
    if (shortage := describe_shortage(err)) is not None:
        return f"{shortage}: end other programs, or use fewer processes, smaller batches, images or models"
    if isinstance(err, ModuleNotFoundError):
        package = (err.name or "").split(".")[0]
        own = package.startswith("occfeat_")
        return (
            None if own else f"the Python package {package} is missing: pip install -e '.[{extra}]' in the repository"
        )
    return str(err) if isinstance(err, ValueError | OSError) else None
