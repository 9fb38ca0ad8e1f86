"""Triton kernel of the lifting: the mean over the views at every voxel, and its gradient.

A program processes a block of one sample's voxels with all channels, and projects the voxels into the cameras itself. No
list of taps is stored, and the host is not synchronised. Projections are float64. They use the operations of
`views.Cameras` in the same order, without fusing, so that every implementation finds the same cameras and weights for a
voxel. Sums are float32; tokens and volumes are float32, bfloat16 or float16 and are converted in registers.

The projections into all cameras are computed at once, and those of one camera are selected by a sum over the cameras. The
sum keeps the compiler from recomputing them in every thread, which would multiply the float64 arithmetic.

The backward pass uses atomic additions in any order, so the last bits of a gradient differ between runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # voxels x channels of a program: 16 per thread, so that several programs fit into a multiprocessor's registers
_MAX_VOXELS = 128  # of a block, also with few channels
_WARPS = 4


def run_kernel(
    tokens: Tensor,  # (B, V * h * w, C)
    cameras: Tensor,  # (B, V, 20) float64, see `views.Cameras.packed`
    image_size: tuple[int, int],  # height, width [px]
    feature_size: tuple[int, int],  # h, w
    axes: tuple[Tensor, Tensor, Tensor],  # float64 centres up (Z,), forward (H,), right (W,) [m]
    volume: Tensor,  # (B, H, W, Z, C)
    is_backward: bool,
) -> None:
    """Forward: volume[voxel] = sum of weight * tokens[token] over the voxel's taps. Backward, the transpose: tokens[token] +=
    weight * volume[voxel] over the taps of all voxels; tokens are float32. All tensors are contiguous and on one GPU.
    """
    batch, rows, columns, levels, channels = volume.shape
    cams, voxels = cameras.shape[1], rows * columns * levels
    padded_channels, padded_cams = triton.next_power_of_2(channels), triton.next_power_of_2(cams)
    block = max(1, min(_BLOCK // padded_channels, _MAX_VOXELS))
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        _lift[-(-voxels // block), batch](
            tokens, volume, cameras, *axes, voxels, columns, levels, channels, padded_channels, cams, padded_cams,
            *image_size, *feature_size, block, is_backward, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _lift(
    tokens: tl.tensor,  # (B, T, C)
    volume: tl.tensor,  # (B, H, W, Z, C)
    cameras: tl.tensor,  # (B, V, 20)
    up: tl.tensor,  # (Z,)
    forward: tl.tensor,  # (H,)
    right: tl.tensor,  # (W,)
    voxels: tl.constexpr,  # H * W * Z
    columns: tl.constexpr,  # W
    levels: tl.constexpr,  # Z
    channels: tl.constexpr,  # C
    padded_channels: tl.constexpr,  # next power of two, as Triton requires
    cams: tl.constexpr,  # V
    padded_cams: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    block: tl.constexpr,  # voxels of a program
    is_backward: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    every = tl.arange(0, padded_cams)
    x0, y0, dx, dy, share, seen = _views(
        cameras + sample * (cams * 20), up, forward, right, voxel[:, None], every[None, :], voxels, columns,
        levels, cams, height, width, h, w,
    )  # fmt: skip
    channel = tl.arange(0, padded_channels)[None, :]
    is_channel = channel < channels
    rows = volume + (sample * voxels + voxel)[:, None] * channels + channel
    is_row = (voxel < voxels)[:, None] & is_channel
    total = tl.full((block, padded_channels), 0, tl.float32)
    if is_backward:
        total = tl.load(rows, is_row, 0).to(tl.float32)
    for cam in range(cams):
        if tl.reduce(tl.where(every == cam, seen, 0), 0, _plus) != 0:
            i00, i01, i10, i11, m00, m01, m10, m11, w00, w01, w10, w11 = _taps(
                x0, y0, dx, dy, share, every[None, :] == cam, h, w
            )
            maps = tokens + (sample * cams + cam) * (h * w * channels) + channel
            p00, p01 = maps + i00[:, None] * channels, maps + i01[:, None] * channels
            p10, p11 = maps + i10[:, None] * channels, maps + i11[:, None] * channels
            if is_backward:
                tl.atomic_add(p00, w00[:, None] * total, m00[:, None] & is_channel, sem="relaxed")
                tl.atomic_add(p01, w01[:, None] * total, m01[:, None] & is_channel, sem="relaxed")
                tl.atomic_add(p10, w10[:, None] * total, m10[:, None] & is_channel, sem="relaxed")
                tl.atomic_add(p11, w11[:, None] * total, m11[:, None] & is_channel, sem="relaxed")
            else:
                t00 = tl.load(p00, m00[:, None] & is_channel, 0).to(tl.float32)
                t01 = tl.load(p01, m01[:, None] & is_channel, 0).to(tl.float32)
                t10 = tl.load(p10, m10[:, None] & is_channel, 0).to(tl.float32)
                t11 = tl.load(p11, m11[:, None] & is_channel, 0).to(tl.float32)
                upper = tl.fma(w00[:, None], t00, w01[:, None] * t01)
                lower = tl.fma(w10[:, None], t10, w11[:, None] * t11)
                total += upper + lower
    if not is_backward:
        tl.store(rows, total.to(volume.dtype.element_ty), is_row)


@triton.jit
def _plus(a: tl.tensor, b: tl.tensor) -> Any:
    return a + b


@triton.jit
def _views(
    cameras: tl.tensor,  # (V, 20) of one sample
    up: tl.tensor,
    forward: tl.tensor,
    right: tl.tensor,
    voxel: tl.tensor,  # (n, 1)
    cam: tl.tensor,  # (1, padded V)
    voxels: tl.constexpr,
    columns: tl.constexpr,
    levels: tl.constexpr,
    cams: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
) -> Any:
    """Projection of every voxel of a block into every camera.

    x0, y0, dx, dy: (n, V) the upper left token, and the distance to its centre [tokens]; x0 is -2 where a camera does not see the voxel.
    share: (n,) float32, the weight of a view in its voxel's mean. seen: (V,) number of voxels that a camera sees.
    """
    is_voxel, is_cam, matrix = voxel < voxels, cam < cams, cameras + cam * 20
    x = tl.load(right + voxel // levels % columns, is_voxel, 0)
    y = tl.load(forward + voxel // (levels * columns), is_voxel, 0)
    z = tl.load(up + voxel % levels, is_voxel, 0)
    u = _row(matrix, is_cam, x, y, z)
    v = _row(matrix + 4, is_cam, x, y, z)
    depth = _row(matrix + 8, is_cam, x, y, z)
    u, v = u / depth, v / depth
    top, left, bottom, end = _four(matrix + 12, is_cam)
    is_valid = is_voxel & is_cam & (depth > 0) & (u >= left) & (u < end) & (v >= top) & (v < bottom)
    first_row, first_column, last_row, last_column = _four(matrix + 16, is_cam)
    u = tl.minimum(tl.maximum(u * (w / width) - 0.5, first_column), last_column)
    v = tl.minimum(tl.maximum(v * (h / height) - 0.5, first_row), last_row)
    u, v = tl.where(is_valid, u, -2.0), tl.where(is_valid, v, 0.0)  # no NaN or infinity from here on
    x0, y0 = tl.floor(u), tl.floor(v)
    dx, dy = (u - x0).to(tl.float32), (v - y0).to(tl.float32)
    count = is_valid.to(tl.int32)
    views = tl.reduce(count, 1, _plus)
    share = tl.full(views.shape, 0, tl.float32)
    for n in tl.static_range(1, cams + 1):  # constants: a float64 division in every thread would be slow
        share = tl.where(views == n, 1 / n, share)
    return x0.to(tl.int32), y0.to(tl.int32), dx, dy, share, tl.reduce(count, 0, _plus)


@triton.jit
def _row(row: tl.tensor, is_cam: tl.tensor, x: tl.tensor, y: tl.tensor, z: tl.tensor) -> Any:
    p0, p1, p2, p3 = _four(row, is_cam)
    return p0 * x + p1 * y + p2 * z + p3


@triton.jit
def _four(first: tl.tensor, is_cam: tl.tensor) -> Any:
    return (
        tl.load(first, is_cam, 0), tl.load(first + 1, is_cam, 0),
        tl.load(first + 2, is_cam, 0), tl.load(first + 3, is_cam, 0),
    )  # fmt: skip


@triton.jit
def _taps(
    x0: tl.tensor,  # from `_views`, (n, V)
    y0: tl.tensor,
    dx: tl.tensor,
    dy: tl.tensor,
    share: tl.tensor,  # (n,)
    is_this: tl.tensor,  # (1, V) mask of one camera
    h: tl.constexpr,
    w: tl.constexpr,
) -> Any:
    """For one camera: the four tokens around each voxel's projection, which of them are read, and their weights; (n,) each."""
    x0 = tl.reduce(tl.where(is_this, x0, 0), 1, _plus)
    y0 = tl.reduce(tl.where(is_this, y0, 0), 1, _plus)
    right = tl.reduce(tl.where(is_this, dx, 0.0), 1, _plus)
    lower = tl.reduce(tl.where(is_this, dy, 0.0), 1, _plus)
    i00, i01, i10, i11, m00, m01, m10, m11 = corners(x0, y0, h, w)
    left, upper, lower = 1 - right, (1 - lower) * share, lower * share
    return i00, i01, i10, i11, m00, m01, m10, m11, upper * left, upper * right, lower * left, lower * right


@triton.jit
def corners(x0: tl.tensor, y0: tl.tensor, h: tl.constexpr, w: tl.constexpr) -> Any:
    """The four tokens of an h x w map around a position whose upper left one is (column x0, row y0), and which of them exist."""
    is_left, is_right = (x0 >= 0) & (x0 < w), (x0 >= -1) & (x0 < w - 1)
    is_upper, is_lower = (y0 >= 0) & (y0 < h), (y0 >= -1) & (y0 < h - 1)
    i00 = y0 * w + x0
    return (
        i00, i00 + 1, i00 + w, i00 + w + 1,
        is_left & is_upper, is_right & is_upper, is_left & is_lower, is_right & is_lower,
    )  # fmt: skip
