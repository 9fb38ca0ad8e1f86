"""BEVFormer as used in the paper: Simple-BEV's single-frame re-implementation (Harley et al.) of Li et al.

Every cell of the BEV map is a learned query. In each of six layers, a query attends to the queries around it and then to
the cameras into which its column of voxels projects, at learned sampling points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.checkpointing import recomputed
from occfeat_train.ops.deformable import Reads, deformable
from occfeat_train.ops.mean_over_views import every_voxel
from occfeat_train.ops.views import Projection, Views, check_shapes

ColumnReads = tuple[Float[Tensor, "HW Z V 2"], Bool[Tensor, "HW V"], Int[Tensor, "HW"]]  # HW: H * W cells
HEADS = 4
_LAYERS, _POINTS, _DROPOUT = 6, 8, 0.1
_OUTSIDE = -1e6  # a point so far outside that no offset returns to the map


class BEVFormer(nn.Module):
    """Image features -> BEV map.

    channels: C, a multiple of 4 heads.
    recompute: activation checkpointing of each layer, which saves 0.5 GB of activations per sample at 200 x 200 cells.
    Raises ValueError for other numbers of channels.
    """

    mirrors_grid = False  # the learned queries do not mirror with the grid: see `network`

    def __init__(self, grid: VoxelGrid, channels: int) -> None:
        super().__init__()
        if channels % HEADS:
            raise ValueError(f"BEVFormer of {channels} channels: its attention has {HEADS} heads, choose a multiple")
        self.grid, self.feature_channels = grid, channels
        self.recompute = True
        self.queries = nn.Parameter(0.1 * torch.randn(channels, *grid.map_shape))
        self.positions = nn.Parameter(0.1 * torch.randn(channels, *grid.map_shape))
        self.layers = nn.ModuleList([Layer(channels, grid.shape[0]) for _ in range(_LAYERS)])

    def forward(self, features: Float[Tensor, "B V C h w"], views: Views) -> Float[Tensor, "B C H W"]:
        check_shapes(features, views)
        batch, _, channels, h, w = features.shape
        height, width = self.grid.map_shape
        cells = neighbour_reads(batch, self.cell_anchors(features.device))
        cameras, num_views = self.camera_reads(views, (h, w))
        tokens = features.permute(0, 1, 3, 4, 2).reshape(-1, h, w, channels)
        query, positions = (  # rows (B * H * W, C)
            p.flatten(1).mT.contiguous().expand(batch, -1, -1).flatten(0, 1) for p in (self.queries, self.positions)
        )
        call: Callable[..., Any] = recomputed if self.recompute else nn.Module.__call__
        for layer in self.layers:
            query = call(layer, query, positions, tokens, cells, cameras, num_views.flatten(), (height, width))
        # layer norms return float32 under autocast
        return query.view(batch, height, width, channels).permute(0, 3, 1, 2).to(features.dtype)

    def cell_anchors(self, device: torch.device) -> Float[Tensor, "HW 2"]:
        """Position (column, row) [cells] around which each cell attends to the map of queries: its own."""
        height, width = self.grid.map_shape
        rows, columns = (torch.arange(n, device=device) for n in (height, width))
        return torch.cartesian_prod(rows, columns).flip(1).float()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def camera_reads(self, views: Views, feature_size: tuple[int, int]) -> tuple[Reads, Int[Tensor, "B HW"]]:
        """Every cell reads the cameras that see a voxel centre of its column, around the projections of all its voxel centres.

        A centre behind a camera is not read. Learned offsets may read tokens outside of the area that shows the scene.
        The reads have a row for each camera of a cell, those that are read first: the host does not wait for their number.
        Returns the reads and the number of cameras in a cell's mean.
        """
        columns = list(self.column_reads(views, feature_size))
        is_read = torch.stack([each for _, each, _ in columns])  # (B, HW, V)
        batch, cells, cams = is_read.shape
        order = is_read.logical_not().flatten().byte().argsort(stable=True)
        maps = torch.arange(batch * cams, device=is_read.device).view(batch, 1, cams).expand(-1, cells, -1)
        anchors = torch.stack([placed.transpose(1, 2).float() for placed, _, _ in columns])  # (B, HW, V, Z, 2)
        starts = nn.functional.pad(is_read.sum(2).flatten().cumsum(0), (1, 0))
        reads = Reads(batch, maps.flatten()[order], starts, anchors.flatten(0, 2)[order])
        return reads, torch.stack([number for _, _, number in columns])

    def column_reads(self, views: Views, feature_size: tuple[int, int]) -> Iterator[ColumnReads]:
        """Of each sample: projections [tokens], whether a cell reads a camera, and the number of cameras in its mean."""
        for sample in range(len(views.images)):
            u, v, depth, is_seen = self.project(views, sample)
            placed = torch.stack(views.cameras.to_tokens(u, v, feature_size), -1)
            placed = placed.clamp(_OUTSIDE, -_OUTSIDE).where((depth > 0)[..., None], _OUTSIDE)
            is_read = is_seen.any(1)
            yield placed, is_read, is_read.sum(1)

    def project(self, views: Views, sample: int) -> Projection:
        """Of a sample's voxel centres: (HW, Z, V)."""
        cameras = views.cameras[sample]
        return Projection(*(t.flatten(0, 1) for t in cameras.project(*every_voxel(self.grid, cameras.area.device))))


class Layer(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each with a residual connection and a LayerNorm after it."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, levels)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self,
        query: Float[Tensor, "BHW C"],
        positions: Float[Tensor, "BHW C"],
        tokens: Float[Tensor, "BV h w C"],
        cells: Reads,
        cameras: Reads,
        num_views: Int[Tensor, " BHW"],
        map_shape: tuple[int, int],
    ) -> Float[Tensor, "BHW C"]:
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

    def forward(
        self, query: Float[Tensor, "BHW C"], cells: Reads, map_shape: tuple[int, int]
    ) -> Float[Tensor, "BHW C"]:
        """query: positions added."""
        values = self.value(query).unflatten(0, (-1, *map_shape)).unflatten(-1, (HEADS, -1))
        read = deformable(values, self.places(query), cells, values.dtype).flatten(1)  # as autocast would round it
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

    def forward(
        self,
        query: Float[Tensor, "BHW C"],
        tokens: Float[Tensor, "BV h w C"],
        cameras: Reads,
        num_views: Int[Tensor, " BHW"],
    ) -> Float[Tensor, "BHW C"]:
        """query: positions added."""
        values = self.value(tokens).unflatten(-1, (HEADS, -1))
        read = deformable(values, self.places(query), cameras).flatten(1)
        dropped: Tensor = self.dropout(self.output(read / num_views.clamp(min=1)[:, None]))
        return dropped


class SamplingPoints(nn.Module):
    """Queries -> sampling points of P per head: offsets (column, row) [tokens] and scores.

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

    def forward(self, query: Float[Tensor, "BHW C"]) -> Float[Tensor, "BHW heads P 3"]:
        """float32 also under autocast: bfloat16 has a resolution of only 1/32 token at an offset of 8 tokens."""
        with torch.autocast(query.device.type, enabled=False):
            weight, bias = (  # of both layers, in the order of the result
                torch.cat([p.unflatten(0, (HEADS, self.points, -1)) for p in pair], 2).flatten(0, 2)
                for pair in ((self.offsets.weight, self.weights.weight), (self.offsets.bias, self.weights.bias))
            )
            exact = torch.promote_types(query.dtype, weight.dtype)
            places = nn.functional.linear(query.to(exact), weight, bias)
        return places.view(-1, HEADS, self.points, 3)


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between them, of the reference's hidden width: 1028 for 128 channels."""

    def __init__(self, channels: int) -> None:
        hidden = 1028 * channels // 128
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, query: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        is_half = dtype.itemsize == 2
        out: Tensor = self.aligned(query) if is_half else super().forward(query)
        return out

    def aligned(self, query: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        """The same with hidden units of zero weights added up to a multiple of 8: same values and gradients.

        With 1028 units, cuBLAS must read half-precision operands 4 bytes at a time instead of 16. These products took 36.8 of
        the 302 ms of a step on an H200 (16 samples, bfloat16).
        """
        first: nn.Linear = self[0]  # type: ignore[assignment]
        last: nn.Linear = self[2]  # type: ignore[assignment]
        extra = -first.out_features % 8
        weight, bias = nn.functional.pad(first.weight, (0, 0, 0, extra)), nn.functional.pad(first.bias, (0, extra))
        hidden = nn.functional.linear(query, weight, bias).relu()
        return nn.functional.linear(hidden, nn.functional.pad(last.weight, (0, extra)), last.bias)


def _linear(channels: int) -> nn.Linear:
    linear = nn.Linear(channels, channels)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def neighbour_reads(batch: int, anchors: Float[Tensor, "HW 2"]) -> Reads:
    """Every cell reads its own sample's map of queries, around its anchor (column, row)."""
    cells = len(anchors)
    return Reads(
        batch=batch,
        maps=torch.arange(batch, device=anchors.device)[:, None].expand(-1, cells).flatten(),
        starts=torch.arange(batch * cells + 1, device=anchors.device),
        anchors=anchors[:, None].expand(batch, -1, -1, -1).flatten(0, 1),
    )
