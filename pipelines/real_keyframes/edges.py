"""Whether LiDAR and images fit together: the borders of near objects in the LiDAR must be edges in the images.

No network, teacher or label is involved, so this measures calibration, ego motion and synchronisation alone (after Levinson
and Thrun, Automatic Online Calibration of Cameras and Lasers, 2013).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, project, transform

REACH = 4  # [px] of a return's neighbourhood in each direction
FACTOR, STEP = 1.2, 0.5  # a border: a neighbour is farther by this factor and these metres


def edge_ranks(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W, 3) -> (H, W): the rank in [0, 1) of each pixel's gradient, averaged over 3x3 pixels, in its image."""
    strength = np.hypot(*np.gradient(image.astype(np.float64).mean(axis=-1)))
    for axis in range(2):
        strength = sum(np.roll(strength, shift, axis) for shift in (-1, 0, 1))
    order = strength.argsort(axis=None, kind="stable")
    ranks = np.empty(order.size)
    ranks[order] = np.arange(order.size) / order.size
    return ranks.reshape(strength.shape)


def borders(pixels: NDArray[np.float64], depth: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(n, 2), (n,) -> (n,) which returns have a much farther return within REACH px, and no much nearer one."""
    column, row = pixels.astype(np.int64).T
    nearest, farthest = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(nearest, (row, column), depth)
    np.maximum.at(farthest, (row, column), depth)
    for axis in range(2):
        nearest, farthest = _spread(nearest, axis, np.minimum, np.inf), _spread(farthest, axis, np.maximum, -np.inf)
    is_border: NDArray[np.bool_] = farthest[row, column] > FACTOR * depth + STEP
    return is_border & (nearest[row, column] >= depth / FACTOR - STEP)


def _spread(values: NDArray[np.float64], axis: int, reduce: Any, fill: float) -> NDArray[np.float64]:
    """The minimum or maximum over up to REACH neighbours on either side along an axis."""
    around = [(REACH, REACH) if each == axis else (0, 0) for each in range(values.ndim)]
    padded = np.pad(values, around, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1, axis=axis)
    return reduce.reduce(windows, axis=-1)  # type: ignore[no-any-return]


def edge_alignment(
    images: NDArray[np.uint8], intrinsics: Matrix, cam_from_ego: Matrix, returns: NDArray[np.float64]
) -> float:
    """Mean rank of the images' gradients at borders in the LiDAR minus that at all other returns; about 0 if unrelated.

    images: (V, H, W, 3). intrinsics: (V, 3, 3). cam_from_ego: (V, 4, 4). returns: (n, 3) in the ego frame [m].
    NaN if no camera sees a border.
    """
    at_borders, elsewhere = [], []
    for image, k, matrix in zip(images, intrinsics, cam_from_ego, strict=True):
        size = (image.shape[0], image.shape[1])
        pixels, depth, is_seen = project(k, transform(matrix, returns), size)
        pixels, depth = pixels[is_seen], depth[is_seen]
        is_border = borders(pixels, depth, size)
        column, row = pixels.astype(np.int64).T
        ranks = edge_ranks(image)[row, column]
        at_borders.append(ranks[is_border])
        elsewhere.append(ranks[~is_border])
    found, others = np.concatenate(at_borders), np.concatenate(elsewhere)
    return float(found.mean() - others.mean()) if len(found) and len(others) else float("nan")
