"""Triton kernels of SimpleBEV's lifting: one weighted sum of feature tokens per voxel, and its gradient.

A program processes a block of one sample's voxels with all channels, and projects the voxels into the cameras itself. No
list of taps is stored, and the host is not synchronised. Projections are float64. They use the operations of
`lifting._taps` in the same order, without fusing, so that every implementation finds the same cameras and weights for a
voxel. Sums are float32; tokens and volumes are float32, bfloat16 or float16 and are converted in registers.

The projections into all cameras are computed at once, and those of one camera are selected by a sum over the cameras. The
sum keeps the compiler from recomputing them in every thread, which would multiply the float64 arithmetic.

`scatter_voxels` uses atomic additions in any order, so the last bits of a gradient differ between runs.
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


def gather_tokens(
    tokens: Tensor,  # (B, V * h * w, C)
    pixels_from_grid: Tensor,  # (B, V, 3, 4) float64
    image_size: tuple[int, int],  # height, width [px]
    feature_size: tuple[int, int],  # h, w
    is_compat: bool,
    axes: tuple[Tensor, Tensor, Tensor],  # float64 centres up (Z,), forward (H,), right (W,) [m]
    volume: Tensor,  # (B, H, W, Z, C) out
) -> None:
    """volume[voxel] = sum of weight * tokens[token] over the voxel's taps. All tensors are contiguous and on one GPU."""
    _launch(_gather, tokens, pixels_from_grid, image_size, feature_size, is_compat, axes, volume)


def scatter_voxels(
    grad: Tensor,  # (B, H, W, Z, C)
    pixels_from_grid: Tensor,  # (B, V, 3, 4) float64
    image_size: tuple[int, int],  # height, width [px]
    feature_size: tuple[int, int],  # h, w
    is_compat: bool,
    axes: tuple[Tensor, Tensor, Tensor],  # float64 centres up (Z,), forward (H,), right (W,) [m]
    out: Tensor,  # (B, V * h * w, C) float32, added to
) -> None:
    """out[token] += weight * grad[voxel] over the taps of all voxels: the transpose of `gather_tokens`."""
    _launch(_scatter, out, pixels_from_grid, image_size, feature_size, is_compat, axes, grad)


def _launch(
    kernel: Any,
    tokens: Tensor,
    pixels_from_grid: Tensor,
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    is_compat: bool,
    axes: tuple[Tensor, Tensor, Tensor],
    volume: Tensor,
) -> None:
    batch, rows, columns, levels, channels = volume.shape
    cams, voxels = pixels_from_grid.shape[1], rows * columns * levels
    padded_channels, padded_cams = triton.next_power_of_2(channels), triton.next_power_of_2(cams)
    block = max(1, min(_BLOCK // padded_channels, _MAX_VOXELS))
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        kernel[-(-voxels // block), batch](
            tokens, volume, pixels_from_grid, *axes, voxels, columns, levels, channels, padded_channels, cams,
            padded_cams, *image_size, *feature_size, is_compat, block, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _gather(
    tokens: tl.tensor,  # (B, T, C)
    volume: tl.tensor,  # (B, H, W, Z, C)
    pixels_from_grid: tl.tensor,  # (B, V, 3, 4)
    up: tl.tensor,  # (Z,)
    forward: tl.tensor,  # (H,)
    right: tl.tensor,  # (W,)
    voxels: tl.constexpr,  # H * W * Z
    columns: tl.constexpr,  # W
    levels: tl.constexpr,  # Z
    channels: tl.constexpr,  # C
    padded_channels: tl.constexpr,  # next power of two, as Triton requires
    cams: tl.constexpr,  # S
    padded_cams: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    is_compat: tl.constexpr,
    block: tl.constexpr,  # voxels of a program
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    every = tl.arange(0, padded_cams)
    x0, y0, dx, dy, share, seen = _views(
        pixels_from_grid + sample * (cams * 12), up, forward, right, voxel[:, None], every[None, :], voxels, columns,
        levels, cams, height, width, h, w, is_compat,
    )  # fmt: skip
    channel = tl.arange(0, padded_channels)[None, :]
    is_channel = channel < channels
    maps = tokens + sample * (cams * h * w * channels) + channel
    total = tl.full((block, padded_channels), 0, tl.float32)
    for cam in range(cams):
        if tl.reduce(tl.where(every == cam, seen, 0), 0, _plus) != 0:
            i00, i01, i10, i11, w00, w01, w10, w11, is_valid = _taps(
                x0, y0, dx, dy, share, every[None, :] == cam, cam, h, w
            )
            mask = is_valid[:, None] & is_channel
            t00 = tl.load(maps + i00[:, None] * channels, mask, 0).to(tl.float32)
            t01 = tl.load(maps + i01[:, None] * channels, mask, 0).to(tl.float32)
            t10 = tl.load(maps + i10[:, None] * channels, mask, 0).to(tl.float32)
            t11 = tl.load(maps + i11[:, None] * channels, mask, 0).to(tl.float32)
            upper = tl.fma(w00[:, None], t00, w01[:, None] * t01)
            lower = tl.fma(w10[:, None], t10, w11[:, None] * t11)
            total += upper + lower
    rows = (sample * voxels + voxel)[:, None] * channels + channel
    tl.store(volume + rows, total.to(volume.dtype.element_ty), (voxel < voxels)[:, None] & is_channel)


@triton.jit
def _scatter(
    out: tl.tensor,  # (B, T, C)
    grad: tl.tensor,  # (B, H, W, Z, C)
    pixels_from_grid: tl.tensor,  # (B, V, 3, 4)
    up: tl.tensor,  # (Z,)
    forward: tl.tensor,  # (H,)
    right: tl.tensor,  # (W,)
    voxels: tl.constexpr,  # H * W * Z
    columns: tl.constexpr,  # W
    levels: tl.constexpr,  # Z
    channels: tl.constexpr,  # C
    padded_channels: tl.constexpr,  # next power of two, as Triton requires
    cams: tl.constexpr,  # S
    padded_cams: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    is_compat: tl.constexpr,
    block: tl.constexpr,  # voxels of a program
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    every = tl.arange(0, padded_cams)
    x0, y0, dx, dy, share, seen = _views(
        pixels_from_grid + sample * (cams * 12), up, forward, right, voxel[:, None], every[None, :], voxels, columns,
        levels, cams, height, width, h, w, is_compat,
    )  # fmt: skip
    channel = tl.arange(0, padded_channels)[None, :]
    is_channel = channel < channels
    maps = out + sample * (cams * h * w * channels) + channel
    rows = (sample * voxels + voxel)[:, None] * channels + channel
    row = tl.load(grad + rows, (voxel < voxels)[:, None] & is_channel, 0).to(tl.float32)
    for cam in range(cams):
        if tl.reduce(tl.where(every == cam, seen, 0), 0, _plus) != 0:
            i00, i01, i10, i11, w00, w01, w10, w11, is_valid = _taps(
                x0, y0, dx, dy, share, every[None, :] == cam, cam, h, w
            )
            mask = is_valid[:, None] & is_channel
            tl.atomic_add(maps + i00[:, None] * channels, w00[:, None] * row, mask, sem="relaxed")
            tl.atomic_add(maps + i01[:, None] * channels, w01[:, None] * row, mask, sem="relaxed")
            tl.atomic_add(maps + i10[:, None] * channels, w10[:, None] * row, mask, sem="relaxed")
            tl.atomic_add(maps + i11[:, None] * channels, w11[:, None] * row, mask, sem="relaxed")


@triton.jit
def _plus(a: tl.tensor, b: tl.tensor) -> Any:
    return a + b


@triton.jit
def _views(
    matrices: tl.tensor,  # (V, 3, 4) of one sample
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
    is_compat: tl.constexpr,
) -> Any:
    """Projection of every voxel of a block into every camera.

    x0, y0, dx, dy: (n, V) the upper left token, and the distance to its centre [tokens]; x0 is -2 where a camera does not see the voxel.
    share: (n,) float32, the weight of a view in its voxel's mean. seen: (V,) number of voxels that a camera sees.
    """
    is_voxel, is_cam, matrix = voxel < voxels, cam < cams, matrices + cam * 12
    x = tl.load(right + voxel // levels % columns, is_voxel, 0)
    y = tl.load(forward + voxel // (levels * columns), is_voxel, 0)
    z = tl.load(up + voxel % levels, is_voxel, 0)
    u = _row(matrix, is_cam, x, y, z)
    v = _row(matrix + 4, is_cam, x, y, z)
    depth = _row(matrix + 8, is_cam, x, y, z)
    is_valid = is_voxel & is_cam & (depth > 0)
    if is_compat:
        depth = tl.maximum(depth, tl.full((1, 1), 1e-6, tl.float64))  # a Python 1e-6 would be float32
        u, v = u / depth * (w / width), v / depth * (h / height)
        is_valid = is_valid & (u > -0.5) & (u < w - 0.5) & (v > -0.5) & (v < h - 0.5)
        u, v = u * (w / (w - 1)) - 0.5, v * (h / (h - 1)) - 0.5
        is_valid = is_valid & (u > -1) & (u < w) & (v > -1) & (v < h)
    else:
        u, v = u / depth, v / depth
        is_valid = is_valid & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        u = tl.minimum(tl.maximum(u * (w / width) - 0.5, 0.0), w - 1.0)
        v = tl.minimum(tl.maximum(v * (h / height) - 0.5, 0.0), h - 1.0)
    u, v = tl.where(is_valid, u, -2.0), tl.where(is_valid, v, 0.0)  # no NaN or infinity from here on
    x0, y0 = tl.floor(u), tl.floor(v)
    dx, dy = (u - x0).to(tl.float32), (v - y0).to(tl.float32)
    count = is_valid.to(tl.int32)
    views = tl.reduce(count, 1, _plus)
    share = tl.full(views.shape, 0, tl.float32)
    for n in tl.static_range(1, cams + 1):  # constants: a float64 division in every thread would be slow
        share = tl.where(views == n, 1 / (n + 1e-6 if is_compat else n), share)
    return x0.to(tl.int32), y0.to(tl.int32), dx, dy, share, tl.reduce(count, 0, _plus)


@triton.jit
def _row(row: tl.tensor, is_cam: tl.tensor, x: tl.tensor, y: tl.tensor, z: tl.tensor) -> Any:
    p0, p1 = tl.load(row, is_cam, 0), tl.load(row + 1, is_cam, 0)
    p2, p3 = tl.load(row + 2, is_cam, 0), tl.load(row + 3, is_cam, 0)
    return p0 * x + p1 * y + p2 * z + p3


@triton.jit
def _taps(
    x0: tl.tensor,  # from `_views`, (n, V)
    y0: tl.tensor,
    dx: tl.tensor,
    dy: tl.tensor,
    share: tl.tensor,  # (n,)
    is_this: tl.tensor,  # (1, V) mask of this camera
    cam: tl.tensor,  # index of this camera
    h: tl.constexpr,
    w: tl.constexpr,
) -> Any:
    """For one camera: the four tokens around each voxel's projection, their weights, and whether it sees the voxel; (n,) each."""
    x0 = tl.reduce(tl.where(is_this, x0, 0), 1, _plus)
    y0 = tl.reduce(tl.where(is_this, y0, 0), 1, _plus)
    right = tl.reduce(tl.where(is_this, dx, 0.0), 1, _plus)
    lower = tl.reduce(tl.where(is_this, dy, 0.0), 1, _plus)
    is_valid = x0 > -2
    left, upper = 1 - right, 1 - lower
    # the weight outside the map is 0, so any valid index will do
    left, right = tl.where(x0 >= 0, left, 0.0), tl.where(x0 + 1 < w, right, 0.0)
    upper, lower = tl.where(y0 >= 0, upper, 0.0) * share, tl.where(y0 + 1 < h, lower, 0.0) * share
    top, bottom = (cam * h + tl.maximum(y0, 0)) * w, (cam * h + tl.minimum(y0 + 1, h - 1)) * w
    x0, x1 = tl.maximum(x0, 0), tl.minimum(x0 + 1, w - 1)
    w00, w01, w10, w11 = upper * left, upper * right, lower * left, lower * right
    return top + x0, top + x1, bottom + x0, bottom + x1, w00, w01, w10, w11, is_valid
