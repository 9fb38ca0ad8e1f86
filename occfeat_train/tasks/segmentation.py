"""BEV segmentation: the task of every kind of label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import TargetSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Sample
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.heads import SegmentationHead
from occfeat_train.tasks.losses import segmentation_loss
from occfeat_train.tasks.metrics import SegmentationMetric, as_text


class Segmentation(Task):
    """Binary segmentation of the BEV plane for each class of a kind of label (`config.task`)."""

    pictures: ClassVar = "occfeat_train.report.segmentation:draw"

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid, feature_dim: int) -> None:
        super().__init__(network, config, grid, feature_dim)
        self.classes = LABEL_KINDS[config.task].classes
        self.head = SegmentationHead(config.network.channels, len(self.classes))

    @staticmethod
    def arrays(config: Config, spec: TargetSpec) -> list[str]:
        kind = config.task
        if kind not in spec.labels:
            raise ValueError(
                f"no {kind} labels (it has: {', '.join(spec.labels) or 'none'}): build it with --label-kinds {kind}, from a data "
                "set that has them"
            )
        return list(LABEL_KINDS[kind].arrays)

    @staticmethod
    def targets(sample: Sample, config: Config) -> dict[str, NDArray[Any]]:
        """labels: (K, H, packed) uint8; valid: (1, H, packed), absent if every cell is valid."""
        shape = (-1, sample.grid.map_shape[0], sample.grid.map_row_bytes)
        names = zip(LABEL_KINDS[config.task].arrays, ("labels", "valid"), strict=False)
        return {name: sample.arrays[array].reshape(shape) for array, name in names}

    def logits(self, batch: Batch) -> Float[Tensor, "B K H W"]:
        logits: Tensor = self.head(self.bev(batch))
        return logits

    @staticmethod
    def labels(batch: Batch) -> tuple[Bool[Tensor, "B K H W"], Bool[Tensor, "B 1 H W"]]:
        """Labels and validity."""
        labels = batch.maps("labels")
        return labels, batch.maps("valid") if "valid" in batch.arrays else torch.ones_like(labels[:, :1])

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"loss": segmentation_loss(self.logits(batch), *self.labels(batch), self.config.loss.pos_weight)}

    def metric(self) -> SegmentationMetric:
        return SegmentationMetric(self.classes, self.grid)

    def measure(self, batch: Batch, metric: Any) -> None:
        metric.update(self.logits(batch), *self.labels(batch))

    @staticmethod
    def score(results: Mapping[str, Any]) -> float | None:
        """IoU at 0.5, the mean over classes [%]."""
        return results["iou"]

    @staticmethod
    def columns(results: Mapping[str, Any]) -> dict[str, str]:
        best = f"{as_text(results['iou_best'])} ({results['threshold_best']:g})"
        at_half = (
            {} if len(results["per_class"]) == 1 else {n.replace("_", " "): v for n, v in results["per_class"].items()}
        )
        at_half |= {band.replace("35-inf", "over 35"): iou for band, iou in results["by_distance"].items()}
        return {
            "IoU at 0.5 [%]": as_text(results["iou"]),
            **{f"{name}, at 0.5": as_text(iou) for name, iou in at_half.items()},
            "IoU at the best threshold [%]": best,
        }
