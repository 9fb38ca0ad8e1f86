"""Single vehicles on one grid, as Simple-BEV's centre and offset heads predict them (get_center_and_offset_bev).

Everything is a whole number of cells, so a cache holds it exactly: the reference's Gaussian follows from the squared distance
(`occfeat_train.tasks.instance_losses`). The centre of a box is rounded to the centre of a cell, halves to the even one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.targets.labels import fill_top_face

FAR = 255  # squared distance [cells^2] from which on cells are not told apart
_LARGEST = np.iinfo(np.int16).max


@dataclass(frozen=True, eq=False)
class Instances:
    """squared_distance: (H, W) uint8, to the nearest rounded centre of any vehicle, in the grid or outside [cells^2]; at most FAR.

    offset: (2, H, W) int16, from the rounded centre of the vehicle drawn in a cell to the cell, along right and forward
    [cells]; 0 in cells without a vehicle. A later box covers earlier ones.
    """

    squared_distance: NDArray[np.uint8]
    offset: NDArray[np.int16]


class DrawInstances(Protocol):
    """Draws the single objects of one kind of labels of a keyframe on the grid of one reference frame."""

    def __call__(self, keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix) -> Instances:
        """grid_from_ego: (4, 4) to the grid ``spec.grid``."""


def vehicle_instances(keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix) -> Instances:
    """`DrawInstances` of the kind ``vehicles``."""
    return draw_instances(keyframe.vehicle_corners, spec.grid, grid_from_ego)


def draw_instances(corners: NDArray[np.floating[Any]], grid: VoxelGrid, grid_from_boxes: Matrix) -> Instances:
    """corners: (n, 8, 3) in the order of the devkit's Box.corners() [m], in the frame that grid_from_boxes, a (4, 4), maps to the
    grid. The cells of a vehicle are those of `draw_vehicles` with compat, hardly visible vehicles included.

    Raises ValueError on a corner that is not finite, or on a vehicle that is too long for the cells.
    """
    boxes = transform(grid.cells_from_grid @ grid_from_boxes, np.asarray(corners, np.float64).reshape(-1, 8, 3))
    if not np.isfinite(boxes).all():
        raise ValueError(f"box {np.argwhere(~np.isfinite(boxes))[0, 0]}: finite corners expected")
    height, width = grid.map_shape
    centers = np.rint(boxes[..., :2].mean(axis=1) - 0.5)  # (n, 2) along right and forward
    number = np.zeros((height, width), np.int32)
    squared = np.full((height, width), FAR, np.uint8)
    reach = int(FAR**0.5)
    for i, (box, (w, h)) in enumerate(zip(boxes, centers, strict=True), start=1):
        fill_top_face(number, box, i)
        if not (-reach <= w < width + reach and -reach <= h < height + reach):
            continue
        rows = np.arange(max(int(h) - reach, 0), min(int(h) + reach + 1, height))
        columns = np.arange(max(int(w) - reach, 0), min(int(w) + reach + 1, width))
        distance = np.minimum((rows[:, None] - h) ** 2 + (columns - w) ** 2, FAR).astype(np.uint8)
        window = squared[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        np.minimum(window, distance, out=window)
    offset = np.zeros((2, height, width))
    rows, columns = np.nonzero(number)
    own = centers[number[rows, columns] - 1]
    offset[:, rows, columns] = columns - own[:, 0], rows - own[:, 1]
    if (longest := np.abs(offset).max()) > _LARGEST:
        raise ValueError(
            f"a vehicle reaches {longest:g} cells from its centre: at most {_LARGEST} expected; check the box"
        )
    return Instances(squared, offset.astype(np.int16))
