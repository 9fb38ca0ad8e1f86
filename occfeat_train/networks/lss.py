"""LSS: image features to a bird's-eye map by Lift-Splat (Philion and Fidler, "push"), as Simple-BEV's liftnet2 has it.

A feature token is spread over the depths along its ray by a softmax; what falls into a voxel is averaged, and a cell of
the map is the sum over its voxels. Stands between the image encoder, which emits the depths' logits, and the decoder.

Of the (depth, token) points half fall into the grid, and a point is one token times a weight: a sparse product of
weights and tokens, so that no outer product of depths and features is ever formed. A gradient has the same bits in every
run on a CPU.

`compat="simple-bev"` reproduces the reference code instead: tokens lie at their upper left corners, points in the cells
that start half a cell further, beyond each lower bound one cell is added to the first, and cells are divided by their
number of points once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.lifting import check_compat
from occfeat_train.ops.views import Views, check_shapes

NEAREST = 2.0  # m


def depth_bins(grid: VoxelGrid) -> Tensor:
    """(D,) float64 depths [m], half as many as the map's longer side has cells, from 2 m to 0.9 of its corner's distance."""
    farthest = math.hypot(*(max(abs(grid.lower[i]), abs(grid.upper[i])) for i in (1, 2)))
    # The reference's range is whole metres.
    return torch.linspace(
        NEAREST, max(int(0.9 * farthest), NEAREST + 1), max(max(grid.map_shape) // 2, 2), dtype=torch.float64
    )


class LSS(nn.Module):
    """(B, V, D + C, h, w), logits of D depths and C features -> (B, C, H, W) map. It has no parameters of its own.

    The encoder's last 1x1 convolution makes both, as the reference's and Lift-Splat's do. channels: C.
    compat: None or "simple-bev".
    """

    mirrors_grid = False  # compat's cells are not mirrored when the grid is: see `network`

    def __init__(self, grid: VoxelGrid, channels: int, compat: str | None = None) -> None:
        super().__init__()
        check_compat(compat)
        self.grid, self.compat, self.channels = grid, compat, channels
        self.num_depths = len(depth_bins(grid))
        self.feature_channels = self.num_depths + channels

    def forward(self, features: Tensor, views: Views) -> Tensor:
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
            points = find_points(views, sample, self.grid, (h, w), self.compat)
            weights = probability[sample].flatten()[points.places] * points.shares.to(dtype)
            maps.append(
                nn.functional.embedding_bag(
                    points.places // self.num_depths, tokens[sample], points.starts,
                    mode="sum", per_sample_weights=weights, include_last_offset=True,
                )
            )  # fmt: skip
        lifted = torch.stack(maps).unflatten(1, self.grid.map_shape).permute(0, 3, 1, 2)
        return lifted.to(features.dtype)


@dataclass(frozen=True)
class Points:
    """One sample's points inside the grid, in the order of the map's cells.

    places: (n,) int64 index into (V, h, w, D). shares: (n,) float64 of each in its voxel's mean.
    starts: (H * W + 1,) int64 where each cell's points start.
    """

    places: Tensor
    shares: Tensor
    starts: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def find_points(
    views: Views, sample: int, grid: VoxelGrid, feature_size: tuple[int, int], compat: str | None
) -> Points:
    (height, width), (h, w) = views.images.shape[-2:], feature_size
    device = views.intrinsics.device
    intrinsics, cam_from_grid = views.intrinsics[sample].double(), views.cam_from_grid[sample].double()
    pixels_from_grid = cam_from_grid.detach().clone()
    pixels_from_grid[:, :3] = intrinsics.detach() @ cam_from_grid[:, :3].detach()
    grid_from_pixels = torch.linalg.inv_ex(pixels_from_grid).inverse  # of a camera that can't be inverted, not finite
    centre = 0.5 if compat is None else 0.0
    u = (torch.arange(w, device=device, dtype=torch.float64) + centre) * (width / w)
    v = (torch.arange(h, device=device, dtype=torch.float64) + centre) * (height / h)
    pixels = torch.stack([u.expand(h, w), v[:, None].expand(h, w), torch.ones_like(u).expand(h, w)], -1).view(-1, 3)
    rays = pixels @ grid_from_pixels[:, :3, :3].mT  # (V, h * w, 3) a metre of depth
    depths = depth_bins(grid).to(device)
    points = rays[:, :, None] * depths[:, None] + grid_from_pixels[:, None, None, :3, 3]
    voxel, is_inside = _voxels(points.view(-1, 3), grid, compat)
    places = is_inside.nonzero().flatten()
    voxel, cells = voxel[places], math.prod(grid.map_shape)
    cell, order = (voxel % cells).sort(stable=True)
    places, voxel = places[order], voxel[order]
    share = 1 / torch.bincount(voxel, minlength=grid.num_voxels)[voxel].double()
    per_cell = torch.bincount(cell, minlength=cells)
    if compat is not None:
        share /= per_cell[cell]
    return Points(places, share, nn.functional.pad(per_cell.cumsum(0), (1, 0)))


def _voxels(points: Tensor, grid: VoxelGrid, compat: str | None) -> tuple[Tensor, Tensor]:
    """(n, 3) points (right, forward, up) -> (n,) flat indices into (Z, H, W), and whether they are inside."""
    index = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    is_inside = torch.ones_like(index, dtype=torch.bool)
    for axis, size in enumerate(grid.shape):
        along = (points[:, 2 - axis] - grid.lower[axis]) / grid.cell_size[axis]
        if compat is None:
            i = along.floor()
        else:  # towards zero, of an index that is whole at centres and counts down from the top
            i = (along - 0.5).trunc() if axis else size - 1 - (size - 0.5 - along).trunc()
        is_inside &= (i >= 0) & (i < size)
        index = index * size + i.nan_to_num().clamp(0, size - 1).long()
    return index, is_inside
