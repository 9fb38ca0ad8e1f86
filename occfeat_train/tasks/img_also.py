"""Img-ALSO (paper 4.2): the pretext task of ALSO for a camera network, the baseline that the paper compares OccFeat with.

Each BEV cell is a point at height 0 of the grid. Every cell within 1 m of a query, seen from above, predicts alone whether the
query is occupied, and the intensity of the LiDAR return next to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from occfeat_targets.cache.geometry import transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Sample
from occfeat_train.data.queries import NO_INTENSITY, NUM_QUERIES, columns_near, decimate, draw_queries
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.losses import pair_loss
from occfeat_train.tasks.metrics import QueryMetric, as_text

LATENT = 128  # channels of a cell's point, and of the decoder's hidden layers


class ReconstructionHead(nn.Module):
    """F_B -> 1x1 convolution to 128 channels, and ALSO's decoder of (latent of a cell, query - cell).

    The decoder is Linear 131 to 128, ReLU, 128 to 128, ReLU, 128 to 128, 128 to 2. Linear layers without an activation between
    them are merged, so a pair of query and cell needs one product of 128 x 128 and one of 128 x 2.
    """

    def __init__(self, channels: int) -> None:
        """channels: N_B."""
        super().__init__()
        self.latent = nn.Linear(channels, LATENT)  # the 1x1 convolution
        self.first = nn.Linear(LATENT + 3, LATENT)
        self.second = nn.Linear(LATENT, LATENT)
        self.third = nn.Linear(LATENT, LATENT)
        self.output = nn.Linear(LATENT, 2)

    def forward(
        self, bev: Float[Tensor, "B C H W"], cell: Int64[Tensor, " p"], offset: Float[Tensor, "p 3"]
    ) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
        """bev: F_B. cell: flat indices into (B, H, W). offset: query - (centre of the cell, height 0) [m].

        Returns occupancy logits and intensities of the pairs.
        """
        with torch.autocast(bev.device.type, enabled=False):  # products of weights in the weights' own precision
            of_latent, of_offset = self.first.weight.split([LATENT, 3], dim=1)
            to_hidden = of_latent @ self.latent.weight, of_latent @ self.latent.bias + self.first.bias
            to_output = self.output.weight @ self.third.weight, self.output.weight @ self.third.bias + self.output.bias
            from_offset = F.linear(offset.to(of_offset), of_offset)
        rows = F.linear(bev.permute(0, 2, 3, 1).flatten(0, 2), *to_hidden)
        # A cell has up to thousands of pairs, whose gradients are summed in the precision of the weights.
        hidden = F.relu(rows.to(of_offset).index_select(0, cell) + from_offset)
        logit, intensity = F.linear(F.relu(self.second(hidden)), *to_output).unbind(1)
        return logit, intensity


class ImgALSO(Task):
    """L = binary cross-entropy of occupancy + L1 of intensity, over pairs of a query and a cell."""

    head: ReconstructionHead
    centers: Tensor
    pictures: ClassVar = "occfeat_train.report.img_also:draw"
    ragged: ClassVar = ("cell", "query")
    without_targets: ClassVar = "their own sweep has no LiDAR return"
    note: ClassVar = (
        "Queries lie on the rays of LiDAR returns: a third just behind a return (occupied), a third just in front of one and a "
        "third anywhere between it and the sensor (free). Calling all of them free is right for 67 %, with an IoU of 0."
    )

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid, feature_dim: int) -> None:
        super().__init__(network, config, grid, feature_dim)
        self.head = ReconstructionHead(config.network.channels)
        plane = torch.from_numpy(grid.voxel_centers()[0]).flatten(0, 1)
        plane[:, 2] = 0
        # (H W, 3) points of the cells [m]
        self.register_buffer("centers", plane, persistent=False)

    @staticmethod
    def arrays(config: Config, spec: TargetSpec) -> list[str]:
        if not spec.max_points:
            raise ValueError("no LiDAR returns, which img-also draws its queries from: build it with --points")
        return ["points", "num_points", "sweep_origins", "grid_from_ego"]

    @staticmethod
    def has_targets(reader: CacheReader) -> NDArray[np.bool_]:
        """(N,) whether a keyframe's own sweep has a return."""
        return np.array([reader.read("num_points", keyframe)[0] > 0 for keyframe in range(len(reader))])

    @staticmethod
    def targets(sample: Sample, config: Config) -> dict[str, NDArray[Any]]:
        """Queries of the keyframe's own sweep, and the pairs of a query and a cell within 1 m of it:

        queries: (q, 3) float32 in the grid [m]. occupied: (q,) bool. intensity: (q,) float32. query, cell: (p,) int64 flat
        indices into the batch's (B, q) and (B, H, W). A sweep of few returns has fewer queries; zeros without a pair follow.
        """
        grid_from_ego, grid = sample.arrays["grid_from_ego"].astype(np.float64), sample.grid
        returns = sample.arrays["points"][: sample.arrays["num_points"][0]]
        kept = returns[decimate(returns[:, :3].astype(np.float64))]
        sensor = sample.arrays["sweep_origins"][0].astype(np.float64)
        drawn = draw_queries(kept[:, :3].astype(np.float64), kept[:, 3], sensor, sample.rng, NUM_QUERIES)
        xyz = transform(grid_from_ego, drawn.xyz)
        query, cell = columns_near(xyz[:, :2], grid)
        missing = NUM_QUERIES - len(xyz)
        return {
            "queries": np.pad(xyz.astype(np.float32), ((0, missing), (0, 0))),
            "occupied": np.pad(drawn.occupied, (0, missing)),
            "intensity": np.pad(drawn.intensity, (0, missing), constant_values=NO_INTENSITY),
            "query": query + sample.index * NUM_QUERIES,
            "cell": cell + sample.index * grid.map_shape[0] * grid.map_shape[1],
        }

    def predict(self, batch: Batch) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
        """Occupancy logits and intensities of the batch's pairs; those of padding are arbitrary."""
        query, cell = (batch.arrays[name].clamp(min=0) for name in ("query", "cell"))
        position = batch.arrays["queries"].flatten(0, 1).index_select(0, query)
        offset = position - self.centers.index_select(0, cell % len(self.centers))
        logits, intensity = self.head(self.bev(batch), cell, offset)
        return logits, intensity

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """{"loss": their sum, "reconstruction": occupancy loss, "intensity": intensity loss}, scalars."""
        logits, intensity = self.predict(batch)
        query, number = batch.arrays["query"], batch.arrays["queries"].shape[1]
        occupied, target = (
            batch.arrays[name].flatten().index_select(0, query.clamp(min=0)) for name in ("occupied", "intensity")
        )
        sample = query // number  # -1 for padding
        losses = {
            "reconstruction": pair_loss(
                F.binary_cross_entropy_with_logits(logits, occupied.to(logits), reduction="none"), sample, len(batch)
            ),
            "intensity": pair_loss((intensity - target).abs(), torch.where(target >= 0, sample, -1), len(batch)),
        }
        return {"loss": losses["reconstruction"] + losses["intensity"], **losses}

    def metric(self) -> QueryMetric:
        return QueryMetric()

    def measure(self, batch: Batch, metric: Any) -> None:
        arrays = (batch.arrays[name] for name in ("query", "occupied", "intensity"))
        metric.update(*self.predict(batch), *arrays)

    @staticmethod
    def score(results: Mapping[str, Any]) -> float | None:
        """Occupancy IoU of the queries [%]."""
        return results["query_iou"]

    @staticmethod
    def heading(config: Config) -> str:
        return "Img-ALSO"

    @staticmethod
    def columns(results: Mapping[str, Any]) -> dict[str, str]:
        return {
            "occupancy IoU of queries [%]": as_text(results["query_iou"]),
            "accuracy of queries [%]": as_text(results["query_accuracy"]),
            "error of intensities": as_text(results["intensity_error"], 3),
        }
