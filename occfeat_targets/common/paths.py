"""Paths that users give: absolute, and on a file system of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

# A path with a Windows drive has one letter. Path("s3://bucket") has only one slash.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path, absolute. Worker processes on a cluster may have another working directory.

    Symbolic links are kept. Raises ValueError if it is a URL.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise ValueError(
            f"{text} is a URL, and only paths on a local or mounted file system are supported: mount it, or copy it, and pass that path"
        )
    return Path(text).absolute()
