"""Kills and errors at a chosen file-system operation of a function, and names that a loss of power could lose."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}  # rename includes replace
_WRITES = os.O_WRONLY | os.O_RDWR


def interrupted_at(number: int, function: Callable[[], object], *, error: OSError | None = None) -> bool:
    """Call a function in a fork of this process, and SIGKILL the fork just before its number-th file-system operation.

    Operations are those of any thread that change files, counted from 1; writing to an open file is part of opening it. error:
    raise it instead, at this operation and all later ones that write. Returns false if the function has fewer operations.
    The function must not raise anything but ValueError and OSError.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _run(number, function, error, write)
    os.close(write)
    with open(read, "rb") as pipe:
        output = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1, -signal.SIGKILL), output.decode()
    return status != 0


def unflushed_renames(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a function renamed and kept without a later flush of the folder that holds the new name."""
    kept: list[Path] = []
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        folder = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        kept[:] = [path for path in kept if path.parent != folder]
        fsync(descriptor)

    def noting(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: str, target: str, **options: Any) -> None:
            rename(source, target, **options)
            kept.append(Path(target))

        return renamed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        for name in ("rename", "replace"):
            patch.setattr(os, name, noting(getattr(os, name)))
        function()
    return [str(path) for path in kept if path.exists()]


def _can_be_made(folder: str | os.PathLike[str]) -> bool:
    return not os.path.exists(folder) and os.path.isdir(os.path.dirname(folder))


def _run(number: int, function: Callable[[], object], error: OSError | None, pipe: int) -> None:
    count = itertools.count(1)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and arguments[2] & _WRITES and not str(arguments[0]).startswith("/dev/")
        if not (is_write or event in _CHANGES) or (event == "os.mkdir" and not _can_be_made(arguments[0])):
            return
        this = next(count)
        if this == number and error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if error is not None and (this == number or (this > number and (is_write or event in ("os.mkdir", "os.link")))):
            raise error

    code = 2
    try:
        sys.addaudithook(on_event)  # for the rest of the fork
        function()
        code = 0
    except (ValueError, OSError):
        code = 1
    except BaseException:
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(code)
