"""Maps mirrored along axes that differ between samples."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from occfeat_train.ops.devices import runs_triton


def mirror(maps: Float[Tensor, "B C H W"], flips: Bool[Tensor, "B 2"]) -> Float[Tensor, "B C H W"]:
    """flips: whether to mirror a sample's (row, column) axis. Returns channels-last maps. The host does not wait for a GPU."""
    mirrored: Tensor = _Mirror.apply(maps, flips.to(maps.device))
    return mirrored


class _Mirror(torch.autograd.Function):
    """Mirroring is its own transpose, so the gradient is mirrored, too. That of an index_select would be a sum with atomics."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, flips: Tensor) -> Tensor:
        ctx.save_for_backward(flips)
        return _mirrored(maps, flips)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mirrored(grad, *ctx.saved_tensors), None


def _mirrored(maps: Tensor, flips: Tensor) -> Tensor:
    batch, channels, height, width = maps.shape
    cells = maps.permute(0, 2, 3, 1).contiguous()
    if runs_triton(maps.device):
        from occfeat_train.ops.mirror_triton import mirror_cells

        return mirror_cells(cells, flips).permute(0, 3, 1, 2)
    rows, columns = (
        torch.where(
            flipped[:, None], torch.arange(n - 1, -1, -1, device=maps.device), torch.arange(n, device=maps.device)
        )
        for flipped, n in zip(flips.unbind(1), (height, width), strict=True)
    )
    samples = torch.arange(batch, device=maps.device)[:, None, None]
    chosen = (samples * height + rows[:, :, None]) * width + columns[:, None, :]
    mirrored = cells.view(-1, channels).index_select(0, chosen.flatten())
    return mirrored.view(batch, height, width, channels).permute(0, 3, 1, 2)
