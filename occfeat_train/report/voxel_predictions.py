"""What a pretraining run predicts for the voxels of a keyframe, and what is true of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.birdseye import Mask
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.report.pretraining import cosine_of_mean
from occfeat_train.tasks.build import move_to_device
from occfeat_train.tasks.losses import feature_loss
from occfeat_train.tasks.metrics import as_text
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training.precision import autocast, forbid_tf32

MAX_VOXELS = 50_000  # predicted voxels whose features are computed: 77 MB of 384 channels
Features = NDArray[np.float32]  # (n, C)


@dataclass(frozen=True, eq=False)
class Seen:
    """Voxels with features. voxels: (n,) ascending flat indices. features: (n, C)."""

    voxels: NDArray[np.int64]
    features: Features


@dataclass(frozen=True, eq=False)
class VoxelPredictions:
    """A run's predictions for one keyframe, with its grid in the reference frame of evaluation.

    frame: index of that frame in the cache. grid_from_ego: (4, 4) of it.
    true: (Z, H, W) voxels with LiDAR returns. guess: (Z, H, W) voxels predicted to be occupied; None for a run without an
    occupancy loss.
    predicted, target: features of the voxels with LiDAR returns that a camera sees: the run's, and Y_v of paper 3.3.
    imagined: the run's features of the voxels that it predicts to be occupied, at most the MAX_VOXELS most certain; None
    without `guess`.
    results: occupancy IoU [%] and mean cosine, as in evaluation.
    """

    reader: CacheReader
    keyframe: int
    frame: int
    grid_from_ego: Matrix
    true: Mask
    guess: Mask | None
    predicted: Seen
    target: Seen
    imagined: Seen | None
    results: Mapping[str, Any]

    @property
    def grid(self) -> VoxelGrid:
        return self.reader.cache.spec.grid

    @property
    def scene(self) -> str:
        return self.reader.cache.identity.scenes[self.keyframe]

    @property
    def split(self) -> str:
        return self.reader.cache.path.stem

    @property
    def name(self) -> str:
        """``scene-0061, sample ca9a282c..., train 0 of 323``."""
        token = self.reader.cache.identity.tokens[self.keyframe]
        return f"{self.scene}, sample {token}, {self.split} {self.keyframe} of {len(self.reader)}"

    @property
    def merits(self) -> str:
        """Metrics in words, with what one fixed vector reaches."""
        words = [] if self.guess is None else [f"occupancy IoU {as_text(self.results['occupancy_iou'])} %"]
        if self.results["cosine"] is not None:
            fixed = cosine_of_mean(self.target.features)
            words.append(f"mean cosine {self.results['cosine']:.3f} (the best fixed vector: {fixed:.3f})")
        return ", ".join(words)


@torch.no_grad()
def predict_voxels(
    task: Pretraining, dataset: KeyframeDataset, keyframe: int, process: Process, limit: int = MAX_VOXELS
) -> VoxelPredictions:
    """Predictions for a keyframe of the data set, computed as in evaluation. The task stays in evaluation mode."""
    forbid_tf32(task.config.precision, process.device)
    move_to_device(task, process.device)
    task.eval()
    batch = dataset.batch([(0, keyframe)]).to(process.device)
    voxels, target = batch.arrays["voxels"], batch.arrays["features"]
    imagined, guess = None, None
    with autocast(process.device, task.config.precision):
        bev = task.bev(batch)
        logits, features = task.head(bev, voxels)
        assert features is not None
        if logits is not None:
            certain = logits.flatten().float()
            number = min(int((certain > 0).sum()), limit)
            chosen = certain.topk(number).indices.sort().values
            at_chosen = task.head(bev, chosen)[1]
            assert at_chosen is not None
            imagined = Seen(chosen.cpu().numpy(), at_chosen.float().cpu().numpy())
            guess = (logits[0] > 0).cpu().numpy()
        occupied = batch.volume("occupancy")
        metric = task.metric()
        metric.update(logits, occupied, feature_loss(features, target, torch.zeros_like(voxels), 1)[1])
    frame = dataset.reader.cache.spec.frames.index(dataset.frames[0])
    here = voxels.cpu().numpy()
    return VoxelPredictions(
        reader=dataset.reader,
        keyframe=keyframe,
        frame=frame,
        grid_from_ego=dataset.reader.read("grid_from_ego", keyframe)[frame].astype(np.float64),
        true=occupied[0].cpu().numpy(),
        guess=guess,
        predicted=Seen(here, features.float().cpu().numpy()),
        target=Seen(here, target.float().cpu().numpy()),
        imagined=imagined,
        results=metric.results(),
    )
