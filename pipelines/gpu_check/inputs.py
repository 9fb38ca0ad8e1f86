"""Inputs of the check: configs, batches and a cache of random content, and whole training steps."""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_train.config import Config, NetworkConfig
from occfeat_train.data.augment import draw
from occfeat_train.data.batch import Batch, Sample, collate
from occfeat_train.distributed import Process
from occfeat_train.ops.views import Views
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import build_task, move_to_device
from occfeat_train.training.step import TakenStep, Trainer
from pipelines.gpu_check.measure import Check

CAMERAS = 6
_OCCUPIED = 6000 / 320_000  # share of the voxels that a nuScenes sweep occupies


def config_of(small: bool, task: str = "occfeat", **network: Any) -> Config:
    """The default config of a pretext task with random weights. network: fields of NetworkConfig to change."""
    tiny: dict[str, Any] = {"channels": 32, "image_size": (32, 64)} if small else {}
    return Config(task, NetworkConfig(**{"weights": "none", **tiny, **network}))


def grid_of(small: bool) -> VoxelGrid:
    return VoxelGrid((4, 24, 24), (-5, -24, -24), (5, 24, 24)) if small else VoxelGrid()


def feature_dim(small: bool) -> int:
    return 16 if small else 384


def rig(batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Six cameras in a ring, 60 degrees apart: intrinsics (B, 6, 3, 3) of images of `size`, cam_from_grid (B, 6, 4, 4)."""
    height, width = size
    pinhole = np.array([[0.79 * width, 0, width / 2], [0, 0.79 * width, height / 2], [0, 0, 1]])
    angles = np.pi * np.arange(CAMERAS) / CAMERAS  # half of the rotation angle
    turned = [rigid((np.cos(a), 0, np.sin(a), 0), (0, 0, 0)) @ inverse_rigid(GRID_FROM_CAMERA_AXES) for a in angles]
    stacked = np.stack([pinhole] * CAMERAS), np.stack(turned)
    intrinsics, cam_from_grid = (torch.from_numpy(m).repeat(batch, 1, 1, 1) for m in stacked)
    return intrinsics, cam_from_grid


def random_views(batch: int, size: tuple[int, int], device: torch.device) -> Views:
    """Views of the rig with black images."""
    return Views(torch.zeros(batch, CAMERAS, 3, *size, device=device), *(t.to(device) for t in rig(batch, size)))


def random_batch(config: Config, batch: int, small: bool) -> Batch:
    """A batch on the host with random contents and random augmentation, in the format of a cache's batch."""
    grid, size = grid_of(small), config.network.image_size
    source = tuple(int(1.2 * n) for n in size)
    maps = (4, 8) if small else (16, 28)
    rng = np.random.default_rng(0)
    draws = [draw(rng, config.augment, size, CAMERAS, [0]) for _ in range(batch)]
    names = ("resized", "crop", "mirror", "cameras", "bev_flip")
    parameters = {name: torch.from_numpy(np.stack([getattr(d, name) for d in draws])) for name in names}
    intrinsics, cam_from_grid = rig(batch, source)  # type: ignore[arg-type]
    occupied = rng.random((batch, grid.num_voxels), np.float32) < _OCCUPIED
    features = rng.standard_normal((batch, CAMERAS, *maps, feature_dim(small)), np.float32)
    images = rng.integers(0, 256, (batch, CAMERAS, *source, 3), np.uint8)
    packed, features = np.packbits(occupied, axis=-1, bitorder="little"), features.astype(np.float16)
    targets = []
    for i in range(batch):
        arrays = {"occupancy": packed[i], "features": features[i], **returns(rng)}
        sample = Sample(i, grid, source, images[i], intrinsics[i].numpy(), cam_from_grid[i].numpy(), arrays, rng)  # type: ignore[arg-type]
        targets.append(config.task_class.targets(sample, config))
    return Batch(
        tokens=tuple(map(str, range(batch))),
        grid=grid,
        images=torch.from_numpy(images),
        intrinsics=intrinsics,
        cam_from_grid=cam_from_grid,
        arrays=collate(targets, config.task_class.ragged),
        **parameters,
    )


def returns(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arrays of a cache with a sweep of 25,000 LiDAR returns of flat ground, as many as a nuScenes sweep has."""
    number = 25_000
    distance, angle = 3 + 47 * rng.random(number) ** 2, rng.uniform(-np.pi, np.pi, number)
    ground = rng.normal(-0.5, 0.02, number)
    columns = (distance * np.cos(angle), distance * np.sin(angle), ground, rng.uniform(0, 255, number))
    return {
        "points": np.stack(columns, axis=1).astype(np.float32),
        "num_points": np.array([number], np.int32),
        "sweep_origins": np.array([[0, 0, 1.3]], np.float32),
        "grid_from_ego": np.eye(4, dtype=np.float32),
    }


class DoubleBatch(Batch):
    """A batch whose images are float64 after augmentation."""

    def views(self, size: tuple[int, int]) -> Views:
        views = super().views(size)
        return replace(views, images=views.images.double())


def task_on(config: Config, small: bool, device: torch.device) -> Task:
    """A task in training mode; its initial weights do not depend on the device."""
    task = build_task(config, grid_of(small), feature_dim(small))
    move_to_device(task, device)
    return task.train()


class Step:
    """One optimiser step of the training loop on a resident batch. Like the loop, reads the losses of the step before."""

    def __init__(self, check: Check, config: Config, batch: int | None = None, *, cuda_graphs: bool = True) -> None:
        self.config = config
        self.task = task_on(config, check.small, check.device)
        self.batch = random_batch(config, batch or check.batch, check.small).to(check.device)
        self.trainer = Trainer(self.task, config, Process(0, 1, check.device), 10_000, cuda_graphs=cuda_graphs)
        self.taken: TakenStep | None = None

    def __call__(self) -> None:
        before, self.taken = self.taken, self.trainer.take_step(itertools.repeat(self.batch))
        if before is not None:
            before.record()


def random_cache(check: Check) -> CacheReader:
    """A cache of random bytes under check.scratch, written by the first part that needs it."""
    path = check.scratch / "cache"
    if not path.exists():
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from loader import SPEC, write

        spec = SPEC
        if check.small:
            teacher = TeacherSpec("random bytes", "none", (56, 112), 14, feature_dim(True))
            spec = TargetSpec(grid=grid_of(True), image_size=(40, 80), teacher=teacher, labels=())
        unfinished = Path(tempfile.mkdtemp(dir=check.scratch))  # an interrupted part leaves no incomplete cache
        write(unfinished, 16 if check.small else 128, spec)
        (unfinished / "val.zarr").symlink_to("train.zarr")
        unfinished.rename(path)
    return CacheReader(path / "train.zarr")
