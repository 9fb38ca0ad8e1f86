"""Metrics over a whole data set: exact sums, divided once at the end.

IoU = sum of intersections / sum of unions over all valid cells of the data set, as in Lift-Splat-Shoot and Simple-BEV. The
mean of per-batch IoUs is a different number (46.6 against 47.4 on one of their checkpoints).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.distributed import gather, sum_over_processes
from occfeat_train.tasks.ray_iou import NUM_COUNTS, ray_ious

THRESHOLDS = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)  # BEVFusion's
HALF = THRESHOLDS.index(0.5)
DISTANCES = ((0.0, 20.0), (20.0, 35.0), (35.0, float("inf")))  # [m] from the grid's origin


class Metric:
    """A metric over a data set, which a task's `measure` updates."""

    def __init__(self) -> None:
        self.num_samples = 0

    def reduce(self) -> None:
        """Sum over all ranks."""
        self.num_samples = int(sum_over_processes(torch.tensor(self.num_samples)))

    def results(self) -> dict[str, Any]:
        """{quantity: value}, as JSON."""
        raise NotImplementedError


class LossMetric(Metric):
    """The mean of each loss over all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, float] = {}

    def update(self, losses: Mapping[str, Tensor], num_samples: int) -> None:
        """losses: means over a batch's samples, scalars."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.item() * num_samples
        self.num_samples += num_samples

    def reduce(self) -> None:
        super().reduce()
        sums = gather(list(self.sums.items()))  # a rank without samples has none
        self.sums = {name: sum(value for other, value in sums if other == name) for name, _ in sums}

    def results(self) -> dict[str, Any]:
        return {"samples": self.num_samples, **{name: total / self.num_samples for name, total in self.sums.items()}}


class SegmentationMetric(Metric):
    """IoU per class, threshold and distance band.

    counts: (thresholds, classes, bands, 2) int64 intersections and unions on the CPU.
    """

    def __init__(self, classes: Sequence[str], grid: VoxelGrid) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.counts = torch.zeros(len(THRESHOLDS), len(classes), len(DISTANCES), 2, dtype=torch.int64)
        centers = grid.voxel_centers()[0, ..., :2]
        distance = torch.from_numpy(np.linalg.norm(centers, axis=-1))
        self._bands = torch.stack([(distance >= low) & (distance < high) for low, high in DISTANCES])
        self._logits = torch.logit(torch.tensor(THRESHOLDS, dtype=torch.float64)).float()

    def update(
        self, logits: Float[Tensor, "B K H W"], target: Bool[Tensor, "B K H W"], valid: Bool[Tensor, "B 1 H W"]
    ) -> None:
        """valid: cells that are scored."""
        bands = self._bands.to(logits.device).flatten(1).double().T  # (cells, bands)
        target, valid = target.flatten(2), valid.flatten(2)
        for row, threshold in enumerate(self._logits.tolist()):
            predicted = logits.flatten(2).float() >= threshold
            for column, cells in enumerate((predicted & target & valid, (predicted | target) & valid)):
                # float64 is exact; autocast, which is on in evaluation, changes all other products.
                self.counts[row, ..., column] += (cells.sum(0).double() @ bands).round().long().cpu()
        self.num_samples += len(logits)

    def reduce(self) -> None:
        super().reduce()
        self.counts = sum_over_processes(self.counts)

    def results(self) -> dict[str, Any]:
        """IoU in percent: mean over classes, per class, best threshold, by distance. None where a union is empty."""
        total = self.counts.sum(2)
        best = max(range(len(THRESHOLDS)), key=lambda i: _mean_iou(total[i]) or 0.0)
        per_class = {name: _iou(total[HALF, k]) for k, name in enumerate(self.classes)}
        per_class_best = {}
        for k, name in enumerate(self.classes):
            ious = [_iou(counts) for counts in total[:, k]]
            row = ious.index(max(ious, key=lambda iou: iou or 0.0))
            per_class_best[name] = {"iou": ious[row], "threshold": THRESHOLDS[row]}
        return {
            "samples": self.num_samples,
            "iou": _mean_iou(total[HALF]),
            "iou_best": _mean_iou(total[best]),
            "threshold_best": THRESHOLDS[best],
            "per_class": per_class,
            "per_class_best": per_class_best,
            "by_distance": {
                f"{low:g}-{high:g} m": _mean_iou(self.counts[HALF, :, band])
                for band, (low, high) in enumerate(DISTANCES)
            },
        }


class PretrainingMetric(Metric):
    """Occupancy IoU at 0.5, and the mean cosine between predicted and target features over all distilled voxels.

    With rays also the IoU over observed voxels, and RayIoU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(
            5, dtype=torch.int64
        )  # intersection, union; both of observed voxels; distilled voxels
        self.rays = torch.zeros(NUM_COUNTS, dtype=torch.int64)
        self.cosine = torch.zeros((), dtype=torch.float64)

    def update(
        self,
        logits: Float[Tensor, "B Z H W"] | None,
        occupied: Bool[Tensor, "B Z H W"],
        cosine: Float[Tensor, " n"] | None,
        observed: Bool[Tensor, "B Z H W"] | None = None,
        rays: Int64[Tensor, " m"] | None = None,
    ) -> None:
        """logits: None without occupancy head. cosine: None without feature head. observed, rays (`ray_counts`): None without rays."""
        if logits is not None:
            predicted = logits > 0
            both, either = predicted & occupied, predicted | occupied
            self.counts[0] += both.sum().cpu()
            self.counts[1] += either.sum().cpu()
            if observed is not None:
                self.counts[2] += (both & observed).sum().cpu()
                self.counts[3] += (either & observed).sum().cpu()
        if rays is not None:
            self.rays += rays
        if cosine is not None:
            self.counts[4] += len(cosine)
            self.cosine += cosine.double().sum().cpu()
        self.num_samples += len(occupied)

    def reduce(self) -> None:
        super().reduce()
        self.counts, self.rays, self.cosine = map(sum_over_processes, (self.counts, self.rays, self.cosine))

    def results(self) -> dict[str, Any]:
        voxels = int(self.counts[4])
        with_rays = {"occupancy_iou_observed": _iou(self.counts[2:4]), **ray_ious(self.rays)} if self.rays.any() else {}
        return {
            "samples": self.num_samples,
            "occupancy_iou": _iou(self.counts[:2]),
            **with_rays,
            "cosine": float(self.cosine) / voxels if voxels else None,
        }


class QueryMetric(Metric):
    """Img-ALSO's queries: accuracy and IoU of their occupancy at 0.5, and the mean absolute error of their intensity.

    The prediction for a query is the mean of its cells', of logits and of intensities. Queries without a cell do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        # Queries: right, all, intersection, union, with an intensity
        self.counts = torch.zeros(5, dtype=torch.int64)
        self.error = torch.zeros((), dtype=torch.float64)

    def update(
        self,
        predicted: Bool[Tensor, "B q"],
        intensity: Float64[Tensor, "B q"],
        has_cell: Bool[Tensor, "B q"],
        occupied: Bool[Tensor, "B q"],
        target: Float[Tensor, "B q"],
    ) -> None:
        """has_cell: queries that count. target: the queries' intensity, negative if they have none."""
        counted = target >= 0
        outcomes = (predicted == occupied, has_cell, predicted & occupied, predicted | occupied, counted)
        self.counts += torch.stack([(cells & has_cell).sum() for cells in outcomes]).cpu()
        self.error += torch.where(counted & has_cell, (intensity - target).abs(), 0).sum().cpu()
        self.num_samples += len(occupied)

    def reduce(self) -> None:
        super().reduce()
        self.counts, self.error = sum_over_processes(self.counts), sum_over_processes(self.error)

    def results(self) -> dict[str, Any]:
        number, with_intensity = self.counts[[1, 4]].tolist()
        return {
            "samples": self.num_samples,
            "queries": number,
            "query_iou": _iou(self.counts[2:4]),
            "query_accuracy": _iou(self.counts[:2]),
            "intensity_error": float(self.error) / with_intensity if with_intensity else None,
        }


def _iou(counts: Tensor) -> float | None:
    """(2,) intersection and union -> percent."""
    intersection, union = counts.tolist()
    return 100 * intersection / union if union else None


def _mean_iou(counts: Tensor) -> float | None:
    """(classes, 2) -> percent, averaged over the classes that occur."""
    values = [iou for iou in map(_iou, counts) if iou is not None]
    return sum(values) / len(values) if values else None


def as_text(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
