"""The network that is fitted to one real keyframe: caches, pretraining, statistics of its BatchNorms, predictions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import occfeat_targets
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.report.voxel_predictions import VoxelPredictions, predict_voxels
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training.checkpoint import find_checkpoint, save_checkpoint
from occfeat_train.training.initial import restore

CPU = Process(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Settings:
    """train, val: (split, scene). build: more options of `occfeat_targets.build_cache`. overrides: fields of the network's config."""

    dataroot: Path
    teacher: str
    out: Path
    train: tuple[str, str] = ("train", "scene-0061")
    val: tuple[str, str] = ("val", "scene-0003")
    version: str | None = None
    steps: int = 500
    build: dict[str, Any] | None = None
    overrides: tuple[str, ...] = ("network.image_size=128x224", "network.channels=64", "optim.lr=2e-3")

    @property
    def cache(self) -> Path:
        return self.out / "cache"

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def settled(self) -> Path:
        return self.out / "settled"


def build(settings: Settings) -> None:
    """The caches of both scenes; finished ones are not built again."""
    for split, scene in (settings.train, settings.val):
        occfeat_targets.build_cache(
            settings.dataroot, settings.cache, split, version=settings.version, scenes=[scene], teacher=settings.teacher,
            workers=0, **settings.build or {},
        )  # fmt: skip


def pretrain(settings: Settings) -> None:
    """Without augmentation and with lambda = 1, so that both losses fit one keyframe in few steps."""
    samples = int(CacheReader(settings.cache / f"{settings.train[0]}.zarr").is_valid.sum())
    plain = ("resize=[1,1]", "crop=0", "flip_images=false", "flip_bev=false", "shuffle_cameras=false")
    overrides = [
        "optim.schedule=onecycle",
        *settings.overrides,
        *(f"augment.{field}" for field in plain),
        "network.drop_connect=0",
    ]
    call(
        "pretrain", "--cache", settings.cache, "--split", settings.train[0], "--preset", "small/occfeat", "--lambda", 1,
        "--batch", 1, "--epochs", repr((settings.steps + 0.5) / samples), "--save-every", 50, "--no-tensorboard",
        "--loader-threads", 1, "--device", "cpu", "--out", settings.run, *(f"--set={text}" for text in overrides),
    )  # fmt: skip


@torch.no_grad()
def settle(settings: Settings) -> None:
    """Write the trained network to settings.settled, with BatchNorm statistics of the training scene.

    The running statistics follow the weights with a time constant of 100 steps, as the encoder's of EfficientNet do, and these weights
    change from one step to the next: 400 steps gave an occupancy IoU of 30 % with the running statistics, and of 78 % with these.
    """
    checkpoint = find_checkpoint(settings.run)
    task = restore(checkpoint)
    reader = CacheReader(settings.cache / f"{settings.train[0]}.zarr")
    dataset = KeyframeDataset(reader, checkpoint.info.config, training=False)
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all forward passes
    task.train()
    for keyframe in dataset.keyframes.tolist():
        task(dataset.batch([(0, keyframe)]))
    save_checkpoint(settings.settled, checkpoint.step, checkpoint.info, task.state_dict(), checkpoint.trainer_state())


def call(*arguments: object) -> None:
    """Run occfeat-train. Raises ClickException if it fails."""
    done = subprocess.run([sys.executable, "-m", "occfeat_train", *map(str, arguments)], check=False)
    if done.returncode:
        raise click.ClickException(
            f"occfeat-train {arguments[0]} exited with {done.returncode}: run the same command again to continue"
        )


@dataclass(frozen=True, eq=False)
class Pair:
    """The trained network's predictions for all keyframes of both scenes."""

    task: Pretraining
    datasets: tuple[KeyframeDataset, KeyframeDataset]
    train: list[VoxelPredictions]
    val: list[VoxelPredictions]

    @classmethod
    def load(cls, settings: Settings) -> Pair:
        checkpoint = find_checkpoint(settings.settled)
        task = restore(checkpoint)
        assert isinstance(task, Pretraining)
        readers = [CacheReader(settings.cache / f"{split}.zarr") for split, _ in (settings.train, settings.val)]
        datasets = [KeyframeDataset(reader, checkpoint.info.config, training=False) for reader in readers]
        found = [[predict_voxels(task, data, int(k), CPU) for k in data.keyframes] for data in datasets]
        return cls(task, (datasets[0], datasets[1]), *found)
