"""Files that are read as a whole, of which a damaged data set may have endless or huge ones."""

from __future__ import annotations

import errno
import os
import stat
import time
from io import FileIO

# Errors of network file systems that may be gone a moment later, and pauses before the file is read again [s].
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
}
_PAUSES = (1.0, 5.0)


def read_file(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file with at most `most` bytes. It is read up to three times if a network file system fails.

    A pipe would never end, and a sparse file of a terabyte takes no space on the disk. Raises ValueError on these, and OSError.
    """
    for pause in _PAUSES:
        try:
            return _read_once(path, most)
        except OSError as err:
            if err.errno not in _PASSING:
                raise
        time.sleep(pause)
    return _read_once(path, most)


def _read_once(path: str | os.PathLike[str], most: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # without waiting for a pipe's other end
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file: restore the file")
        if status.st_size > most:
            raise ValueError(f"{path} has {status.st_size:,} bytes, at most {most:,} expected: restore the file")
        return FileIO(descriptor, "rb", closefd=False).read(status.st_size)
    finally:
        os.close(descriptor)
