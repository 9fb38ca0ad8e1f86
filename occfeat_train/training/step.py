"""One optimiser step of any task, on any number of ranks.

The random numbers of a step follow from (seed, step, micro-batch, rank).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from occfeat_train.config import Config
from occfeat_train.distributed import Process, average_statistics, gather, sum_over_processes
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import freeze_batchnorm, move_to_device
from occfeat_train.training.checkpoint import Checkpoint, load_weights
from occfeat_train.training.optim import build_optimizer
from occfeat_train.training.precision import autocast


class TrainingError(ValueError):
    """Training cannot continue, for example because of a loss that is not finite."""


class Trainer:
    """A task with its optimiser and schedule. step: number of the next step, from 0."""

    def __init__(
        self, task: Task, config: Config, process: Process, num_steps: int, resume: Checkpoint | None = None
    ) -> None:
        """num_steps: of the whole run. Raises TrainingError if the ranks cannot share a batch."""
        optim, device = config.optim, process.device
        if optim.batch % process.world:
            raise TrainingError(
                f"optim.batch={optim.batch} is no multiple of the {process.world} processes: change one of them"
            )
        self.task, self.config, self.process, self.step = task, config, process, 0
        move_to_device(task, device)
        self.optimizer, self.schedule = build_optimizer(
            task.parameters(), optim, num_steps, fused=device.type == "cuda"
        )
        if resume is not None:
            load_weights(task, resume.weights(), resume.path)
            state = resume.trainer_state()
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step = resume.step
        if config.compile:
            task.network.compile()
        self.model: Any = task if process.world == 1 else distribute(task)

    def state(self) -> dict[str, Any]:
        """Optimiser and schedule, as a checkpoint holds them."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def take_step(self, batches: Iterator[Any], **flags: Tensor) -> dict[str, float]:
        """One optimiser step on the next batches. Returns losses, grad_norm, lr, and the sum of each flag over all ranks.

        Raises TrainingError on a loss or gradient that is not finite, before it changes a weight.
        """
        set_training(self.task, self.config)
        losses, tokens = forward_backward(self.model, batches, self.config, self.process, self.step)
        average_statistics(self.task)  # after every step, so that saving and validating do not change the run
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.config.optim.clip)
        record = reduce_losses({**losses, "grad_norm": norm / self.process.world, **flags})
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise TrainingError(
                f"step {self.step}: loss {record['loss']}, gradient norm {record['grad_norm']} for samples "
                f"{', '.join(gather(tokens))}. Nothing was saved after it; the run's newest checkpoint is intact. "
                "Look at these samples ('occfeat-targets preview --token'), or lower the learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        record["lr"] = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.step += 1
        return record


def distribute(task: Task) -> DistributedDataParallel:
    """DDP without synchronisation of buffers, which torch 2.13 renamed.

    DDP would overwrite all ranks' BatchNorm statistics with rank 0's before each forward pass, and the ranks would differ
    after it. `average_statistics` averages them instead.
    """
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keep_buffers: Any = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    return DistributedDataParallel(task, **keep_buffers)


def forward_backward(
    model: Any, batches: Iterator[Any], config: Config, process: Process, step: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Forward and backward passes of one optimiser step; the gradient is that of the mean loss over all its samples.

    Returns the averaged losses, and the tokens of this rank's samples.
    """
    count = config.optim.accumulation
    total: dict[str, Tensor] = {}
    tokens: list[str] = []
    for micro in range(count):
        batch = next(batches)
        tokens += batch.tokens
        seed_step(config.seed, step, micro, process.rank)
        is_last = micro == count - 1
        with contextlib.nullcontext() if is_last or process.world == 1 else model.no_sync():
            with autocast(process.device, config.precision):
                losses = model(batch)
            (losses["loss"] / count).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach().double() / (count * process.world)
    return total, tokens


def seed_step(*numbers: int) -> None:
    """Seed torch's random numbers (stochastic depth, dropout) from (seed, step, micro-batch, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


def set_training(task: Task, config: Config) -> None:
    """Set training mode; frozen BatchNorms stay in evaluation mode."""
    task.train()
    if config.network.freeze_batchnorm:
        freeze_batchnorm(task)


def reduce_losses(values: dict[str, Tensor]) -> dict[str, float]:
    """Sums over all ranks, with one all-reduce and one device synchronisation."""
    stacked = torch.stack([v.detach().double() for v in values.values()])
    return dict(zip(values, sum_over_processes(stacked).tolist(), strict=True))
