"""Contents of a report: log, metrics over a split, and predictions for some keyframes of each run."""

from __future__ import annotations

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
from occfeat_train.report.figures import Prediction
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import move_to_device
from occfeat_train.training.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from occfeat_train.training.compatibility import changes_of_meaning, measured, notes_on_data, require_fit
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.initial import restore
from occfeat_train.training.log import read_log
from occfeat_train.training.precision import autocast, forbid_tf32, note_on_precision

RUN_COLORS = ("#1f6fb4", "#d1602a", "#2c924c", "#8d5bb5", "#a5822c", "#c2457f", "#3f9ea6", "#6b6b6b")


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


def load_runs(
    paths: Sequence[Path],
    reader: CacheReader,
    split: str,
    samples: int,
    process: Process,
    print_line: Callable[[str], None],
) -> tuple[list[Run], list[int]]:
    """Runs with predictions for up to `samples` keyframes, evenly spread over the split, and the numbers of these keyframes.

    Raises ValueError if a run is absent, has no log, or does not fit the cache, before any run is evaluated.
    """
    opened = [(path, *open_run(path)) for path in dict.fromkeys(paths)]
    datasets = []
    for _, checkpoint, _ in opened:
        datasets.append(KeyframeDataset(reader, checkpoint.info.config, training=False))
        require_fit(datasets[-1], checkpoint.info.grid, checkpoint.info.feature_dim, str(checkpoint.path))
    chosen = evenly_spread(datasets[0].keyframes, samples)
    names = [path.name for path, _, _ in opened]
    runs: list[Run] = []
    for (path, checkpoint, log), dataset in zip(opened, datasets, strict=True):
        print_line(f"{path}: {checkpoint.info.config.task}, {checkpoint.describe_step()}")
        precision = note_on_precision(checkpoint.info.config.precision, process.device)
        for line in (*changes_of_meaning(dataset, checkpoint), *notes_on_data(dataset), *precision):
            print_line(line)
        task = restore(checkpoint)
        results, source = read_or_evaluate(path, split, checkpoint, task, dataset, process)
        predictions = draw_predictions(task, dataset, chosen, process)
        name = path.name if names.count(path.name) == 1 else os.path.relpath(path)
        color = RUN_COLORS[len(runs) % len(RUN_COLORS)]
        runs.append(Run(name, color, checkpoint, log, dataset, results, source, predictions))
    return runs, chosen


def open_run(path: Path) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """A run's newest checkpoint and its log."""
    checkpoint = find_checkpoint(path)
    log = read_log(path) if (path / "log.jsonl").is_file() else []
    if not any("loss" in record for record in log):
        raise CheckpointError(
            f"{path} has no log.jsonl with a training step: the directory of a run is expected, not one of its checkpoints"
        )
    return checkpoint, log


def evenly_spread(keyframes: NDArray[np.integer[Any]], count: int) -> list[int]:
    chosen = np.linspace(0, len(keyframes) - 1, min(count, len(keyframes))).round().astype(int)
    return [int(keyframe) for keyframe in keyframes[chosen]]


def read_or_evaluate(
    path: Path, split: str, checkpoint: Checkpoint, task: Task, dataset: KeyframeDataset, process: Process
) -> tuple[dict[str, Any], str]:
    """Results from RUN/evaluation/SPLIT.json if it matches weights, keyframes and frame, else from a new evaluation; and the source."""
    file = path / "evaluation" / f"{split}.json"
    if file.is_file():
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
