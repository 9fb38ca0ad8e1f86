"""Queries of Img-ALSO (paper 4.2): positions on the rays of a keyframe's LiDAR returns, and the BEV cells that explain them.

The space just behind a return is occupied, and the space between sensor and return is free. The numbers are ALSO's
(github.com/valeoai/ALSO).

This is NumPy on the host: the loader's threads draw queries while the device trains, from the generator of the sample, so that
queries do not depend on the device, on the batch or on other samples. It takes 6 ms of a thread per sample. On a device that
never waits for the host, the number of pairs would have to be fixed: 25 cells per query, of which half are farther than RADIUS,
and the head's work doubles (pipelines/benchmarks/methods.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid

NUM_QUERIES = 4096
DECIMATION = 0.1  # edge of the cells of which one return each is kept [m]
DELTA = 0.1  # largest distance between a return and a query next to it [m]
RADIUS = 1.0  # horizontal distance within which a cell explains a query [m]
NO_INTENSITY = -1.0
_LARGEST_INTENSITY = 255.0  # of nuScenes' sensor


@dataclass(frozen=True)
class Queries:
    """xyz: positions in the frame of the returns [m]. occupied: whether they lie behind their return, seen from the sensor.

    intensity: of the return next to a query, 0 to 1; NO_INTENSITY on lines of sight, and where the return has none.
    """

    xyz: Float64[NDArray[Any], "q 3"]
    occupied: Bool[NDArray[Any], " q"]
    intensity: Float32[NDArray[Any], " q"]


def decimate(xyz: Float64[NDArray[Any], "n 3"], size: float = DECIMATION) -> Int64[NDArray[Any], " m"]:
    """Ascending indices of the first return in each cubic cell of edge `size` [m].

    ALSO rounds coordinates towards zero, so that its cells next to the sensor's planes are twice as large. These are equal.
    """
    if not len(xyz):
        return np.empty(0, np.int64)
    cells = np.floor(xyz / size).astype(np.int64)
    cells -= cells.min(axis=0)
    _, first = np.unique(np.ravel_multi_index(tuple(cells.T), tuple(cells.max(axis=0) + 1)), return_index=True)
    return np.sort(first)


def draw_queries(
    xyz: Float64[NDArray[Any], "n 3"],
    intensity: Float32[NDArray[Any], " n"],
    sensor: Float64[NDArray[Any], " 3"],
    rng: np.random.Generator,
    number: int,
) -> Queries:
    """`number` queries: a third up to DELTA in front of a return, a third anywhere on a line of sight, the rest up to DELTA behind.

    xyz, intensity: decimated returns; the intensity is 0 to 255. sensor: its position. A return is drawn at most once in each
    third, so n returns give at most 3 n queries.
    """
    third = number // 3
    front, sight, behind = (rng.permutation(len(xyz))[:count] for count in (third, third, number - 2 * third))
    chosen = np.concatenate([front, sight, behind])
    ray = xyz[chosen] - sensor
    length = np.linalg.norm(ray, axis=1)
    fraction = rng.random(len(chosen))
    occupied, is_sight = np.zeros((2, len(chosen)), np.bool_)
    is_sight[len(front) : len(front) + len(sight)] = True
    occupied[len(front) + len(sight) :] = True
    # Distance from the sensor, as a fraction of the return's.
    beside = DELTA * fraction / np.maximum(length, 1e-6)
    along = np.where(is_sight, fraction, np.where(occupied, 1 + beside, 1 - beside))
    scaled = intensity[chosen] / np.float32(_LARGEST_INTENSITY)
    scaled[is_sight | ~np.isfinite(scaled)] = NO_INTENSITY
    return Queries(sensor + along[:, None] * ray, occupied, scaled)


def columns_near(
    xy: Float64[NDArray[Any], "q 2"], grid: VoxelGrid, radius: float = RADIUS
) -> tuple[Int64[NDArray[Any], " p"], Int64[NDArray[Any], " p"]]:
    """All pairs of a position and a cell of the grid's plane whose centre is at most `radius` [m] away.

    xy: (right, forward) [m]. Returns indices of positions and flat indices of cells into (H, W), ascending. A position outside
    of the grid has pairs only if it is near its border. A fixed window of cells around each position contains all of them.
    """
    cells, gaps = [], []
    for axis in (1, 0):  # of the position: forward, right
        lower, size, number = grid.lower[2 - axis], grid.cell_size[2 - axis], grid.shape[2 - axis]
        reach = math.floor(radius / size + 0.5)
        index = np.floor((xy[:, axis, None] - lower) / size).astype(np.int64) + np.arange(-reach, reach + 1)
        gap = (lower + (index + 0.5) * size - xy[:, axis, None]) ** 2
        cells.append(index)
        gaps.append(np.where((index >= 0) & (index < number), gap, np.inf))
    (rows, columns), (forward, right) = cells, gaps
    position, row, column = np.nonzero(forward[:, :, None] + right[:, None] <= radius**2)
    return position, rows[position, row] * grid.shape[2] + columns[position, column]
