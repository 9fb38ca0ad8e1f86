"""Img-ALSO (paper 4.2): the pretext task of ALSO for a camera network, the baseline that the paper compares OccFeat with.

Each BEV cell is a point at height 0 of the grid. Every cell within 1 m of a query, seen from above, predicts alone whether the
query is occupied, and the intensity of the LiDAR return next to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from occfeat_targets.cache.geometry import transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Sample
from occfeat_train.data.queries import NUM_QUERIES, Queries, cells_near, decimate, draw_queries, scale_intensity, window
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.losses import exact, mean_over_samples
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
        self,
        bev: Float[Tensor, "B C H W"],
        centers: Float[Tensor, "n 3"],
        xyz: Float[Tensor, "B q 3"],
        cell: Int64[Tensor, "B q w"],
    ) -> tuple[Float[Tensor, "B q w"], Float[Tensor, "B q w"]]:
        """bev: F_B. centers: points of the n = H W cells [m]. xyz: queries [m]. cell: of a query, indices into n.

        Returns occupancy logits and intensities of the pairs.
        """
        with torch.autocast(bev.device.type, enabled=False):  # products of weights in the weights' own precision
            of_latent, of_offset = self.first.weight.split([LATENT, 3], dim=1)
            to_hidden = of_latent @ self.latent.weight, of_latent @ self.latent.bias + self.first.bias
            to_output = self.output.weight @ self.third.weight, self.output.weight @ self.third.bias + self.output.bias
            # The share of each in the product of the offset, query - cell: not one for every pair. It is not a matrix product, because
            # those may be rounded to TF32, which is coarse for positions that are subtracted.
            from_query, from_cell = (
                sum(points[..., axis, None].to(of_offset) * of_offset[:, axis] for axis in range(3))
                for points in (xyz, centers)
            )
        rows = F.linear(bev.permute(0, 2, 3, 1).flatten(1, 2), *to_hidden).to(of_offset) - from_cell
        first = torch.arange(len(bev), device=cell.device)[:, None, None] * len(centers)
        # A cell has up to thousands of pairs, whose gradients are summed in the precision of the weights.
        of_pairs = rows.flatten(0, 1).index_select(0, (cell + first).flatten()).unflatten(0, cell.shape)
        hidden = F.relu(of_pairs + from_query[:, :, None])
        logit, intensity = F.linear(F.relu(self.second(hidden)), *to_output).unbind(-1)
        return logit, intensity


@dataclass(frozen=True)
class Pairs:
    """Queries with w cells each. near: whether a pair counts. logits: of occupancy."""

    queries: Queries
    near: Bool[Tensor, "B q w"]
    logits: Float[Tensor, "B q w"]
    intensity: Float[Tensor, "B q w"]


class ImgALSO(Task):
    """L = binary cross-entropy of occupancy + L1 of intensity, over pairs of a query and a cell."""

    head: ReconstructionHead
    centers: Tensor
    window: Tensor
    pictures: ClassVar = "occfeat_train.report.img_also:draw"
    ragged: ClassVar = ("returns", "sample")
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
        self.register_buffer("window", window(grid), persistent=False)

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
        """The decimated returns of the keyframe's own sweep, from which the device draws queries, in the grid's frame.

        returns: (n, 4) float32 x, y, z [m], intensity (0 to 1, or NO_INTENSITY). sample: (n,) int32 the sample's position in its batch.
        sensor: (3,) float32 position [m]. seed: () int64 of the queries.
        """
        grid_from_ego = sample.arrays["grid_from_ego"].astype(np.float64)
        returns = sample.arrays["points"][: sample.arrays["num_points"][0]]
        kept = returns[decimate(returns[:, :3].astype(np.float64))]
        xyz, sensor = (
            transform(grid_from_ego, points.astype(np.float64)).astype(np.float32)
            for points in (kept[:, :3], sample.arrays["sweep_origins"][:1])
        )
        return {
            "returns": np.column_stack([xyz, scale_intensity(kept[:, 3])]),
            "sample": np.full(len(kept), sample.index, np.int32),
            "sensor": sensor[0],
            "seed": np.array(sample.rng.integers(2**63)),
        }

    def predict(self, batch: Batch) -> Pairs:
        """The batch's queries, with the predictions of the cells around them."""
        queries = draw_queries(**batch.arrays, number=NUM_QUERIES)
        cell, near = cells_near(queries.xyz[..., :2], self.window, self.grid)
        predicted = self.head(self.bev(batch), self.centers, queries.xyz, cell)
        return Pairs(queries, near & queries.exists[..., None], *predicted)

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """{"loss": their sum, "reconstruction": occupancy loss, "intensity": intensity loss}, scalars."""
        pairs = self.predict(batch)
        logits, intensity = exact(pairs.logits), exact(pairs.intensity)
        occupied, target = (
            each[..., None].expand(logits.shape) for each in (pairs.queries.occupied, pairs.queries.intensity)
        )
        losses = {
            "reconstruction": mean_over_samples(
                F.binary_cross_entropy_with_logits(logits, occupied.to(logits), reduction="none"), pairs.near
            ),
            "intensity": mean_over_samples((intensity - target).abs(), pairs.near & (target >= 0)),
        }
        return {"loss": losses["reconstruction"] + losses["intensity"], **losses}

    def metric(self) -> QueryMetric:
        return QueryMetric()

    def measure(self, batch: Batch, metric: Any) -> None:
        pairs = self.predict(batch)
        metric.update(*mean_of_cells(pairs), pairs.queries.occupied, pairs.queries.intensity)

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


def mean_of_cells(pairs: Pairs) -> tuple[Bool[Tensor, "B q"], Float64[Tensor, "B q"], Bool[Tensor, "B q"]]:
    """Of each query: whether the mean of its cells' logits is above 0, their mean intensity, and whether it has a cell."""
    logits, intensity = (
        torch.where(pairs.near, values, 0).sum(2, dtype=torch.float64) for values in (pairs.logits, pairs.intensity)
    )
    number = pairs.near.sum(2)
    return logits > 0, intensity / number.clamp(min=1), number > 0
