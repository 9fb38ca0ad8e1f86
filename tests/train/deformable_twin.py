"""Slow reference of BEVFormer for tiny sizes: a loop over samples, cameras, queries, heads and points."""

from __future__ import annotations

import torch
from torch import Tensor

from occfeat_train.networks.bevformer import HEADS, BEVFormer, CrossAttention, Layer, SamplingPoints, SelfAttention
from occfeat_train.ops.views import Views
from occfeat_train.simple_bev.quirks import ReferenceBEVFormer


def sample(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear sample (d,) of values (h, w, d) at x, y in tokens, with zeros outside."""
    h, w, d = values.shape
    total = values.new_zeros(d)
    for row in (int(y.floor()), int(y.floor()) + 1):
        for column in (int(x.floor()), int(x.floor()) + 1):
            if 0 <= row < h and 0 <= column < w:
                total = total + (1 - (x - column).abs()) * (1 - (y - row).abs()) * values[row, column]
    return total


def attend(places: SamplingPoints, query: Tensor, values: Tensor, anchors: Tensor) -> Tensor:
    """query (C,), values (h, w, C), anchors (A, 2) in tokens -> (C,)."""
    offsets = places.offsets(query).view(HEADS, places.points, 2)
    weights = places.weights(query).view(HEADS, places.points).softmax(-1)
    heads = []
    for head, own in enumerate(values.chunk(HEADS, -1)):
        read = [
            weights[head, p] * sample(own, *(anchors[p % len(anchors)] + offsets[head, p]))
            for p in range(places.points)
        ]
        heads.append(torch.stack(read).sum(0))
    return torch.cat(heads)


def self_attention(module: SelfAttention, query: Tensor, positions: Tensor, compat: bool) -> Tensor:
    """query, positions: (H, W, C) of one sample."""
    height, width, _ = query.shape
    placed = query + positions
    values = module.value(placed)
    out = torch.empty_like(query)
    for row in range(height):
        for column in range(width):
            x, y = float(column), float(row)
            if compat:
                x, y = (row + 0.5) / height * width - 0.5, (column + 0.5) / width * height - 0.5
            read = attend(module.places, placed[row, column], values, torch.tensor([[x, y]], dtype=query.dtype))
            out[row, column] = query[row, column] + module.output(module.inner(read))
    return out


def cross_attention(
    module: CrossAttention,
    query: Tensor,  # (H, W, C)
    positions: Tensor,  # (H, W, C)
    features: Tensor,  # (V, h, w, C)
    anchors: Tensor,  # (V, H, W, Z, 2) in tokens
    is_read: Tensor,  # (V, H, W) bool
    num_views: Tensor,  # (H, W)
) -> Tensor:
    values = module.value(features)
    out = torch.empty_like(query)
    for row, column in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:2])).tolist():
        placed = query[row, column] + positions[row, column]
        total = torch.zeros_like(placed)
        for cam in range(len(features)):
            if is_read[cam, row, column]:
                total = total + attend(module.places, placed, values[cam], anchors[cam, row, column])
        mean = total / max(1, int(num_views[row, column]))
        out[row, column] = query[row, column] + module.output(mean)
    return out


def project(views: Views, centers: Tensor, feature_size: tuple[int, int], compat: bool) -> tuple[Tensor, Tensor]:
    """centers (H, W, Z, 3) -> positions in tokens (B, V, H, W, Z, 2), far away if behind the camera; is_seen (B, V, H, W)."""
    (height, width), (h, w) = views.images.shape[-2:], feature_size
    points = torch.einsum("bsij,hwzj->bshwzi", views.cam_from_grid[..., :3, :3], centers)
    points = points + views.cam_from_grid[:, :, None, None, None, :3, 3]
    fx, fy, cx, cy = (views.intrinsics[..., i, j][:, :, None, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    depth = points[..., 2]
    divisor = depth.clamp(min=1e-4) if compat else depth
    u, v = fx * points[..., 0] / divisor + cx, fy * points[..., 1] / divisor + cy
    if compat:
        is_seen = (u > 0) & (u < width) & (v > 0) & (v < height)
    else:
        is_seen = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        u, v = u.where(depth > 0, -1e9), v.where(depth > 0, -1e9)
    return torch.stack([u * w / width - 0.5, v * h / height - 0.5], -1), is_seen.any(-1)


def run(model: BEVFormer, features: Tensor, views: Views) -> Tensor:
    """`BEVFormer.forward` in evaluation mode."""
    compat = isinstance(model, ReferenceBEVFormer)
    centers = torch.from_numpy(model.grid.voxel_centers()).to(features.dtype).permute(1, 2, 0, 3)
    anchors, is_seen = project(views, centers, (features.shape[3], features.shape[4]), compat)
    maps = features.permute(0, 1, 3, 4, 2)
    positions = model.positions.permute(1, 2, 0)
    out = []
    for b in range(len(features)):
        query = model.queries.permute(1, 2, 0)
        is_read = is_seen[0 if compat else b]
        layer: Layer
        for layer in model.layers:  # type: ignore[assignment]
            query = layer.norm1(self_attention(layer.self_attention, query, positions, compat))
            query = layer.norm2(
                cross_attention(
                    layer.cross_attention, query, positions, maps[b], anchors[b], is_read, is_seen[b].sum(0)
                )
            )
            query = layer.norm3(query + layer.feed_forward(query))
        out.append(query.permute(2, 0, 1))
    return torch.stack(out)
