"""BEVFormer as used in the paper: Simple-BEV's single-frame re-implementation (Harley et al.) of Li et al.

Every cell of the BEV map is a learned query. In each of six layers, a query attends to the queries around it and then to
the cameras into which its column of voxels projects, at learned sampling points.

`compat="simple-bev"` reproduces the differences of the reference code: its self-attention reads around the transposed
cell, its cross-attention uses the views of the batch's first sample for all samples, and it recognises points behind a
camera only by a depth clamped at 1e-4. In training the reference also flips channels where it should flip the map
forward; this is not reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.checkpointing import recomputed
from occfeat_train.ops.deformable import Reads, deformable
from occfeat_train.ops.lifting import cell_axes, check_compat
from occfeat_train.ops.views import Views, check_shapes

HEADS = 4
_LAYERS, _POINTS, _DROPOUT = 6, 8, 0.1
_OUTSIDE = -1e6  # a point so far outside that no offset returns to the map


class BEVFormer(nn.Module):
    """(B, V, C, h, w) features -> (B, C, H, W) map.

    channels: C, a multiple of 4 heads. compat: None or "simple-bev".
    recompute: activation checkpointing of each layer, which saves 0.5 GB of activations per sample at 200 x 200 cells.
    Raises ValueError for other numbers of channels.
    """

    mirrors_grid = False  # the learned queries do not mirror with the grid: see `network`

    def __init__(self, grid: VoxelGrid, channels: int, compat: str | None = None) -> None:
        super().__init__()
        check_compat(compat)
        if channels % HEADS:
            raise ValueError(f"BEVFormer of {channels} channels: its attention has {HEADS} heads, choose a multiple")
        self.grid, self.compat, self.feature_channels = grid, compat, channels
        self.recompute = True
        self.queries = nn.Parameter(0.1 * torch.randn(channels, *grid.map_shape))
        self.positions = nn.Parameter(0.1 * torch.randn(channels, *grid.map_shape))
        self.layers = nn.ModuleList([Layer(channels, grid.shape[0]) for _ in range(_LAYERS)])

    def forward(self, features: Tensor, views: Views) -> Tensor:
        check_shapes(features, views)
        batch, _, channels, h, w = features.shape
        height, width = self.grid.map_shape
        cells = neighbour_reads(batch, (height, width), self.compat, features.device)
        cameras, num_views = camera_reads(views, self.grid, (h, w), self.compat)
        tokens = features.permute(0, 1, 3, 4, 2).reshape(-1, h, w, channels)
        query, positions = (  # rows (B * H * W, C)
            p.flatten(1).mT.contiguous().expand(batch, -1, -1).flatten(0, 1) for p in (self.queries, self.positions)
        )
        call: Callable[..., Any] = recomputed if self.recompute else nn.Module.__call__
        for layer in self.layers:
            query = call(layer, query, positions, tokens, cells, cameras, num_views.flatten(), (height, width))
        return query.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Layer(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each with a residual connection and a LayerNorm after it."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        hidden = 1028 * channels // 128  # 1028 as in the reference
        self.self_attention = SelfAttention(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, levels)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self,
        query: Tensor,  # (B * H * W, C), the same for positions
        positions: Tensor,
        tokens: Tensor,  # (B * V, h, w, C)
        cells: Reads,
        cameras: Reads,
        num_views: Tensor,  # (B * H * W,)
        map_shape: tuple[int, int],
    ) -> Tensor:
        query = self.norm1(query + self.self_attention(query + positions, cells, map_shape))
        query = self.norm2(query + self.cross_attention(query + positions, tokens, cameras, num_views))
        normed: Tensor = self.norm3(query + self.feed_forward(query))
        return normed


class SelfAttention(nn.Module):
    """Queries attend to queries, at 8 sampling points per head around their own cell. Keys are not used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.places = SamplingPoints(channels, _POINTS)
        self.value = _linear(channels)
        self.inner = _linear(channels)  # Deformable-DETR's output layer; the reference adds another after it
        self.output = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, query: Tensor, cells: Reads, map_shape: tuple[int, int]) -> Tensor:
        """query: (B * H * W, C), positions added."""
        values = self.value(query).unflatten(0, (-1, *map_shape)).unflatten(-1, (HEADS, -1))
        read = deformable(values, self.places(query), cells).flatten(1)
        dropped: Tensor = self.dropout(self.output(self.inner(read)))
        return dropped


class CrossAttention(nn.Module):
    """Queries attend to the cameras that see their column, around the projections of its voxel centres; mean over cameras.

    A head has 8 sampling points, assigned to the levels of the grid in turn. If 8 is no multiple of the number of levels,
    it has one point per level.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        points = _POINTS if _POINTS % levels == 0 else levels
        self.places = SamplingPoints(channels, points, levels)
        self.value = _linear(channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, query: Tensor, tokens: Tensor, cameras: Reads, num_views: Tensor) -> Tensor:
        """query: (B * H * W, C), positions added; tokens: (B * V, h, w, C); num_views: (B * H * W,)."""
        values = self.value(tokens).unflatten(-1, (HEADS, -1))
        read = deformable(values, self.places(query), cameras).flatten(1)
        dropped: Tensor = self.dropout(self.output(read / num_views.clamp(min=1)[:, None]))
        return dropped


class SamplingPoints(nn.Module):
    """Queries (B, N, C) -> sampling points (B * N, heads, P, 3): offsets (column, row) [tokens] and scores.

    At initialisation all queries have the same points: the heads point right, up, left and down, point i at i + 1 tokens.
    levels: number of anchors to which the points are assigned in turn; the point of the highest level starts nearest.
    """

    def __init__(self, channels: int, points: int, levels: int = 1) -> None:
        super().__init__()
        self.points = points
        self.offsets = nn.Linear(channels, HEADS * points * 2)
        self.weights = nn.Linear(channels, HEADS * points)
        angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
        directions = torch.stack([angles.cos(), angles.sin()], -1).round()
        distance = torch.arange(1, points + 1).view(-1, levels).flip(1).flatten()
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * distance[:, None]).flatten())
        for tensor in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(tensor)

    def forward(self, query: Tensor) -> Tensor:
        """float32 also under autocast: bfloat16 has a resolution of only 1/32 token at an offset of 8 tokens."""
        with torch.autocast(query.device.type, enabled=False):
            exact = torch.promote_types(query.dtype, self.offsets.weight.dtype)
            offsets, scores = self.offsets(query.to(exact)), self.weights(query.to(exact))
        shape = (-1, HEADS, self.points)
        return torch.cat([offsets.view(*shape, 2), scores.view(*shape, 1)], -1)


def _linear(channels: int) -> nn.Linear:
    linear = nn.Linear(channels, channels)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def neighbour_reads(batch: int, map_shape: tuple[int, int], compat: str | None, device: torch.device) -> Reads:
    """Every cell reads its own sample's map of queries around itself; with compat, around the transposed cell."""
    height, width = map_shape
    rows = torch.arange(height, device=device)[:, None].expand(map_shape)
    columns = torch.arange(width, device=device).expand(map_shape)
    if compat is None:
        anchors = torch.stack([columns, rows], -1).float()
    else:
        anchors = torch.stack([(rows + 0.5) / height * width - 0.5, (columns + 0.5) / width * height - 0.5], -1)
    cells = height * width
    return Reads(
        batch=batch,
        maps=torch.arange(batch, device=device).repeat_interleave(cells),
        starts=torch.arange(batch * cells + 1, device=device),
        anchors=anchors.reshape(1, cells, 1, 2).expand(batch, -1, -1, -1).flatten(0, 1),
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def camera_reads(
    views: Views, grid: VoxelGrid, feature_size: tuple[int, int], compat: str | None
) -> tuple[Reads, Tensor]:
    """Every cell reads the cameras that see a voxel centre of its column, around the projections of all its voxel centres.

    A centre behind a camera is not read. Returns the reads and (B, H * W) the number of cameras that a cell reads.
    """
    (height, width), (h, w) = views.images.shape[-2:], feature_size
    batch, cams = views.images.shape[:2]
    device = views.intrinsics.device
    pixels_from_grid = (views.intrinsics.double() @ views.cam_from_grid[..., :3, :].double()).detach()
    up, forward, right = (torch.from_numpy(axis).to(device) for axis in cell_axes(grid))
    x, y, z = right[:, None], forward[:, None, None], up  # to (H, W, Z)
    maps, anchors, reads_of, views_of = [], [], [], []
    first_seen: Tensor | None = None
    for sample in range(batch):
        u, v, depth = (
            (row[:, 0] * x[..., None] + row[:, 1] * y[..., None] + row[:, 2] * z[:, None] + row[:, 3]).flatten(0, 1)
            for row in pixels_from_grid[sample].unbind(1)
        )  # (H * W, Z, V)
        if compat is None:
            is_valid = depth > 0
            u, v = u / depth, v / depth
            is_inside = is_valid & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        else:
            clamped = depth.clamp(min=1e-4)
            # behind the camera, (x fx + depth cx) / clamped differs from the reference's x fx / clamped + cx
            centre_u, centre_v = views.intrinsics[sample, :, 0, 2].double(), views.intrinsics[sample, :, 1, 2].double()
            u, v = (u - centre_u * depth) / clamped + centre_u, (v - centre_v * depth) / clamped + centre_v
            is_valid = torch.ones_like(depth, dtype=torch.bool)
            is_inside = (u > 0) & (u < width) & (v > 0) & (v < height)
        seen = is_inside.any(1)  # (H * W, V)
        views_of.append(seen.sum(1))
        if compat is not None:
            first_seen = seen = seen if first_seen is None else first_seen
        cell, cam = seen.nonzero(as_tuple=True)
        places = torch.stack([u * (w / width) - 0.5, v * (h / height) - 0.5], -1)
        places = places.clamp(_OUTSIDE, -_OUTSIDE).where(is_valid[..., None], _OUTSIDE)
        anchors.append(places.transpose(1, 2)[cell, cam].float())
        maps.append(sample * cams + cam)
        reads_of.append(seen.sum(1))
    starts = nn.functional.pad(torch.cat(reads_of).cumsum(0), (1, 0))
    return Reads(batch, torch.cat(maps), starts, torch.cat(anchors)), torch.stack(views_of)
