"""Interleaved timing for all benchmarks in this folder.

On a shared machine, absolute times drift by tens of percent; ratios hardly do. So each round runs every contender once, in a
rotating order, and ratios are medians of the ratios within rounds.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One contender: median and quartiles of its times [s]; ratios to ours and to the limit (None if there is none)."""

    name: str
    median: float
    quartiles: tuple[float, float]
    to_ours: float | None
    to_limit: float | None


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    ours: str | None = None,
    limit: str | None = None,
    seconds: float = 10.0,
    max_rounds: int = 500,
    min_rounds: int = 5,
) -> list[Row]:
    """Times all contenders, interleaved, for about `seconds` in total and at least `min_rounds` rounds.

    ours, limit: names of the contenders that ratios refer to. Each contender is called once before, so that it is compiled.
    """
    _keep_freed_memory()
    for name in (ours, limit):
        if name is not None and name not in contenders:
            raise ValueError(f"no contender {name!r} among {list(contenders)}")
    for function in contenders.values():
        function()
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < seconds):
            shift = rounds % len(names)
            for name in names[shift:] + names[:shift]:
                before = time.perf_counter()
                contenders[name]()
                times[name].append(time.perf_counter() - before)
            rounds += 1
    finally:
        if collecting:
            gc.enable()

    def ratio(name: str, base: str | None) -> float | None:
        if base is None:
            return None
        return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))

    rows = []
    for name in names:
        low, _, high = statistics.quantiles(times[name], n=4)
        rows.append(Row(name, statistics.median(times[name]), (low, high), ratio(name, ours), ratio(name, limit)))
    return rows


def _keep_freed_memory() -> None:
    """Make glibc reuse freed blocks up to 32 MiB. Does nothing with other C libraries.

    By default, glibc returns large blocks or keeps them depending on earlier frees. Whether a contender pays for the page
    faults of its result would then depend on the other contenders: a factor of two for a few megabytes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 32 << 20), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(parameter, value)


def table(rows: list[Row], notes: Mapping[str, str] | None = None, note_title: str = "") -> str:
    """A Markdown table, fastest first. notes: {contender: text of the last column}."""
    unit, factor = ("us", 1e6) if min(row.median for row in rows) < 1e-3 else ("ms", 1e3)
    if min(row.median for row in rows) >= 1:
        unit, factor = "s", 1.0
    head = ["", f"median {unit}", "middle half", "to ours", "to the limit"]
    keep = [True, True, True, rows[0].to_ours is not None, rows[0].to_limit is not None, notes is not None]

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    lines = []
    for row in sorted(rows, key=lambda row: row.median):
        low, high = row.quartiles
        cells = [row.name, number(row.median * factor), f"{number(low * factor)} - {number(high * factor)}"]
        cells += ["" if value is None else f"{value:.2f}" for value in (row.to_ours, row.to_limit)]
        lines.append([*cells, (notes or {}).get(row.name, "")])
    lines = [[*head, note_title], ["---"] * 6, *lines]
    return "\n".join("| " + " | ".join(c for c, k in zip(cells, keep, strict=True) if k) + " |" for cells in lines)


def machine() -> str:
    """Processor, cores, load and relevant versions on one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = []
    for package in ("numpy", "numba", "torch", "triton", "pillow", "simplejpeg"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{model}, {cores} cores{load}; Python {platform.python_version()}, {', '.join(versions)}"
