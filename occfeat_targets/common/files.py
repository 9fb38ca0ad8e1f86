"""Files that are read as a whole, of which a damaged data set may have endless or huge ones."""

from __future__ import annotations

import os
import stat
from io import FileIO


def open_file(path: str | os.PathLike[str], most: int) -> tuple[FileIO, int]:
    """(unbuffered file, its size in bytes) of a regular file with at most `most` bytes.

    A pipe would never end, and a sparse file of a terabyte takes no space on the disk. Raises ValueError on these, and OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # without waiting for a pipe's other end
    status = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    elif status.st_size > most:
        problem = f"has {status.st_size:,} bytes, at most {most:,} expected"
    if problem is not None:
        os.close(descriptor)
        raise ValueError(f"{path} {problem}: restore the file")
    return FileIO(descriptor, "rb"), status.st_size
