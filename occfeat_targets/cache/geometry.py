"""Rigid transforms and the pinhole camera.

A 4x4 transform is called ``a_from_b`` and maps column vectors of frame b to frame a, so that adjacent names in a
product match: ``cam_from_ego @ ego_from_lidar``.

Pixels are continuous: pixel ``i`` covers ``[i, i + 1)``, an image of width W spans ``[0, W)``, and the centre of
its first pixel is at 0.5. In this convention a resize scales intrinsics without a half-pixel term, and the reference code's
``fx * s, cx * s`` is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
Area = tuple[int, int, int, int]  # (top, left, bottom, right) [px]
MAX_STRETCH = (
    1.05  # ratio of two aspect ratios up to which an image is stretched instead of padded: 900x1600 -> 270x480, 224x392
)

# (right, forward, up) of a grid from the axes of its frame. nuScenes' ego frame (x forward, y left, z up): the grid's origin
# is 0.5 m above the ego's. A camera (x right, y down, z forward): the origin is 1 m below it, as in Simple-BEV.
GRID_FROM_EGO_AXES: Matrix = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, -0.5], [0, 0, 0, 1]], np.float64)
GRID_FROM_CAMERA_AXES: Matrix = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1.0], [0, 0, 0, 1]], np.float64)


def rotation_matrix(quaternion: ArrayLike) -> Matrix:
    """(3, 3) rotation of a quaternion (w, x, y, z), which is normalised first.

    Raises ValueError on a NaN, an infinity or a zero quaternion.
    """
    q = np.asarray(quaternion, np.float64)
    norm = np.sqrt((q * q).sum()) if q.shape == (4,) else np.nan
    if not (np.isfinite(norm) and norm > 1e-6):
        raise ValueError(f"rotation {np.asarray(quaternion).tolist()} is no quaternion (w, x, y, z)")
    w, x, y, z = q / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rigid(rotation: ArrayLike, translation: ArrayLike) -> Matrix:
    """(4, 4) transform from a quaternion (w, x, y, z) and a translation [m].

    Raises ValueError on a NaN, an infinity or a zero quaternion.
    """
    t = np.asarray(translation, np.float64)
    if t.shape != (3,) or not np.isfinite(t).all():
        raise ValueError(f"translation {np.asarray(translation).tolist()} is not three finite numbers")
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_matrix(rotation)
    matrix[:3, 3] = t
    return matrix


def inverse_rigid(a_from_b: Matrix) -> Matrix:
    """(..., 4, 4) -> the inverse of a rotation and translation."""
    inverse = np.zeros_like(a_from_b)
    rotation_t = np.swapaxes(a_from_b[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = rotation_t
    inverse[..., :3, 3] = -(rotation_t @ a_from_b[..., :3, 3, None])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


def transform(a_from_b: NDArray[Any], points_b: NDArray[Any]) -> NDArray[Any]:
    """(4, 4) and (..., 3) points in frame b -> (..., 3) points in frame a [m]."""
    return points_b @ a_from_b[:3, :3].T + a_from_b[:3, 3]


def scale_intrinsics(intrinsics: NDArray[Any], scale_x: float, scale_y: float) -> NDArray[Any]:
    """(..., 3, 3) intrinsics after the image is resized by (scale_x, scale_y)."""
    return intrinsics * np.array([[scale_x], [scale_y], [1.0]], intrinsics.dtype)


def crop_intrinsics(intrinsics: NDArray[Any], left: float, top: float) -> NDArray[Any]:
    """(..., 3, 3) intrinsics after `left` and `top` pixels are cropped (negative: added)."""
    cropped = intrinsics.copy()
    cropped[..., 0, 2] -= left
    cropped[..., 1, 2] -= top
    return cropped


def fit(source_size: tuple[int, int], size: tuple[int, int]) -> Area:
    """The part of an image of `size` that a source image fills: (top, left, bottom, right) [px]; the rest is black.

    source_size, size: (height, width) [px]. If the aspect ratios differ by at most MAX_STRETCH, the part is the whole image
    and the axes are scaled independently. Otherwise the source image is scaled to fit inside, centred.
    """
    (height, width), (source_height, source_width) = size, source_size
    stretch = Fraction(source_height * width, source_width * height)  # exact, so that ties do not depend on rounding
    if max(stretch, 1 / stretch) <= MAX_STRETCH:
        return 0, 0, height, width
    scale = min(Fraction(height, source_height), Fraction(width, source_width))
    used_height, used_width = max(round(source_height * scale), 1), max(round(source_width * scale), 1)
    top, left = (height - used_height) // 2, (width - used_width) // 2
    return top, left, top + used_height, left + used_width


def scale_area(area: Area, size: tuple[int, int], to_size: tuple[int, int]) -> Area:
    """The same part of an image of `to_size`, to the nearest pixel; at least one pixel along each axis."""
    top, bottom = (round(area[i] * to_size[0] / size[0]) for i in (0, 2))
    left, right = (round(area[i] * to_size[1] / size[1]) for i in (1, 3))
    return top, left, max(bottom, top + 1), max(right, left + 1)


def fit_intrinsics(intrinsics: NDArray[Any], source_size: tuple[int, int], area: Area) -> NDArray[Any]:
    """(3, 3) intrinsics after the source image is resized to the part `area` of another image."""
    top, left, bottom, right = area
    scaled = scale_intrinsics(intrinsics, (right - left) / source_size[1], (bottom - top) / source_size[0])
    return crop_intrinsics(scaled, -left, -top)


def project(
    intrinsics: NDArray[Any], points_cam: NDArray[Any], image_size: Sequence[int], area: Sequence[int] | None = None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Pinhole projection (paper 3.3: a projection is valid if it falls inside the image, in front of the camera).

    intrinsics: (3, 3) of the image; points_cam: (..., 3) in camera axes [m]; image_size: (height, width).
    area: (top, left, bottom, right) [px] of the part of the image that shows the scene; the whole image by default.
    Returns pixels (..., 2) as (u, v), depth (...) [m], is_valid (...). Pixels of points behind the camera are 0.
    """
    depth = points_cam[..., 2]
    in_front = depth > 0
    homogeneous = points_cam @ intrinsics.T
    pixels = np.where(in_front[..., None], homogeneous[..., :2] / np.where(in_front, depth, 1)[..., None], 0)
    top, left, bottom, right = (0, 0, *image_size) if area is None else area
    u, v = pixels[..., 0], pixels[..., 1]
    is_valid = in_front & (u >= left) & (u < right) & (v >= top) & (v < bottom)
    return pixels, depth, is_valid
