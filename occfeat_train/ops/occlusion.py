"""Depth test for target features (`loss.occlusion=zbuffer`): which occupied voxels other occupied voxels hide from a camera.

The paper (3.3) samples the features of a voxel in every view that its centre projects into, also where something nearer hides
it. With several sweeps, this happens more often. The test has four steps, for each camera:

1. A voxel is the rectangle of pixels around its eight projected corners, at the depth of its centre.
2. A depth buffer of the image's size holds the smallest depth at each pixel, of the voxels whose rectangle contains the pixel's centre.
3. A voxel is hidden if the buffer is more than a voxel's diagonal nearer at every pixel that its rectangle touches in the image.
4. A voxel that reaches behind the camera hides nothing, and is not hidden.

The whole voxel is tested because voxels are thick. With a test of its centre alone, the road would hide itself: seen at a flat
angle, the line of sight to the centre of a voxel of 1.25 m height passes other voxels of the road for several metres.
pipelines/occlusion.py compares the two.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled
from occfeat_train.ops.views import Cameras


def hidden_voxels(
    centers: NDArray[np.floating[Any]], cell_size: tuple[float, float, float], cameras: Cameras
) -> NDArray[np.bool_]:
    """(V, n) whether each of n occupied voxels is hidden from a camera by others of them; False outside of its image.

    centers: (n, 3) right, forward, up [m]. cell_size: (up, forward, right) [m]. cameras: of one sample, on the host. float64.
    """
    half = np.array(cell_size[::-1]) / 2
    signs = np.array(list(product((-1.0, 1.0), repeat=3))).T
    matrices = np.ascontiguousarray(cameras.pixels_from_grid.numpy())
    corners = matrices[..., :3] @ (half[:, None] * signs)
    hidden = np.zeros((len(matrices), len(centers)), np.bool_)
    _test_depths(np.ascontiguousarray(centers, np.float64), matrices, corners, np.ascontiguousarray(cameras.area.numpy()),
                 cameras.image_size, 2 * float(np.linalg.norm(half)), hidden)  # fmt: skip
    return hidden


@compiled(error_model="numpy")
def _rectangle(center: NDArray[np.float64], corners: NDArray[np.float64], out: NDArray[np.float64]) -> bool:
    """(first column, first row, last column, last row) [px] around the corners' pixels -> out; False if a corner is behind the camera.

    center: (3,), corners: (3, 8) relative to it, both (u * depth, v * depth, depth).
    """
    out[:2], out[2:] = np.inf, -np.inf
    for k in range(8):
        depth = center[2] + corners[2, k]
        if depth <= 0:
            return False
        for axis in range(2):
            pixel = (center[axis] + corners[axis, k]) / depth
            out[axis], out[axis + 2] = min(out[axis], pixel), max(out[axis + 2], pixel)
    return True


@compiled(error_model="numpy")
def _test_depths(
    centers: NDArray[np.float64],  # (n, 3)
    matrices: NDArray[np.float64],  # (V, 3, 4) pixels_from_grid
    corners: NDArray[np.float64],  # (V, 3, 8) of a voxel relative to its centre, as (u * depth, v * depth, depth)
    areas: NDArray[np.float64],  # (V, 4)
    image_size: tuple[int, int],
    diagonal: float,  # [m]
    hidden: NDArray[np.bool_],  # (V, n) out
) -> None:
    """Releases the GIL."""
    number, (height, width) = len(centers), image_size
    depths, rectangles, in_front = np.empty(number), np.empty((number, 4)), np.empty(number, np.bool_)
    buffer, center = np.empty((height, width)), np.empty(3)
    for view in range(len(matrices)):
        # the part of the image that shows the scene, in whole pixels
        top, left = max(np.floor(areas[view, 0]), 0.0), max(np.floor(areas[view, 1]), 0.0)
        bottom, right = min(np.ceil(areas[view, 2]), height) - 1.0, min(np.ceil(areas[view, 3]), width) - 1.0
        buffer[:] = np.inf
        for i in range(number):
            m = matrices[view]
            for a in range(3):
                center[a] = m[a, 0] * centers[i, 0] + m[a, 1] * centers[i, 1] + m[a, 2] * centers[i, 2] + m[a, 3]
            depths[i] = center[2]
            rectangle = rectangles[i]
            in_front[i] = _rectangle(center, corners[view], rectangle)
            if not in_front[i]:
                continue
            # pixels whose centre is in the rectangle; clipped as floats, because they may be too large for integers
            first_column, last_column = (
                int(max(np.ceil(rectangle[0] - 0.5), left)),
                int(min(np.floor(rectangle[2] - 0.5), right)),
            )
            first_row, last_row = (
                int(max(np.ceil(rectangle[1] - 0.5), top)),
                int(min(np.floor(rectangle[3] - 0.5), bottom)),
            )
            for row in range(first_row, last_row + 1):
                for column in range(first_column, last_column + 1):
                    buffer[row, column] = min(buffer[row, column], depths[i])
        for i in range(number):
            if not in_front[i]:
                continue
            rectangle, nearest = rectangles[i], depths[i] - diagonal
            first_column, last_column = int(max(np.floor(rectangle[0]), left)), int(min(np.floor(rectangle[2]), right))
            first_row, last_row = int(max(np.floor(rectangle[1]), top)), int(min(np.floor(rectangle[3]), bottom))
            is_hidden = first_row <= last_row and first_column <= last_column
            for row in range(first_row, last_row + 1):
                for column in range(first_column, last_column + 1):
                    if buffer[row, column] >= nearest:
                        is_hidden = False
                        break
                if not is_hidden:
                    break
            hidden[view, i] = is_hidden
