"""SimpleBEV: lifting by `ops.mean_over_views`, then a compressor from the volume to a BEV map."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.instance_norm import InstanceNorm
from occfeat_train.ops.mean_over_views import lift
from occfeat_train.ops.views import Views


class SimpleBEV(nn.Module):
    """Lifting, and a compressor from its Z * C channels to C: 3x3 convolution, InstanceNorm, GELU."""

    mirrors_grid = True  # mirroring the grid gives the mirrored volume: see `network`

    def __init__(self, grid: VoxelGrid, channels: int) -> None:
        """channels: C of the image features and of the result."""
        super().__init__()
        self.grid, self.feature_channels = grid, channels
        self.compressor = nn.Sequential(
            nn.Conv2d(grid.shape[0] * channels, channels, 3, padding=1, bias=False), InstanceNorm(), nn.GELU()
        )

    def lift(self, features: Float[Tensor, "B V C h w"], views: Views) -> Float[Tensor, "B ZC H W"]:
        """`mean_over_views.lift` on this module's grid."""
        return lift(features, views, self.grid)

    def forward(self, features: Float[Tensor, "B V C h w"], views: Views) -> Float[Tensor, "B C H W"]:
        compressed: Tensor = self.compressor(self.lift(features, views))
        return compressed
