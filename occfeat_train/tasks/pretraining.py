"""OccFeat's pretext task: occupancy and teacher features of voxels (eq. 1 to 3).

`forward` takes a batch and returns the losses, so that DDP and torch.compile see the whole step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.heads import OccFeatHead, voxel_rows
from occfeat_train.tasks.losses import feature_loss, occupancy_loss
from occfeat_train.tasks.metrics import PretrainingMetric


class Pretraining(nn.Module):
    """L = L_occ + lambda L_feat (eq. 1). A loss with weight 0 is not computed and has no projection layer."""

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid, feature_dim: int) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.network = network
        self.head = OccFeatHead(
            config.network.channels,
            grid.shape[0],
            feature_dim if config.loss.feat else 0,
            occupancy=config.loss.occ > 0,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": eq. 1, "occupancy": eq. 2, "features": eq. 3}, scalars."""
        occupied = batch.occupied()
        logits, _, feat = self._outputs(batch, occupied)
        losses: dict[str, Tensor] = {}
        if logits is not None:
            losses["occupancy"] = occupancy_loss(logits, occupied)
        if feat is not None:
            losses["features"] = feat
        weights = {"occupancy": self.config.loss.occ, "features": self.config.loss.feat}
        return {"loss": torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(), **losses}

    def _outputs(self, batch: Batch, occupied: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Occupancy logits, cosines of the distilled voxels, and eq. 3; None for outputs that this run does not have."""
        bev = self.network(batch.views(self.config.network.image_size), batch.bev_flip)
        if not self.config.loss.feat:
            return self.head(bev, None)[0], None, None
        voxels, target = self.targets(batch, occupied)
        logits, predicted = self.head(bev, voxels)
        feat, cosine = feature_loss(predicted, target, voxels // self.grid.num_voxels, len(batch))
        return logits, cosine, feat

    @staticmethod
    def targets(batch: Batch, occupied: Tensor) -> tuple[Tensor, Tensor]:
        """Flat indices (n,) and Y_v (n, N_y) of the `occupied` voxels (B, Z, H, W) that at least one camera sees."""
        voxels = voxel_rows(occupied)
        target, num_views = batch.voxel_targets(voxels)
        seen = num_views > 0
        return voxels[seen], target[seen]

    def metric(self) -> PretrainingMetric:
        return PretrainingMetric()

    def measure(self, batch: Batch, metric: Any) -> None:
        occupied = batch.occupied()
        logits, cosine, _ = self._outputs(batch, occupied)
        metric.update(logits, occupied, cosine)
