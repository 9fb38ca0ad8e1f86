"""Numba kernel of the mean over the views for target features, and bilinear taps for all numba kernels."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled

_BLOCK = 256  # voxels projected at a time


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


@compiled(error_model="numpy")
def _project(
    cameras: NDArray[np.float64],  # as in `mean_over_views`
    size: tuple[int, int],
    image_size: tuple[float, float],
    points: NDArray[np.float64],  # (3, n)
    count: int,  # of the points to project
    column: NDArray[np.float64],  # (V, n) out, also row and is_seen
    row: NDArray[np.float64],
    is_seen: NDArray[np.uint8],
) -> None:
    """`views.Cameras.project` and `to_tokens_in_view`. Vectorised over points: pixels behind a camera are computed but not used."""
    (h, w), (height, width) = size, image_size
    for view in range(len(cameras)):
        p, q, r = cameras[view, 0:4], cameras[view, 4:8], cameras[view, 8:12]
        top, left, bottom, right = cameras[view, 12:16]
        first_row, first_column, last_row, last_column = cameras[view, 16:20]
        columns, rows, seen = column[view], row[view], is_seen[view]
        for i in range(count):
            x, y, z = points[0, i], points[1, i], points[2, i]
            depth = r[0] * x + r[1] * y + r[2] * z + r[3]
            u = (p[0] * x + p[1] * y + p[2] * z + p[3]) / depth
            v = (q[0] * x + q[1] * y + q[2] * z + q[3]) / depth
            seen[i] = (depth > 0) & (u >= left) & (u < right) & (v >= top) & (v < bottom)
            columns[i] = min(max(u * (w / width) - 0.5, first_column), last_column)
            rows[i] = min(max(v * (h / height) - 0.5, first_row), last_row)


@compiled(error_model="numpy")
def mean_over_views(
    maps: NDArray[Any],  # (V, h * w, C) float32 or int8; the channels of a token are contiguous
    scale: NDArray[np.float32] | None,  # (V, h * w)
    size: tuple[int, int],  # h, w
    cameras: NDArray[np.float64],  # (V, 20), see `views.Cameras.packed`
    image_size: tuple[float, float],  # height, width [px]
    centers: NDArray[np.float32],  # (n, 3)
    hidden: NDArray[np.bool_] | None,  # (V, n) points that a camera does not see although they are inside its image
    out: NDArray[np.float32],  # (n, C) out
    num_views: NDArray[np.uint8],  # (n,) out
) -> None:
    """Mean over the views of bilinear samples of one sample's maps. Releases the GIL."""
    views, _, channels = maps.shape
    h, w = size
    points = np.empty((3, _BLOCK))
    column, row = np.empty((views, _BLOCK)), np.empty((views, _BLOCK))
    is_seen = np.empty((views, _BLOCK), np.uint8)
    total = np.empty(channels, np.float32)
    for start in range(0, centers.shape[0], _BLOCK):
        count = min(_BLOCK, centers.shape[0] - start)
        for i in range(count):
            points[0, i], points[1, i], points[2, i] = centers[start + i]
        _project(cameras, size, image_size, points, count, column, row, is_seen)
        if hidden is not None:
            for view in range(views):
                for i in range(count):
                    is_seen[view, i] &= not hidden[view, start + i]
        for i in range(count):
            num_seen = 0
            for view in range(views):
                num_seen += is_seen[view, i]
            num_views[start + i] = num_seen
            target = out[start + i]
            if num_seen == 0:
                target[:] = 0
                continue
            if num_seen > 1:
                total[:] = 0
            for view in range(views):
                if not is_seen[view, i]:
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
