"""Correlation maps (paper, Figure 6): the cosine between the feature of some voxels and those of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.labels import LABEL_KINDS, LabelKind
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.common.suggest import did_you_mean
from occfeat_targets.pictures.birdseye import Mask
from occfeat_targets.pictures.colors import directions
from occfeat_train.report.voxel_predictions import VoxelPredictions

MAX_DISTANCE = 2.0  # [m] from a picked point to the nearest voxel with a feature
DEFAULT_CLASSES = ("road", "vehicles")  # the paper's road and car, as far as a cache has their labels
Point = tuple[float, float, float]  # (right, forward, up) in the grid [m]


@dataclass(frozen=True, eq=False)
class Query:
    """The feature with which all others are compared.

    name: of the voxel or class. origin: which voxels of which keyframe it is the mean of, in words.
    predicted, target: (C,) mean of the unit features of these voxels: the run's, and the teacher's.
    label: class of labels, or empty. voxel: (split, keyframe, flat index) of a picked voxel; None for a class.
    """

    name: str
    origin: str
    label: str
    predicted: NDArray[np.float64]
    target: NDArray[np.float64]
    voxel: tuple[str, int, int] | None = None


def pick_voxel(point: Point, found: VoxelPredictions) -> Query:
    """The voxel with a feature whose centre is nearest to a point.

    Raises ValueError if the point is outside of the grid, or the voxel farther than MAX_DISTANCE.
    """
    grid, name = found.grid, ",".join(f"{value:g}" for value in point)
    low, high = (bounds[::-1] for bounds in (grid.lower, grid.upper))
    if not all(a <= value < b for a, value, b in zip(low, point, high, strict=True)):
        spans = ", ".join(f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True))
        raise ValueError(f"--voxel {name} is outside of the grid: right, forward, up within {spans} m expected")
    centers = grid.centers_of(found.predicted.voxels)
    distance = np.linalg.norm(centers - np.array(point), axis=1)
    nearest = int(distance.argmin())
    at = ",".join(f"{value:g}" for value in np.round(centers[nearest].astype(np.float64), 3))
    if distance[nearest] > MAX_DISTANCE:
        raise ValueError(
            f"--voxel {name}: no voxel with a LiDAR return within {MAX_DISTANCE:g} m in {found.name}: the nearest is --voxel {at}"
        )
    query = _query(f"voxel {at}", "", found, np.array([nearest]), f"the voxel at {at} m (right, forward, up)")
    return replace(query, voxel=(found.split, found.keyframe, int(found.predicted.voxels[nearest])))


def pick_class(label: str, found: Sequence[VoxelPredictions]) -> Query:
    """The mean of a class's voxels in the first keyframe that has some. Raises ValueError if none has."""
    for predictions in found:
        chosen = np.flatnonzero(voxels_of(label, predictions))
        if len(chosen):
            return _query(label.replace("_", " "), label, predictions, chosen, f"{len(chosen)} voxels of {label}")
    names = "; ".join(predictions.name for predictions in found)
    raise ValueError(f"--of {label}: no voxel of that class in {names}: choose other --keyframes, or another class")


def _query(name: str, label: str, found: VoxelPredictions, chosen: NDArray[np.intp], what: str) -> Query:
    means = [directions(seen.features[chosen]).mean(axis=0) for seen in (found.predicted, found.target)]
    return Query(name, f"{what} in {found.scene} ({found.split})", label, *means)


def cosines(features: NDArray[Any], query: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, C), (C,) -> (n,) cosines."""
    return directions(features) @ directions(query)


def check_class(label: str, spec: TargetSpec) -> None:
    """Raises ValueError if a cache has no labels of a class."""
    there = classes_of(spec)
    if label not in there:
        remedy = did_you_mean(label, there) or f": it has {', '.join(there) or 'no labels'}"
        raise ValueError(f"--of {label}: the cache has no such class{remedy}; --voxel needs no labels")


def classes_of(spec: TargetSpec) -> dict[str, LabelKind]:
    """{class: its kind} of the labels of a cache."""
    return {name: LABEL_KINDS[kind] for kind in spec.labels for name in LABEL_KINDS[kind].classes}


def label_mask(label: str, found: VoxelPredictions) -> Mask:
    """(H, W) valid cells of a class."""
    kind = classes_of(found.reader.cache.spec)[label]
    masks, is_valid = found.reader.read_labels(kind, found.keyframe)
    cells: Mask = masks[found.frame, kind.classes.index(label)]
    return cells if is_valid is None else cells & is_valid[found.frame]


def voxels_of(label: str, found: VoxelPredictions) -> Mask:
    """(n,) which voxels of `found.predicted` belong to a class.

    Objects, such as vehicles: all voxels in their cells. Classes of the ground, such as road: the lowest voxel in each cell
    that no object covers, because trees and wires are above the road, too.
    """
    classes = classes_of(found.reader.cache.spec)
    cells = label_mask(label, found)
    if not classes[label].is_solid:
        for other, kind in classes.items():
            if kind.is_solid:
                cells = cells & ~label_mask(other, found)
    area = int(np.prod(found.grid.map_shape))
    column = found.predicted.voxels % area
    chosen: Mask = cells.reshape(-1)[column]
    if not classes[label].is_solid:
        lowest = np.zeros(len(column), np.bool_)
        lowest[np.unique(column, return_index=True)[1]] = True  # ascending indices: the lowest comes first
        chosen &= lowest
    return chosen


def outline(query: Query, found: VoxelPredictions) -> Mask | None:
    """(H, W) cells of a query's class, or of the picked voxel and its neighbours; None for the voxel of another keyframe."""
    if query.voxel is None:
        return label_mask(query.label, found)
    split, keyframe, voxel = query.voxel
    if (split, keyframe) != (found.split, found.keyframe):
        return None
    h, w = divmod(voxel % int(np.prod(found.grid.map_shape)), found.grid.map_shape[1])
    cells = np.zeros(found.grid.map_shape, np.bool_)
    cells[max(h - 1, 0) : h + 2, max(w - 1, 0) : w + 2] = True
    return cells


def contrast(label: str, found: VoxelPredictions, query: Query) -> tuple[float, float] | None:
    """Mean cosine of a class's voxels and of all others; None if either has none."""
    chosen = voxels_of(label, found)
    if chosen.all() or not chosen.any():
        return None
    cosine = cosines(found.predicted.features, query.predicted)
    return float(cosine[chosen].mean()), float(cosine[~chosen].mean())
