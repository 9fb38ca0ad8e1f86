"""CVT: Cross-View Transformers (Zhou and Krähenbühl, CVPR 2022; paper 3.1) from image features to a BEV map.

Learned queries of a coarse map, an eighth as high and wide as the grid's, attend to the tokens of all cameras. Keys and
queries contain embeddings of their positions relative to each camera, so attention can find the tokens that show a cell.
Nothing is projected into the images, and the grid's levels are not used. Upsampling blocks then give the map of the grid.

The attention, embeddings, and layers after them compute the same function as bradyz/cross_view_transformers. These choices
differ, because the image encoder and the grid are this package's:

- The reference attends to maps of stride 4, then of stride 16. The encoder outputs one map of stride 8, in which it has
  fused strides 8 and 16. Both attention layers read it.
- The positions are those of the centres of tokens and of coarse cells. The reference spreads them from border to border,
  so that the first is at 0 and the last at the full width, and upsamples accordingly (align_corners).
- Coordinates are (right, forward, up) instead of (forward, left, up), and the last block has as many channels as the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.cross_attention import cross_attention
from occfeat_train.ops.resize import resize
from occfeat_train.ops.views import Views, check_shapes

HEADS, HEAD_DIM = 4, 32
_STAGES, _REFINEMENTS, _UPSAMPLINGS = 2, 2, 3
_EPS = 1e-7  # of the length of an embedded position


class CVT(nn.Module):
    """Image features -> BEV map. channels: C, any number; the reference has 128, as is the default here.

    The map of queries has H / 8 x W / 8 cells, rounded up, so every grid is possible.
    """

    mirrors_grid = False  # the learned queries do not mirror with the grid: see `network`

    def __init__(self, grid: VoxelGrid, channels: int) -> None:
        super().__init__()
        self.grid, self.feature_channels = grid, channels
        shapes = [grid.map_shape]
        for _ in range(_UPSAMPLINGS):
            shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
        *self.shapes, coarse = shapes
        self.queries = nn.Parameter(torch.randn(channels, *coarse))
        self.views = nn.ModuleList([CrossView(channels) for _ in range(_STAGES)])
        self.refine = nn.ModuleList(
            [nn.Sequential(*(Bottleneck(channels) for _ in range(_REFINEMENTS))) for _ in range(_STAGES)]
        )
        self.up = nn.ModuleList([Upsampling(channels) for _ in range(_UPSAMPLINGS)])

    def forward(self, features: Float[Tensor, "B V C h w"], views: Views) -> Float[Tensor, "B C H W"]:
        check_shapes(features, views)
        exact = torch.promote_types(features.dtype, torch.float32)
        rays = find_rays(views, (features.shape[3], features.shape[4]), exact)
        cells = cell_centers(self.grid, (self.queries.shape[1], self.queries.shape[2]), features.device).to(exact)
        coarse = self.queries.to(features.dtype).expand(len(features), -1, -1, -1)
        coarse = coarse.contiguous(memory_format=torch.channels_last)
        for cross_view, refine in zip(self.views, self.refine, strict=True):
            coarse = refine(cross_view(coarse, features, cells, rays))
        lifted = coarse
        for up, shape in zip(self.up, reversed(self.shapes), strict=True):
            lifted = up(lifted, coarse, shape)
        return lifted


@dataclass(frozen=True)
class Rays:
    """Where the tokens of N = B * V cameras look.

    pixels: the point on each token's ray at a depth of 1 m, homogeneous (right, forward, up, 1) [m]. centers: the cameras.
    Zeros for masked cameras. is_key: whether the token's centre is in the area of an image of a camera that is not masked.
    """

    pixels: Float[Tensor, "N T 4"]
    centers: Float[Tensor, "N 1 4"]
    is_key: Bool[Tensor, "B V T"]


def find_rays(views: Views, feature_size: tuple[int, int], dtype: torch.dtype) -> Rays:
    """The rays of the tokens' centres, row by row, computed in float64."""
    (height, width), (h, w) = views.image_size, feature_size
    grid_from_pixels, is_used = views.cameras.grid_from_pixels
    grid_from_pixels = torch.where(is_used[..., None, None], grid_from_pixels, 0.0)
    columns, rows = (torch.arange(n, device=is_used.device, dtype=torch.float64) + 0.5 for n in (w, h))
    u, v = (columns * (width / w)).repeat(h), (rows * (height / h)).repeat_interleave(w)
    pixels = torch.stack([u, v, torch.ones_like(u), torch.ones_like(u)], -1) @ grid_from_pixels.mT
    is_shown = views.cameras.is_inside(u[:, None, None], v[:, None, None]).permute(1, 2, 0)
    centers = grid_from_pixels[..., None, :, 3]
    return Rays(pixels.flatten(0, 1).to(dtype), centers.flatten(0, 1).to(dtype), is_shown & is_used[..., None])


def cell_centers(grid: VoxelGrid, shape: tuple[int, int], device: torch.device) -> Float[Tensor, "Q 2"]:
    """float64 (right, forward) [m] of the centres of the cells of a map of this shape that covers the grid, row by row."""
    (_, rear, left), (_, front, right) = grid.lower, grid.upper
    forward, rightward = (
        low + (torch.arange(n, device=device, dtype=torch.float64) + 0.5) * ((high - low) / n)
        for n, low, high in ((shape[0], rear, front), (shape[1], left, right))
    )
    return torch.stack([rightward.repeat(shape[0]), forward.repeat_interleave(shape[1])], -1)


class CrossView(nn.Module):
    """Queries attend to the tokens of all cameras; then a feed-forward network, both with residual connections.

    A query is embedded for each camera in turn, as the unit vector of (embedded cell - embedded camera), and a key as that of
    (embedded pixel - embedded camera).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.key, self.value = (
            nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False))
            for _ in range(2)
        )
        self.cell = nn.Linear(2, channels)
        self.pixel = nn.Linear(4, channels, bias=False)
        self.camera = nn.Linear(4, channels, bias=False)
        self.to_queries, self.to_keys, self.to_values = (
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, HEADS * HEAD_DIM)) for _ in range(3)
        )
        self.output = nn.Linear(HEADS * HEAD_DIM, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        self.norm2 = nn.LayerNorm(channels)

    def forward(
        self,
        coarse: Float[Tensor, "B C y x"],
        features: Float[Tensor, "B V C h w"],
        cells: Float[Tensor, "Q 2"],
        rays: Rays,
    ) -> Float[Tensor, "B C y x"]:
        """coarse: map of queries, Q = y * x cells. cells: their (right, forward) [m]."""
        batch, cams = features.shape[:2]
        rows, tokens = _rows(coarse), features.flatten(0, 1)
        positions, directions = self.embed(cells, rays)
        queries = self.to_queries(positions + rows.repeat_interleave(cams, 0))
        keys = self.to_keys(directions + _rows(self.key(tokens)))
        values = self.to_values(_rows(self.value(tokens)))
        # (B * V, rows, heads * D) -> (B, V, heads, rows, D)
        queries, keys, values = (
            t.view(batch, cams, -1, HEADS, HEAD_DIM).transpose(2, 3) for t in (queries, keys, values)
        )
        read = cross_attention(queries, keys, values, rays.is_key).transpose(1, 2).flatten(2)
        rows = self.norm1(self.output(read) + rows)
        rows = self.norm2(rows + self.feed_forward(rows))
        # layer norms return float32 under autocast
        return rows.to(features.dtype).mT.unflatten(2, coarse.shape[2:])

    def embed(self, cells: Float[Tensor, "Q 2"], rays: Rays) -> tuple[Float[Tensor, "N Q C"], Float[Tensor, "N T C"]]:
        """Of the cells and of the tokens, relative to each camera. Not in bfloat16, whose resolution at 50 m is 0.25 m."""
        with torch.autocast(cells.device.type, enabled=False):
            camera = self.camera(rays.centers)
            return _unit(self.cell(cells) - camera), _unit(self.pixel(rays.pixels) - camera)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block with a quarter of the channels inside; the shape is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(channels // 4, 1)
        self.conv1 = nn.Conv2d(channels, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "B C y x"]) -> Float[Tensor, "B C y x"]:
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = functional.relu(self.bn2(self.conv2(out)), inplace=True)
        return functional.relu(self.bn3(self.conv3(out)) + x, inplace=True)


class Upsampling(nn.Module):
    """A map, resized to about twice its sides, and the coarse map of queries, resized to the same, -> their sum after convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(channels // 2, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(channels, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside), nn.ReLU(True),
            nn.Conv2d(inside, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.skip = nn.Conv2d(channels, channels, 1)

    def forward(
        self, x: Float[Tensor, "B C _h _w"], coarse: Float[Tensor, "B C y x"], shape: tuple[int, int]
    ) -> Float[Tensor, "B C H W"]:
        return functional.relu(self.conv(resize(x, shape)) + resize(self.skip(coarse), shape), inplace=True)


def _rows(x: Float[Tensor, "N C h w"]) -> Float[Tensor, "N hw C"]:
    return x.flatten(2).mT


def _unit(x: Float[Tensor, "N n C"]) -> Float[Tensor, "N n C"]:
    return x / (x.norm(dim=-1, keepdim=True) + _EPS)
