"""LSS: Lift-Splat (Philion and Fidler, "push") from image features to a BEV map, as in Simple-BEV's liftnet2.

A softmax distributes each feature token over the depths along its ray. The points in a voxel are averaged, and a cell of
the map is the sum over its voxels. The image encoder outputs the depth logits.

Half of the (depth, token) points are inside the grid, and each is a token times a weight. The map is therefore a sparse
product of weights and tokens, and the outer product of depths and features is never stored. On a CPU, gradients are
bit-identical in every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.devices import host_waits
from occfeat_train.ops.views import Views, check_shapes

NEAREST = 2.0  # m
_CPU = torch.device("cpu")
_UNUSED = 64  # points without a cell that are summed at a time


@lru_cache(maxsize=8)
def depth_bins(grid: VoxelGrid, device: torch.device = _CPU) -> Float[Tensor, " D"]:
    """float64 depths [m] from 2 m to 0.9 of the distance of the map's corner; D is half the cells of its longer side."""
    farthest = math.hypot(*(max(abs(grid.lower[i]), abs(grid.upper[i])) for i in (1, 2)))
    # The reference rounds the range to whole metres.
    return torch.linspace(
        NEAREST, max(int(0.9 * farthest), NEAREST + 1), max(max(grid.map_shape) // 2, 2), dtype=torch.float64
    ).to(device)


@dataclass(frozen=True)
class Points:
    """The points of one sample inside the grid, sorted by the map's cells; on a GPU, all other points follow, with share 0.

    places: index into (V, h, w, D). shares: float64, weight of each in its voxel's mean.
    starts: index of each of H * W cells' first point, and the number of points inside.
    """

    places: Int[Tensor, " n"]
    shares: Float[Tensor, " n"]
    starts: Int[Tensor, " HW_plus_1"]

    @property
    def bags(self) -> Int[Tensor, " bags_plus_1"]:
        """starts; on a GPU also bags of the other points, so that the last bag ends at n.

        They are small, because a GPU sums a bag one point after the other.
        """
        count = len(self.places)
        if not host_waits(self.places.device):
            return self.starts
        rest = torch.arange(1, count // _UNUSED + 2, device=self.places.device) * _UNUSED
        return torch.cat([self.starts, (self.starts[-1] + rest).clamp(max=count)])


class LSS(nn.Module):
    """D depth logits and C features of each token -> BEV map. It has no parameters of its own.

    The encoder's last 1x1 convolution outputs both, as in the reference and Lift-Splat. channels: C.
    """

    mirrors_grid = False  # a point on the border of two cells would change its cell: see `network`
    token_center = 0.5  # position of a token's ray in the token, along both axes

    def __init__(self, grid: VoxelGrid, channels: int) -> None:
        super().__init__()
        self.grid, self.channels = grid, channels
        self.num_depths = len(depth_bins(grid))
        self.feature_channels = self.num_depths + channels

    def forward(self, features: Float[Tensor, "B V D_plus_C h w"], views: Views) -> Float[Tensor, "B C H W"]:
        check_shapes(features, views)
        if features.shape[2] != self.feature_channels:
            raise ValueError(
                f"features of {features.shape[2]} channels: {self.num_depths} depths and {self.channels} expected"
            )
        batch, _, _, h, w = features.shape
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        rows = features.permute(0, 1, 3, 4, 2).flatten(1, 3).to(dtype)  # (B, V * h * w, D + C)
        probability = rows[..., : self.num_depths].softmax(-1)
        tokens = rows[..., self.num_depths :]
        maps = []
        for sample in range(batch):
            points = self.find_points(views, sample, (h, w))
            weights = probability[sample].flatten()[points.places] * points.shares.to(dtype)
            sums = nn.functional.embedding_bag(
                points.places // self.num_depths, tokens[sample], points.bags,
                mode="sum", per_sample_weights=weights, include_last_offset=True,
            )  # fmt: skip
            maps.append(sums[: math.prod(self.grid.map_shape)])
        lifted = torch.stack(maps).unflatten(1, self.grid.map_shape).permute(0, 3, 1, 2)
        return lifted.to(features.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def find_points(self, views: Views, sample: int, feature_size: tuple[int, int]) -> Points:
        """The points of a sample's tokens, as far as a token's centre is in the area of its image that shows the scene."""
        (height, width), (h, w) = views.image_size, feature_size
        device = views.intrinsics.device
        cameras = views.cameras[sample]
        grid_from_pixels, is_camera = cameras.grid_from_pixels
        columns, rows = (torch.arange(n, device=device, dtype=torch.float64) for n in (w, h))
        u, v = (columns + self.token_center) * (width / w), (rows + self.token_center) * (height / h)
        pixels = torch.stack([u.expand(h, w), v[:, None].expand(h, w), torch.ones_like(u).expand(h, w)], -1).view(-1, 3)
        rays = pixels @ grid_from_pixels[:, :3, :3].mT  # (V, h * w, 3) per metre of depth
        depths = depth_bins(self.grid, device)
        points = rays[:, :, None] * depths[:, None] + grid_from_pixels[:, None, None, :3, 3]
        voxel, is_inside = self.voxels(points.view(-1, 3))
        center_u, center_v = (columns + 0.5) * (width / w), (rows[:, None] + 0.5) * (height / h)
        is_shown = cameras.is_inside(center_u[:, None], center_v[..., None])  # (h, w, V)
        is_used = is_shown.permute(2, 0, 1) & is_camera[:, None, None]
        is_point = (is_inside.view(-1, len(depths)) & is_used.reshape(-1, 1)).flatten()
        places = torch.arange(len(is_point), device=device) if host_waits(device) else is_point.nonzero().flatten()
        is_point, voxel, cells = is_point[places], voxel[places], math.prod(self.grid.map_shape)
        cell, order = torch.where(is_point, voxel % cells, cells).sort(stable=True)
        places, voxel, is_point = places[order], voxel[order], is_point[order]
        number = torch.zeros(self.grid.num_voxels, dtype=torch.int64, device=device)
        number.scatter_add_(0, voxel, is_point.long())  # bincount waits for a GPU
        share = is_point.double() / number[voxel].clamp(min=1)
        return Points(places, share, torch.searchsorted(cell, torch.arange(cells + 1, device=device)))

    def voxels(self, points: Float[Tensor, "n 3"]) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
        """Points (right, forward, up) -> flat indices into (Z, H, W), and whether they are inside."""
        grid = self.grid
        index = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        is_inside = torch.ones_like(index, dtype=torch.bool)
        for axis, size in enumerate(grid.shape):
            i = self.cells((points[:, 2 - axis] - grid.lower[axis]) / grid.cell_size[axis], axis)
            is_inside &= (i >= 0) & (i < size)
            index = index * size + i.nan_to_num().clamp(0, size - 1).long()
        return index, is_inside

    def cells(self, along: Float[Tensor, " n"], axis: int) -> Float[Tensor, " n"]:
        """Positions along an axis of the grid (0 up, 1 forward, 2 right), in cells from its lower bound -> indices."""
        return along.floor()
