"""Numba kernel of the mean over the views for target features on a CPU, and bilinear taps for all numba kernels.

Feature maps are channels-last, so that the channels of a token are contiguous. The kernel releases the GIL.
"""

from __future__ import annotations

from typing import Any, Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_train.ops.views import Cameras, check_arguments

_BLOCK = 256  # voxels projected at a time


def sample_voxel_features_numpy(
    features: NDArray[Any],
    feature_scale: NDArray[np.float16] | None,
    cam_from_grid: NDArray[Any],
    intrinsics: NDArray[Any],
    image_size: tuple[int, int],
    centers: NDArray[Any],
    *,
    area: NDArray[Any] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Mean over the views of one sample's teacher features at voxel centres (paper 3.3).

    features: (V, h, w, C) float16 or float32; or int8, with
    feature_scale: (V, h, w) float16, the factor of each token's int8 values; None otherwise.
    cam_from_grid: (V, 4, 4), that is cam_from_ego @ inverse(grid_from_ego) [m]; zeros for a masked camera.
    intrinsics: (V, 3, 3) of an image of image_size, (height, width) [px].
    centers: (n, 3) voxel centres (right, forward, up) in the grid [m].
    area: (V, 4) (top, left, bottom, right) [px] of the part of each image that shows the scene; None for whole images.
    dtype: of the result. Arithmetic is float32, the projection float64.

    Returns features (n, C) and num_views (n,) uint8. A voxel that no camera sees has num_views 0 and zeros. A NaN or
    infinity in one of the four tokens around a projection propagates to the channel.
    Raises ValueError on shapes that don't fit.
    """
    check_arguments(features, feature_scale, cam_from_grid, intrinsics, centers, area)
    views, h, w, channels = features.shape
    if features.dtype not in (np.float16, np.float32, np.int8):
        raise ValueError(f"features are {features.dtype}: expected float16, float32, or int8 with feature_scale")
    maps = np.ascontiguousarray(features).reshape(views, h * w, channels)
    if maps.dtype == np.float16:
        maps = torch.from_numpy(maps).float().numpy()  # several times faster than NumPy
    scale = None
    if feature_scale is not None:
        scale = np.ascontiguousarray(feature_scale, np.float32).reshape(views, h * w)
    matrices = torch.from_numpy(intrinsics.astype(np.float64) @ cam_from_grid[..., :3, :].astype(np.float64))
    cameras = Cameras.from_matrices(matrices, image_size, None if area is None else torch.from_numpy(area))
    out, num_views = np.empty((len(centers), channels), np.float32), np.empty(len(centers), np.uint8)
    _sample(maps, scale, (h, w), cameras.packed((h, w)).numpy(), float(image_size[1]), float(image_size[0]),
            np.ascontiguousarray(centers, np.float32), out, num_views)  # fmt: skip
    return out if dtype == "float32" else torch.from_numpy(out).half().numpy(), num_views


@numba.njit(inline="always")
def bilinear_taps(x: Any, y: Any, h: Any, w: Any) -> Any:
    """Around a position (column x, row y) of an h x w map: the four tokens, the bilinear weights, and 0 for each token outside.

    Numba caches compiled callers by their own file: after a change here, touch the files that import it.
    """
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    right, lower = np.float32(x - x0), np.float32(y - y0)
    left, upper = np.float32(1) - right, np.float32(1) - lower
    is_left, is_right = np.float32(x0 >= 0), np.float32(x0 + 1 < w)
    is_upper, is_lower = np.float32(y0 >= 0), np.float32(y0 + 1 < h)
    top, bottom = max(y0, 0) * w, min(y0 + 1, h - 1) * w
    x0, x1 = max(x0, 0), min(x0 + 1, w - 1)
    inside = (is_upper * is_left, is_upper * is_right, is_lower * is_left, is_lower * is_right)
    return (top + x0, top + x1, bottom + x0, bottom + x1), (left, right, upper, lower), inside


@numba.njit(forceinline=True, fastmath={"contract"})
def _blend(c: int, t00: Any, t01: Any, t10: Any, t11: Any, w00: Any, w01: Any, w10: Any, w11: Any) -> Any:
    """Weighted sum of channel c of four tokens; multiplications and additions may be fused."""
    top = w00 * np.float32(t00[c]) + w01 * np.float32(t01[c])
    return top + (w10 * np.float32(t10[c]) + w11 * np.float32(t11[c]))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sample(
    maps: NDArray[Any],  # (V, h * w, C) float32 or int8
    scale: NDArray[np.float32] | None,  # (V, h * w)
    size: tuple[int, int],  # h, w
    cameras: NDArray[np.float64],  # (V, 20), see `views.Cameras.packed`
    width: float,
    height: float,
    centers: NDArray[np.float32],  # (n, 3)
    out: NDArray[np.float32],  # (n, C)
    num_views: NDArray[np.uint8],  # (n,)
) -> None:
    views, _, channels = maps.shape
    h, w = size
    points = np.empty((3, _BLOCK))
    column, row = np.empty((views, _BLOCK)), np.empty((views, _BLOCK))
    is_valid = np.empty((views, _BLOCK), np.uint8)
    total = np.empty(channels, np.float32)
    for start in range(0, centers.shape[0], _BLOCK):
        count = min(_BLOCK, centers.shape[0] - start)
        for i in range(count):
            points[0, i], points[1, i], points[2, i] = centers[start + i]
        for view in range(
            views
        ):  # vectorised over voxels: pixels of points behind the camera are computed but not used
            p, q, r = cameras[view, 0:4], cameras[view, 4:8], cameras[view, 8:12]
            top, left, bottom, right = cameras[view, 12:16]
            first_row, first_column, last_row, last_column = cameras[view, 16:20]
            columns, rows, valid = column[view], row[view], is_valid[view]
            for i in range(count):
                x, y, z = points[0, i], points[1, i], points[2, i]
                depth = r[0] * x + r[1] * y + r[2] * z + r[3]
                u = (p[0] * x + p[1] * y + p[2] * z + p[3]) / depth
                v = (q[0] * x + q[1] * y + q[2] * z + q[3]) / depth
                valid[i] = (depth > 0) & (u >= left) & (u < right) & (v >= top) & (v < bottom)
                columns[i] = min(max(u * (w / width) - 0.5, first_column), last_column)
                rows[i] = min(max(v * (h / height) - 0.5, first_row), last_row)
        for i in range(count):
            num_seen = 0
            for view in range(views):
                num_seen += is_valid[view, i]
            num_views[start + i] = num_seen
            target = out[start + i]
            if num_seen == 0:
                target[:] = 0
                continue
            if num_seen > 1:
                total[:] = 0
            for view in range(views):
                if not is_valid[view, i]:
                    continue
                # all four are on the map, or have a weight of 0
                tokens, weights, _ = bilinear_taps(column[view, i], row[view, i], h, w)
                i00, i01, i10, i11 = tokens
                upper, lower = weights[2] / np.float32(num_seen), weights[3] / np.float32(num_seen)
                w00, w01 = upper * weights[0], upper * weights[1]
                w10, w11 = lower * weights[0], lower * weights[1]
                if scale is not None:
                    w00, w01 = w00 * scale[view, i00], w01 * scale[view, i01]
                    w10, w11 = w10 * scale[view, i10], w11 * scale[view, i11]
                t00, t01, t10, t11 = maps[view, i00], maps[view, i01], maps[view, i10], maps[view, i11]
                if num_seen == 1:  # nine of ten voxels: write directly, without the intermediate sum
                    for c in range(channels):
                        target[c] = _blend(c, t00, t01, t10, t11, w00, w01, w10, w11)
                else:
                    for c in range(channels):
                        total[c] += _blend(c, t00, t01, t10, t11, w00, w01, w10, w11)
            if num_seen > 1:
                for c in range(channels):
                    target[c] = total[c]
