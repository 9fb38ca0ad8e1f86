"""What can be predicted of a voxel without any image: from its height and distance, or from the mean of a training scene.

A network that is trained on one keyframe is only informative where it is better than these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.pictures.birdseye import Mask

RING = 5.0  # [m]


def places(grid: VoxelGrid) -> NDArray[np.int64]:
    """(Z * H * W,) number of each voxel's place: its level, and its ring of RING metres around the grid's origin."""
    centers = grid.voxel_centers().reshape(-1, 3)
    ring = (np.linalg.norm(centers[:, :2], axis=1) / RING).astype(np.int64)
    level = np.arange(grid.num_voxels) // int(np.prod(grid.map_shape))
    found: NDArray[np.int64] = level * (ring.max() + 1) + ring
    return found


def iou(guesses: Sequence[Mask], truths: Sequence[Mask]) -> float:
    """Intersection over union [%] over all voxels of all keyframes; 0 if the union is empty."""
    both = sum(int((guess & true).sum()) for guess, true in zip(guesses, truths, strict=True))
    either = sum(int((guess | true).sum()) for guess, true in zip(guesses, truths, strict=True))
    return 100 * both / max(either, 1)


def occupancy_by_place(volumes: Sequence[Mask], grid: VoxelGrid) -> Mask:
    """(Z, H, W) voxels of those places that are occupied so often in `volumes` that predicting them all gives the largest IoU there."""
    place = places(grid)
    count = np.bincount(place).astype(np.float64) * len(volumes)
    hits = np.sum([np.bincount(place, volume.reshape(-1), len(count)) for volume in volumes], axis=0)
    order = np.argsort(-hits / np.maximum(count, 1), kind="stable")
    found, predicted = np.cumsum(hits[order]), np.cumsum(count[order])
    best = int(np.argmax(found / (predicted + hits.sum() - found)))
    chosen: Mask = np.isin(place, order[: best + 1]).reshape(grid.shape)
    return chosen


def features_by_place(
    voxels: NDArray[np.int64], features: NDArray[np.float64], at: NDArray[np.int64], grid: VoxelGrid
) -> NDArray[np.float64]:
    """(m, C) for voxels `at` (m,): the mean of `features` (n, C) of `voxels` (n,) in the same place, or of all if it has none."""
    place = places(grid)
    sums = np.zeros((place.max() + 1, features.shape[1]))
    np.add.at(sums, place[voxels], features)
    count = np.bincount(place[voxels], minlength=len(sums))
    means = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], features.mean(axis=0))
    return means[place[at]]


def mean_cosine(features: NDArray[Any], targets: NDArray[Any]) -> float:
    """(n, C) or (C,), (n, C) -> the mean cosine of the rows."""
    norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(targets, axis=-1)
    return float(((features * targets).sum(axis=-1) / np.maximum(norms, 1e-12)).mean())
