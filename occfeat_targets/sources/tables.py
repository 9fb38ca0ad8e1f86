"""Records of nuScenes' tables whose lack of a key is an error with a remedy, and the search for a damaged table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from occfeat_targets.sources.keyframe import DatasetError

# The tables that the devkit loads. A data set without annotations has empty ones.
_NEVER_EMPTY = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "log", "map")
_MAY_BE_EMPTY = ("category", "attribute", "visibility", "instance", "sample_annotation")


class Record(dict[str, Any]):
    """A record of a table. place: table and token for messages. A missing key is a DatasetError that names the record."""

    def __init__(self, record: dict[str, Any], place: str) -> None:
        super().__init__(record)
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise DatasetError(f"{self.place}: the record has no key {key!r}; re-extract the tables")


def get_record(nusc: Any, table: str, token: str, file: str | None = None) -> Record:
    """A record, and for messages the file that it belongs to. Raises DatasetError if the table has none."""
    place = f"{table}.json, token {token}" + (f", of {file}" if file else "")
    try:
        return Record(nusc.get(table, token), place)
    except KeyError as err:
        raise DatasetError(f"{place}: no such record; re-extract the tables") from err


def describe_broken_table(folder: Path) -> str | None:
    """The first table that is missing, cut short, empty or no table, with what is wrong. None if all are complete.

    It reads all tables, which takes a minute for nuScenes, so it is called only after an error.
    """
    for name in (*_NEVER_EMPTY, *_MAY_BE_EMPTY):
        file = folder / f"{name}.json"
        try:
            content = file.read_bytes()
        except OSError as err:
            return f"{file.name} cannot be read ({err.strerror})"
        try:
            records = json.loads(content)
        except ValueError as err:
            return f"{file.name} ({len(content)} bytes) is no complete JSON file ({err})"
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            return f"{file.name} is no list of records"
        if not records and name in _NEVER_EMPTY:
            return f"{file.name} has no records"
    return None
