"""Weighted sums of feature tokens, one a voxel, and their gradient: the compiled half of `lifting`.

A voxel's value is a short list of taps, (token, weight) pairs, four for each camera that sees it. `find_taps` lists
them from the geometry, `gather` sums tokens into voxels, `scatter` sums voxel gradients into tokens. A call takes a
slab of voxels or the tokens of a camera and lets go of the GIL: callers run several on threads of their own (numba's
OpenMP layer would reset torch's thread count, its workqueue breaks when two threads enter it).

A row of channels is float32, or bfloat16 as its int16 bits; sums are float32.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import overload
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def find_taps(
    pixels_from_grid: NDArray[np.float64],  # (S, 3, 4)
    image_size: tuple[float, float],  # height, width [px]
    feature_size: tuple[int, int],  # h, w
    is_compat: bool,
    axes: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],  # centres up, forward, right [m]
    starts: Ints,  # (n + 1,) out: where the pairs of each of the axes' n voxels start, in order forward, right, up
    tokens: Ints,  # (n * S, 4) out: the pairs' tokens, (camera * h + row) * w + column
    weights: Floats,  # (n * S, 4) out: and weights, divided by the voxel's number of views
) -> int:
    """Lists the taps of the (voxel, camera) pairs in view, returns how many; arithmetic as in `lifting._taps_torch`."""
    ups, forwards, rights = axes
    height, width = image_size
    h, w = feature_size
    cams, row_voxels = pixels_from_grid.shape[0], rights.size * ups.size
    column, row = np.empty((cams, row_voxels)), np.empty((cams, row_voxels))
    is_valid, views = np.empty((cams, row_voxels), np.bool_), np.empty(row_voxels, np.uint8)
    xs, zs = np.empty(row_voxels), np.empty(row_voxels)
    for i in range(row_voxels):
        xs[i], zs[i] = rights[i // ups.size], ups[i % ups.size]
    count = 0
    starts[0] = 0
    for f in range(forwards.size):
        views[:] = 0
        for cam in range(cams):
            p, q, r = pixels_from_grid[cam]
            columns, rows, valid = column[cam], row[cam], is_valid[cam]
            for i in range(row_voxels):
                x, y, z = xs[i], forwards[f], zs[i]
                depth = r[0] * x + r[1] * y + r[2] * z + r[3]
                u = p[0] * x + p[1] * y + p[2] * z + p[3]
                v = q[0] * x + q[1] * y + q[2] * z + q[3]
                if is_compat:
                    clamped = max(depth, 1e-6)
                    u, v = u / clamped * (w / width), v / clamped * (h / height)
                    inside = (depth > 0) & (u > -0.5) & (u < w - 0.5) & (v > -0.5) & (v < h - 0.5)
                    u, v = u * (w / (w - 1)) - 0.5, v * (h / (h - 1)) - 0.5
                    inside &= (u > -1) & (u < w) & (v > -1) & (v < h)  # some bilinear weight is left
                else:
                    u, v = u / depth, v / depth
                    inside = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                    u = min(max(u * (w / width) - 0.5, 0.0), w - 1.0)
                    v = min(max(v * (h / height) - 0.5, 0.0), h - 1.0)
                columns[i], rows[i], valid[i] = u, v, inside
                views[i] += inside
        for i in range(row_voxels):
            if views[i]:
                share = np.float32(1 / (views[i] + 1e-6 if is_compat else views[i]))
                for cam in range(cams):
                    if not is_valid[cam, i]:
                        continue
                    x0, y0 = int(np.floor(column[cam, i])), int(np.floor(row[cam, i]))
                    right, lower = np.float32(column[cam, i] - x0), np.float32(row[cam, i] - y0)
                    left, upper = np.float32(1) - right, np.float32(1) - lower
                    # beside the map the weight is 0, so that any token does
                    left, right = left if x0 >= 0 else np.float32(0), right if x0 + 1 < w else np.float32(0)
                    upper, lower = upper if y0 >= 0 else np.float32(0), lower if y0 + 1 < h else np.float32(0)
                    top, bottom = (cam * h + max(y0, 0)) * w, (cam * h + min(y0 + 1, h - 1)) * w
                    x0, x1 = max(x0, 0), min(x0 + 1, w - 1)
                    upper, lower = upper * share, lower * share
                    token, weight = tokens[count], weights[count]
                    token[0], token[1], token[2], token[3] = top + x0, top + x1, bottom + x0, bottom + x1
                    weight[0], weight[1], weight[2], weight[3] = (
                        upper * left,
                        upper * right,
                        lower * left,
                        lower * right,
                    )
                    count += 1
            starts[f * row_voxels + i + 1] = count
    return count


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def gather(
    features: Floats,  # (T, C)
    starts: Ints,  # (n + 1,)
    tokens: Ints,  # (pairs, 4)
    weights: Floats,  # (pairs, 4)
    out: NDArray[Any],  # (n, C) float32, or int16: the bits of bfloat16
) -> None:
    """out[voxel] = sum of weight * features[token] over the voxel's taps."""
    channels = features.shape[1]
    total = np.empty(channels, np.float32)
    for voxel in range(starts.size - 1):
        if starts[voxel] == starts[voxel + 1]:
            out[voxel, :] = 0
            continue
        for pair in range(starts[voxel], starts[voxel + 1]):
            i00, i01, i10, i11 = tokens[pair]
            w00, w01, w10, w11 = weights[pair]
            t00, t01, t10, t11 = features[i00], features[i01], features[i10], features[i11]
            if pair == starts[voxel]:
                for c in range(channels):
                    total[c] = (w00 * t00[c] + w01 * t01[c]) + (w10 * t10[c] + w11 * t11[c])
            else:
                for c in range(channels):
                    total[c] += (w00 * t00[c] + w01 * t01[c]) + (w10 * t10[c] + w11 * t11[c])
        _store_row(out[voxel], total)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def scatter(
    grad: NDArray[Any],  # (n, C) float32, or int16: the bits of bfloat16
    starts: Ints,  # (n + 1,)
    tokens: Ints,  # (pairs, 4)
    weights: Floats,  # (pairs, 4)
    owned: tuple[int, int],  # first token, and behind the last
    out: Floats,  # (T, C)
) -> None:
    """out[token] += weight * grad[voxel] over the taps of one camera's tokens, in voxel order: `gather` transposed."""
    first, last = owned
    row = np.empty(grad.shape[1], np.float32)
    for voxel in range(starts.size - 1):
        for pair in range(starts[voxel], starts[voxel + 1]):
            if tokens[pair, 0] < first or tokens[pair, 0] >= last:
                continue
            _load_row(row, grad[voxel])
            for tap in range(4):
                weight, target = weights[pair, tap], out[tokens[pair, tap]]
                for c in range(row.size):
                    target[c] += weight * row[c]


def _store_row(row: Any, values: Any) -> None:
    """Compiled code only: row[:] = values, rounded to nearest even where the row holds bfloat16's bits."""
    raise NotImplementedError


def _load_row(values: Any, row: Any) -> None:
    """Compiled code only: values[:] = row."""
    raise NotImplementedError


@overload(_store_row, inline="always")
def _compile_store_row(row: Any, values: Any) -> Any:
    if row.dtype == types.int16:

        def store(row: Any, values: Any) -> None:
            bits = values.view(np.uint32)
            for c in range(values.size):
                b = bits[c]
                rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))
                is_nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # rounding could carry it to infinity
                row[c] = np.int16(np.uint32(b | np.uint32(0x400000) if is_nan else rounded) >> np.uint32(16))

    else:

        def store(row: Any, values: Any) -> None:
            for c in range(values.size):
                row[c] = values[c]

    return store


@overload(_load_row, inline="always")
def _compile_load_row(values: Any, row: Any) -> Any:
    if row.dtype == types.int16:

        def load(values: Any, row: Any) -> None:
            bits = values.view(np.uint32)
            for c in range(values.size):
                bits[c] = np.uint32(row[c]) << np.uint32(16)

    else:

        def load(values: Any, row: Any) -> None:
            for c in range(values.size):
                values[c] = row[c]

    return load
