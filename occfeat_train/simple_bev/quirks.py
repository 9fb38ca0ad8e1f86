"""The reference repository's defects: liftings that compute the same function as aharley/simple_bev, for its weights.

`network.compat=simple-bev` selects them. Each overrides the geometry of one of our liftings; parameters are the same. They
run in plain torch on every device, except for BEVFormer's attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from occfeat_train.networks.bevformer import BEVFormer, ColumnReads
from occfeat_train.networks.lss import LSS, Points
from occfeat_train.networks.simplebev import SimpleBEV
from occfeat_train.ops.mean_over_views import every_voxel, sum_taps, taps_of, to_map, to_tokens
from occfeat_train.ops.views import Cameras, Projection, Views, check_shapes


class ReferenceSimpleBEV(SimpleBEV):
    """Stretches the map by w / (w - 1), accepts views up to half a token outside the image, and fades them out there."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def lift(self, features: Float[Tensor, "B V C h w"], views: Views) -> Float[Tensor, "B ZC H W"]:
        """Raises ValueError on maps of fewer than 2x2 tokens."""
        check_shapes(features, views)
        size = h, w = features.shape[3], features.shape[4]
        if min(size) < 2:
            raise ValueError(f"features of {h}x{w} tokens: expected at least 2x2 for simple-bev")
        exact = torch.float64 if features.dtype == torch.float64 else torch.float32
        cameras = views.cameras.to(features.device)
        volumes = []
        for sample, tokens in enumerate(to_tokens(features).unbind()):
            column, row, is_seen = self._stretched(cameras[sample], size)
            share = 1 / (is_seen.sum(-1).flatten().double() + 1e-6)
            volumes.append(sum_taps(tokens.to(exact), taps_of(column, row, is_seen, share, size, exact)))
        return to_map(torch.stack(volumes).to(features.dtype), self.grid)

    def _stretched(
        self, cameras: Cameras, feature_size: tuple[int, int]
    ) -> tuple[Float[Tensor, "H W Z V"], Float[Tensor, "H W Z V"], Bool[Tensor, "H W Z V"]]:
        """Columns and rows [tokens], and whether the camera counts as a view."""
        (height, width), (h, w) = cameras.image_size, feature_size
        u, v, depth = cameras.homogeneous(*every_voxel(self.grid, cameras.area.device))
        clamped = depth.clamp(min=1e-6)
        u, v = u / clamped * (w / width), v / clamped * (h / height)
        is_seen = (depth > 0) & (u > -0.5) & (u < w - 0.5) & (v > -0.5) & (v < h - 0.5)
        u, v = u * (w / (w - 1)) - 0.5, v * (h / (h - 1)) - 0.5
        return u, v, is_seen & (u > -1) & (u < w) & (v > -1) & (v < h)


class ReferenceBEVFormer(BEVFormer):
    """Self-attention reads around the transposed cell; cross-attention uses the views of the batch's first sample for all
    samples, and recognises points behind a camera only by a depth clamped at 1e-4.

    In training the reference also flips channels where it should flip the map forward; this is not reproduced.
    """

    def cell_anchors(self, device: torch.device) -> Float[Tensor, "HW 2"]:
        height, width = self.grid.map_shape
        columns, rows = super().cell_anchors(device).unbind(-1)
        return torch.stack([(rows + 0.5) / height * width - 0.5, (columns + 0.5) / width * height - 0.5], -1)

    def column_reads(self, views: Views, feature_size: tuple[int, int]) -> Iterator[ColumnReads]:
        first = None
        for placed, is_read, num_views in super().column_reads(views, feature_size):
            first = is_read if first is None else first
            yield placed, first, num_views

    def project(self, views: Views, sample: int) -> Projection:
        cameras = views.cameras[sample]
        height, width = cameras.image_size
        u, v, depth = (t.flatten(0, 1) for t in cameras.homogeneous(*every_voxel(self.grid, cameras.area.device)))
        clamped = depth.clamp(min=1e-4)
        # behind the camera, (x fx + depth cx) / clamped differs from the reference's x fx / clamped + cx
        center_u, center_v = views.intrinsics[sample, :, 0, 2].double(), views.intrinsics[sample, :, 1, 2].double()
        u, v = (u - center_u * depth) / clamped + center_u, (v - center_v * depth) / clamped + center_v
        is_masked = (views.cam_from_grid[sample] == 0).all(-1).all(-1)
        return Projection(u, v, clamped, (u > 0) & (u < width) & (v > 0) & (v < height) & ~is_masked)


class ReferenceLSS(LSS):
    """Rays start at a token's upper left corner, points are assigned to cells that start half a cell further, the first cell
    also takes one cell beyond each lower bound, and cells are divided by their number of points again.
    """

    token_center = 0.0

    def cells(self, along: Float[Tensor, " n"], axis: int) -> Float[Tensor, " n"]:
        """Rounds towards zero; the reference's index is whole at cell centres, and along up it counts down from the top."""
        size = self.grid.shape[axis]
        return (along - 0.5).trunc() if axis else size - 1 - (size - 0.5 - along).trunc()

    def find_points(self, views: Views, sample: int, feature_size: tuple[int, int]) -> Points:
        points: Points = super().find_points(views, sample, feature_size)
        place = torch.arange(len(points.places), device=points.places.device)
        cell = (torch.searchsorted(points.starts, place, right=True) - 1).clamp(max=len(points.starts) - 2)
        return replace(points, shares=points.shares / points.starts.diff()[cell].clamp(min=1))
