"""Triton kernel that mirrors maps; `mirror` has the plain function. torch's index_select takes four times as long as a copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a program
_WARPS = 4


def mirror_cells(cells: Tensor, flips: Tensor) -> Tensor:
    """cells: (B, H, W, C), contiguous; flips: (B, 2) bool, whether to mirror (rows, columns)."""
    out = torch.empty_like(cells)
    batch, height, width, channels = cells.shape
    padded = triton.next_power_of_2(channels)
    block = max(1, _TILE // padded)
    with torch.cuda.device_of(cells):  # Triton launches on the current device
        _mirror[(triton.cdiv(batch * height * width, block),)](
            cells, flips, out, batch * height * width, height, width, channels, padded, block, num_warps=_WARPS
        )
    return out


@triton.jit
def _mirror(
    cells: tl.tensor,  # (B, H, W, C)
    flips: tl.tensor,  # (B, 2)
    out: tl.tensor,  # (B, H, W, C) out
    count: tl.tensor,  # B * H * W
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,  # C, to a power of two
    block: tl.constexpr,  # cells of a program
) -> None:
    cell = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_cell = cell < count
    sample, row, column = cell // (height * width), cell // width % height, cell % width
    row = tl.where(tl.load(flips + sample * 2, is_cell, 0) != 0, height - 1 - row, row)
    column = tl.where(tl.load(flips + sample * 2 + 1, is_cell, 0) != 0, width - 1 - column, column)
    channel = tl.arange(0, padded)[None, :]
    exists = is_cell[:, None] & (channel < channels)
    source = (sample * height + row) * width + column
    value = tl.load(cells + source[:, None] * channels + channel, exists, 0)
    tl.store(out + cell[:, None] * channels + channel, value, exists)
