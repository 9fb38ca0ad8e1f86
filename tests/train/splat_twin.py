"""Slow reference of Lift-Splat: adds the outer product of depths and features to a volume, point by point."""

from __future__ import annotations

import torch
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.views import Views


def splat_dense(logits: Tensor, features: Tensor, depths: Tensor, views: Views, grid: VoxelGrid) -> Tensor:
    """logits: (B, V, D, h, w). features: (B, V, C, h, w). depths: (D,) [m]. Returns (B, C, H, W)."""
    batch, cams, channels, h, w = features.shape
    height, width = views.images.shape[-2:]
    outer = logits.softmax(2)[:, :, None] * features[:, :, :, None]  # (B, V, C, D, h, w)
    volume = features.new_zeros(batch, channels, *grid.shape)
    count = features.new_zeros(batch, 1, *grid.shape)
    for b, s, k, row, column in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, cams, len(depths), h, w))
    ).tolist():
        pixel = torch.tensor([(column + 0.5) * width / w, (row + 0.5) * height / h, 1], dtype=torch.float64)
        in_camera = torch.linalg.solve(views.intrinsics[b, s], pixel * depths[k])
        camera = views.cam_from_grid[b, s]
        right, forward, up = torch.linalg.solve(camera[:3, :3], in_camera - camera[:3, 3]).tolist()
        index = [
            int((x - low) // size)
            for x, low, size in zip((up, forward, right), grid.lower, grid.cell_size, strict=True)
        ]
        if all(0 <= i < n for i, n in zip(index, grid.shape, strict=True)):
            z, y, x = index
            volume[b, :, z, y, x] += outer[b, s, :, k, row, column]
            count[b, 0, z, y, x] += 1
    return (volume / count.clamp(min=1)).sum(2)
