"""Slow reference of the lifting: samples every camera at every voxel, then averages. Also used by a benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.views import Views


def lift_dense(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """features: (B, V, C, h, w) -> (B, Z * C, H, W), channel z * C + c."""
    batch, cams, channels, h, w = features.shape
    height, width = views.images.shape[-2:]
    centers = torch.from_numpy(grid.voxel_centers()).double().reshape(-1, 3).to(features.device)
    points = torch.einsum("bsij,nj->bsni", views.cam_from_grid[..., :3, :3], centers)
    points = points + views.cam_from_grid[..., None, :3, 3]
    intrinsics = views.intrinsics
    if compat is not None:  # intrinsics of the feature map
        intrinsics = intrinsics * intrinsics.new_tensor([[w / width], [h / height], [1]])
    homogeneous = torch.einsum("bsij,bsnj->bsni", intrinsics, points)
    depth = homogeneous[..., 2]
    u, v = (homogeneous[..., :2] / (depth if compat is None else depth.clamp(min=1e-6))[..., None]).unbind(-1)
    if compat is None:
        whole = torch.tensor([0.0, 0, height, width], dtype=torch.float64)
        top, left, bottom, right = (whole if views.area is None else views.area[:, :, None]).unbind(-1)
        is_valid = (depth > 0) & (u >= left) & (u < right) & (v >= top) & (v < bottom)
        if views.area is not None:  # at least half a token from the area's border
            half_width, half_height = width / w / 2, height / h / 2
            u, v = u.clamp(left + half_width, right - half_width), v.clamp(top + half_height, bottom - half_height)
        x, y = 2 * u / width - 1, 2 * v / height - 1
    else:
        is_valid = (depth > 0) & (u > -0.5) & (u < w - 0.5) & (v > -0.5) & (v < h - 0.5)
        x, y = (2 * u / (w - 1) - 1).clamp(-2, 2), (2 * v / (h - 1) - 1).clamp(-2, 2)
    position = torch.stack([x, y], -1).where(is_valid[..., None], 0).flatten(0, 1)[:, None].to(features.dtype)
    padding = "border" if compat is None else "zeros"

    def sample(maps: Tensor) -> Tensor:
        sampled = torch.nn.functional.grid_sample(maps, position, padding_mode=padding, align_corners=False)
        return sampled.view(batch, cams, -1, position.shape[2]) * is_valid[:, :, None]

    volumes, mask = sample(features.flatten(0, 1)), is_valid[:, :, None].to(features.dtype)
    if compat is None:
        mean = volumes.sum(1) / mask.sum(1).clamp(min=1)
    else:  # a view counts if any of its bilinear weight is inside the map
        with torch.no_grad():
            mask = (sample(features.new_ones(batch * cams, 1, h, w)) > 0).to(features.dtype)
        mean = (volumes * mask).sum(1) / (1e-6 + mask.sum(1))
    z, rows, columns = grid.shape
    return mean.view(batch, channels, z, rows, columns).transpose(1, 2).reshape(batch, -1, rows, columns)
