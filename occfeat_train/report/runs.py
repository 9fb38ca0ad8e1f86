"""Contents of a report: log, metrics over a split, and predictions for some keyframes of each run."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.report.figures import LINE_COLORS, Prediction
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import move_to_device
from occfeat_train.training.checkpoint import Checkpoint, find_checkpoint
from occfeat_train.training.compatibility import changes_of_meaning, measured, notes_on_data, require_fit
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.initial import restore
from occfeat_train.training.log import note_on_damage, read_lines
from occfeat_train.training.precision import autocast, forbid_tf32, note_on_precision
from occfeat_train.training.saving import CheckpointError


@dataclass(frozen=True)
class Run:
    """A run of the report. color: ``#rrggbb``. results: metrics of its newest checkpoint over the split; source: their origin.

    predictions: one for each keyframe shown; none if the task has no pictures.
    """

    name: str
    color: str
    checkpoint: Checkpoint
    log: list[dict[str, Any]]
    dataset: KeyframeDataset
    results: dict[str, Any]
    source: str
    predictions: list[Prediction]

    @property
    def config(self) -> Config:
        return self.checkpoint.info.config

    @property
    def mark(self) -> str:
        """``step 3 of 60, unfinished``; empty for a finished run."""
        return "" if self.checkpoint.is_finished else self.checkpoint.describe_step()


@dataclass(frozen=True)
class Opened:
    """A run that can be evaluated on the report's cache. damage: a note on damaged lines of its log, or empty."""

    path: Path
    checkpoint: Checkpoint
    log: list[dict[str, Any]]
    dataset: KeyframeDataset
    damage: str


def load_runs(
    paths: Sequence[Path],
    reader: CacheReader,
    split: str,
    samples: int,
    process: Process,
    print_line: Callable[[str], None],
) -> tuple[list[Run], list[int], list[str]]:
    """Runs with predictions for up to `samples` keyframes, evenly spread over the split; the numbers of these keyframes; notes.

    A run that is absent or broken, has no log, or does not fit the cache is left out, with a note that gives the reason. So is
    a log's damaged line. Raises ValueError if no run is left.
    """
    notes: list[str] = []
    opened: list[Opened] = []
    for path in dict.fromkeys(paths):
        try:
            opened.append(open_run(path, reader))
        except (ValueError, OSError) as err:
            notes.append(f"{path} is left out: {err}")
    names = [run.path.name for run in opened]
    chosen: list[int] = []
    runs: list[Run] = []
    for run in opened:
        chosen = chosen or evenly_spread(run.dataset.keyframes, samples)
        name = run.path.name if names.count(run.path.name) == 1 else os.path.relpath(run.path)
        try:
            runs.append(load_run(run, name, len(runs), split, chosen, process, print_line))
        except (ValueError, OSError) as err:
            notes.append(f"{run.path} is left out: {err}")
            continue
        if run.damage:
            notes.append(f"{run.damage}, left out")
    if not runs:
        raise ValueError("; ".join(notes))
    return runs, chosen, notes


def open_run(path: Path, reader: CacheReader) -> Opened:
    """Raises ValueError or OSError if the run cannot be reported."""
    checkpoint = find_checkpoint(path)
    lines = read_lines(path) if (path / "log.jsonl").is_file() else []
    log = [record for _, record in lines if record is not None]
    if not any("loss" in record for record in log):
        raise CheckpointError(
            f"{path} has no log.jsonl with a training step: the directory of a run is expected, not one of its checkpoints"
        )
    dataset = KeyframeDataset(reader, checkpoint.info.config, training=False)
    require_fit(dataset, checkpoint.info.grid, checkpoint.info.feature_dim, str(checkpoint.path))
    return Opened(path, checkpoint, log, dataset, note_on_damage(path / "log.jsonl", lines))


def load_run(
    opened: Opened,
    name: str,
    number: int,
    split: str,
    keyframes: Sequence[int],
    process: Process,
    print_line: Callable[[str], None],
) -> Run:
    """A run with its results over the split and its predictions for keyframes. number: determines its colour."""
    path, checkpoint, dataset = opened.path, opened.checkpoint, opened.dataset
    print_line(f"{path}: {checkpoint.info.config.task}, {checkpoint.describe_step()}")
    precision = note_on_precision(checkpoint.info.config.precision, process.device)
    for line in (*changes_of_meaning(dataset, checkpoint), *notes_on_data(dataset), *precision):
        print_line(line)
    task = restore(checkpoint)
    results, source = read_or_evaluate(path, split, checkpoint, task, dataset, process)
    predictions = draw_predictions(task, dataset, keyframes, process)
    color = LINE_COLORS[number % len(LINE_COLORS)]
    return Run(name, color, checkpoint, opened.log, dataset, results, source, predictions)


def evenly_spread(keyframes: NDArray[np.integer[Any]], number: int) -> list[int]:
    chosen = np.linspace(0, len(keyframes) - 1, min(number, len(keyframes))).round().astype(int)
    return [int(keyframe) for keyframe in keyframes[chosen]]


def read_or_evaluate(
    path: Path, split: str, checkpoint: Checkpoint, task: Task, dataset: KeyframeDataset, process: Process
) -> tuple[dict[str, Any], str]:
    """Results from RUN/evaluation/SPLIT.json if it matches weights, keyframes and frame, else from a new evaluation; and the source."""
    file = path / "evaluation" / f"{split}.json"
    if file.is_file():
        with contextlib.suppress(ValueError, AttributeError):  # damaged
            found = json.loads(file.read_text())
            if measured(checkpoint, dataset).items() <= found.items():
                return found, f"evaluation/{split}.json"
    return dict(evaluate(task, dataset, process, workers=1, progress=False).results()), "evaluated for this report"


@torch.no_grad()
def draw_predictions(
    task: Task, dataset: KeyframeDataset, keyframes: Sequence[int], process: Process
) -> list[Prediction]:
    """A network's predictions for keyframes, computed as in evaluation."""
    if not task.pictures:
        return []
    forbid_tf32(task.config.precision, process.device)
    move_to_device(task, process.device)
    task.eval()
    frame = dataset.reader.cache.spec.frames.index(dataset.frames[0])
    poses = [dataset.reader.read("grid_from_ego", keyframe)[frame].astype(np.float64) for keyframe in keyframes]
    batches = [dataset.batch([(0, keyframe)]).to(process.device) for keyframe in keyframes]
    with autocast(process.device, task.config.precision):
        predictions: list[Prediction] = pkgutil.resolve_name(task.pictures)(task, batches, poses)
    return predictions
