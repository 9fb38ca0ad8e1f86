"""The city at one instant as flat arrays, with a grid for ray casting.

A `Stage` packs every shape of a scene once; `Stage.at` places them at given poses and sorts them into the columns of a
2-D grid. Cameras and LiDAR use such a `World`, built for their own timestamps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.synth.ground import Ground
from occfeat_targets.synth.kernels import kernel
from occfeat_targets.synth.shapes import SOLID_COLUMNS, Shape

_CELL = 2.5
# Distance of a district's corners from its centre, for any angle and bend [m].
_REACH = 250.0
_NUM_CELLS = int(2 * _REACH / _CELL)


class World(NamedTuple):
    """objects: (m, 13) x, y, z, cos and sin of yaw, bounding box centre and half extents in its own axes, first solid,
    number of solids; solids: (n, SOLID_COLUMNS); cell c = row * columns + column holds objects
    items[starts[c]:starts[c + 1]], none higher than tops[row, column]; grid: (4,) lowest corner x, y, cell size and the
    highest top of all [m].
    """

    objects: NDArray[np.float64]
    solids: NDArray[np.float64]
    starts: NDArray[np.int64]
    items: NDArray[np.int64]
    tops: NDArray[np.float64]
    grid: NDArray[np.float64]
    ground: Ground


class Stage:
    """All shapes of a scene, packed for the kernels."""

    def __init__(self, shapes: list[Shape], ground: Ground) -> None:
        counts = [len(s.solids) for s in shapes]
        self._solids = np.concatenate([s.solids for s in shapes]) if shapes else np.zeros((0, SOLID_COLUMNS))
        low = np.array([s.bounds[0] for s in shapes]).reshape(-1, 3)
        high = np.array([s.bounds[1] for s in shapes]).reshape(-1, 3)
        first = np.concatenate([[0], np.cumsum(counts)])[:-1]
        self._fixed = np.column_stack([(low + high) / 2, (high - low) / 2, first, counts])
        self._ground = ground

    def at(self, poses: NDArray[np.float64]) -> World:
        """poses: (m, 4) x, y, z, yaw of every shape, in the order they were given."""
        turned = np.column_stack([poses[:, :3], np.cos(poses[:, 3]), np.sin(poses[:, 3])])
        objects = np.ascontiguousarray(np.concatenate([turned, self._fixed], axis=1))
        origin = self._ground.frame[:2] - _REACH
        starts, items, tops = _sort_into_columns(objects, origin)
        return World(objects, self._solids, starts, items, tops, np.array([*origin, _CELL, tops.max()]), self._ground)


@kernel
def _columns_of(row, origin):  # type: ignore[no-untyped-def]
    """Columns (first x, last x, first y, last y) under an object's turned bounding box."""
    c, s = row[3], row[4]
    x = row[0] + c * row[5] - s * row[6] - origin[0]
    y = row[1] + s * row[5] + c * row[6] - origin[1]
    hx = abs(c) * row[8] + abs(s) * row[9]
    hy = abs(s) * row[8] + abs(c) * row[9]
    last = _NUM_CELLS - 1
    return (
        max(0, int(np.floor((x - hx) / _CELL))),
        min(last, int(np.floor((x + hx) / _CELL))),
        max(0, int(np.floor((y - hy) / _CELL))),
        min(last, int(np.floor((y + hy) / _CELL))),
    )


@kernel
def _sort_into_columns(objects, origin):  # type: ignore[no-untyped-def]
    starts = np.zeros(_NUM_CELLS * _NUM_CELLS + 1, np.int64)
    tops = np.full((_NUM_CELLS, _NUM_CELLS), -1.0)
    for k in range(objects.shape[0]):
        x0, x1, y0, y1 = _columns_of(objects[k], origin)
        top = objects[k, 2] + objects[k, 7] + objects[k, 10]
        for j in range(y0, y1 + 1):
            for i in range(x0, x1 + 1):
                cell = j * _NUM_CELLS + i
                starts[cell + 1] += 1
                tops[j, i] = max(tops[j, i], top)
    starts = np.cumsum(starts)
    filled = starts[:-1].copy()
    items = np.empty(starts[-1], np.int64)
    for k in range(objects.shape[0]):
        x0, x1, y0, y1 = _columns_of(objects[k], origin)
        for j in range(y0, y1 + 1):
            for i in range(x0, x1 + 1):
                cell = j * _NUM_CELLS + i
                items[filled[cell]] = k
                filled[cell] += 1
    return starts, items, tops
