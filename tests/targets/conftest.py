"""The reference build, and a city and tables that a test may damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.sources.source import SOURCES
from tests.targets.command_line import build_arguments, contents, run
from tests.targets.toy_source import write_toy


@pytest.fixture(scope="session")
def serial(city: Path, tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted serial build, which all other builds are compared with."""
    cache = tmp_path_factory.mktemp("serial")
    run(*build_arguments(city, cache, tiny_teacher, "--workers", "0", "--frames", "both"))
    return cache


@pytest.fixture(scope="session")
def expected(serial: Path) -> dict[str, np.ndarray]:
    return contents(serial)


@pytest.fixture
def broken_city(city, tmp_path) -> Path:
    """A copy of the city whose files a test may damage."""
    return Path(shutil.copytree(city, tmp_path / "city"))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataroot of the toy source, which is in the table of sources during the test."""
    monkeypatch.setitem(SOURCES, "toy", "tests.targets.toy_source:ToySource")
    return write_toy(tmp_path / "toy")


@pytest.fixture
def changed(city, tmp_path):
    """Function that changes the list of records of a table of a copy; it returns the copy's dataroot."""

    def change(table: str, function):
        shutil.copytree(city, tmp_path, ignore=shutil.ignore_patterns("samples", "sweeps"), dirs_exist_ok=True)
        file = tmp_path / "v1.0-mini" / f"{table}.json"
        records = json.loads(file.read_text())
        function(records)
        file.write_text(json.dumps(records))
        return tmp_path

    return change


@pytest.fixture
def without_key(changed):
    """Function that removes a key from every record of a table of a copy; it returns the copy's dataroot."""

    def remove(table: str, key: str):
        return changed(table, lambda records: [record.pop(key, None) for record in records])

    return remove
