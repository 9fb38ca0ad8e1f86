"""Triton kernels of the occupancy head: linear layer, Softplus and dot product with a vector, in one pass over the cells.

They compute `heads.softplus_logits`; `_SoftplusLogits` there is the plain reference. With 8x200x200 voxels and 256 hidden
channels a sample has 82 M hidden values. Here they exist only in registers; the backward pass recomputes them. Products
use the inputs' dtype, sums are float32.

Gradients of the weights are summed over splits of the cells in separate buffers, so they are identical in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_CELLS, _HIDDEN = 64, 64  # tile of cells x hidden channels
_WARPS, _STAGES = 4, 3
_SPLITS = 64  # splits of the cells for the gradient of the weights


def forward(cells: Tensor, weight: Tensor, bias: Tensor, to_logit: Tensor) -> Tensor:
    """(n, C), (Z * K, C), (Z * K,), (K,), contiguous and of the same 16-bit type -> logits (n, Z) float32."""
    num_cells, channels, hidden, levels = _sizes(cells, weight, to_logit)
    logits = torch.empty((num_cells, levels), dtype=torch.float32, device=cells.device)
    with torch.cuda.device_of(cells):  # Triton launches on the current device
        _forward[(triton.cdiv(num_cells, _CELLS),)](
            cells, weight, bias, to_logit, logits, num_cells, levels, hidden, channels, _padded(channels),
            _CELLS, _HIDDEN, num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    return logits


def backward(
    grad: Tensor, cells: Tensor, weight: Tensor, bias: Tensor, to_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad: (n, Z) float32, gradient of the logits. Returns the gradients of `forward`'s four inputs: float32, for the cells their dtype."""
    num_cells, channels, hidden, levels = _sizes(cells, weight, to_logit)
    grad_cells = torch.empty_like(cells)
    blocks = triton.cdiv(num_cells, _CELLS)
    splits = min(_SPLITS, blocks)
    chunks = triton.cdiv(hidden, _HIDDEN)
    sums = [
        torch.empty((splits, len(weight), *s), dtype=torch.float32, device=cells.device) for s in ((channels,), (), ())
    ]
    with torch.cuda.device_of(cells):
        _backward_cells[(blocks,)](
            grad, cells, weight, bias, to_logit, grad_cells, num_cells, levels, hidden, channels, _padded(channels),
            _CELLS, _HIDDEN, num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
        _backward_weights[(levels * chunks, splits)](
            grad, cells, weight, bias, *sums, num_cells, levels, hidden, chunks, channels, _padded(channels),
            triton.cdiv(blocks, splits), _CELLS, _HIDDEN, num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    of_weight, of_bias, of_logit = (s.sum(0) for s in sums)
    factor = to_logit.float().repeat(levels)
    return grad_cells, of_weight * factor[:, None], of_bias * factor, of_logit.view(levels, hidden).sum(0)


def _sizes(cells: Tensor, weight: Tensor, to_logit: Tensor) -> tuple[int, int, int, int]:
    """n, C, K, Z."""
    return len(cells), cells.shape[1], len(to_logit), len(weight) // len(to_logit)


def _padded(channels: int) -> int:
    """Triton needs the sizes of matrix products to be powers of two, at least 16."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def _forward(
    cells: tl.tensor,  # (n, C)
    weight: tl.tensor,  # (Z * K, C)
    bias: tl.tensor,  # (Z * K,)
    to_logit: tl.tensor,  # (K,)
    logits: tl.tensor,  # (n, Z) out
    num_cells: tl.tensor,
    levels: tl.constexpr,  # Z
    hidden: tl.constexpr,  # K
    channels: tl.constexpr,  # C
    padded: tl.constexpr,  # C, to a power of two
    block: tl.constexpr,  # cells of a program
    chunk: tl.constexpr,  # hidden channels at a time
) -> None:
    cell = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_cell = cell < num_cells
    x = _rows(cells, cell, is_cell, channels, padded)
    for level in range(levels):
        total = tl.full((block,), 0, tl.float32)
        for first in range(0, hidden, chunk):
            k = first + tl.arange(0, chunk)
            is_k = k < hidden
            w = _rows(weight, level * hidden + k, is_k, channels, padded)
            product = tl.dot(x, tl.trans(w), input_precision="ieee")
            product += tl.load(bias + level * hidden + k, is_k, 0).to(tl.float32)[None, :]
            factor = tl.load(to_logit + k, is_k, 0).to(tl.float32)
            total += tl.sum(_softplus(product) * factor[None, :], 1)
        tl.store(logits + cell * levels + level, total, is_cell)


@triton.jit
def _backward_cells(
    grad: tl.tensor,  # (n, Z)
    cells: tl.tensor,  # (n, C)
    weight: tl.tensor,  # (Z * K, C)
    bias: tl.tensor,  # (Z * K,)
    to_logit: tl.tensor,  # (K,)
    grad_cells: tl.tensor,  # (n, C) out
    num_cells: tl.tensor,
    levels: tl.constexpr,
    hidden: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    cell = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_cell = cell < num_cells
    x = _rows(cells, cell, is_cell, channels, padded)
    total = tl.full((block, padded), 0, tl.float32)
    for level in range(levels):
        g = tl.load(grad + cell * levels + level, is_cell, 0)
        for first in range(0, hidden, chunk):
            k = first + tl.arange(0, chunk)
            is_k = k < hidden
            w = _rows(weight, level * hidden + k, is_k, channels, padded)
            product = tl.dot(x, tl.trans(w), input_precision="ieee")
            product += tl.load(bias + level * hidden + k, is_k, 0).to(tl.float32)[None, :]
            factor = tl.load(to_logit + k, is_k, 0).to(tl.float32)
            slope = _sigmoid(product) * factor[None, :] * g[:, None]
            total = tl.dot(slope.to(w.dtype), w, total, input_precision="ieee")
    channel = tl.arange(0, padded)[None, :]
    out = grad_cells + cell[:, None] * channels + channel
    tl.store(out, total.to(grad_cells.dtype.element_ty), is_cell[:, None] & (channel < channels))


@triton.jit
def _backward_weights(
    grad: tl.tensor,  # (n, Z)
    cells: tl.tensor,  # (n, C)
    weight: tl.tensor,  # (Z * K, C)
    bias: tl.tensor,  # (Z * K,)
    of_weight: tl.tensor,  # (splits, Z * K, C) out, without `to_logit`'s factor
    of_bias: tl.tensor,  # (splits, Z * K) out, the same
    of_logit: tl.tensor,  # (splits, Z * K) out
    num_cells: tl.tensor,
    levels: tl.constexpr,
    hidden: tl.constexpr,
    chunks: tl.constexpr,  # of a level's hidden channels
    channels: tl.constexpr,
    padded: tl.constexpr,
    blocks: tl.constexpr,  # of cells in a split
    block: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    level, split = tl.program_id(0) // chunks, tl.program_id(1)
    k = tl.program_id(0) % chunks * chunk + tl.arange(0, chunk)
    is_k = k < hidden
    row = level * hidden + k
    w = _rows(weight, row, is_k, channels, padded)
    offset = tl.load(bias + row, is_k, 0).to(tl.float32)
    sum_weight = tl.full((chunk, padded), 0, tl.float32)
    sum_bias, sum_logit = tl.full((chunk,), 0, tl.float32), tl.full((chunk,), 0, tl.float32)
    for i in range(blocks):
        cell = (split * blocks + i).to(tl.int64) * block + tl.arange(0, block)
        is_cell = cell < num_cells
        x = _rows(cells, cell, is_cell, channels, padded)
        g = tl.load(grad + cell * levels + level, is_cell, 0)
        product = tl.dot(w, tl.trans(x), input_precision="ieee") + offset[:, None]
        slope = _sigmoid(product) * g[None, :]
        sum_bias += tl.sum(slope, 1)
        sum_logit += tl.sum(_softplus(product) * g[None, :], 1)
        sum_weight = tl.dot(slope.to(x.dtype), x, sum_weight, input_precision="ieee")
    out = split.to(tl.int64) * (levels * hidden) + row
    channel = tl.arange(0, padded)[None, :]
    tl.store(of_weight + out[:, None] * channels + channel, sum_weight, is_k[:, None] & (channel < channels))
    tl.store(of_bias + out, sum_bias, is_k)
    tl.store(of_logit + out, sum_logit, is_k)


@triton.jit
def _rows(matrix: tl.tensor, row: tl.tensor, is_row: tl.tensor, channels: tl.constexpr, padded: tl.constexpr) -> Any:
    """(rows, padded) block of a matrix (any, C), zeros in the padding."""
    channel = tl.arange(0, padded)[None, :]
    return tl.load(matrix + row[:, None] * channels + channel, is_row[:, None] & (channel < channels), 0)


@triton.jit
def _softplus(x: tl.tensor) -> Any:
    """log(1 + exp(x)). The logarithm is a polynomial with a relative error of 1.4e-6; `tl.log` has twice as many instructions."""
    s = _exp_minus_abs(x)
    series = -0.0664018082 + 0.014141025 * s  # log(1 + s) / s on [0, 1], minimax
    series = 0.149223891 + series * s
    series = -0.235038617 + series * s
    series = 0.331094495 + series * s
    series = -0.499869657 + series * s
    series = 0.999998732 + series * s
    return tl.maximum(x, 0.0) + series * s


@triton.jit
def _sigmoid(x: tl.tensor) -> Any:
    s = _exp_minus_abs(x)
    root = tl.rsqrt(1.0 + s)  # squared, this is the reciprocal in two instructions; a division is eight
    return tl.where(x >= 0, 1.0, s) * (root * root)


@triton.jit
def _exp_minus_abs(x: tl.tensor) -> Any:
    return tl.exp2(tl.abs(x) * -1.4426950408889634)
