"""Runs the command line for the tests of the build."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cli import main

COMMAND = [sys.executable, "-m", "occfeat_targets"]
# The default grid's voxel size over a quarter of its area, because verify's slow reference of the labels visits every cell.
GRID = VoxelGrid((8, 100, 100), (-5, -25, -25), (5, 25, 25))
SMALL = [
    "--grid", "8x100x100", "--range", "-5", "5", "-25", "25", "-25", "25", "--image-size", "96x160", "--feature-size", "56x98",
    "--shard-size", "2", "--teacher-dtype", "float32",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, check: bool = True) -> Result:
    """Run occfeat-targets in this process, so that a test need not import everything again."""
    invoked = CliRunner().invoke(main, [str(a) for a in arguments])
    if invoked.exception is not None and not isinstance(invoked.exception, SystemExit):
        raise invoked.exception
    result = Result(invoked.exit_code, invoked.stdout, invoked.stderr)
    if check and result.returncode != 0:
        raise AssertionError(f"exit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def run_in_subprocess(*arguments: str | Path) -> None:
    """Run occfeat-targets in a separate process; it must succeed."""
    result = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def build_arguments(city: Path, cache: Path, teacher: str, *more: str) -> list[str]:
    where = ["--dataroot", str(city), "--cache", str(cache), "--split", "mini_train"]
    return ["build", *where, "--teacher", teacher, *SMALL, *more]


def contents(cache: Path, split: str = "mini_train") -> dict[str, np.ndarray]:
    group = zarr.open_group(cache / f"{split}.zarr", mode="r")
    return {name: array[:] for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}


def assert_same_bytes(cache: Path, expected: dict[str, np.ndarray]) -> None:
    found = contents(cache)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tobytes() == values.tobytes() if values.dtype != object else (found[name] == values).all(), (
            name
        )


@contextmanager
def tmpfs(directory: Path, options: str) -> Iterator[Path]:
    """Mount a small or read-only file system; skips the test where that is not possible."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs can't be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def table(city: Path, name: str) -> list[dict]:
    return json.loads((city / "v1.0-mini" / f"{name}.json").read_text())


def write_table(city: Path, name: str, records: list[dict]) -> None:
    (city / "v1.0-mini" / f"{name}.json").write_text(json.dumps(records))
