"""A cache on disk: writing and reading shards, and the records of finished shards. opening.py opens one.

There is one Zarr v3 group per split, ``<cache>/<split>.zarr``. Every array is split into the same shards of K keyframes, and
one task writes one shard of every array, so that no two writers share a file and no locks are needed. A shard is finished
when ``progress/<number>.json`` exists. It is written last, atomically, with the SHA-256 of every file of the shard
and the CRC-32C of every keyframe's chunk. A shard is first written to ``progress/<number>.draft`` (drafts.py).

``progress/created.json`` holds the SHA-256 of every metadata file, and each shard's record holds the SHA-256 of
``created.json``. Edited metadata, and records of another cache or shard, are therefore detected.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from occfeat_targets.cache.drafts import PROGRESS, Draft
from occfeat_targets.cache.records import (
    CacheError,
    digest,
    is_partial,
    read_record,
    sync_and_digest,
    write_record,
    writing,
)
from occfeat_targets.cache.shards import chunk_checksums, shard_file, shard_name
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.common.plural import count

CREATED = "created"


@dataclass(frozen=True)
class Identity:
    """Identity of the keyframes, in the split's order. tokens, scenes: (N,) strings; timestamps_us: (N,) int64."""

    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    timestamps_us: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Cache:
    """An existing cache.

    provenance: package versions, data set, simulated parts; not part of the fingerprint.
    metadata: SHA-256 of ``created.json``, which covers all metadata; also in every shard's record.
    """

    path: Path
    spec: TargetSpec
    identity: Identity
    keyframes_per_shard: int
    provenance: Mapping[str, Any]
    metadata: str = ""

    def __len__(self) -> int:
        return len(self.identity)

    @property
    def num_shards(self) -> int:
        return -(-len(self) // self.keyframes_per_shard)

    def shard_range(self, shard: int) -> range:
        """Indices of the shard's keyframes."""
        start = shard * self.keyframes_per_shard
        return range(start, min(start + self.keyframes_per_shard, len(self)))

    @property
    def simulated(self) -> list[str]:
        """Phrases for the parts of this cache that are not real; empty for real data with a real teacher."""
        return list(self.provenance.get("simulated", []))

    @property
    def warnings(self) -> list[str]:
        """A line to print wherever this cache is used if a part of it is not real."""
        return [f"SIMULATED: {' and '.join(self.simulated)}"] if self.simulated else []

    def finished_shards(self, among: Collection[int] | None = None) -> dict[int, dict[str, Any]]:
        """{shard: its record}, of all or some shards. Raises CacheError on an invalid record; see shard_record."""
        return {shard: self.shard_record(shard) for shard in self.recorded_shards() if among is None or shard in among}

    def require_files(self, names: Collection[str] | None = None, among: Collection[int] | None = None) -> None:
        """Raises CacheError if finished shards lost files of these arrays. Default: of any array and any shard."""
        arrays = [array for array in self.spec.arrays() if names is None or array.name in names]
        shards = [shard for shard in self.recorded_shards() if among is None or shard in among]
        files = [shard_name(array, shard) for shard in shards for array in arrays]
        lost = [name for name in files if not os.path.exists(f"{self.path}/{name}")]
        if lost:
            shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            raise CacheError(
                f"{self.path} lost {count(len(lost), 'file')} of finished shards ({shown}): restore them, or delete these shards' "
                f"records in {self._progress} and run the build again; 'occfeat-targets verify' lists all"
            )

    def recorded_shards(self) -> list[int]:
        """Shards with a record, valid or not."""
        names = {p.name for p in self._progress.iterdir()}
        return [shard for shard in range(self.num_shards) if self._record_path(shard).name in names]

    def shard_record(self, shard: int) -> dict[str, Any]:
        """The record written by write_shard. Raises CacheError if it is damaged or belongs to another shard or cache."""
        file = self._record_path(shard)
        record = read_record(file)
        found = {**record, **{name: sorted(record.get(name, ())) for name in ("files", "chunks")}}
        files = sorted(shard_name(array, shard) for array in self.spec.arrays())
        chunks = sorted(array.name for array in self.spec.arrays() if array.per_keyframe)
        for name, expected in {**self._record_head(shard), "files": files, "chunks": chunks}.items():
            if found.get(name) != expected:
                raise CacheError(
                    f"{file} is not the record of this shard: its {name} is {found.get(name)}, {expected} expected. If all "
                    "records are refused, the cache's metadata were edited: restore them. Otherwise delete this record and "
                    "run the build again: it rebuilds that shard"
                )
        return record

    def _record_head(self, shard: int) -> dict[str, Any]:
        """The fields that tie a record to its shard and its cache."""
        rows = self.shard_range(shard)
        return {"shard": shard, "keyframes": [rows.start, rows.stop], "metadata": self.metadata}

    def failed_shards(self) -> dict[int, dict[str, Any]]:
        """{shard: why its last attempt failed}."""
        return {int(p.name.split(".")[0]): read_record(p) for p in sorted(self._progress.glob("*.failed.json"))}

    def pending_shards(self) -> list[int]:
        finished = self.finished_shards()
        return [shard for shard in range(self.num_shards) if shard not in finished]

    @property
    def _progress(self) -> Path:
        return self.path / PROGRESS

    def _record_path(self, shard: int) -> Path:
        return self._progress / f"{shard:05d}.json"

    def write_shard(self, shard: int, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any]) -> None:
        """Write one shard of every array, flush it, and then replace the earlier version of the shard, if any.

        arrays: {name: (keyframes of the shard, ...)} for every array of the spec. notes: stored in the record, such as
        skipped {sample token: reason} and masked {sample token: {camera: reason}}.
        Raises CacheError if the disk is full or not writable; then an earlier version of the shard stays with its record.
        """
        keyframes = self.shard_range(shard)
        span = slice(keyframes.start, keyframes.stop)
        for array in self.spec.arrays():  # check everything before the first write
            expected = (len(keyframes), *array.shape)
            values = arrays[array.name]
            assert values.shape == expected and values.dtype == array.dtype, (array.name, values.shape, values.dtype)
        what = f"shard {shard} (keyframes {span.start}..{span.stop - 1}) of {self.path}"
        with writing(what, "another process may build it, too; let one finish, then run the same command again"):
            self._settle_draft(shard)
            draft = self._draft(shard)
            files, chunks = {}, {}
            try:
                for array in self.spec.arrays():
                    (draft.folder / array.name).mkdir(parents=True)
                    shutil.copy(self.path / array.name / "zarr.json", draft.folder / array.name)
                    # Write zero chunks, too: a missing chunk must always mean "never written".
                    with zarr.config.set({"array.write_empty_chunks": True}):
                        writable = zarr.open_array(draft.folder / array.name, mode="r+")
                    writable[span] = arrays[array.name]
                    file = shard_file(draft.folder, array, shard)
                    files[shard_name(array, shard)] = sync_and_digest(file)
                    if array.per_keyframe:
                        chunks[array.name] = chunk_checksums(file, self.keyframes_per_shard)[: len(keyframes)]
                record = {
                    **self._record_head(shard),
                    "files": files,
                    "chunks": chunks,
                    "skipped": {},
                    "masked": {},
                    **notes,
                }
                draft.complete(record)
            except BaseException:
                draft.remove()
                raise
            self._settle_draft(shard)

    def settle_drafts(self, shards: Collection[int]) -> None:
        """Move the complete drafts of these shards into the arrays, and remove what else a killed build left of them.

        If this is killed, the next call continues. Only the process that builds these shards may call it.
        """
        for path in list(self._progress.iterdir()):
            number = path.name.lstrip(".").partition(".")[0]
            if number.isdecimal() and int(number) in shards:
                if path == self._draft(int(number)).folder:
                    self._settle_draft(int(number))
                elif is_partial(path.name):
                    path.unlink(missing_ok=True)

    def _settle_draft(self, shard: int) -> None:
        draft = self._draft(shard)
        if draft.is_complete:
            self._failed_path(shard).unlink(missing_ok=True)
            draft.move(self._record_path(shard))
        draft.remove()

    def read_shard(self, shard: int, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """{name: (keyframes of the shard, ...)} of some or all arrays. Raises CacheError if the shard is not finished or was changed."""
        keyframes, files = self.shard_range(shard), self.shard_record(shard)["files"]
        arrays = [array for array in self.spec.arrays() if names is None or array.name in names]
        for name in (shard_name(array, shard) for array in arrays):
            if not (self.path / name).is_file() or digest(self.path / name) != files[name]:
                raise CacheError(
                    f"{self.path / name} is missing or was changed after it was written: delete "
                    f"{self._record_path(shard)} and run the build again: it rebuilds that shard"
                )
        opened = {array.name: zarr.open_array(self.path / array.name, mode="r") for array in arrays}
        return {name: np.asarray(array[keyframes.start : keyframes.stop]) for name, array in opened.items()}

    def _draft(self, shard: int) -> Draft:
        return Draft(self._progress / f"{shard:05d}.draft", self.path)

    def _failed_path(self, shard: int) -> Path:
        return self._progress / f"{shard:05d}.failed.json"

    def record_failure(self, shard: int, error: str) -> None:
        """Record why a shard failed, for `status`. The next successful build of the shard removes the record."""
        with writing(f"the failure of shard {shard}"):
            write_record(self._failed_path(shard), {"shard": shard, "error": error})


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether no keyframe of a finished shard was skipped and no camera masked."""
    return not (record["skipped"] or record["masked"])
