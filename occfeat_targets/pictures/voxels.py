"""Voxels as cubes in perspective, seen from behind and above the ego vehicle."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.pictures.birdseye import EGO_OUTLINE, Mask
from occfeat_targets.pictures.colors import Colors

EGO_COLOR = (17, 17, 17)
_EGO_HEIGHT = 1.7  # [m]
_SHADES = np.array([1, 0.82, 0.68])  # brightness of faces across up, forward and right
_BACKGROUND = "#f2f2ef"


def viewpoint(grid: VoxelGrid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(right, forward, up) of the viewer [m], outside of the grid, and (3, 3) camera axes from the grid's.

    Camera axes: x right, y down, z towards the middle of the grid.
    """
    lower, upper = np.array(grid.lower[::-1]), np.array(grid.upper[::-1])
    middle, reach = (lower + upper) / 2, (upper - lower)[:2].max()
    position = np.array([middle[0], lower[1] - 0.7 * reach, upper[2] + 0.75 * reach])
    ahead = np.array([middle[0], middle[1], middle[2]]) - position
    ahead /= np.linalg.norm(ahead)
    right = np.array([1.0, 0, 0])
    return position, np.stack([right, np.cross(ahead, right), ahead])


def visible_faces(
    shown: Mask, viewer: NDArray[np.float64], grid: VoxelGrid
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Faces of the shown voxels (Z, H, W) that look to the viewer and have no shown neighbour there, in drawing order.

    viewer: (right, forward, up) [m], outside of the shown voxels. Returns corners (n, 4, 3) (right, forward, up) [m], flat
    indices (n,) of the voxels, and the axis (n,) of the volume that a face lies across.

    A ray from the viewer moves away from its cell along each axis, so a voxel that hides another one is nearer by the sum of
    the distances along the axes in cells. Drawing in descending order of that sum is exact.
    """
    voxels = np.flatnonzero(shown)
    cells = np.stack(np.unravel_index(voxels, grid.shape), axis=-1)
    at = transform(grid.cells_from_grid, viewer)[::-1]  # (up, forward, right), like the cells
    offset = cells + 0.5 - at
    distance, padded = np.abs(offset).sum(axis=-1), np.pad(shown, 1)
    corners, owners, axes, order = [], [], [], []
    for axis in range(3):
        step = np.where(offset[:, axis] > 0, -1, 1)
        neighbour = cells + 1  # of the padded volume
        neighbour[:, axis] += step
        chosen = np.flatnonzero((np.abs(offset[:, axis]) > 0.5) & ~padded[tuple(neighbour.T)])
        square = np.zeros((len(chosen), 4, 3))
        square[..., axis] = 0.5 * step[chosen, None]
        square[..., [other for other in range(3) if other != axis]] = [
            (-0.5, -0.5),
            (-0.5, 0.5),
            (0.5, 0.5),
            (0.5, -0.5),
        ]
        corners.append(cells[chosen, None] + 0.5 + square)
        owners.append(voxels[chosen])
        axes.append(np.full(len(chosen), axis))
        order.append(distance[chosen])
    sequence = np.argsort(-np.concatenate(order), kind="stable")
    metres = np.array(grid.lower) + np.concatenate(corners)[sequence] * np.array(grid.cell_size)
    return metres[..., ::-1], np.concatenate(owners)[sequence], np.concatenate(axes)[sequence]


def ego_voxels(grid: VoxelGrid, grid_from_ego: Matrix) -> Mask:
    """(Z, H, W) voxels of the ego vehicle's box: those whose centres lie in it."""
    centers = transform(inverse_rigid(grid_from_ego), grid.voxel_centers().astype(np.float64))
    low, high = EGO_OUTLINE.min(axis=0), EGO_OUTLINE.max(axis=0) + np.array([0, 0, _EGO_HEIGHT])
    inside: Mask = ((centers >= low) & (centers <= high)).all(axis=-1)
    return inside


def draw_voxels(
    axes: Axes, voxels: NDArray[np.integer[Any]], colors: Colors, grid: VoxelGrid, grid_from_ego: Matrix
) -> None:
    """Draw voxels (n,), flat indices, in colours (n, 3), darker on their sides, and the ego vehicle in black.

    The axes show the whole grid and keep its proportions.
    """
    position, camera_from_grid = viewpoint(grid)

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        seen = (points - position) @ camera_from_grid.T
        projected: NDArray[np.float64] = seen[..., :2] / seen[..., 2:]
        return projected

    (low, rear, left), (high, front, right) = grid.lower, grid.upper
    ground = float(np.clip(transform(grid_from_ego, np.zeros((1, 3)))[0, 2], low, high))
    base = np.array([(left, rear, ground), (left, front, ground), (right, front, ground), (right, rear, ground)])
    axes.add_collection(PolyCollection([project(base)], facecolors=_BACKGROUND, edgecolors="#bbb", linewidths=0.6))
    shades = np.zeros((grid.num_voxels, 3), np.float64)
    shades[voxels] = colors
    shown = np.zeros(grid.shape, np.bool_)
    shown.reshape(-1)[voxels] = True
    ego = ego_voxels(grid, grid_from_ego)
    shown |= ego
    shades[ego.reshape(-1)] = EGO_COLOR
    corners, owners, across = visible_faces(shown, position, grid)
    faces = shades[owners] * _SHADES[across, None] / 255
    axes.add_collection(
        PolyCollection(list(project(corners)), facecolors=faces, edgecolors=0.8 * faces, linewidths=0.25)
    )
    box = project(np.array([(r, f, u) for r in (left, right) for f in (rear, front) for u in (low, high)]))
    (x_low, y_low), (x_high, y_high) = box.min(axis=0), box.max(axis=0)
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_high, y_low)
    axes.set_aspect("equal")
    axes.set_axis_off()
