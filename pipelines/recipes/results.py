"""What finished runs say about a cell: its IoU for every seed, whether it is simulated, in what it differs from the paper."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.paper import differences
from pipelines.recipes.graph import evaluation_file
from pipelines.recipes.tables import Cell
from pipelines.recipes.trainings import Training, run_directory


@dataclass(frozen=True)
class Measured:
    """One run's IoU [%] on val. simulated: warnings of the run and of the data it was evaluated on. differences: from the paper."""

    iou: float
    simulated: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """A cell's runs: {seed: measured}, and {seed: why there is nothing}."""

    cell: Cell
    found: dict[int, Measured] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(each.iou for each in self.found.values()) if self.found else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(each.iou for each in self.found.values()) if len(self.found) > 1 else None

    @property
    def simulated(self) -> list[str]:
        return list(dict.fromkeys(text for each in self.found.values() for text in each.simulated))

    @property
    def text(self) -> str:
        """``23.9 ± 0.4 (24.3)``: ours and the paper's number; * marks simulated runs."""
        paper = "-" if self.cell.paper is None else f"{self.cell.paper:.1f}"
        if self.mean is None:
            return f"missing ({paper})"
        spread = "" if self.spread is None else f" ± {self.spread:.1f}"
        return f"{self.mean:.1f}{spread}{'*' * bool(self.simulated)} ({paper})"


def read_cell(cell: Cell, out: Path, seeds: int) -> Result:
    """Of these seeds, and of others that were run in `out`."""
    result = Result(cell)
    for seed in sorted({*range(seeds), *seeds_of(cell.training, out)}):
        measured = read_run(run_directory(out, cell.training, seed))
        if isinstance(measured, Measured):
            result.found[seed] = measured
        else:
            result.missing[seed] = measured
    return result


def seeds_of(each: Training, out: Path) -> list[int]:
    """Seeds of the directories of a training's runs."""
    name = re.compile(re.escape(each.name) + r"-seed-(\d+)")
    there = (out / "runs").iterdir() if (out / "runs").is_dir() else ()
    return [int(match[1]) for path in there if (match := name.fullmatch(path.name))]


def read_run(run: Path) -> Measured | str:
    """A finished and evaluated run, or why there is none."""
    if not run.exists():
        return "not begun"
    try:
        checkpoint = find_checkpoint(run)
        if not checkpoint.is_finished:
            return checkpoint.describe_step()
        if not evaluation_file(run).is_file():
            return "not evaluated"
        values = json.loads(evaluation_file(run).read_text())
        if values["weights"] != checkpoint.weights_digest:
            return f"{evaluation_file(run)} is of other weights: delete it and its run's evaluation is repeated"
        if values["iou"] is None:
            return "its IoU is undefined: no cell is predicted or true"
    except (ValueError, KeyError, TypeError) as err:
        return f"cannot be read: {err}"
    info = checkpoint.info
    simulated = tuple(dict.fromkeys([*info.warnings(), *values["simulated"]]))
    changed = tuple(f"{d.field}: {d.here} (paper: {d.paper})" for d in differences(info))
    return Measured(float(values["iou"]), simulated, changed)
