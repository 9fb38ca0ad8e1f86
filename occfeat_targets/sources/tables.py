"""nuScenes' tables: read record by record, so that only the records that a split needs are in memory.

The devkit loads all tables as they are, which takes 8.5 GB for nuScenes. Of its 2.6 million records of files, a split without
earlier sweeps needs 200,000.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from occfeat_targets.sources.keyframe import DatasetError

_BLOCK = 1 << 22  # bytes read at a time
_STRINGS = ("token", "name", "location", "channel", "filename")
_LINKS = ("next", "prev")  # null or empty at the end


class Record(dict[str, Any]):
    """A record of a table. place: table and token for messages.

    A missing key is a DatasetError that names the record; so is a name, token or time of another type.
    """

    def __init__(self, record: dict[str, Any], place: str) -> None:
        super().__init__(record)
        self.place = place

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key == "timestamp":
            expected, is_right = "a number of microseconds", isinstance(value, int | float) and abs(value) < 2**63
        elif key in _STRINGS or key.endswith("_token"):
            expected, is_right = "text", isinstance(value, str)
        elif key in _LINKS:
            expected, is_right = "text", isinstance(value, str | None)
        else:
            return value
        if not is_right:
            raise DatasetError(f"{self.place}: {key} is {value!r}: {expected} expected; re-extract the tables")
        return value

    def __missing__(self, key: str) -> Any:
        raise DatasetError(f"{self.place}: the record has no key {key!r}; re-extract the tables")


class Tables:
    """Loaded records of the tables in a folder, such as v1.0-trainval."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[str, dict[str, dict[str, Any]]] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the loaded tables."""
        return tuple(self.file(table) for table in self._records)

    def file(self, table: str) -> Path:
        return self.folder / f"{table}.json"

    def load(
        self,
        table: str,
        is_needed: Callable[[dict[str, Any]], bool] | None = None,
        fields: Collection[str] | None = None,
    ) -> None:
        """Load the records of a table that are needed, and these fields of them; all by default.

        Raises DatasetError that names the table, and the record if it lacks a key that `is_needed` asks for.
        """
        loaded = self._records[table] = {}
        with _without_collector():
            for record in read_records(self.file(table)):
                try:
                    token = record["token"]
                    if is_needed is not None and not is_needed(record):
                        continue
                    loaded[token] = record if fields is None else {key: record[key] for key in fields if key in record}
                except KeyError as err:
                    raise DatasetError(
                        f"{table}.json, token {record.get('token')}: the record has no key {err}; re-extract the tables"
                    ) from err
                except TypeError as err:  # a list or an object instead of a token
                    raise DatasetError(
                        f"{table}.json, token {record.get('token')}: {err}, text expected; re-extract the tables"
                    ) from err

    def all(self, table: str) -> Iterator[Record]:
        """The loaded records of a table, in its order."""
        return (Record(record, f"{table}.json, token {token}") for token, record in self._records[table].items())

    def has(self, table: str, token: str) -> bool:
        return token in self._records[table]

    def get(self, table: str, token: str, file: str | None = None) -> Record:
        """A loaded record. file: the file that it belongs to, for messages. Raises DatasetError if there is none."""
        place = f"{table}.json, token {token}" + (f", of {file}" if file else "")
        if not self.has(table, token):
            raise DatasetError(f"{place}: no such record; re-extract the tables")
        return Record(self._records[table][token], place)

    def follow(self, table: str, token: str, key: str) -> Iterator[Record]:
        """The record of a token, the one that it names under `key`, and so on, until none is named.

        Raises DatasetError if there is no such record, or if they go round in a circle.
        """
        seen: set[str] = set()
        while token:
            record = self.get(table, token)
            if token in seen:
                raise DatasetError(f"{record.place}: {key!r} leads back to this record; re-extract the tables")
            seen.add(token)
            yield record
            token = record[key]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Without garbage collection, which would go through all loaded records again and again: 74 instead of 44 s for nuScenes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_records(file: Path, *, may_be_empty: bool = False) -> Iterator[dict[str, Any]]:
    """The records of a table, in its order. Raises DatasetError if it is missing, cut short, empty or no table."""
    seen = False
    try:
        for records in _parts(file):
            if not all(isinstance(record, dict) for record in records):
                raise _broken(file, "is no list of records")
            seen = seen or bool(records)
            yield from records
    except OSError as err:
        raise _broken(file, f"cannot be read ({err.strerror})") from err
    if not seen and not may_be_empty:
        raise _broken(file, "has no records")


def _parts(file: Path) -> Iterator[list[Any]]:
    """A JSON list in parts.

    A part ends before the last "{" read so far. If this is not the beginning of a record, but inside of one, the part is no
    valid JSON, and more is read.
    """
    with file.open("rb") as opened:
        pending, size = opened.read(_BLOCK).lstrip(), _BLOCK
        if not pending.startswith(b"["):
            _parse(file, pending + opened.read())
            raise _broken(file, "is no list of records")
        pending = pending[1:]
        while block := opened.read(size):
            pending += block
            start = pending.rfind(b"{")
            records = pending[:start].rstrip()
            try:
                if not records.endswith(b","):
                    raise ValueError
                part = json.loads(b"[%b]" % records[:-1])
            except ValueError:
                size *= 2
                continue
            yield part
            pending, size = pending[start:], _BLOCK
        yield _parse(file, b"[" + pending)


def _parse(file: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as err:
        raise _broken(file, f"({file.stat().st_size} bytes) is no complete JSON file ({err})") from err


def _broken(file: Path, fault: str) -> DatasetError:
    return DatasetError(f"the tables of {file.parent} do not load: {file.name} {fault}: re-extract the tables")
