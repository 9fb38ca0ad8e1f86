"""Weighted sums of feature tokens, one a voxel, and their gradient on a GPU: `gather` and its kin as Triton kernels.

A program takes a block of one sample's voxels and all channels. It projects the voxels into every camera itself, so that
no list of taps is ever in memory and the host waits for nothing. Places are float64, every operation `gather.find_taps`'s
in its order and none fused with another: a voxel is in view of the same cameras on every path, and its weights are the
same bits. Sums are float32, tokens and volumes float32, bfloat16 or float16, converted in registers.

`scatter_voxels` adds with atomics, whose order, and with it the last bits of a gradient, changes from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # values of the volume, voxels x channels, a program has in registers: 32 a thread
_MAX_VOXELS = 128  # of a block; as many as there are threads
_WARPS = 4


@dataclass(frozen=True)
class Scene:
    """What the voxels' taps depend on. Tensors are float64, contiguous, on the tokens' device."""

    pixels_from_grid: Tensor  # (B, S, 3, 4)
    axes: tuple[Tensor, Tensor, Tensor]  # centres up (Z,), forward (H,), right (W,) [m]
    image_size: tuple[int, int]  # height, width [px]
    feature_size: tuple[int, int]  # h, w
    is_compat: bool


def gather_tokens(tokens: Tensor, scene: Scene, volume: Tensor) -> None:
    """Writes volume (B, H, W, Z, C), the mean over a voxel's views of the tokens (B, S * h * w, C); both contiguous."""
    _launch(_gather, tokens, scene, volume)


def scatter_voxels(grad: Tensor, scene: Scene, out: Tensor) -> None:
    """`gather_tokens` transposed: adds grad (B, H, W, Z, C) to out (B, S * h * w, C) float32, in any order."""
    _launch(_scatter, out, scene, grad)


def _launch(kernel: Any, tokens: Tensor, scene: Scene, volume: Tensor) -> None:
    batch, rows, columns, levels, channels = volume.shape
    voxels, padded = rows * columns * levels, triton.next_power_of_2(channels)
    block = max(1, min(_BLOCK // padded, _MAX_VOXELS))
    with torch.cuda.device_of(tokens):  # Triton launches on the current one
        kernel[-(-voxels // block), batch](
            tokens, volume, scene.pixels_from_grid, *scene.axes, voxels, columns, levels, channels, padded,
            scene.pixels_from_grid.shape[1], *scene.image_size, *scene.feature_size, scene.is_compat, block,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _gather(
    tokens, volume, pixels_from_grid, up, forward, right,
    voxels: tl.constexpr, columns: tl.constexpr, levels: tl.constexpr, channels: tl.constexpr, padded: tl.constexpr,
    cams: tl.constexpr, height: tl.constexpr, width: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    is_compat: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    is_voxel = voxel < voxels
    x, y, z = _centers(voxel, is_voxel, up, forward, right, columns, levels)
    matrices = pixels_from_grid + sample * (cams * 12)
    share = _share(matrices, x, y, z, is_voxel, cams, height, width, h, w, is_compat)
    channel = tl.arange(0, padded)[None, :]
    is_channel = channel < channels
    maps = tokens + sample * (cams * h * w * channels) + channel
    total = tl.full((block, padded), 0, tl.float32)
    for cam in range(cams):
        u, v, is_valid = _see(matrices + cam * 12, x, y, z, is_voxel, height, width, h, w, is_compat)
        if tl.reduce(is_valid.to(tl.int32), 0, _either) != 0:
            i00, i01, i10, i11, w00, w01, w10, w11 = _taps(u, v, share, cam, h, w)
            mask = is_valid[:, None] & is_channel
            t00 = tl.load(maps + i00[:, None] * channels, mask, 0).to(tl.float32)
            t01 = tl.load(maps + i01[:, None] * channels, mask, 0).to(tl.float32)
            t10 = tl.load(maps + i10[:, None] * channels, mask, 0).to(tl.float32)
            t11 = tl.load(maps + i11[:, None] * channels, mask, 0).to(tl.float32)
            upper = tl.fma(w00[:, None], t00, w01[:, None] * t01)
            lower = tl.fma(w10[:, None], t10, w11[:, None] * t11)
            total += upper + lower
    rows = (sample * voxels + voxel)[:, None] * channels + channel
    tl.store(volume + rows, total.to(volume.dtype.element_ty), is_voxel[:, None] & is_channel)


@triton.jit
def _scatter(
    out, grad, pixels_from_grid, up, forward, right,
    voxels: tl.constexpr, columns: tl.constexpr, levels: tl.constexpr, channels: tl.constexpr, padded: tl.constexpr,
    cams: tl.constexpr, height: tl.constexpr, width: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    is_compat: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    is_voxel = voxel < voxels
    x, y, z = _centers(voxel, is_voxel, up, forward, right, columns, levels)
    matrices = pixels_from_grid + sample * (cams * 12)
    share = _share(matrices, x, y, z, is_voxel, cams, height, width, h, w, is_compat)
    channel = tl.arange(0, padded)[None, :]
    is_channel = channel < channels
    maps = out + sample * (cams * h * w * channels) + channel
    rows = (sample * voxels + voxel)[:, None] * channels + channel
    row = tl.load(grad + rows, is_voxel[:, None] & is_channel, 0).to(tl.float32)
    for cam in range(cams):
        u, v, is_valid = _see(matrices + cam * 12, x, y, z, is_voxel, height, width, h, w, is_compat)
        if tl.reduce(is_valid.to(tl.int32), 0, _either) != 0:
            i00, i01, i10, i11, w00, w01, w10, w11 = _taps(u, v, share, cam, h, w)
            mask = is_valid[:, None] & is_channel
            tl.atomic_add(maps + i00[:, None] * channels, w00[:, None] * row, mask, sem="relaxed")
            tl.atomic_add(maps + i01[:, None] * channels, w01[:, None] * row, mask, sem="relaxed")
            tl.atomic_add(maps + i10[:, None] * channels, w10[:, None] * row, mask, sem="relaxed")
            tl.atomic_add(maps + i11[:, None] * channels, w11[:, None] * row, mask, sem="relaxed")


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _centers(voxel, is_voxel, up, forward, right, columns: tl.constexpr, levels: tl.constexpr):
    """Of voxels in order (h, w, z)."""
    x = tl.load(right + voxel // levels % columns, is_voxel, 0)
    y = tl.load(forward + voxel // (levels * columns), is_voxel, 0)
    z = tl.load(up + voxel % levels, is_voxel, 0)
    return x, y, z


@triton.jit
def _see(
    matrix, x, y, z, is_voxel, height: tl.constexpr, width: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    is_compat: tl.constexpr,
):  # fmt: skip
    """Where one camera sees voxel centres, in tokens from the centre of the map's first (0 unseen), and whether."""
    p0, p1, p2, p3 = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2), tl.load(matrix + 3)
    q0, q1, q2, q3 = tl.load(matrix + 4), tl.load(matrix + 5), tl.load(matrix + 6), tl.load(matrix + 7)
    r0, r1, r2, r3 = tl.load(matrix + 8), tl.load(matrix + 9), tl.load(matrix + 10), tl.load(matrix + 11)
    u = p0 * x + p1 * y + p2 * z + p3
    v = q0 * x + q1 * y + q2 * z + q3
    depth = r0 * x + r1 * y + r2 * z + r3
    is_valid = is_voxel & (depth > 0)
    if is_compat:
        clamped = tl.maximum(depth, tl.full((), 1e-6, tl.float64))  # a bare 1e-6 is float32 here
        u, v = u / clamped * (w / width), v / clamped * (h / height)
        is_valid = is_valid & (u > -0.5) & (u < w - 0.5) & (v > -0.5) & (v < h - 0.5)
        u, v = u * (w / (w - 1)) - 0.5, v * (h / (h - 1)) - 0.5
        is_valid = is_valid & (u > -1) & (u < w) & (v > -1) & (v < h)
        u, v = tl.where(is_valid, u, 0.0), tl.where(is_valid, v, 0.0)
    else:
        u, v = u / depth, v / depth
        is_valid = is_valid & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        u, v = tl.where(is_valid, u, 0.0), tl.where(is_valid, v, 0.0)  # nor NaN nor infinity beyond here
        u = tl.minimum(tl.maximum(u * (w / width) - 0.5, 0.0), w - 1.0)
        v = tl.minimum(tl.maximum(v * (h / height) - 0.5, 0.0), h - 1.0)
    return u, v, is_valid


@triton.jit
def _share(
    matrices, x, y, z, is_voxel, cams: tl.constexpr, height: tl.constexpr, width: tl.constexpr, h: tl.constexpr,
    w: tl.constexpr, is_compat: tl.constexpr,
):  # fmt: skip
    """A view's weight in its voxel's mean, float32."""
    views = tl.full(x.shape, 0, tl.int32)
    for cam in range(cams):
        _, _, is_valid = _see(matrices + cam * 12, x, y, z, is_voxel, height, width, h, w, is_compat)
        views += is_valid.to(tl.int32)
    count = tl.maximum(views, 1).to(tl.float64)  # without a view, any finite number does
    return (1 / (count + 1e-6 if is_compat else count)).to(tl.float32)


@triton.jit
def _taps(u, v, share, cam, h: tl.constexpr, w: tl.constexpr):
    """The four tokens around a place on a camera's map, and their weights."""
    x0, y0 = tl.floor(u).to(tl.int32), tl.floor(v).to(tl.int32)
    right, lower = (u - x0.to(tl.float64)).to(tl.float32), (v - y0.to(tl.float64)).to(tl.float32)
    left, upper = 1 - right, 1 - lower
    # beside the map the weight is 0, so that any token does
    left, right = tl.where(x0 >= 0, left, 0.0), tl.where(x0 + 1 < w, right, 0.0)
    upper, lower = tl.where(y0 >= 0, upper, 0.0) * share, tl.where(y0 + 1 < h, lower, 0.0) * share
    top, bottom = (cam * h + tl.maximum(y0, 0)) * w, (cam * h + tl.minimum(y0 + 1, h - 1)) * w
    x0, x1 = tl.maximum(x0, 0), tl.minimum(x0 + 1, w - 1)
    return top + x0, top + x1, bottom + x0, bottom + x1, upper * left, upper * right, lower * left, lower * right
