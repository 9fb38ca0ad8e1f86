"""Triton kernels of deformable attention, forward and backward; `deformable.deformable_torch` is the reference.

A program processes a block of rows and loops over their maps and points; a row is one head of one query. Neither samples nor
weights are stored. Values have any floating-point type and are converted in registers; sums are float32.

The gradient of the values uses atomic additions, so its last bits differ between runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from occfeat_train.ops.mean_over_views_triton import corners

_TILE = 1024  # rows x channels of a program
_WARPS = 4


def weighted_samples(
    values: Tensor,  # (M, h, w, heads, d)
    places: Tensor,  # (Q, heads, P, 3) float32: offset's column and row [tokens], score
    maps: Tensor,  # (n,) int64
    starts: Tensor,  # (Q + 1,) int64
    anchors: Tensor,  # (n, A, 2) float32
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """out[query, head] = sum over the query's pairs and over p of weight * the map at anchor p % A + offset p.

    The weights are the softmax of the scores over p. All tensors are contiguous. Returns (Q, heads, d) of `dtype`.
    """
    out = torch.empty((*places.shape[:2], values.shape[-1]), dtype=dtype, device=values.device)
    grid, sizes = _sizes(values, places, anchors)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        _forward[grid](values, places, maps, starts, anchors, out, *sizes, num_warps=_WARPS)
    return out


def weighted_samples_backward(
    grad: Tensor,  # (Q, heads, d)
    values: Tensor,
    places: Tensor,
    maps: Tensor,
    starts: Tensor,
    anchors: Tensor,
) -> tuple[Tensor, Tensor]:
    """Float32 gradients of values and places of `weighted_samples`. All tensors are contiguous."""
    of_values = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
    of_places = torch.empty_like(places)
    grid, sizes = _sizes(values, places, anchors)
    with torch.cuda.device_of(values):
        _backward[grid](
            grad, values, places, maps, starts, anchors, of_values, of_places, *sizes, num_warps=_WARPS
        )  # fmt: skip
    return of_values, of_places


def _sizes(values: Tensor, places: Tensor, anchors: Tensor) -> tuple[tuple[int], tuple[int, ...]]:
    """Launch grid and sizes of the kernels; a row is one head of one query."""
    _, h, w, heads, d = values.shape
    padded = triton.next_power_of_2(d)
    block = max(1, _TILE // padded)
    rows = len(places) * heads
    return (triton.cdiv(rows, block),), (rows, h, w, heads, d, padded, places.shape[2], anchors.shape[1], block)


@triton.jit
def _forward(
    values: tl.tensor,  # (M, h, w, heads, d)
    places: tl.tensor,  # (rows, P, 3)
    maps: tl.tensor,  # (n,)
    starts: tl.tensor,  # (Q + 1,)
    anchors: tl.tensor,  # (n, A, 2)
    out: tl.tensor,  # (rows, d)
    rows: tl.tensor,  # Q * heads
    h: tl.constexpr,
    w: tl.constexpr,
    heads: tl.constexpr,
    d: tl.constexpr,
    padded: tl.constexpr,  # d, to a power of two
    points: tl.constexpr,  # P
    num_anchors: tl.constexpr,  # A
    block: tl.constexpr,  # rows of a program
) -> None:
    row, is_row, first, count, channel, is_channel = _rows(starts, rows, heads, d, padded, block)
    highest, scale = _softmax(places, row, is_row, points, block)
    total = tl.full((block, padded), 0, tl.float32)
    for i in range(tl.max(count, 0)):
        is_pair, pair = i < count, first + i
        start = tl.load(maps + pair, is_pair, 0) * (h * w * heads) + row % heads
        for p in range(points):
            i00, i01, i10, i11, m00, m01, m10, m11, right, lower = _taps(
                places, anchors, row, is_row, pair, is_pair, p, h, w, points, num_anchors
            )
            weight = _weight(places, row, is_row, highest, scale, p, points)
            upper, lower = (weight * (1 - lower))[:, None], (weight * lower)[:, None]
            left, right = 1 - right[:, None], right[:, None]
            v00 = _read(values, start, i00, m00, heads, d, channel, is_channel)
            v01 = _read(values, start, i01, m01, heads, d, channel, is_channel)
            v10 = _read(values, start, i10, m10, heads, d, channel, is_channel)
            v11 = _read(values, start, i11, m11, heads, d, channel, is_channel)
            total += upper * (left * v00 + right * v01) + lower * (left * v10 + right * v11)
    tl.store(out + row[:, None] * d + channel, total, is_row[:, None] & is_channel)


@triton.jit
def _backward(
    grad: tl.tensor,  # (rows, d)
    values: tl.tensor,
    places: tl.tensor,
    maps: tl.tensor,
    starts: tl.tensor,
    anchors: tl.tensor,
    of_values: tl.tensor,  # (M, h, w, heads, d) added to
    of_places: tl.tensor,  # (rows, P, 3) out
    rows: tl.tensor,
    h: tl.constexpr,
    w: tl.constexpr,
    heads: tl.constexpr,
    d: tl.constexpr,
    padded: tl.constexpr,
    points: tl.constexpr,
    num_anchors: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row, is_row, first, count, channel, is_channel = _rows(starts, rows, heads, d, padded, block)
    g = tl.load(grad + row[:, None] * d + channel, is_row[:, None] & is_channel, 0).to(tl.float32)
    highest, scale = _softmax(places, row, is_row, points, block)
    mean = tl.full((block,), 0, tl.float32)
    most = tl.max(count, 0)
    for p in range(points):
        weight = _weight(places, row, is_row, highest, scale, p, points)
        along_x, along_y = tl.full((block,), 0, tl.float32), tl.full((block,), 0, tl.float32)
        of_weight = tl.full((block,), 0, tl.float32)
        for i in range(most):
            is_pair, pair = i < count, first + i
            start = tl.load(maps + pair, is_pair, 0) * (h * w * heads) + row % heads
            i00, i01, i10, i11, m00, m01, m10, m11, right, lower = _taps(
                places, anchors, row, is_row, pair, is_pair, p, h, w, points, num_anchors
            )
            left, upper = 1 - right, 1 - lower
            s00 = tl.sum(g * _read(values, start, i00, m00, heads, d, channel, is_channel), 1)
            s01 = tl.sum(g * _read(values, start, i01, m01, heads, d, channel, is_channel), 1)
            s10 = tl.sum(g * _read(values, start, i10, m10, heads, d, channel, is_channel), 1)
            s11 = tl.sum(g * _read(values, start, i11, m11, heads, d, channel, is_channel), 1)
            along_x += upper * (s01 - s00) + lower * (s11 - s10)
            along_y += left * (s10 - s00) + right * (s11 - s01)
            of_weight += upper * (left * s00 + right * s01) + lower * (left * s10 + right * s11)
            _add(of_values, start, i00, m00, weight * upper * left, g, heads, d, channel, is_channel)
            _add(of_values, start, i01, m01, weight * upper * right, g, heads, d, channel, is_channel)
            _add(of_values, start, i10, m10, weight * lower * left, g, heads, d, channel, is_channel)
            _add(of_values, start, i11, m11, weight * lower * right, g, heads, d, channel, is_channel)
        out = of_places + (row * points + p) * 3
        tl.store(out, weight * along_x, is_row)
        tl.store(out + 1, weight * along_y, is_row)
        tl.store(out + 2, of_weight, is_row)
        mean += weight * of_weight
    tl.debug_barrier()  # the threads that read the gradients of the weights are not those that stored them
    for p in range(points):  # from the weights to the scores, through the softmax
        weight, out = _weight(places, row, is_row, highest, scale, p, points), of_places + (row * points + p) * 3 + 2
        of_weight = tl.load(out, is_row, 0)
        tl.store(out, weight * (of_weight - mean), is_row)


@triton.jit
def _rows(
    starts: tl.tensor,
    rows: tl.tensor,
    heads: tl.constexpr,
    d: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
) -> Any:
    """Rows of a program (block,), their first pair and number of pairs (block,), and channels (1, padded)."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_row = row < rows
    first = tl.load(starts + row // heads, is_row, 0)
    count = tl.load(starts + row // heads + 1, is_row, 0) - first
    channel = tl.arange(0, padded)[None, :]
    return row, is_row, first, count.to(tl.int32), channel, channel < d


@triton.jit
def _softmax(places: tl.tensor, row: tl.tensor, is_row: tl.tensor, points: tl.constexpr, block: tl.constexpr) -> Any:
    """For `_weight`: the highest score of the rows, and one over their sum of exponentials; both (block,)."""
    score = places + row * points * 3 + 2
    highest, total = tl.load(score, is_row, 0), tl.full((block,), 0, tl.float32)
    for p in range(1, points):
        highest = tl.maximum(highest, tl.load(score + p * 3, is_row, 0))
    for p in range(points):
        total += tl.exp(tl.load(score + p * 3, is_row, 0) - highest)
    return highest, 1 / total


@triton.jit
def _weight(
    places: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    highest: tl.tensor,
    scale: tl.tensor,
    p: tl.tensor,
    points: tl.constexpr,
) -> Any:
    score = tl.load(places + (row * points + p) * 3 + 2, is_row, 0)
    return tl.exp(score - highest) * scale


@triton.jit
def _taps(
    places: tl.tensor,
    anchors: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    pair: tl.tensor,
    is_pair: tl.tensor,
    p: tl.tensor,
    h: tl.constexpr,
    w: tl.constexpr,
    points: tl.constexpr,
    num_anchors: tl.constexpr,
) -> Any:
    """For point p of every row: the four tokens around it, which of them are read, and the distances to the upper left one."""
    offset, anchor = places + (row * points + p) * 3, anchors + (pair * num_anchors + p % num_anchors) * 2
    x = tl.load(anchor, is_pair, 0) + tl.load(offset, is_row, 0)
    y = tl.load(anchor + 1, is_pair, 0) + tl.load(offset + 1, is_row, 0)
    x0, y0 = tl.floor(x), tl.floor(y)
    right, lower = x - x0, y - y0
    i00, i01, i10, i11, m00, m01, m10, m11 = corners(x0.to(tl.int32), y0.to(tl.int32), h, w)
    return i00, i01, i10, i11, is_pair & m00, is_pair & m01, is_pair & m10, is_pair & m11, right, lower


@triton.jit
def _read(
    values: tl.tensor,
    start: tl.tensor,
    token: tl.tensor,
    exists: tl.tensor,
    heads: tl.constexpr,
    d: tl.constexpr,
    channel: tl.tensor,
    is_channel: tl.tensor,
) -> Any:
    """(block, padded) float32 tokens of the rows, zeros where a token does not exist."""
    at = (start + token * heads)[:, None] * d + channel
    return tl.load(values + at, exists[:, None] & is_channel, 0).to(tl.float32)


@triton.jit
def _add(
    of_values: tl.tensor,
    start: tl.tensor,
    token: tl.tensor,
    exists: tl.tensor,
    weight: tl.tensor,
    g: tl.tensor,
    heads: tl.constexpr,
    d: tl.constexpr,
    channel: tl.tensor,
    is_channel: tl.tensor,
) -> None:
    at = (start + token * heads)[:, None] * d + channel
    tl.atomic_add(of_values + at, weight[:, None] * g, exists[:, None] & is_channel, sem="relaxed")
