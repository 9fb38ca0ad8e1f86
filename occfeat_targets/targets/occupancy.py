"""LiDAR returns -> bit-packed occupancy (paper 3.2).

A voxel is occupied if it contains at least one return. The kernels are single-threaded numba and release the GIL, because a
build runs one keyframe per core.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import EGO_BOX
from occfeat_targets.common.compiled import compiled

MAX_VOXELS = 2**27  # limit of the kernel's 24-bit byte index: 16 MiB of bits per volume
_BLOCK = 4096  # returns per block: their coordinates and bits stay in the nearest cache


@compiled(error_model="numpy")
def _voxelize(
    points: NDArray[np.float32],  # (n, >=3)
    transforms: NDArray[np.float32],  # (frames, 4, 4)
    shape: tuple[np.int32, np.int32, np.int32],
    lower: NDArray[np.float32],  # (up, forward, right)
    upper: NDArray[np.float32],
    per_metre: NDArray[np.float32],  # cells per metre
    ego_box: np.float32,
    out: NDArray[np.uint8],  # (frames, packed_bytes)
) -> None:
    xs, ys, zs = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    hits = np.empty(_BLOCK, np.uint32)  # 24 bits: index of the volume's byte; 8 bits: the return's bit, or 0
    zero, one = np.float32(0), np.float32(1)
    rows, columns = shape[1], shape[2]
    last_u, last_f, last_r = np.float32(shape[0]) - one, np.float32(rows) - one, np.float32(columns) - one
    low_u, low_f, low_r = lower
    high_u, high_f, high_r = upper
    scale_u, scale_f, scale_r = per_metre
    for start in range(0, points.shape[0], _BLOCK):
        kept = 0
        for i in range(start, min(start + _BLOCK, points.shape[0])):  # returns from the ego vehicle are overwritten
            x, y = points[i, 0], points[i, 1]
            xs[kept], ys[kept], zs[kept] = x, y, points[i, 2]
            kept += (abs(x) >= ego_box) | (abs(y) >= ego_box)
        for frame in range(transforms.shape[0]):
            t = transforms[frame]
            a, b, c, d = t[0, 0], t[0, 1], t[0, 2], t[0, 3]
            e, f, g, h = t[1, 0], t[1, 1], t[1, 2], t[1, 3]
            k, m, n, o = t[2, 0], t[2, 1], t[2, 2], t[2, 3]
            for i in range(kept):  # vectorises: no branches, no calls, contiguous loads and stores
                x, y, z = xs[i], ys[i], zs[i]
                right, forward, up = a * x + b * y + c * z + d, e * x + f * y + g * z + h, k * x + m * y + n * z + o
                inside = (right >= low_r) & (right < high_r) & (forward >= low_f) & (forward < high_f)
                inside &= (up >= low_u) & (up < high_u)
                # Clamped before the conversion (NaN becomes 0), so that every index is valid; outside returns set no bit.
                r, w, u = (right - low_r) * scale_r, (forward - low_f) * scale_f, (up - low_u) * scale_u
                r, w, u = min(last_r, max(zero, r)), min(last_f, max(zero, w)), min(last_u, max(zero, u))
                index = np.uint32((np.int32(u) * rows + np.int32(w)) * columns + np.int32(r))
                hits[i] = index >> np.uint32(3) << np.uint32(8) | np.uint32(inside) << (index & np.uint32(7))
            target = out[frame]
            for i in range(kept):
                target[np.uint32(hits[i] >> np.uint32(8))] |= np.uint8(hits[i])


@lru_cache(maxsize=16)
def _constants(grid: VoxelGrid) -> tuple[int, tuple[Any, ...]]:
    """packed_bytes, and the grid for the kernel: (shape, lower, upper, cells per metre) along (up, forward, right)."""
    if grid.num_voxels > MAX_VOXELS:
        raise ValueError(f"grid {grid} has {grid.num_voxels} voxels, more than {MAX_VOXELS}: use larger cells")
    axes = np.array([grid.lower, grid.upper, [1 / size for size in grid.cell_size]], np.float32)
    return grid.packed_bytes, (tuple(np.array(grid.shape, np.int32)), *axes)


def check_arguments(
    points: NDArray[np.float32], grid_from_sensor: NDArray[np.float64], grid: VoxelGrid, out: NDArray[np.uint8] | None
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.uint8]]:
    """Arguments of `voxelize` and `rays.walk_rays`: float32 points, float64 transforms, and `out`, zeros by default.

    Raises ValueError on another shape, and on a grid of too many voxels.
    """
    transforms = np.asarray(grid_from_sensor, np.float64)
    if transforms.shape[-2:] != (4, 4) or transforms.ndim > 3:
        raise ValueError(f"grid_from_sensor of shape {transforms.shape}: expected (4, 4) or (frames, 4, 4)")
    points = np.ascontiguousarray(points, np.float32)
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"points of shape {points.shape}: expected (n, 3 or more) with x, y, z first")
    shape = (*transforms.shape[:-2], _constants(grid)[0])
    if out is None:
        out = np.zeros(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype}{out.shape}: expected contiguous uint8{shape} for grid {grid}")
    return points, transforms, out


def voxelize(
    points: NDArray[np.float32],
    grid_from_sensor: NDArray[np.float64],
    grid: VoxelGrid,
    *,
    ego_box: float = EGO_BOX,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Occupied voxels of a sweep, bit-packed as `VoxelGrid.unpack_volume` reads them (paper 3.2, fig. 3).

    points: (n, >=3) float32 returns in the sensor's frame [m]; returns with a NaN are ignored.
    grid_from_sensor: (4, 4), or (frames, 4, 4) for one sweep in several reference frames, which is faster than
        a call per frame: the returns are read and unpacked once.
    ego_box: returns with |x| and |y| below it [m], in the sensor's frame, are dropped as returns from the ego vehicle.
    out: (packed_bytes,) or (frames, packed_bytes) uint8 to add a further sweep to (OR); zeros by default.
    Returns (packed_bytes,) or (frames, packed_bytes) uint8: `out`.

    Cells are half-open. Arithmetic is float32 in a fixed order: a return within 0.1 mm of a cell's border may be on either
    side of it, but equally on every machine. Raises ValueError on arguments of another shape.
    """
    points, transforms, out = check_arguments(points, grid_from_sensor, grid, out)
    packed_bytes, (cells, lower, upper, per_metre) = _constants(grid)
    frames = transforms.astype(np.float32, order="C").reshape(-1, 4, 4)
    _voxelize(points, frames, cells, lower, upper, per_metre, np.float32(ego_box), out.reshape(-1, packed_bytes))
    return out
