"""Search for a damaged table of nuScenes, after the devkit failed to load the tables."""

from __future__ import annotations

import json
from pathlib import Path

# The tables that the devkit loads. A data set without annotations has empty ones.
_NEVER_EMPTY = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "log", "map")
_MAY_BE_EMPTY = ("category", "attribute", "visibility", "instance", "sample_annotation")


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
