"""Contents of a report: log, metrics over a split, and predictions for some keyframes of each run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import move_to_device
from occfeat_train.tasks.losses import feature_loss
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.tasks.segmentation import Segmentation
from occfeat_train.training.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from occfeat_train.training.compatibility import changes_of_meaning, measured, notes_on_data, require_fit
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.initial import restore
from occfeat_train.training.log import read_log
from occfeat_train.training.loop import autocast


@dataclass(frozen=True)
class Prediction:
    """Outputs of a run's network for one keyframe; None for outputs that it does not have.

    predicted, true: (Z, H, W) occupancy or (K, H, W) masks. valid: (H, W). probability: (K, H, W). voxels: (n,) flat
    indices of the distilled voxels. target, features: (n, N_y). results: the task's metric on this keyframe.
    """

    grid_from_ego: NDArray[np.float64]
    true: NDArray[np.bool_]
    results: dict[str, Any]
    predicted: NDArray[np.bool_] | None = None
    valid: NDArray[np.bool_] | None = None
    probability: NDArray[np.float32] | None = None
    voxels: NDArray[np.int64] | None = None
    target: NDArray[np.float32] | None = None
    features: NDArray[np.float32] | None = None

    @property
    def all_scored(self) -> bool:
        return self.valid is None or bool(self.valid.all())


@dataclass(frozen=True)
class Run:
    """A run of the report. number: its position in the report. results: metrics of its newest checkpoint; source: their origin."""

    number: int
    name: str
    checkpoint: Checkpoint
    log: list[dict[str, Any]]
    dataset: KeyframeDataset
    results: dict[str, Any]
    source: str
    predictions: list[Prediction]

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def config(self) -> Config:
        return self.checkpoint.info.config


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
        print_line(f"{path}: {checkpoint.info.config.task}, step {checkpoint.step}")
        for line in (*changes_of_meaning(dataset, checkpoint), *notes_on_data(dataset)):
            print_line(line)
        task = restore(checkpoint)
        results, source = read_or_evaluate(path, split, checkpoint, task, dataset, process)
        predictions = [predict(task, dataset, keyframe, process) for keyframe in chosen]
        name = path.name if names.count(path.name) == 1 else str(path)
        runs.append(Run(len(runs), name, checkpoint, log, dataset, results, source, predictions))
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
def predict(task: Task, dataset: KeyframeDataset, keyframe: int, process: Process) -> Prediction:
    """The outputs of a network for one keyframe, computed as in evaluation."""
    move_to_device(task, process.device)
    task.eval()
    batch = dataset.batch([(0, keyframe)])
    cam_from_ego = dataset.reader.read("cam_from_ego", keyframe)[0].astype(np.float64)
    grid_from_ego = inverse_rigid(batch.cam_from_grid[0, 0].numpy()) @ cam_from_ego
    batch = batch.to(process.device)
    with autocast(process.device, task.config.precision):
        if isinstance(task, Pretraining):
            return _predict_pretraining(task, batch, grid_from_ego)
        assert isinstance(task, Segmentation)
        logits = task.logits(batch)
        metric, (labels, valid) = task.metric(), task.labels(batch)
        metric.update(logits, labels, valid)
    return Prediction(
        grid_from_ego,
        labels[0].cpu().numpy(),
        metric.results(),
        predicted=(logits[0].float() >= 0).cpu().numpy(),
        valid=valid[0, 0].cpu().numpy(),
        probability=logits[0].float().sigmoid().cpu().numpy(),
    )


def _predict_pretraining(task: Pretraining, batch: Batch, grid_from_ego: NDArray[np.float64]) -> Prediction:
    occupied, voxels, target = batch.volume("occupancy"), batch.arrays.get("voxels"), batch.arrays.get("features")
    logits, features = task.head(task.bev(batch), voxels)
    cosine = None
    if voxels is not None and target is not None:
        _, cosine = feature_loss(features, target, torch.zeros_like(voxels), 1)
    metric = task.metric()
    metric.update(logits, occupied, cosine)
    return Prediction(
        grid_from_ego,
        occupied[0].cpu().numpy(),
        metric.results(),
        predicted=None if logits is None else (logits[0] > 0).cpu().numpy(),
        voxels=None if voxels is None else voxels.cpu().numpy(),
        target=None if target is None else target.float().cpu().numpy(),
        features=None if features is None else features.float().cpu().numpy(),
    )
