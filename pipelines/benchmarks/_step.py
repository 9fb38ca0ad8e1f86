"""A pretraining step for benchmarks: inputs, networks, heads and losses; and the measurement of peak memory."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory import forget_peak, megabytes
from _reference import Reference
from sampling import SIZE as SAMPLED_SIZE
from sampling import real_scene, synthetic_scene
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # for the dense reference of the tests

from occfeat_targets.cache.geometry import scale_intrinsics
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.network import build_network
from occfeat_train.ops.views import Views
from occfeat_train.tasks.heads import OccFeatHead
from occfeat_train.tasks.losses import feature_loss, occupancy_loss
from tests.train.head_twin import DenseHead

CHANNELS, FEATURE_DIM, LAMBDA = 128, 384, 0.01
OCCUPIED = 6000 / 320_000  # share of the voxels


@dataclass(frozen=True)
class Setting:
    """Settings of a measured step.

    cameras: more than six repeat cameras of the rig, fewer omit some. compiled: compile our image encoder, as `--compile` does.
    dataroot: the rig is that of the first keyframe; None: a synthetic rig.
    """

    network: str = "simplebev"
    backbone: str = "efficientnet-b0"
    batch: int = 1
    cameras: int = 6
    image_size: tuple[int, int] = (224, 400)
    grid: VoxelGrid = field(default_factory=VoxelGrid)
    precision: str = "float32"
    device: str = "cpu"
    compiled: bool = False
    dataroot: Path | None = None
    split: str = "mini_train"
    threads: int = 2

    def views(self) -> Views:
        cameras, pinholes, _ = synthetic_scene() if self.dataroot is None else real_scene(self.dataroot, self.split)
        height, width = self.image_size
        pinholes = scale_intrinsics(pinholes, width / SAMPLED_SIZE[1], height / SAMPLED_SIZE[0])
        chosen = np.arange(self.cameras) % len(cameras)
        cam_from_grid, intrinsics = (
            torch.from_numpy(m[chosen]).double()[None].repeat(self.batch, 1, 1, 1) for m in (cameras, pinholes)
        )
        shape = (self.batch, self.cameras, 3, height, width)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return Views(*(t.to(self.device) for t in (images, intrinsics, cam_from_grid)))

    def targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """occupied (B, Z, H, W) bool; indices (n,) of the voxels with target features; target features (n, N_y)."""
        generator = torch.Generator().manual_seed(0)
        occupied = torch.rand((self.batch, *self.grid.shape), generator=generator) < OCCUPIED
        voxels = occupied.flatten().nonzero()[:, 0]
        features = torch.randn(len(voxels), FEATURE_DIM, generator=generator)
        return occupied.to(self.device), voxels.to(self.device), features.half().to(self.device)

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


class Step(nn.Module):
    """Forward and backward of eq. 1 on a resident batch, called without arguments. Subclasses compute F_B."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.views = setting.views()
        self.occupied, self.voxels, self.target = setting.targets()

    def losses(self, logits: Tensor, predicted: Tensor) -> Tensor:
        samples = self.voxels // self.setting.grid.num_voxels
        feat, _ = feature_loss(predicted, self.target, samples, self.setting.batch)
        return occupancy_loss(logits, self.occupied) + LAMBDA * feat

    def loss(self) -> Tensor:
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bfloat16"):
            return self.losses(*self.predictions(self.bev()))

    def bev(self) -> Tensor:
        raise NotImplementedError

    def predictions(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __call__(self) -> float:
        self.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.setting.synchronize()
        return loss.item()


class OurStep(Step):
    """compat: "simple-bev" for the same function as the reference's, which has no Triton kernels for the lifting."""

    def __init__(self, setting: Setting, compat: str = "none") -> None:
        super().__init__(setting)
        torch.manual_seed(0)
        self.network = build_network(setting.grid, setting.backbone, CHANNELS, setting.network, compat=compat).to(
            setting.device
        )
        self.head = OccFeatHead(CHANNELS, setting.grid.shape[0], FEATURE_DIM).to(setting.device)
        self.to(memory_format=torch.channels_last)
        if setting.compiled:
            self.network.encoder.compile()

    def bev(self) -> Tensor:
        return self.network(self.views)

    def predictions(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(bev, self.voxels)


class ReferenceStep(Step):
    """aharley/simple_bev's network with the paper's head implemented literally: every layer at every voxel."""

    def __init__(self, setting: Setting, checkout: Path) -> None:
        super().__init__(setting)
        torch.manual_seed(0)
        self.network = Reference(
            checkout, setting.network, setting.backbone, setting.grid, torch.device(setting.device)
        )
        self.head = DenseHead(CHANNELS, setting.grid.shape[0], FEATURE_DIM).to(setting.device)

    def bev(self) -> Tensor:
        return self.network(self.views)

    def predictions(self, bev: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self.head(bev)
        return logits, self.at_voxels(features)

    def at_voxels(self, features: Tensor) -> Tensor:
        """(B, N_y, Z, H, W) -> (n, N_y)."""
        size = self.setting.grid.num_voxels
        counts = torch.bincount(self.voxels // size, minlength=self.setting.batch).tolist()
        split = (self.voxels % size).split(counts)
        return torch.cat([f.flatten(1)[:, v].T for f, v in zip(features, split, strict=True)])


def peak_megabytes(build: Callable[..., Callable[[], Any]], setting: Setting, *arguments: Any) -> tuple[float, float]:
    """Peak memory of `build(setting, *arguments)()` in a new process; `build` must be picklable.

    Returns the peak of the process (on a GPU: of its tensors) and the increase during the call [MB]; NaN if unknown.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_peak, (build, setting, *arguments))


def _peak(build: Callable[..., Callable[[], Any]], setting: Setting, *arguments: Any) -> tuple[float, float]:
    torch.set_num_threads(setting.threads)
    step = build(setting, *arguments)
    if setting.device != "cpu":
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 1e6, (torch.cuda.max_memory_allocated() - resident) / 1e6
    if not forget_peak():
        return float("nan"), float("nan")
    before = megabytes("VmRSS")
    step()
    peak = megabytes("VmHWM")
    return peak, peak - before
