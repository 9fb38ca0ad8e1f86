"""What is plugged on top of F_B: OccFeat's un-splatting head for pretraining (paper 3.2, 3.3), a segmentation head after.

Volumes inside the head lie in memory as (B, H, W, Z, channels), channels-last maps whose channels are Z groups of
N_B (3.2): the reshape of a 2D map into a volume moves nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occfeat_train.norms import InstanceNorm


class OccFeatHead(nn.Module):
    """D_V and the two projections of paper 3.2-3.3.

    F_B -> 3x3 conv, InstanceNorm, ReLU -> 1x1 conv to N_B * Z_B, Z_B groups of N_B -> 1x1x1 to 2 N_B, Softplus ->
    1x1x1 to N_B: F_V -> occupancy logit, and N_y features.

    The layers hold exactly the paper's parameters. Computed is the same function, without what nobody reads: the two
    linear layers before the Softplus are one, so are the two between it and the occupancy logit, and F_V and the
    features exist only at the voxels asked for.
    """

    def __init__(self, channels: int, height: int, feature_dim: int, *, occupancy: bool = True) -> None:
        """channels: N_B. height: Z_B. feature_dim: N_y, 0 for no feature projection. occupancy: false leaves its out."""
        super().__init__()
        self.channels, self.height = channels, height
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = InstanceNorm()
        self.unsplat = nn.Conv2d(channels, channels * height, 1)
        self.expand = nn.Linear(channels, 2 * channels)  # a 1x1x1 convolution
        self.reduce = nn.Linear(2 * channels, channels)
        self.occupancy = nn.Linear(channels, 1) if occupancy else None
        self.features = nn.Linear(channels, feature_dim) if feature_dim else None

    def forward(self, bev: Tensor, voxels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """bev: F_B (B, N_B, H, W). voxels: (n,) int64 flat indices into (B, Z_B, H, W) whose features are wanted.

        Returns occupancy logits (B, Z_B, H, W), None without that projection, and features (n, N_y), None if voxels is.
        """
        batch, _, height, width = bev.shape
        wide = 2 * self.channels
        hidden = F.relu(self.norm(self.conv(bev)))
        with torch.autocast(bev.device.type, enabled=False):  # products of weights, formed in their own precision
            unsplat, to_logit = self._unsplat_and_expand(), self._reduce_and_occupancy()
        hidden = F.conv2d(hidden, *unsplat)  # (B, Z_B * 2N_B, H, W)
        hidden = F.softplus(hidden.permute(0, 2, 3, 1).reshape(-1, wide))  # rows: (b, h, w, z)
        logits = features = None
        if to_logit is not None:
            logits = F.linear(hidden, *to_logit).reshape(batch, height, width, self.height).permute(0, 3, 1, 2)
        if voxels is not None:
            assert self.features is not None, "this head was built without a feature projection"
            cells = height * width
            cell = voxels % cells + voxels // (self.height * cells) * cells
            rows = hidden.index_select(0, cell * self.height + voxels // cells % self.height)
            features = self.features(self.reduce(rows))
        return logits, features

    def _unsplat_and_expand(self) -> tuple[Tensor, Tensor]:
        """The 1x1 convolution and the 1x1x1 one after it, with nothing between, as one: N_B to Z_B groups of 2 N_B."""
        groups = self.unsplat.weight.reshape(self.height, self.channels, self.channels)
        weight = self.expand.weight @ groups  # (Z_B, 2N_B, N_B)
        bias = self.unsplat.bias.reshape(self.height, self.channels) @ self.expand.weight.T + self.expand.bias  # type: ignore[union-attr]
        return weight.reshape(-1, self.channels, 1, 1), bias.reshape(-1)

    def _reduce_and_occupancy(self) -> tuple[Tensor, Tensor] | None:
        """F_V's layer and the occupancy projection after it, as one: 2 N_B to a logit."""
        if self.occupancy is None:
            return None
        weight = self.occupancy.weight @ self.reduce.weight
        return weight, self.occupancy.weight @ self.reduce.bias + self.occupancy.bias


class SegmentationHead(nn.Sequential):
    """F_B (B, N_B, H, W) -> logits (B, classes, H, W): Simple-BEV's head, 3x3 conv, InstanceNorm, ReLU, 1x1 conv."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            InstanceNorm(),
            nn.ReLU(),
            nn.Conv2d(channels, classes, 1),
        )


def voxel_rows(occupied: Tensor) -> Tensor:
    """(B, Z, H, W) bool -> (n,) flat indices of the true ones, sample by sample."""
    return torch.nonzero(occupied.reshape(-1)).reshape(-1)
