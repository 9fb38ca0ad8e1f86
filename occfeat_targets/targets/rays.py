"""LiDAR rays -> bit-packed voxels that they pass: free space.

The voxels are those of an exact grid traversal (Amanatides and Woo 1987) from the sensor to the return. That method steps from
voxel to voxel, so each step waits for the one before. All rays of a sweep start at one point, which allows to go plane by plane
instead: the rays that cross a plane of the grid are a slice of the rays sorted by how far they reach along that axis, and each
of them leaves the voxel at (sensor + distance of the plane * slope of the ray). That loop vectorises, and a sweep takes about a
fourth of the time. The kernels are single-threaded numba and release the GIL, because a build runs one keyframe per core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import EGO_BOX
from occfeat_targets.common.compiled import compiled
from occfeat_targets.targets.occupancy import check_arguments

Rays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
_BLOCK = 8192  # rays per block: their slopes stay in the processor's cache
_TINY = np.float32(1e-30)  # instead of a zero in a direction


@compiled(error_model="numpy")
def _leave_voxels(
    slope_b: NDArray[np.float32],
    slope_c: NDArray[np.float32],
    distance: np.float32,
    sensor: tuple[np.float32, np.float32],
    last: tuple[np.float32, np.float32],
    steps: tuple[np.int32, np.int32],
    base: np.int32,
    outside: np.int32,
    index: NDArray[np.int32],
    passed: NDArray[np.uint8],
) -> None:
    """Mark the voxels that these rays leave through one plane across axis a, at a signed `distance` [cells] from the sensor.

    slope_b, slope_c: (n,) cells along the other axes per cell along a. last, steps: index of the last cell and step of the flat
    index along b and c. base: flat index of the cells before the plane at b = c = 0. outside: flat index of no voxel.
    """
    zero = np.float32(0)
    at_b, at_c = sensor
    last_b, last_c = last
    step_b, step_c = steps
    for i in range(slope_b.shape[0]):  # vectorises
        b, c = np.floor(at_b + distance * slope_b[i]), np.floor(at_c + distance * slope_c[i])
        inside = (b >= zero) & (b <= last_b) & (c >= zero) & (c <= last_c)
        flat = base + np.int32(b) * step_b + np.int32(c) * step_c
        index[i] = flat if inside else outside
    for i in range(slope_b.shape[0]):
        passed[np.uint32(index[i])] = 1


@compiled(error_model="numpy")
def _clip(
    rays: Rays,
    sensor: NDArray[np.float32],
    shape: NDArray[np.float32],
    ends: NDArray[np.float32],
    passed: NDArray[np.uint8],
) -> None:
    """Position on each ray where it ends in the grid, as a fraction of the ray: 1 at its return, 0 if it misses the grid.

    rays: three (n,) arrays, right, forward and up, from sensor to return [cells]; zeros are replaced. Voxels in which a ray leaves the grid are marked as passed.
    """
    zero, one = np.float32(0), np.float32(1)
    columns, area = np.int64(shape[0]), np.int64(shape[0]) * np.int64(shape[1])
    ends[:], nears = one, np.zeros_like(ends)
    for a in range(3):
        along, start, size = rays[a], sensor[a], shape[a]
        for i in range(ends.shape[0]):  # vectorises
            step = along[i] if along[i] != zero else _TINY
            low, high = -start / step, (size - start) / step
            nears[i], ends[i] = max(nears[i], min(low, high)), min(ends[i], max(low, high))
            along[i] = step
    for i in range(ends.shape[0]):
        ends[i] = ends[i] if nears[i] < ends[i] else zero
    for i in range(ends.shape[0]):
        if zero < ends[i] < one:
            x = np.int64(min(shape[0] - one, max(zero, sensor[0] + ends[i] * rays[0][i])))
            y = np.int64(min(shape[1] - one, max(zero, sensor[1] + ends[i] * rays[1][i])))
            z = np.int64(min(shape[2] - one, max(zero, sensor[2] + ends[i] * rays[2][i])))
            passed[z * area + y * columns + x] = 1


@compiled(error_model="numpy")
def _pass_planes(
    axis: int,
    rays: Rays,
    ends: NDArray[np.float32],
    sensor: NDArray[np.float32],
    shape: NDArray[np.float32],
    passed: NDArray[np.uint8],
) -> None:
    """Mark the voxels that rays leave through planes across an axis: 0 right, 1 forward, 2 up."""
    zero, one = np.float32(0), np.float32(1)
    others = ((1, 2), (0, 2), (0, 1))
    b, c = others[axis]
    steps = (np.int32(1), np.int32(shape[0]), np.int32(np.int64(shape[0]) * np.int64(shape[1])))
    cells, n = int(shape[axis]), ends.shape[0]
    along, side_b, side_c, start = rays[axis], rays[b], rays[c], sensor[axis]
    reach, inverse = np.empty(n, np.int32), np.empty(n, np.float32)  # index of each ray's last cell along the axis
    last = shape[axis] - one
    for i in range(n):  # vectorises
        reach[i] = np.int32(min(last, max(zero, start + ends[i] * along[i])))
        inverse[i] = one / along[i]
    # Counting sort by that index: bounds[j] is the number of rays that reach no further than cell j - 1.
    bounds = np.zeros(cells + 1, np.int32)
    for i in range(n):
        bounds[np.uint32(reach[i] + 1)] += 1
    for j in range(cells):
        bounds[j + 1] += bounds[j]
    slot, slope_b, slope_c = bounds[:cells].copy(), np.empty(n, np.float32), np.empty(n, np.float32)
    for i in range(n):
        cell = np.uint32(reach[i])
        at = np.uint32(slot[cell])
        slot[cell] += 1
        slope_b[at], slope_c[at] = side_b[i] * inverse[i], side_c[i] * inverse[i]

    index, outside = np.empty(n, np.int32), np.int32(passed.shape[0] - 1)
    sensor_bc, last_bc, steps_bc = (sensor[b], sensor[c]), (shape[b] - one, shape[c] - one), (steps[b], steps[c])
    first = int(np.floor(min(max(start, -one), shape[axis])))  # the sensor's cell; -1 or `cells` outside of the grid
    for plane in range(max(first + 1, 1), cells):  # upwards, from cell plane - 1 into cell plane
        some = slice(bounds[plane], n)
        if bounds[plane] == n:
            break
        _leave_voxels(
            slope_b[some], slope_c[some], np.float32(plane) - start, sensor_bc, last_bc, steps_bc,
            np.int32((plane - 1) * steps[axis]), outside, index, passed,
        )  # fmt: skip
    for plane in range(min(first, cells - 1), 0, -1):  # downwards, from cell plane into cell plane - 1
        some = slice(0, bounds[plane])
        if bounds[plane] == 0:
            break
        _leave_voxels(
            slope_b[some], slope_c[some], np.float32(plane) - start, sensor_bc, last_bc, steps_bc,
            np.int32(plane * steps[axis]), outside, index, passed,
        )  # fmt: skip


@compiled(error_model="numpy")
def _walk(
    points: NDArray[np.float32],  # (n, >=3)
    cells_from_sensor: NDArray[np.float32],  # (4, 4)
    shape: NDArray[np.float32],  # (right, forward, up)
    ego_box: np.float32,
    passed: NDArray[np.uint8],  # (num_voxels + 1,)
) -> None:
    t = cells_from_sensor
    sensor = t[:3, 3].copy()
    xs, ys, zs = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    ends = np.empty(_BLOCK, np.float32)
    for begin in range(0, points.shape[0], _BLOCK):
        kept = 0
        for i in range(begin, min(begin + _BLOCK, points.shape[0])):
            x, y, z = points[i, 0], points[i, 1], points[i, 2]
            xs[kept], ys[kept], zs[kept] = x, y, z
            is_own = (abs(x) < ego_box) & (abs(y) < ego_box)
            kept += (not is_own) & (abs(x) + abs(y) + abs(z) < np.float32(np.inf))
        for i in range(kept):  # vectorises
            x, y, z = xs[i], ys[i], zs[i]
            xs[i] = t[0, 0] * x + t[0, 1] * y + t[0, 2] * z
            ys[i] = t[1, 0] * x + t[1, 1] * y + t[1, 2] * z
            zs[i] = t[2, 0] * x + t[2, 1] * y + t[2, 2] * z
        rays = xs[:kept], ys[:kept], zs[:kept]
        _clip(rays, sensor, shape, ends[:kept], passed)
        for axis in range(3):
            _pass_planes(axis, rays, ends[:kept], sensor, shape, passed)


def walk_rays(
    points: NDArray[np.float32],
    grid_from_sensor: NDArray[np.float64],
    grid: VoxelGrid,
    *,
    ego_box: float = EGO_BOX,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Voxels that the rays of a sweep pass before their returns, bit-packed as `VoxelGrid.unpack_volume` reads them.

    A ray starts at the sensor, the origin of the returns' frame, and ends at its return. The voxel of the return is not passed
    by this ray, but may be by another one. Outside of the grid nothing is marked; the sensor and the return may be there.

    points: (n, >=3) float32 returns in the sensor's frame [m]; those that are not finite are ignored.
    grid_from_sensor: (4, 4), or (frames, 4, 4) for one sweep in several reference frames.
    ego_box: returns with |x| and |y| below it [m], in the sensor's frame, are from the ego vehicle and dropped.
    out: (packed_bytes,) or (frames, packed_bytes) uint8 to add a further sweep to (OR); zeros by default.
    Returns (packed_bytes,) or (frames, packed_bytes) uint8: `out`.

    Arithmetic is float32: a ray within 0.1 mm of a voxel's border may or may not pass it. Raises ValueError on arguments of
    another shape.
    """
    points, transforms, out = check_arguments(points, grid_from_sensor, grid, out)
    cells_from_sensor = (grid.cells_from_grid @ transforms).astype(np.float32).reshape(-1, 4, 4)
    cells: Any = np.array(grid.shape[::-1], np.float32)
    for matrix, packed in zip(cells_from_sensor, out.reshape(-1, grid.packed_bytes), strict=True):
        passed = np.zeros(grid.num_voxels + 1, np.uint8)  # the last one stands for all points outside
        _walk(points, matrix, cells, np.float32(ego_box), passed)
        packed |= np.packbits(passed[:-1], bitorder="little")
    return out
