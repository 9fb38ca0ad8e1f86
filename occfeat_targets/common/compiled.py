"""Functions compiled by numba, without the GIL, with machine code that is kept on disk.

numba keeps it beside the module, or below the home directory. Where neither is writable, as in a read-only container without
a home, it would refuse to import the module; a temporary folder is used instead.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

logger = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.njit` with these options, nogil and cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiler = numba.njit(nogil=True, cache=True, **options)
        try:
            return compiler(function)
        except RuntimeError:  # numba found no writable folder
            _use_temporary_folder()
            return compiler(function)

    return decorate


def _use_temporary_folder() -> None:
    folder = _own_folder()
    logger.warning(
        "numba cannot write to %s, nor below the home directory, and keeps its machine code in %s: set NUMBA_CACHE_DIR to "
        "keep it elsewhere",
        Path(__file__).parent,
        folder,
    )
    # numba reads the variable when it is imported, in worker processes
    numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder)  # type: ignore[attr-defined]


def _own_folder() -> Path:
    """A temporary folder that later processes of this user find again, and that no other user can write to.

    Whoever writes to it can run code in our processes. A folder of that name that belongs to another user is not used.
    """
    if not hasattr(os, "getuid"):  # on Windows, the temporary directory is the user's own
        return Path(tempfile.gettempdir()) / "occfeat-numba"
    folder = Path(tempfile.gettempdir()) / f"occfeat-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="occfeat-numba-"))
