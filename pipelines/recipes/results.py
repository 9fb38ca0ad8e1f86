"""What finished runs say about a cell: its IoU for every seed, whether it is simulated, in what it differs from the paper."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from occfeat_targets.cache.corruption import CORRUPTIONS
from occfeat_train.training.checkpoint import Checkpoint, find_checkpoint
from occfeat_train.training.paper import differences
from pipelines.recipes.data import Settings
from pipelines.recipes.graph import evaluation_file
from pipelines.recipes.tables import Cell
from pipelines.recipes.trainings import Training, run_directory

RESILIENCE, ERROR = "mRR", "mCE"


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


def read_cell(cell: Cell, settings: Settings) -> Result:
    result = Result(cell)
    for seed in evaluated_seeds(cell.training, settings):
        measured = read_run(run_directory(settings.out, cell.training, seed))
        if isinstance(measured, Measured):
            result.found[seed] = measured
        else:
            result.missing[seed] = measured
    return result


def evaluated_seeds(each: Training, settings: Settings) -> list[int]:
    """The seeds that were asked for, and others whose runs are in OUT."""
    name = re.compile(re.escape(each.name) + r"-seed-(\d+)")
    runs = settings.out / "runs"
    there = [
        int(match[1]) for path in (runs.iterdir() if runs.is_dir() else ()) if (match := name.fullmatch(path.name))
    ]
    return sorted({*range(settings.seeds), *there})


def finished_checkpoint(run: Path) -> Checkpoint | str:
    """The last checkpoint of a finished training, or why there is none."""
    if not run.exists():
        return "not begun"
    try:
        checkpoint = find_checkpoint(run)
        return checkpoint if checkpoint.is_finished else checkpoint.describe_step()
    except ValueError as err:
        return f"cannot be read: {err}"


def read_run(run: Path) -> Measured | str:
    """A finished and evaluated run, or why there is none."""
    checkpoint, file = finished_checkpoint(run), evaluation_file(run)
    if isinstance(checkpoint, str):
        return checkpoint
    if not file.is_file():
        return "not evaluated"
    try:
        values = json.loads(file.read_text())
        if values["weights"] != checkpoint.weights_digest:
            return f"{file} is of other weights: delete it and run the recipe again"
        if values["iou"] is None:
            return "its IoU is undefined: no cell is predicted or true"
        simulated = tuple(dict.fromkeys([*checkpoint.info.warnings(), *values["simulated"]]))
        iou = float(values["iou"])
    except (ValueError, KeyError, TypeError) as err:
        return f"{file} cannot be read: {err}"
    changed = tuple(f"{d.field}: {d.here} (paper: {d.paper})" for d in differences(checkpoint.info))
    return Measured(iou, simulated, changed)


def read_corruptions(cells: Sequence[Cell], settings: Settings) -> list[Result]:
    """For each cell, its IoU under each corruption (mean of the three severities), its mRR and, but for the first, its mCE [%]."""
    results = []
    for cell in cells:
        columns = [*CORRUPTIONS, RESILIENCE, *([ERROR] if cell is not cells[0] else [])]
        of_cell = {column: Result(replace(cell, column=column, paper=None)) for column in columns}
        for seed in evaluated_seeds(cell.training, settings):
            values = read_values(run_directory(settings.out, cell.training, seed))
            for column, result in of_cell.items():
                if isinstance(values, str):
                    result.missing[seed] = values
                elif column not in values:
                    result.missing[seed] = "not evaluated on all corrupted caches"
                else:
                    result.found[seed] = values[column]
        results += of_cell.values()
    return results


def read_values(run: Path) -> dict[str, Measured] | str:
    """{corruption, mRR, mCE: value [%]} of a run, or why there is none."""
    base, checkpoint = read_run(run), finished_checkpoint(run)
    if isinstance(base, str):
        return base
    if isinstance(checkpoint, str):
        return checkpoint
    file = run / "corruptions.json"
    if not file.is_file():
        return "not evaluated on corrupted caches"
    try:
        summary = json.loads(file.read_text())
        if summary["evaluations"]["clean"]["weights"] != checkpoint.weights_digest:
            return f"{file} is of other weights: delete corruptions.finished beside it and run the recipe again"
        values = {**summary["mean"], RESILIENCE: summary["mRR"], ERROR: summary.get("mCE")}
        simulated = tuple(dict.fromkeys([*base.simulated, *summary["simulated"]]))
    except (ValueError, KeyError, TypeError) as err:
        return f"{file} cannot be read: {err}"
    return {name: replace(base, iou=value, simulated=simulated) for name, value in values.items() if value is not None}
