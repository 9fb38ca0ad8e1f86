"""Triton kernels of instance normalisation on channels-last maps, in the input's dtype: two passes forward, two backward.

Under autocast, torch computes a group norm in float32 and returns it channels-first. These kernels keep 16-bit types and
channels-last. Statistics are float32: each tile of rows computes its sum and the squared deviations from its own mean, and
`_combined` merges them without cancellation (Chan et al.), so a large mean costs no precision.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16384  # elements of a program
_WARPS = 8


def normalize(x: Tensor, eps: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """out = (x - mean) / sqrt(variance + eps) over n; x and out: (B, n, C), contiguous, of the same dtype.

    Returns the means and 1 / sqrt(variance + eps), (B, C) float32.
    """
    grid, sizes = _tiles(x)
    sums, squares = _sums(x, grid)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _statistics[grid](x, sums, squares, *sizes, num_warps=_WARPS)
        mean, variance = _combined(sums, squares, x.shape[1], sizes[-1])
        scale = torch.rsqrt(variance + eps)
        _normalize[grid](x, mean, scale, out, *sizes, num_warps=_WARPS)
    return mean, scale


def normalize_backward(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, out: Tensor) -> None:
    """out = gradient of x, given the gradient of `normalize`'s result: scale * (g - mean(g) - normed * mean(g * normed))."""
    grid, sizes = _tiles(x)
    sums, products = _sums(x, grid)
    with torch.cuda.device_of(x):
        _products[grid](x, grad, mean, scale, sums, products, *sizes, num_warps=_WARPS)
        means = sums.sum(1) / x.shape[1], products.sum(1) / x.shape[1]
        _gradient[grid](x, grad, mean, scale, *means, out, *sizes, num_warps=_WARPS)


def _tiles(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Launch grid (tiles of rows, B), and sizes: rows, channels, channels padded to a power of two, rows per tile."""
    batch, rows, channels = x.shape
    padded = triton.next_power_of_2(channels)
    block = max(1, min(_TILE // padded, triton.next_power_of_2(rows)))
    return (triton.cdiv(rows, block), batch), (rows, channels, padded, block)


def _sums(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two buffers (B, tiles, C) float32."""
    first, second = torch.empty((2, len(x), grid[0], x.shape[2]), device=x.device).unbind()
    return first, second


def _combined(sums: Tensor, squares: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """(B, tiles, C) sums and squared deviations from the tiles' means -> mean and variance (B, C) over all rows."""
    first = torch.arange(0, rows, block, device=sums.device)
    counts = (rows - first).clamp(max=block)[:, None]
    mean = sums.sum(1) / rows
    between = counts * (sums / counts - mean[:, None]).square()
    return mean, (squares + between).sum(1) / rows


@triton.jit
def _tile(rows: tl.constexpr, channels: tl.constexpr, padded: tl.constexpr, block: tl.constexpr) -> Any:
    """Offsets (block, padded) of a program's elements in (B, n, C) and their mask; the same for (B, C), (1, padded)."""
    row = tl.program_id(0) * block + tl.arange(0, block)[:, None]
    channel = tl.arange(0, padded)[None, :]
    sample = tl.program_id(1).to(tl.int64)
    is_channel = channel < channels
    return (
        (sample * rows + row) * channels + channel,
        (row < rows) & is_channel,
        sample * channels + channel,
        is_channel,
    )


@triton.jit
def _store_sums(
    first: tl.tensor, second: tl.tensor, a: tl.tensor, b: tl.tensor, channels: tl.constexpr, padded: tl.constexpr
) -> None:
    """Write two results (padded,) of a program to (B, tiles, C)."""
    channel = tl.arange(0, padded)
    out = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * channels + channel
    tl.store(first + out, a, channel < channels)
    tl.store(second + out, b, channel < channels)


@triton.jit
def _statistics(
    x: tl.tensor,  # (B, n, C)
    sums: tl.tensor,  # (B, tiles, C) out
    squares: tl.tensor,  # (B, tiles, C) out
    rows: tl.constexpr,  # n
    channels: tl.constexpr,  # C
    padded: tl.constexpr,  # C, to a power of two
    block: tl.constexpr,  # rows of a program
) -> None:
    at, is_there, _, _ = _tile(rows, channels, padded, block)
    value = tl.load(x + at, is_there, 0).to(tl.float32)
    total = tl.sum(value, 0)
    count = tl.minimum(rows - tl.program_id(0) * block, block).to(tl.float32)
    centred = tl.where(is_there, value - (total / count)[None, :], 0.0)
    _store_sums(sums, squares, total, tl.sum(centred * centred, 0), channels, padded)


@triton.jit
def _normalize(
    x: tl.tensor,  # (B, n, C)
    mean: tl.tensor,  # (B, C)
    scale: tl.tensor,  # (B, C)
    out: tl.tensor,  # (B, n, C)
    rows: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at, is_there, channel, is_channel = _tile(rows, channels, padded, block)
    value = tl.load(x + at, is_there, 0).to(tl.float32)
    normed = (value - tl.load(mean + channel, is_channel, 0)) * tl.load(scale + channel, is_channel, 0)
    tl.store(out + at, normed.to(out.dtype.element_ty), is_there)


@triton.jit
def _products(
    x: tl.tensor,  # (B, n, C)
    grad: tl.tensor,  # (B, n, C)
    mean: tl.tensor,  # (B, C)
    scale: tl.tensor,  # (B, C)
    sums: tl.tensor,  # (B, tiles, C) out, of the gradient
    products: tl.tensor,  # (B, tiles, C) out, of gradient times normed
    rows: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at, is_there, channel, is_channel = _tile(rows, channels, padded, block)
    value = tl.load(x + at, is_there, 0).to(tl.float32)
    normed = (value - tl.load(mean + channel, is_channel, 0)) * tl.load(scale + channel, is_channel, 0)
    g = tl.load(grad + at, is_there, 0).to(tl.float32)
    _store_sums(sums, products, tl.sum(g, 0), tl.sum(g * normed, 0), channels, padded)


@triton.jit
def _gradient(
    x: tl.tensor,  # (B, n, C)
    grad: tl.tensor,  # (B, n, C)
    mean: tl.tensor,  # (B, C)
    scale: tl.tensor,  # (B, C)
    mean_grad: tl.tensor,  # (B, C)
    mean_product: tl.tensor,  # (B, C)
    out: tl.tensor,  # (B, n, C)
    rows: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at, is_there, channel, is_channel = _tile(rows, channels, padded, block)
    factor = tl.load(scale + channel, is_channel, 0)
    value = tl.load(x + at, is_there, 0).to(tl.float32)
    normed = (value - tl.load(mean + channel, is_channel, 0)) * factor
    g = tl.load(grad + at, is_there, 0).to(tl.float32) - tl.load(mean_grad + channel, is_channel, 0)
    g = factor * (g - normed * tl.load(mean_product + channel, is_channel, 0))
    tl.store(out + at, g.to(out.dtype.element_ty), is_there)
