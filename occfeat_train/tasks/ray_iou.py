"""RayIoU (SparseOcc, Liu et al. 2024) of a binary occupancy: whether query rays first meet occupied voxels at the right depth.

Rays start at the LiDAR, in a fixed pattern. The depth of a ray is the distance to the border of the first occupied voxel. Rays
whose true depth exists are counted, so a prediction that is thick behind the true surface is not punished, but one before it is.
There is one class, "occupied". With true positives TP, rays of which both depths exist and differ by less than a threshold,
RayIoU = TP / (rays with a true depth + those of them with a predicted depth - TP).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.common.compiled import compiled

DEPTH_ERRORS = (1.0, 2.0, 4.0)  # [m]; thresholds
NUM_COUNTS = 2 + len(DEPTH_ERRORS)
_STEEP = 10  # elevations whose rays meet the ground at equal distances
_HIGHEST = 0.21  # [rad] of a nuScenes LiDAR's rays above the horizon


@lru_cache(maxsize=1)
def query_directions() -> NDArray[np.float64]:
    """(n, 3) unit vectors (right, forward, up) of SparseOcc's query rays: every degree of azimuth, at 39 elevations.

    The lowest ten meet the ground at 1 to 10 times the height of the sensor. From there on the elevation grows evenly to that
    of the highest rays of a nuScenes LiDAR.
    """
    elevations = [-np.arctan(1 / k) for k in range(1, _STEEP + 1)]
    step = elevations[-1] - elevations[-2]
    while elevations[-1] < _HIGHEST:
        elevations.append(elevations[-1] + step)
    azimuth, elevation = (a.ravel() for a in np.meshgrid(np.deg2rad(np.arange(360)), elevations))
    return np.stack([np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation)], 1)


@compiled(error_model="numpy")
def _first_hits(
    volume: NDArray[np.bool_],  # (Z, H, W)
    origin: NDArray[np.float64],  # (3,) right, forward, up [cells]
    rays: NDArray[np.float64],  # (n, 3) [cells per metre]
    depths: NDArray[np.float64],  # (n,) out [m]
) -> None:
    """Sequential grid traversal (Amanatides and Woo 1987). A border's distance is computed from its position, not accumulated."""
    shape = (volume.shape[2], volume.shape[1], volume.shape[0])
    for i in range(rays.shape[0]):
        near, far = 0.0, np.inf
        for a in range(3):
            if rays[i, a] != 0:
                low, high = -origin[a] / rays[i, a], (shape[a] - origin[a]) / rays[i, a]
                near, far = max(near, min(low, high)), min(far, max(low, high))
            elif not 0 <= origin[a] < shape[a]:
                far = -np.inf
        depths[i] = np.inf
        if near >= far:  # the ray misses the grid
            continue
        cell, step, border = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3)
        for a in range(3):
            cell[a] = min(shape[a] - 1, max(0, int(np.floor(origin[a] + near * rays[i, a]))))
            step[a] = 1 if rays[i, a] > 0 else -1
            border[a] = (cell[a] + (step[a] > 0) - origin[a]) / rays[i, a] if rays[i, a] != 0 else np.inf
        depth = near
        while not volume[cell[2], cell[1], cell[0]]:
            a = int(np.argmin(border))
            depth = border[a]
            cell[a] += step[a]
            if not 0 <= cell[a] < shape[a]:
                depth = np.inf
                break
            border[a] = (cell[a] + (step[a] > 0) - origin[a]) / rays[i, a]
        depths[i] = depth


def first_depths(
    volume: NDArray[np.bool_], origin: NDArray[np.floating[Any]], directions: NDArray[np.float64], grid: VoxelGrid
) -> NDArray[np.float64]:
    """(n,) distance [m] at which each ray enters its first occupied voxel, 0 from inside of one, inf without one.

    volume: (Z, H, W), occupied voxels. origin: (3,) right, forward, up [m]; it may be outside of the grid.
    directions: (n, 3) unit vectors. float64.
    """
    cells = np.array(grid.cell_size[::-1])
    depths = np.empty(len(directions))
    start = (np.asarray(origin, np.float64) - grid.lower[::-1]) / cells
    _first_hits(np.ascontiguousarray(volume), start, np.ascontiguousarray(directions / cells), depths)
    return depths


def count_rays(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) depths -> (NUM_COUNTS,): rays with a true depth, those of them with a predicted one, true positives per threshold."""
    is_true = np.isfinite(true)
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.abs(true - predicted)[is_true]
    hits = [is_true.sum(), np.isfinite(predicted[is_true]).sum(), *((error < limit).sum() for limit in DEPTH_ERRORS)]
    return np.array(hits, np.int64)


def ray_counts(
    predicted: Bool[Tensor, "B Z H W"],
    true_depths: Float64[Tensor, "B n"],
    origins: Float[Tensor, "B 3"],
    grid: VoxelGrid,
) -> Int64[Tensor, " counts"]:
    """`count_rays` of the query rays from `origins` [m] in the grid, summed over samples. On the host.

    true_depths: `first_depths` of these rays in the true occupancy [m].
    """
    total = np.zeros(NUM_COUNTS, np.int64)
    for volume, depths, origin in zip(*(t.cpu().numpy() for t in (predicted, true_depths, origins)), strict=True):
        total += count_rays(depths, first_depths(volume, origin, query_directions(), grid))
    return torch.from_numpy(total)


def ray_ious(counts: Int64[Tensor, " n"]) -> dict[str, float | None]:
    """{"ray_iou": mean over the thresholds, "ray_iou_1m": ...} in percent; None without rays."""
    true, found, *hits = counts.tolist()
    values = [100 * hit / (true + found - hit) if true else None for hit in hits]
    by_threshold = {f"ray_iou_{limit:g}m": value for limit, value in zip(DEPTH_ERRORS, values, strict=True)}
    mean = sum(value for value in values if value is not None) / len(values) if true else None
    return {"ray_iou": mean, **by_threshold}
