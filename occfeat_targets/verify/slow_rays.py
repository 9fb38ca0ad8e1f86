"""Slow, independent computation of the voxels that LiDAR rays pass, for `verify` and the tests.

Float64 NumPy: every ray is cut at all planes of the grid that it crosses, and the middle of each piece lies in a voxel that the
ray passes. Where rounding may decide, single voxels are tested against all rays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
_RAYS = 2048  # rays at a time, for memory


def passed_voxels(start: Floats, ends: Floats, grid: VoxelGrid) -> Mask:
    """(Z, H, W): voxels that rays from `start` (3,) pass before the voxels of their `ends` (n, 3), all (right, forward, up) [m]."""
    lower, size = np.array(grid.lower[::-1]), np.array(grid.cell_size[::-1])
    volume = np.zeros(grid.shape, np.bool_)
    for begin in range(0, len(ends), _RAYS):
        rays = ends[begin : begin + _RAYS] - start
        cuts = [np.zeros((len(rays), 1)), np.ones((len(rays), 1))]
        for axis, cells in enumerate(grid.shape[::-1]):
            planes = lower[axis] + np.arange(cells + 1) * size[axis]
            with np.errstate(divide="ignore", invalid="ignore"):
                cuts.append(np.clip(np.nan_to_num((planes - start[axis]) / rays[:, axis, None], nan=0.0), 0.0, 1.0))
        at = np.sort(np.concatenate(cuts, axis=1), axis=1)
        middle = (at[:, 1:] + at[:, :-1]) / 2
        index = np.floor((start + middle[..., None] * rays[:, None] - lower) / size).astype(np.int64)
        last = np.floor((ends[begin : begin + _RAYS] - lower) / size).astype(np.int64)
        is_passed = (at[:, 1:] > at[:, :-1]) & (index != last[:, None]).any(axis=2)
        is_passed &= ((index >= 0) & (index < grid.shape[::-1])).all(axis=2)
        right, forward, up = index[is_passed].T
        volume[up, forward, right] = True
    return volume


def is_passed(voxel: NDArray[np.int64], start: Floats, ends: Floats, grid: VoxelGrid, grow: float) -> bool:
    """Whether some ray passes a voxel (z, h, w) that is made larger by `grow` [m] on every side.

    Rays that end in a voxel made smaller do not count, because they may end in the voxel itself.
    """
    low = np.array(grid.lower[::-1]) + voxel[::-1] * np.array(grid.cell_size[::-1]) - grow
    high = low + np.array(grid.cell_size[::-1]) + 2 * grow
    if grow < 0:
        margin = 2 * grow
        ends = ends[~((ends > low + margin) & (ends < high - margin)).all(axis=1)]
    along = np.where(ends == start, 1e-300, ends - start)
    with np.errstate(over="ignore"):
        entry, leave = np.sort([(low - start) / along, (high - start) / along], axis=0)
    return bool((np.maximum(entry.max(axis=1), 0) < np.minimum(leave.min(axis=1), 1)).any())
