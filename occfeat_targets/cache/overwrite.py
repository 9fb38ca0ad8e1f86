"""Replacing a cache: it is deleted only when the build of the new one has been planned."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from occfeat_targets.cache.drafts import PROGRESS
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.store import CREATED


@contextlib.contextmanager
def replaced(path: Path, overwrite: bool) -> Iterator[None]:
    """With `overwrite`, rename a cache while the new one is planned; then delete it, or restore it if an error is raised.

    Raises CacheError, and changes nothing, if something is there and it is no cache. If the process is killed, the old cache is
    at PATH.replaced, and the next call deletes it.
    """
    if not overwrite:
        yield
        return
    aside = path.with_name(f"{path.name}.replaced")
    if path.exists():
        if not _is_cache(path):
            raise CacheError(
                f"{path} is no cache of occfeat-targets, so --overwrite deletes nothing: choose another --cache"
            )
        _delete(aside)
        path.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            _delete(path)
            aside.rename(path)
        raise
    _delete(aside)


def _is_cache(path: Path) -> bool:
    """Whether its attributes are a cache's, or its record of creation is there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return "occfeat" in json.loads((path / "zarr.json").read_text())["attributes"]
    return (path / PROGRESS / f"{CREATED}.json").is_file()


def _delete(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
