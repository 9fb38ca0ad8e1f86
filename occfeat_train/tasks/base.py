"""What a task is: the data that it reads and computes on the host, a network with a head, losses, and a metric.

A task is one file with a subclass of `Task` and one row of PRETEXTS in config.py. A pretext task is a task without labels;
the segmentation of any kind of label is a task, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Sample
from occfeat_train.networks.network import BEVNetwork
from occfeat_train.tasks.metrics import LossMetric, Metric


class Task(nn.Module):
    """A network with a head for one task. Subclasses set `head` in their constructor, and define `arrays` and `forward`.

    ragged: names of targets whose first axis differs between samples. They are concatenated to a batch instead of stacked. On
    a GPU rows are added to them, -1 in arrays of integers and 0 in others, which must not change the losses.
    pictures: "module:function" that draws a run's predictions for the report, like `report.segmentation:draw`; without one,
    the report has none.
    note: what a reader of the report's curves should know, in a sentence or two.
    without_targets: why `has_targets` leaves out keyframes.
    """

    head: nn.Module
    ragged: ClassVar[tuple[str, ...]] = ()
    pictures: ClassVar[str] = ""
    note: ClassVar[str] = ""
    without_targets: ClassVar[str] = ""

    def __init__(self, network: BEVNetwork, config: Config, grid: VoxelGrid, feature_dim: int) -> None:
        """feature_dim: N_y of the cache's teacher, 0 without a teacher."""
        super().__init__()
        self.config, self.grid = config, grid
        self.network = network

    @staticmethod
    def arrays(config: Config, spec: TargetSpec) -> list[str]:
        """Names of the cache's arrays that the task reads, besides images and calibration.

        Raises ValueError if the cache lacks something: a phrase that follows "CACHE has", with what to do.
        """
        raise NotImplementedError

    @staticmethod
    def has_targets(reader: CacheReader) -> NDArray[np.bool_]:
        """(N,) whether a keyframe has targets of the task, by default whether it is valid. Others are left out."""
        return reader.is_valid

    @staticmethod
    def evaluation_arrays(config: Config, spec: TargetSpec) -> list[str]:
        """Names of further arrays that only `measure` reads, and that a cache need not have."""
        return []

    @staticmethod
    def targets(sample: Sample, config: Config) -> dict[str, NDArray[Any]]:
        """What a batch carries of a sample, by default its arrays. Called in the loader's threads."""
        return dict(sample.arrays)

    def bev(self, batch: Batch) -> Float[Tensor, "B C H W"]:
        """F_B."""
        bev: Tensor = self.network(batch.views(self.config.network.image_size), batch.bev_flip)
        return bev

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """{"loss": the loss that is minimised, and its parts}, scalars. A GPU repeats it as a CUDA graph, so it must not wait for the GPU (`.item()`, boolean indices)."""
        raise NotImplementedError

    def metric(self) -> Metric:
        """An empty metric over a data set, by default the mean of each loss."""
        return LossMetric()

    def measure(self, batch: Batch, metric: Any) -> None:
        """Add a batch to a metric of `metric()`."""
        metric.update(self(batch), len(batch))

    @staticmethod
    def score(results: Mapping[str, Any]) -> float | None:
        """The quantity of `metric().results()` by which runs and checkpoints are compared; higher is better. By default minus the loss."""
        return -float(results["loss"])

    @staticmethod
    def heading(config: Config) -> str:
        """Heading of the task's sections in the report."""
        return config.task.replace("_", " ").capitalize()

    @staticmethod
    def columns(results: Mapping[str, Any]) -> dict[str, str]:
        """{name: text} for evaluation's table and the report's, from `metric().results()`; by default every loss."""
        return {name: f"{value:.4g}" for name, value in results.items() if isinstance(value, float)}
