"""Pictures of the pretext task's predictions: occupancy, outcomes, and features as colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.pictures.birdseye import occupancy_colors
from occfeat_targets.pictures.colors import FeatureColors, height_scale
from occfeat_train.data.batch import Batch
from occfeat_train.report import figures
from occfeat_train.report.figures import OUTCOMES, Prediction, key_of, key_of_heights
from occfeat_train.tasks.losses import feature_loss
from occfeat_train.tasks.pretraining import Pretraining


def draw(task: Pretraining, batches: Sequence[Batch], poses: Sequence[Matrix]) -> list[Prediction]:
    """One prediction for each keyframe. Feature colours are fitted to the targets of all keyframes."""
    found = [batch.arrays["features"].float().cpu().numpy() for batch in batches if "features" in batch.arrays]
    colors, note = None, ""
    if sum(map(len, found)) > 1:
        targets = np.concatenate(found)
        colors = FeatureColors.fit(targets)
        note = (
            "Features: three principal components of the targets of all keyframes shown, as red, green and blue, the same "
            "for targets and predictions. Predicting their mean for every voxel gives a mean cosine of "
            f"{cosine_of_mean(targets):.3f} (a feature loss of {-cosine_of_mean(targets):.3f}): a network above it has learnt "
            "where features differ."
        )
    return [_draw(task, batch, pose, colors, note) for batch, pose in zip(batches, poses, strict=True)]


def cosine_of_mean(features: NDArray[np.floating[Any]]) -> float:
    """Mean cosine between features (n, C) and one fixed vector, for the best such vector: the mean of the unit features."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-8)
    return float(np.linalg.norm(unit.mean(0)))


def _draw(task: Pretraining, batch: Batch, pose: Matrix, colors: FeatureColors | None, note: str) -> Prediction:
    grid, occupied = task.grid, batch.volume("occupancy")
    voxels, target = batch.arrays.get("voxels"), batch.arrays.get("features")
    logits, features = task.head(task.bev(batch), voxels)
    cosine = None
    if voxels is not None and target is not None:
        _, cosine = feature_loss(features, target, torch.zeros_like(voxels), 1)
    metric = task.metric()
    metric.update(logits, occupied, cosine)
    merits = [f"{name} {value}" for name, value in task.columns(metric.results()).items() if value != "-"]
    true = occupied[0].cpu().numpy()
    maps = {"true occupancy, highest cell": occupancy_colors(true, height_scale(grid), grid)}
    pictures = {}
    if logits is not None:
        predicted = (logits[0] > 0).cpu().numpy()
        maps["predicted occupancy, highest cell"] = occupancy_colors(predicted, height_scale(grid), grid)
        maps["columns with an occupied cell, right or wrong"] = figures.outcome_colors(predicted.any(0), true.any(0))
        behind = figures.draw_from_behind(figures.outcome_shares(predicted, true, axis=1), grid, pose)
        pictures["all cells from behind, outcomes averaged"] = behind
    if colors is not None and voxels is not None and target is not None:
        for values, name in ((target, "target"), (features, "predicted")):
            shown = colors(values.float().cpu().numpy())
            maps[f"{name} features, topmost seen voxel"] = figures.topmost(voxels.cpu().numpy(), shown, grid)
    return Prediction(
        ", ".join(merits),
        {name: figures.draw_map(cells, grid, pose) for name, cells in maps.items()} | pictures,
        [*key_of(OUTCOMES), key_of_heights(grid)],
        note,
    )
