"""SimpleBEV: lifting by `ops.lifting`, then a compressor from the volume to a BEV map."""

from __future__ import annotations

from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.lifting import check_compat, lift
from occfeat_train.ops.norms import InstanceNorm
from occfeat_train.ops.views import Views


class SimpleBEV(nn.Module):
    """Lifting, and a compressor from its Z * C channels to C: 3x3 convolution, InstanceNorm, GELU."""

    mirrors_grid = True  # mirroring the grid gives the mirrored volume: see `network`

    def __init__(self, grid: VoxelGrid, channels: int, compat: str | None = None) -> None:
        """channels: C of the image features and of the result. compat: None or "simple-bev"."""
        super().__init__()
        check_compat(compat)
        self.grid, self.compat, self.feature_channels = grid, compat, channels
        self.compressor = nn.Sequential(
            nn.Conv2d(grid.shape[0] * channels, channels, 3, padding=1, bias=False), InstanceNorm(), nn.GELU()
        )

    def lift(self, features: Tensor, views: Views) -> Tensor:
        """(B, V, C, h, w) -> (B, Z * C, H, W): `lift` on this module's grid."""
        return lift(features, views, self.grid, self.compat)

    def forward(self, features: Tensor, views: Views) -> Tensor:
        """(B, V, C, h, w) -> (B, C, H, W)."""
        compressed: Tensor = self.compressor(self.lift(features, views))
        return compressed
