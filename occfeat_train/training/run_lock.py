"""The lock of a run directory: one training at a time writes to it.

RUN/lock is locked with flock, which the system releases when the process ends, however it ends, also on another host of a
shared file system. It names host and process, and is deleted at the end. One that is found unlocked was left by a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from occfeat_train.distributed import Process, prepare_together
from occfeat_train.training.saving import CheckpointError, saving

LOCK = "lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked_run(run: Path, process: Process) -> Iterator[None]:
    """Hold the lock of a run directory, which is created if necessary. Rank 0 holds it for all ranks.

    Prints who left a lock behind. Raises CheckpointError, on every rank, if another training holds it.
    """
    descriptor = prepare_together(lambda: _acquire(run / LOCK, process) if process.is_main else None)
    try:
        yield
    finally:
        if descriptor is not None:
            if _is_open_file(descriptor, run / LOCK):
                (run / LOCK).unlink()
            os.close(descriptor)


def _acquire(file: Path, process: Process) -> int:
    """The descriptor of the locked file."""
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with saving(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_locked = _lock(descriptor, file)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_open_file(descriptor, file):
            break
        os.close(descriptor)  # its holder ended and deleted it in the meantime
    left = _owner(descriptor)
    if not is_locked:
        named = f" ({file} names {left})" if left else ""
        process.print(
            f"{file.parent} is on a file system without locks: make sure that no other training writes to it{named}"
        )
    elif left:
        process.print(f"{file} was left by {left}, which no longer runs")
    try:
        with saving(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, file: Path) -> bool:
    """False on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise CheckpointError(
            f"{file.parent} is in use by {_owner(descriptor) or 'another process'}: wait for it or stop it, or choose another "
            "--out; several processes train together only under torchrun"
        ) from err
    except OSError as err:
        if err.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip()


def _is_open_file(descriptor: int, file: Path) -> bool:
    """Whether the file of this name is the open one."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
