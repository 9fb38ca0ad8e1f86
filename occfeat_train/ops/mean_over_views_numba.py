"""Numba kernel of the mean over the views for target features on a CPU, and bilinear taps for all numba kernels.

Feature maps are channels-last, so that the channels of a token are contiguous. The kernel releases the GIL.
"""

from __future__ import annotations

from typing import Any, Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_train.ops.views import Cameras

_BLOCK = 256  # voxels projected at a time

Precision = Literal["float16", "float32"]


def sample_voxel_features_numpy(
    features: NDArray[Any],
    feature_scale: NDArray[np.float16] | None,
    cam_from_grid: NDArray[Any],
    intrinsics: NDArray[Any],
    image_size: tuple[int, int],
    centers: NDArray[Any],
    batch_index: NDArray[np.integer[Any]] | None = None,
    *,
    area: NDArray[Any] | None = None,
    dtype: Precision = "float16",
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """`mean_over_views.sample_voxel_features` on NumPy arrays."""
    check_arguments(features, feature_scale, cam_from_grid, intrinsics, centers, batch_index, area)
    views, h, w, channels = features.shape[-4:]
    if features.dtype not in (np.float16, np.float32, np.int8):
        raise ValueError(f"features are {features.dtype}: expected float16, float32, or int8 with feature_scale")
    maps = np.ascontiguousarray(features).reshape(-1, views, h * w, channels)
    if maps.dtype == np.float16:
        maps = torch.from_numpy(maps).float().numpy()  # several times faster than NumPy
    scale = None
    if feature_scale is not None:
        scale = np.ascontiguousarray(feature_scale, np.float32).reshape(-1, views, h * w)
    matrices = torch.from_numpy(intrinsics.astype(np.float64) @ cam_from_grid[..., :3, :].astype(np.float64))
    cameras = Cameras.from_matrices(matrices, image_size, None if area is None else torch.from_numpy(area))
    geometry = matrices.flatten(-2), cameras.area, cameras.token_area((h, w))
    packed = torch.cat(geometry, -1).reshape(-1, views, 20).numpy()
    points = np.ascontiguousarray(centers, np.float32)
    ends = [len(points)]
    if batch_index is not None:
        ends = np.searchsorted(batch_index, np.arange(len(maps)), side="right").tolist()
        if ends[-1] != len(points) or (len(points) and batch_index[0] < 0) or (np.diff(batch_index) < 0).any():
            raise ValueError(f"batch_index decreases or leaves 0..{len(maps) - 1}: sort the voxels by sample")
    out = np.empty((len(points), channels), np.float32)
    num_views = np.empty(len(points), np.uint8)
    start = 0
    for sample, end in enumerate(ends):
        one_scale = None if scale is None else scale[sample]
        _sample(maps[sample], one_scale, (h, w), packed[sample], float(image_size[1]), float(image_size[0]),
                points[start:end], out[start:end], num_views[start:end])  # fmt: skip
        start = end
    return out if dtype == "float32" else torch.from_numpy(out).half().numpy(), num_views


def check_arguments(
    features: Any, feature_scale: Any, cam_from_grid: Any, intrinsics: Any, centers: Any, batch_index: Any, area: Any
) -> None:
    """Raises ValueError on shapes that do not match. Takes tensors or arrays."""
    lead = tuple(features.shape[:-3])
    if len(lead) != (1 if batch_index is None else 2):
        raise ValueError(
            f"features of shape {tuple(features.shape)} with{'out' if batch_index is None else ''} a batch_index: "
            "expected (V, h, w, C), or (B, V, h, w, C) and a batch_index"
        )
    expected = {
        "cam_from_grid": (cam_from_grid, (*lead, 4, 4)),
        "intrinsics": (intrinsics, (*lead, 3, 3)),
        "area": (area, (*lead, 4)),
        "centers": (centers, (centers.shape[0], 3)),
        "feature_scale": (feature_scale, tuple(features.shape[:-1])),
        "batch_index": (batch_index, (centers.shape[0],)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(
                f"{name} of shape {tuple(array.shape)} beside features of {tuple(features.shape)}: expected {shape}"
            )
    if ("int8" in str(features.dtype)) != (feature_scale is not None):
        raise ValueError(f"features are {features.dtype}: int8 needs feature_scale, other types must not have it")


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
    cameras: NDArray[
        np.float64
    ],  # (V, 20): pixels_from_grid (3, 4), area (4,) [px], token_area (4,); see `views.Cameras`
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
