"""The draft of a shard: its new files, which are moved into the cache when all of them are on disk.

Until then, an earlier version of the shard stays in place. A draft is complete when it holds the shard's record. What a killed
process leaves is either complete, and then moved by the next build, or removed by it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occfeat_targets.cache.records import is_partial, read_record, sync, write_record

PROGRESS = "progress"  # the folder of records and drafts in a cache
_RECORD = "record.json"


@dataclass(frozen=True)
class Draft:
    """folder: the draft's, with files under their names in the cache. root: the cache's folder."""

    folder: Path
    root: Path

    @property
    def is_complete(self) -> bool:
        return (self.folder / _RECORD).is_file()

    def complete(self, record: Mapping[str, Any]) -> None:
        """Write the record, with the names of all files under ``files``. They are on disk."""
        write_record(self.folder / _RECORD, record)

    def move(self, record_file: Path) -> None:
        """Move all files, and then the record to `record_file`. If this is killed, another call continues."""
        files = read_record(self.folder / _RECORD)["files"]
        if record_file.exists():  # while files of two builds are mixed, readers refuse the shard
            record_file.unlink()
            sync(record_file.parent)
        for name in files:
            if (self.folder / name).is_file():  # not yet moved
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).replace(self.root / name)
        for folder in {(self.root / name).parent for name in files}:
            sync(folder)
        (self.folder / _RECORD).replace(record_file)
        sync(record_file.parent)

    def remove(self) -> None:
        # The record first, because a draft without some of its files is not complete.
        (self.folder / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def is_draft(name: str) -> bool:
    """Whether a file (name relative to the cache) is part of a running or killed build, and not of the cache."""
    return name.startswith(f"{PROGRESS}/") and (".draft/" in name or is_partial(Path(name).name))
