"""Progress: a bar on a terminal, and one line a minute elsewhere, such as in the log file of a cluster job."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0
_LINE = "{desc}{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(
    total: int,
    *,
    unit: str,
    desc: str | None = None,
    initial: int = 0,
    unit_scale: bool = False,
    leave: bool = True,
    disable: bool = False,
) -> Any:
    """A context manager with `update(n)`, `set_postfix_str` and `external_write_mode`: a bar of tqdm, or `ProgressLines`.

    leave: a bar stays on the terminal when it is closed.
    """
    if disable or sys.stderr.isatty():
        return tqdm(
            total=total, unit=unit, desc=desc, initial=initial, unit_scale=unit_scale, leave=leave, disable=disable,
            dynamic_ncols=True,
        )  # fmt: skip
    return ProgressLines(total, unit=unit, desc=desc, initial=initial, unit_scale=unit_scale)


class ProgressLines:
    """What a bar shows, as a line on stderr every minute and at the end."""

    def __init__(self, total: int, *, unit: str, desc: str | None, initial: int, unit_scale: bool) -> None:
        self._fixed = {
            "total": total,
            "unit": unit,
            "prefix": f"{desc}: " if desc else "",
            "initial": initial,
            "unit_scale": unit_scale,
        }
        self._done = initial
        self._printed: int | None = None
        self._postfix = ""
        self._started = self._printed_at = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self._postfix = text

    def external_write_mode(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        if self._done != self._printed:
            self._print()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _print(self) -> None:
        self._printed, self._printed_at = self._done, time.monotonic()
        elapsed = self._printed_at - self._started
        line = tqdm.format_meter(
            self._done, elapsed=elapsed, bar_format=_LINE, postfix=self._postfix or None, **self._fixed
        )
        print(line, file=sys.stderr, flush=True)
