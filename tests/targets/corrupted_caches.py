"""A small clean cache, and corrupted caches of it."""

from __future__ import annotations

from pathlib import Path

from tests.targets.command_line import run

SPLIT = "mini_val"


def build_clean(city: Path, cache: Path) -> list[object]:
    where = ["--dataroot", city, "--cache", cache, "--split", SPLIT]
    grid = ["--grid", "8x24x24", "--range", "-5", "5", "-6", "6", "-6", "6"]  # verify's slow labels visit every cell
    return [
        "build",
        *where,
        "--teacher",
        "none",
        "--workers",
        "0",
        *grid,
        "--image-size",
        "96x160",
        "--shard-size",
        "2",
    ]


def make(cache: Path, name: str, severity: int, *more: object, check: bool = True):
    where = ["--cache", cache, "--split", SPLIT, "--workers", "0"]
    return run("build", *where, "--corruption", name, "--severity", str(severity), *more, check=check)
