"""From a config to a task (network, head, losses, metric), with weights initialised from the seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import Config
from occfeat_train.networks.network import build_network
from occfeat_train.tasks.base import Task


def build_task(config: Config, grid: VoxelGrid, feature_dim: int) -> Task:
    """A task with initial weights that depend only on config and seed. feature_dim: N_y of the cache's teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(
            grid,
            config.network.backbone,
            config.network.channels,
            config.network.lifting,
            config.network.drop_connect,
            config.network.compat,
            config.network.recompute is not False,
            config.network.efficientnet,
        )
        task: Task = config.task_class(network, config, grid, feature_dim)
        return task


def move_to_device(task: Task, device: torch.device) -> None:
    """Move a task to a device, with the weights of convolutions in channels-last format."""
    task.to(device)
    task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def freeze_batchnorm(module: nn.Module) -> None:
    """Make every BatchNorm use its running statistics in training, too."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


def count_parameters(module: nn.Module) -> int:
    return int(np.sum([p.numel() for p in module.parameters()], dtype=np.int64))
