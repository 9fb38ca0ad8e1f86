"""BEV segmentation of vehicles or map classes. `forward` takes a batch and returns its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch
from occfeat_train.data.dataset import CLASSES
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.heads import SegmentationHead
from occfeat_train.tasks.losses import segmentation_loss
from occfeat_train.tasks.metrics import SegmentationMetric


class Segmentation(nn.Module):
    """Binary segmentation of the BEV plane for vehicles or for each map class."""

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
