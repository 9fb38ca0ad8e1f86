"""What is trained: a BEV network with a head, its loss and its metric. Each task is one module whose `forward` takes a
batch and gives its losses, so that DDP and torch.compile see the whole step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch
from occfeat_train.data.dataset import CLASSES
from occfeat_train.networks.network import BEVNetwork, build_network
from occfeat_train.tasks.heads import OccFeatHead, SegmentationHead, voxel_rows
from occfeat_train.tasks.losses import feature_loss, occupancy_loss, segmentation_loss
from occfeat_train.tasks.metrics import PretrainingMetric, SegmentationMetric


class Pretraining(nn.Module):
    """L = L_occ + lambda L_feat (eq. 1). A loss of weight 0 is not computed, and its projection does not exist."""

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
        """Occupancy logits, cosines of the distilled voxels, and eq. 3; None for what this run leaves out."""
        bev = self.network(batch.views(self.config.network.image_size), batch.bev_flip)
        if not self.config.loss.feat:
            return self.head(bev, None)[0], None, None
        voxels, target = self.targets(batch, occupied)
        logits, predicted = self.head(bev, voxels)
        feat, cosine = feature_loss(predicted, target, voxels // self.grid.num_voxels, len(batch))
        return logits, cosine, feat

    @staticmethod
    def targets(batch: Batch, occupied: Tensor) -> tuple[Tensor, Tensor]:
        """Of the `occupied` voxels (B, Z, H, W) that some camera sees: flat indices (n,), and their Y_v (n, N_y)."""
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


class Segmentation(nn.Module):
    """Vehicles, or the map's classes, each a binary segmentation of the BEV plane."""

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.classes = CLASSES[config.task]
        self.network = network
        self.head = SegmentationHead(config.network.channels, len(self.classes))

    def logits(self, batch: Batch) -> Tensor:
        """(B, classes, H, W)."""
        return self.head(self.network(batch.views(self.config.network.image_size), batch.bev_flip))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": segmentation_loss(self.logits(batch), *batch.map_labels(), self.config.loss.pos_weight)}

    def metric(self) -> SegmentationMetric:
        return SegmentationMetric(self.classes, self.grid)

    def measure(self, batch: Batch, metric: Any) -> None:
        metric.update(self.logits(batch), *batch.map_labels())


AnyTask = Pretraining | Segmentation


def build_task(config: Config, grid: VoxelGrid, feature_dim: int) -> AnyTask:
    """A task with freshly initialised weights, the same for the same seed. feature_dim: N_y of the cache's teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(
            grid,
            config.network.backbone,
            config.network.channels,
            config.network.lifting,
            config.network.drop_connect,
            None if config.network.compat == "none" else config.network.compat,
            config.network.recompute,
        )
        if config.task == "pretrain":
            return Pretraining(network, config, grid, feature_dim)
        return Segmentation(network, config, grid)


def place(task: AnyTask, device: torch.device) -> None:
    """Move a task to where it computes, its convolutions' weights in channels-last order."""
    task.to(device)
    task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def freeze_batchnorm(module: nn.Module) -> None:
    """Let every BatchNorm use its running statistics, in training too."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


def count_parameters(module: nn.Module) -> int:
    return int(np.sum([p.numel() for p in module.parameters()], dtype=np.int64))
