"""Slow reference of ``instances`` for `verify` and the tests: every box against every cell, in metres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.verify.slow_labels import TIE, Mask, top_face

_FAR = 255


@dataclass(frozen=True, eq=False)
class ReferenceInstances:
    """squared_distance: (H, W), offset: (2, H, W), as `targets.instances.Instances`.

    has_known_distance, has_known_offset: (H, W) false where rounding or OpenCV's treatment of borders decides.
    """

    squared_distance: NDArray[np.float64]
    offset: NDArray[np.float64]
    has_known_distance: Mask
    has_known_offset: Mask


class InstanceReference(Protocol):
    """Slow reference of one kind's instances, the counterpart of `targets.instances.DrawInstances`."""

    def __call__(self, keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix) -> ReferenceInstances:
        """grid_from_ego: (4, 4) to the grid ``spec.grid``."""


def vehicle_instances_reference(keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix) -> ReferenceInstances:
    """`InstanceReference` of the kind ``vehicles``."""
    return reference_instances(keyframe.vehicle_corners, spec.grid, grid_from_ego)


def reference_instances(
    corners: NDArray[np.floating[Any]], grid: VoxelGrid, grid_from_boxes: Matrix
) -> ReferenceInstances:
    """Reference of ``draw_instances``."""
    columns, rows = np.meshgrid(*map(np.arange, grid.map_shape[::-1]))
    squared = np.full(grid.map_shape, float(_FAR))
    offset = np.zeros((2, *grid.map_shape))
    distance_known, offset_known = np.ones((2, *grid.map_shape), np.bool_)
    (_, bottom, left), (_, size_h, size_w) = grid.lower, grid.cell_size
    for box in transform(grid_from_boxes, np.asarray(corners, np.float64)):
        right, forward, _ = box.mean(axis=0).tolist()
        exact = (right - left - size_w / 2) / size_w, (forward - bottom - size_h / 2) / size_h
        w, h = (round(value) for value in exact)  # halves to even
        is_tie = any(abs(abs(value - n) - 0.5) < TIE for value, n in zip(exact, (w, h), strict=True))
        distance = (columns - float(w)) ** 2 + (rows - float(h)) ** 2
        if is_tie:
            distance_known &= distance > 2 * _FAR
        squared = np.minimum(squared, distance)
        inside, near = top_face(box, grid)
        offset[:, inside] = (columns - float(w))[inside], (rows - float(h))[inside]
        offset_known[inside] = not is_tie
        offset_known &= ~near
    return ReferenceInstances(squared, offset, distance_known, offset_known)
