"""Segmentation with Simple-BEV's centre and offset heads and its losses (loss.heads=simple-bev)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import TargetSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Sample
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.heads import SegmentationHead
from occfeat_train.tasks.instance_losses import cell_loss, center_loss, gaussian, offset_loss, weighted_sum
from occfeat_train.tasks.losses import exact
from occfeat_train.tasks.segmentation import Segmentation


class InstanceHeads(nn.Module):
    """Three heads on F_B, and the learned log variances of their losses.

    segmentation: logits. center: logits of the nearness to a centre. offset: twice the offset from a cell's centre, along right
    and forward [cells].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.segmentation = SegmentationHead(channels, 1)
        self.center = SegmentationHead(channels, 1)
        self.offset = SegmentationHead(channels, 2)
        self.log_variance = nn.Parameter(torch.zeros(3))


class InstanceSegmentation(Segmentation):
    """Segmentation of a kind of labels with single objects. Only training uses centres and offsets; evaluation is the same."""

    head: InstanceHeads

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid, feature_dim: int) -> None:
        super().__init__(network, config, grid, feature_dim)
        self.head = InstanceHeads(config.network.channels)

    @staticmethod
    def arrays(config: Config, spec: TargetSpec) -> list[str]:
        kind = LABEL_KINDS[config.task]
        names = Segmentation.arrays(config, spec)
        if not spec.instances:
            raise ValueError(
                f"no instances, which loss.heads={config.loss.heads} needs: build it with {' '.join(config.build_options)}, or "
                "train the segmentation alone with --set loss.heads=segmentation"
            )
        return [*names, kind.center_array, kind.offset_array]

    @staticmethod
    def targets(sample: Sample, config: Config) -> dict[str, NDArray[Any]]:
        """As of `Segmentation`; and center: (1, H, W) uint8, offset: (2, H, W) int16, as in the cache."""
        kind = LABEL_KINDS[config.task]
        instances = {"center": sample.arrays[kind.center_array][None], "offset": sample.arrays[kind.offset_array]}
        return Segmentation.targets(sample, config) | instances

    def logits(self, batch: Batch) -> Float[Tensor, "B K H W"]:
        logits: Tensor = self.head.segmentation(self.bev(batch))
        return logits

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The loss, and its parts without their weights."""
        bev = self.bev(batch)
        cells, valid = self.labels(batch)
        logits = exact(self.head.segmentation(bev))
        near = torch.sigmoid(exact(self.head.center(bev)))
        segmentation = cell_loss(logits, cells, valid, self.config.loss.pos_weight)
        center = center_loss(near, gaussian(batch.arrays["center"], near.dtype))
        offset = offset_loss(self.head.offset(bev), batch.arrays["offset"], cells & valid)
        loss = weighted_sum(segmentation, center, offset, self.head.log_variance)
        return {"loss": loss, "segmentation": segmentation, "center": center, "offset": offset}
