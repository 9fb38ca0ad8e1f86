"""Heads on F_B: OccFeat's un-splatting head for pretraining (paper 3.2, 3.3), and a segmentation head.

Volumes in the head are channels-last maps whose channels are Z groups (3.2). Reshaping a map into a volume copies
nothing, and the voxels of a cell's column are one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from occfeat_train.ops.devices import runs_triton
from occfeat_train.ops.instance_norm import InstanceNorm

# Hidden values per block: few enough for a core's cache, or enough to fill a GPU.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 27
_BLOCK_ROWS = 64  # rows that share a layer in `_linear_by_level`


class OccFeatHead(nn.Module):
    """D_V and the two projections of paper 3.2-3.3.

    F_B -> 3x3 conv, InstanceNorm, ReLU -> 1x1 conv to N_B * Z_B, Z_B groups of N_B -> 1x1x1 to 2 N_B, Softplus ->
    1x1x1 to N_B: F_V -> occupancy logit, and N_y features.

    The layers have exactly the paper's parameters. The head evaluates the same function but skips outputs that are never
    used: the two linear layers before the Softplus are merged, and so are the two between the Softplus and the occupancy
    logit. F_V and the features are computed only at the requested voxels. Values between the Softplus and the logits
    exist for one block of cells at a time.
    """

    def __init__(self, channels: int, height: int, feature_dim: int, *, occupancy: bool = True) -> None:
        """channels: N_B. height: Z_B. feature_dim: N_y, 0 for no feature projection. occupancy: whether to have an occupancy projection."""
        super().__init__()
        self.channels, self.height = channels, height
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
        self.norm = InstanceNorm()  # removes the bias before it, which is therefore neither added nor trained
        self.unsplat = nn.Conv2d(channels, channels * height, 1)
        self.expand = nn.Linear(channels, 2 * channels)  # a 1x1x1 convolution
        self.reduce = nn.Linear(2 * channels, channels)
        self.occupancy = nn.Linear(channels, 1) if occupancy else None
        self.features = nn.Linear(channels, feature_dim) if feature_dim else None

    def forward(
        self, bev: Float[Tensor, "B C H W"], voxels: Int64[Tensor, " n"] | None
    ) -> tuple[Float[Tensor, "B Z H W"] | None, Float[Tensor, "n Y"] | None]:
        """bev: F_B. voxels: flat indices into (B, Z_B, H, W) whose features are computed; those of -1 are arbitrary.

        Returns occupancy logits or None without that projection, and features or None without voxels.
        """
        batch, _, height, width = bev.shape
        hidden = F.relu(self.norm(F.conv2d(bev, self.conv.weight, padding=1)))
        cells = hidden.permute(0, 2, 3, 1).reshape(-1, self.channels)
        with torch.autocast(bev.device.type, enabled=False):  # products of weights in the weights' own precision
            weight, bias = self._unsplat_and_expand()
        logits = features = None
        if self.occupancy is not None:
            logits = self._occupancy(cells, weight, bias).view(batch, height, width, self.height).permute(0, 3, 1, 2)
        if voxels is not None:
            assert self.features is not None, "this head was built without a feature projection"
            voxels, area = voxels.clamp(min=0), height * width
            cell = voxels % area + voxels // (self.height * area) * area
            linear = _linear_by_level(cells, cell, voxels // area % self.height, weight, bias)
            with torch.autocast(bev.device.type, enabled=False):  # it would return float32, which the next layer rounds
                softened = F.softplus(linear)
            features = self.features(self.reduce(softened))
        return logits, features

    def _occupancy(self, cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(n, N_B) cells -> (n, Z_B) logits; the layer that outputs F_V and the occupancy projection are merged: 2 N_B to 1."""
        assert self.occupancy is not None
        with torch.autocast(cells.device.type, enabled=False):
            to_logit = (self.occupancy.weight @ self.reduce.weight)[0]
            constant = self.occupancy.weight @ self.reduce.bias + self.occupancy.bias
            parameters = (weight.flatten(0, 1), bias.flatten(), to_logit)
            return softplus_logits(cells, *(p.to(cells.dtype) for p in parameters)) + constant

    def _unsplat_and_expand(self) -> tuple[Tensor, Tensor]:
        """The 1x1 convolution and the 1x1x1 convolution after it (no activation between), merged to one linear layer per level.

        Returns weights (Z_B, 2 N_B, N_B) and biases (Z_B, 2 N_B).
        """
        groups = self.unsplat.weight.reshape(self.height, self.channels, self.channels)
        bias = self.unsplat.bias.reshape(self.height, self.channels)  # type: ignore[union-attr]
        return self.expand.weight @ groups, bias @ self.expand.weight.T + self.expand.bias


def _linear_by_level(cells: Tensor, cell: Tensor, level: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Row i: the linear layer of level[i], applied to cells[cell[i]]. weight: (Z, out, in), bias: (Z, out) -> (n, out).

    Rows are sorted by level, and each level's rows fill whole blocks, so that a block has one layer. The number of blocks
    depends only on n. Splitting into levels would depend on their numbers of rows, for which the host would wait.
    """
    num_levels, count, device = len(weight), len(level), level.device
    blocks = count // _BLOCK_ROWS + num_levels
    rows = (level == torch.arange(num_levels, device=device)[:, None]).sum(1)
    first = F.pad(rows.cumsum(0), (1, 0))
    first_block = F.pad(((rows + _BLOCK_ROWS - 1) // _BLOCK_ROWS).cumsum(0), (1, 0))
    order = level.argsort(stable=True)
    of_row = level[order]
    slot = torch.arange(count, device=device) - first[of_row] + first_block[of_row] * _BLOCK_ROWS
    position = torch.empty_like(order).index_copy_(0, order, slot)
    cell_of_slot = cell.new_zeros(blocks * _BLOCK_ROWS).index_copy_(
        0, slot, cell[order]
    )  # slots without a row read any cell
    layer = torch.searchsorted(first_block[1:], torch.arange(blocks, device=device), right=True).clamp(
        max=num_levels - 1
    )
    inputs = cells.index_select(0, cell_of_slot)
    weight, bias = (t.to(cells.dtype).index_select(0, layer) for t in (weight, bias))
    outputs = torch.baddbmm(bias[:, None], inputs.unflatten(0, (blocks, _BLOCK_ROWS)), weight.transpose(1, 2))
    return outputs.flatten(0, 1).index_select(0, position)


def softplus_logits(
    cells: Float[Tensor, "n C"],
    weight: Float[Tensor, "ZK C"],
    bias: Float[Tensor, " ZK"],
    to_logit: Float[Tensor, " K"],
) -> Float[Tensor, "n Z"]:
    """softplus(cells W^T + b), reshaped to rows of K channels, times `to_logit`.

    ZK is Z * K. All are of one dtype.
    For bfloat16 and float16 on a GPU this is one Triton kernel, which returns float32. Otherwise it is plain torch in blocks.
    """
    is_half = cells.dtype in (torch.bfloat16, torch.float16)
    function = _TritonSoftplusLogits if is_half and runs_triton(cells.device) else _SoftplusLogits
    logits: Tensor = function.apply(cells, weight, bias, to_logit)
    return logits


class _TritonSoftplusLogits(torch.autograd.Function):
    """`softplus_logits` with `head_triton`. Hidden values are not stored; the backward pass recomputes them."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, weight: Tensor, bias: Tensor, to_logit: Tensor) -> Tensor:
        from occfeat_train.ops.head_triton import forward

        given = [t.contiguous() for t in (cells, weight, bias, to_logit)]
        ctx.save_for_backward(*given)
        return forward(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        from occfeat_train.ops.head_triton import backward

        given = ctx.saved_tensors
        return tuple(g.to(t.dtype) for g, t in zip(backward(grad.contiguous(), *given), given, strict=True))


class _SoftplusLogits(torch.autograd.Function):
    """`softplus_logits` in plain torch.

    For 8x200x200 voxels the Softplus output takes 328 MB, and so does its gradient; each is read and written several
    times. Here a block of cells stays in the processor's cache from the first product to the logit. The backward pass
    recomputes it, which takes less time than reading it from memory.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, weight: Tensor, bias: Tensor, to_logit: Tensor) -> Tensor:
        """(n, N_B), (Z * 2N_B, N_B), (Z * 2N_B,), (2N_B,) -> (n, Z), all of one dtype."""
        ctx.save_for_backward(cells, weight, bias, to_logit)
        logits = cells.new_empty(len(cells), len(weight) // len(to_logit))
        for block, product in _blocks(cells, weight, bias):
            logits[block] = torch.mv(F.softplus(product).view(-1, len(to_logit)), to_logit).view_as(logits[block])
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Sums over blocks are float32, or float64 for float64 inputs. The factor `to_logit` is applied outside the loop."""
        cells, weight, bias, to_logit = ctx.saved_tensors
        factor = to_logit.repeat(len(weight) // len(to_logit))
        to_cells = weight * factor[:, None]
        exact = torch.promote_types(cells.dtype, torch.float32)
        sums = [torch.zeros_like(parameter, dtype=exact) for parameter in (weight, bias, to_logit)]
        grad_cells = torch.empty_like(cells)
        for block, product in _blocks(cells, weight, bias):
            of_logits = grad[block].reshape(-1, 1)
            sums[2] += (F.softplus(product).view(-1, len(to_logit)).T @ of_logits)[:, 0]
            slope = torch.sigmoid_(product)
            slope.view(-1, len(to_logit)).mul_(of_logits)
            sums[0] += slope.T @ cells[block]
            sums[1] += slope.sum(0, dtype=exact)
            torch.mm(slope, to_cells, out=grad_cells[block])
        sums[0] *= factor[:, None]
        sums[1] *= factor
        return grad_cells, *(s.to(cells.dtype) for s in sums)


def _blocks(cells: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, with cells W^T + b of each in a buffer that the next block overwrites."""
    size = max((_CPU_BLOCK if cells.device.type == "cpu" else _GPU_BLOCK) // len(weight), 1)
    memory = cells.new_empty(min(size, len(cells)), len(weight))
    for start in range(0, len(cells), size):
        block = slice(start, min(start + size, len(cells)))
        yield block, torch.addmm(bias, cells[block], weight.T, out=memory[: block.stop - start])


class SegmentationHead(nn.Sequential):
    """F_B (B, N_B, H, W) -> logits (B, classes, H, W): Simple-BEV's head, 3x3 conv, InstanceNorm, ReLU, 1x1 conv."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            InstanceNorm(),
            nn.ReLU(),
            nn.Conv2d(channels, classes, 1),
        )
