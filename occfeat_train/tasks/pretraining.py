"""OccFeat's pretext task: occupancy and teacher features of voxels (eq. 1 to 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import TargetSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Sample
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.ops.mean_over_views import sample_voxel_features_numpy
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.heads import OccFeatHead
from occfeat_train.tasks.losses import feature_loss, occupancy_loss
from occfeat_train.tasks.metrics import PretrainingMetric, as_text
from occfeat_train.tasks.ray_iou import DEPTH_ERRORS, first_depths, query_directions, ray_counts


class Pretraining(Task):
    """L = L_occ + lambda L_feat (eq. 1). A loss with weight 0 is not computed and has no projection layer."""

    head: OccFeatHead
    pictures: ClassVar = "occfeat_train.report.pretraining:draw"
    ragged: ClassVar = ("voxels", "features")
    note: ClassVar = (
        "The feature loss is minus the mean cosine between predicted and target features: -1 is a perfect prediction, and "
        "0 means that they are unrelated. One fixed vector, the mean feature, already reaches a value well below 0; the key of "
        "the pictures below gives it. The loss is the occupancy loss plus lambda times the feature loss, so it may be negative."
    )

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid, feature_dim: int) -> None:
        super().__init__(network, config, grid, feature_dim)
        self.head = OccFeatHead(
            config.network.channels,
            grid.shape[0],
            feature_dim if config.loss.feat else 0,
            occupancy=config.loss.occ > 0,
        )

    @staticmethod
    def arrays(config: Config, spec: TargetSpec) -> list[str]:
        names = ["occupancy"]
        if config.loss.occ_on == "observed":
            if not spec.rays:
                raise ValueError(
                    "no rays, which loss.occ_on=observed needs: build it with --rays, or pretrain with --occ-on all"
                )
            names.append("rays")
        if not config.loss.feat:
            return names
        if spec.teacher is None:
            raise ValueError(
                f"no teacher features, which lambda={config.loss.feat:g} needs: build it with --teacher, or pretrain with "
                "--occ-only"
            )
        return [*names, "features"] + ["feature_scale"] * (spec.feature_dtype == "int8")

    @staticmethod
    def evaluation_arrays(config: Config, spec: TargetSpec) -> list[str]:
        return ["rays", "ray_origin"] if spec.rays and config.loss.occ else []

    @staticmethod
    def targets(sample: Sample, config: Config) -> dict[str, NDArray[Any]]:
        """Packed occupancy and, if they were read, packed observed voxels, the rays' origin, and the true depths of RayIoU's
        query rays, (n,) float64.

        Also, of the n occupied voxels that at least one camera sees (`loss.occlusion`), with a feature loss:

        voxels: (n,) int64 flat indices into the batch's (B, Z, H, W). features: (n, N_y) float16, Y_v of paper 3.3. They are
        sampled from features of the cached images, because only the student's images are augmented.
        """
        targets = {"occupancy": sample.arrays["occupancy"]}
        if "rays" in sample.arrays:
            targets["observed"] = sample.arrays["rays"][0]
        if "ray_origin" in sample.arrays:
            origin = targets["ray_origin"] = sample.arrays["ray_origin"]
            occupied = sample.grid.unpack_volume(targets["occupancy"])
            targets["ray_depths"] = first_depths(occupied, origin, query_directions(), sample.grid)
        if not config.loss.feat:
            return targets
        voxels = np.flatnonzero(sample.grid.unpack_volume(targets["occupancy"]))
        features, num_views = sample_voxel_features_numpy(
            sample.arrays["features"],
            sample.arrays.get("feature_scale"),
            sample.cam_from_grid,
            sample.intrinsics,
            sample.image_size,
            sample.grid.centers_of(voxels),
            area=sample.area,
            cell_size=sample.grid.cell_size if config.loss.occlusion == "zbuffer" else None,
        )
        seen = num_views > 0
        voxels = voxels[seen] + sample.index * sample.grid.num_voxels
        return {**targets, "voxels": voxels, "features": features[seen]}

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """{"loss": eq. 1, "occupancy": eq. 2, "features": eq. 3}, scalars."""
        logits, _, feat = self._outputs(batch)
        losses: dict[str, Tensor] = {}
        if logits is not None:
            observed = batch.volume("observed") if self.config.loss.occ_on == "observed" else None
            losses["occupancy"] = occupancy_loss(logits, batch.volume("occupancy"), observed)
        if feat is not None:
            losses["features"] = feat
        weights = {"occupancy": self.config.loss.occ, "features": self.config.loss.feat}
        return {"loss": torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(), **losses}

    def _outputs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Occupancy logits, cosines of the distilled voxels, and eq. 3; None for outputs that this run does not have."""
        bev = self.bev(batch)
        if not self.config.loss.feat:
            return self.head(bev, None)[0], None, None
        voxels, target = batch.arrays["voxels"], batch.arrays["features"]
        logits, predicted = self.head(bev, voxels)
        feat, cosine = feature_loss(predicted, target, voxels // self.grid.num_voxels, len(batch))
        return logits, cosine, feat

    def metric(self) -> PretrainingMetric:
        return PretrainingMetric()

    def measure(self, batch: Batch, metric: Any) -> None:
        logits, cosine, _ = self._outputs(batch)
        occupied, observed, rays = batch.volume("occupancy"), None, None
        if logits is not None and "ray_origin" in batch.arrays:
            observed = batch.volume("observed")
            depths, origins = batch.arrays["ray_depths"], batch.arrays["ray_origin"]
            rays = ray_counts(logits > 0, depths, origins, self.grid)
        metric.update(logits, occupied, cosine, observed, rays)

    @staticmethod
    def score(results: Mapping[str, Any]) -> float | None:
        """Occupancy IoU [%]; the mean cosine without an occupancy loss."""
        return results["cosine"] if results["occupancy_iou"] is None else results["occupancy_iou"]

    @staticmethod
    def heading(config: Config) -> str:
        return "Pretraining"

    @staticmethod
    def columns(results: Mapping[str, Any]) -> dict[str, str]:
        columns = {"occupancy IoU at 0.5 [%]": as_text(results["occupancy_iou"], 1)}
        if "occupancy_iou_observed" in results:
            columns["IoU over observed voxels [%]"] = as_text(results["occupancy_iou_observed"], 1)
            by_threshold = " ".join(as_text(results[f"ray_iou_{limit:g}m"], 1) for limit in DEPTH_ERRORS)
            columns["RayIoU at 1, 2, 4 m [%]"] = by_threshold
        return columns | {"mean cosine to the teacher's features": as_text(results["cosine"], 3)}
