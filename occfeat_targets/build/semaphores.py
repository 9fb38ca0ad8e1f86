"""Semaphores that killed builds left in shared memory.

Python's multiprocessing, and so Dask, names a dozen of them for its worker processes, and a process of its own removes them at the end.
If that is killed with all others, as by a cluster at the time limit, they stay until the machine is started again.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_SECONDS = 600.0  # after which a process that was started with a semaphore has certainly opened it


def remove_semaphores(folder: Path = _SHARED_MEMORY) -> None:
    """Remove this user's old semaphores of multiprocessing that no process has open.

    Processes in other containers may share the folder and be invisible, but they need a name only while they start.
    """
    opened = _mapped_files()
    for file in folder.glob("sem.mp-*"):
        with contextlib.suppress(OSError):
            status = file.stat()
            is_old = time.time() - status.st_mtime > _SECONDS
            if is_old and status.st_uid == os.getuid() and str(file) not in opened:
                file.unlink()


def _mapped_files() -> set[str]:
    """Files that this user's processes have mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found |= {line.split(maxsplit=5)[-1].rstrip() for line in maps.read_text(errors="replace").splitlines()}
    return found
