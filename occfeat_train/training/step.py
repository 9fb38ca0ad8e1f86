"""One optimiser step of any task, on any number of ranks.

The random numbers of a step follow from (seed, step, micro-batch, rank).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from occfeat_targets.common.terminal import echo
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch
from occfeat_train.distributed import (
    Process,
    average_gradients,
    average_statistics,
    gather,
    raise_once,
    sum_over_processes,
)
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import freeze_batchnorm, move_to_device
from occfeat_train.training.checkpoint import Checkpoint, load_weights
from occfeat_train.training.graph import CudaGraphs, GraphedPass, Pass
from occfeat_train.training.optim import build_optimizer
from occfeat_train.training.precision import autocast

# Compilation takes 74 s, and a step is then 11 ms faster on a large GPU (BENCHMARKS.md).
COMPILED_FROM = 20_000  # steps of a run


class TrainingError(ValueError):
    """Training cannot continue, for example because of a loss that is not finite."""


class TakenStep:
    """A step that the GPU may still be computing. Creating it does not wait for the GPU."""

    def __init__(self, number: int, values: dict[str, Tensor], tokens: list[str], lr: float) -> None:
        """values: scalars that are summed over all ranks, among them loss and grad_norm. tokens: of this rank's samples."""
        self.number, self._names, self._tokens, self._lr = number, list(values), tokens, lr
        summed = sum_over_processes(torch.stack([v.detach().double() for v in values.values()]))
        self._summed = summed.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if summed.is_cuda else None

    def record(self) -> dict[str, float]:
        """The values and the learning rate. Waits for the GPU.

        Raises TrainingError on a loss or gradient that is not finite; ranks above 0 exit with 1.
        """
        if self._copied is not None:
            self._copied.synchronize()
        record = dict(zip(self._names, self._summed.tolist(), strict=True))
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise_once(
                TrainingError(
                    f"step {self.number}: loss {record['loss']}, gradient norm {record['grad_norm']} for samples "
                    f"{', '.join(gather(self._tokens))}. Nothing was saved after it; the run's newest checkpoint is intact. "
                    "Look at these samples ('occfeat-targets preview --token'), or lower the learning rate"
                )
            )
        return {**record, "lr": self._lr}


class Trainer:
    """A task with its optimiser and schedule.

    step: number of the next step, from 0. lag: number of steps to take before the first of them is read. A GPU then computes
    one step while the host reads the one before it.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        process: Process,
        num_steps: int,
        resume: Checkpoint | None = None,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        """num_steps: of the whole run. cuda_graphs: whether to use them on a GPU.

        Raises TrainingError if the ranks cannot share a batch.
        """
        optim, device = config.optim, process.device
        if optim.batch % process.world:
            raise TrainingError(
                f"optim.batch={optim.batch} is no multiple of the {process.world} processes: change one of them"
            )
        self.task, self.config, self.process, self.step = task, config, process, 0
        self.is_cuda = device.type == "cuda"
        self.lag = int(self.is_cuda)
        move_to_device(task, device)
        self.optimizer, self.schedule = build_optimizer(task.parameters(), optim, num_steps, fused=self.is_cuda)
        if resume is not None:
            load_weights(task, resume.weights(), resume.path)
            state = resume.trainer_state()
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step = resume.step
        if is_compiled(config, device, num_steps):
            task.network.encoder.compile()
            task.network.decoder.compile()
        self.run: Pass = partial(forward_backward, task, config, process.device)
        self.graphed: GraphedPass | None = None
        if self.is_cuda and cuda_graphs:
            self.run = self.graphed = GraphedPass(
                self.run, task.parameters(), task.ragged, CudaGraphs(device), process.print
            )
        if self.is_cuda and config.network.recompute == "auto":
            task.network.recompute = False
            self.run = partial(recompute_if_needed, self.run, task)

    def state(self) -> dict[str, Any]:
        """Optimiser and schedule, as a checkpoint holds them."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def release_memory(self) -> None:
        """Return the memory that recorded passes hold, for example before a validation. They are recorded again."""
        if self.graphed is not None:
            self.graphed.release()

    def take_step(self, batches: Iterator[Any], **flags: bool) -> TakenStep:
        """One optimiser step on the next batches. The result's record has the losses, grad_norm, lr, and the number of ranks
        with each flag.

        On a loss or gradient that is not finite, weights do not change, and `TakenStep.record` raises TrainingError; on a CPU
        already this method.
        """
        set_training(self.task, self.config)
        losses, tokens = accumulate(self.run, batches, self.config, self.process, self.step)
        average_gradients(self.task)
        average_statistics(self.task)  # after every step, so that saving and validating do not change the run
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.config.optim.clip)
        counts = {name: norm.new_full((), flag) for name, flag in flags.items()}
        values = {**losses, "grad_norm": norm / self.process.world, **counts}
        taken = TakenStep(self.step, values, tokens, float(self.schedule.get_last_lr()[0]))
        if self.is_cuda:  # the kernel checks, so that the host does not wait before it
            self.optimizer.found_inf = (~torch.isfinite(norm + losses["loss"])).float()  # type: ignore[attr-defined]
        else:
            taken.record()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        return taken


def is_compiled(config: Config, device: torch.device, num_steps: int) -> bool:
    """Whether a run of `num_steps` compiles the image encoder and the decoder."""
    return device.type == "cuda" and num_steps >= COMPILED_FROM if config.compile == "auto" else config.compile


def accumulate(
    run: Pass, batches: Iterator[Any], config: Config, process: Process, step: int
) -> tuple[dict[str, Tensor], list[str]]:
    """The passes of one optimiser step; the gradient is that of the mean or sum of their losses on this rank.

    Returns the averaged losses, divided by the number of ranks, and the tokens of this rank's samples.
    """
    count = config.optim.accumulation
    total: dict[str, Tensor] = {}
    tokens: list[str] = []
    for micro in range(count):
        batch = next(batches)
        tokens += batch.tokens
        seed_step(config.seed, step, micro, process.rank)
        for name, loss in run(batch).items():
            total[name] = total.get(name, 0) + loss.double() / (count * process.world)
    return total, tokens


def forward_backward(task: Task, config: Config, device: torch.device, batch: Batch) -> dict[str, Tensor]:
    """Adds the gradient of a batch's loss, divided by the number of accumulated batches unless these are summed. Returns its
    detached losses.
    """
    with autocast(device, config.precision):
        losses = task(batch)
    parts = config.optim.accumulation if config.optim.accumulate == "mean" else 1
    (losses["loss"] / parts).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def recompute_if_needed(run: Pass, task: Task, batch: Batch) -> dict[str, Tensor]:
    """run(batch), if necessary with activation checkpointing, which is then turned on for all later batches.

    Raises torch.OutOfMemoryError if the memory is exceeded nevertheless, or not in the first of several accumulated batches.
    """
    is_first = all(p.grad is None for p in task.parameters())
    try:
        return run(batch)
    except torch.OutOfMemoryError:
        if task.network.recompute or not is_first:
            raise
    echo("the GPU's memory is exceeded: training continues with activation checkpointing, which is slower")
    task.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    task.network.recompute = True
    return run(batch)


def seed_step(*numbers: int) -> None:
    """Seed torch's random numbers (stochastic depth, dropout) from (seed, step, micro-batch, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


def set_training(task: Task, config: Config) -> None:
    """Set training mode; frozen BatchNorms stay in evaluation mode."""
    task.train()
    if config.network.freeze_batchnorm:
        freeze_batchnorm(task)
