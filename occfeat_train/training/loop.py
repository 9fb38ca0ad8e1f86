"""The training loop of all tasks: pretraining and finetuning differ only in task, data and config.

A run is a function of its config and its data. The samples of a step follow from its number (dataset.py), and its random
numbers from (seed, step, micro-batch, rank). A checkpoint therefore needs only weights, optimiser and schedule to continue
exactly.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.prefetch import Prefetcher
from occfeat_train.distributed import Process, average_statistics, gather, sum_over_processes
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import freeze_batchnorm, move_to_device
from occfeat_train.training.checkpoint import Checkpoint, RunInfo, load_weights, save_checkpoint
from occfeat_train.training.log import RunLog, read_log
from occfeat_train.training.optim import build_optimizer


@dataclass(frozen=True)
class LoopOptions:
    """Options that do not change the trained weights.

    save_every: steps between checkpoints, 0 for once per epoch. workers: threads that prefetch samples.
    """

    save_every: int = 0
    workers: int = 2
    tensorboard: bool = True
    progress: bool = True


class TrainingError(ValueError):
    """Training cannot continue, for example because of a loss that is not finite."""


def train(
    task: Task,
    info: RunInfo,
    dataset: KeyframeDataset,
    run: Path,
    process: Process,
    resume: Checkpoint | None,
    options: LoopOptions,
    validate: Callable[[Task], dict[str, Any]] | None = None,
) -> bool:
    """Train a task to its last step, or until SIGTERM or SIGUSR1.

    validate: called on all ranks at every checkpoint, and at the start of a continued run whose last validation is missing.
    Returns whether the run is finished; if not, the same call continues it. Raises TrainingError on a loss or gradient that is
    not finite; the newest checkpoint stays intact.
    """
    config, device = info.config, process.device
    optim = config.optim
    if optim.batch % process.world:
        raise TrainingError(
            f"optim.batch={optim.batch} is no multiple of the {process.world} processes: change one of them"
        )
    num_steps = optim.num_steps(len(dataset))
    save_every = options.save_every or max(math.ceil(len(dataset) / optim.samples_per_step), 1)
    move_to_device(task, device)
    optimizer, schedule = build_optimizer(task.parameters(), optim, num_steps, fused=device.type == "cuda")
    start = 0
    if resume is not None:
        load_weights(task, resume.weights(), resume.path)
        state = resume.trainer_state()
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = resume.step
    if config.compile:
        task.network.compile()
    model: Any = task
    if process.world > 1:
        # With broadcast_buffers, DDP would overwrite all ranks' BatchNorm statistics with rank 0's before each forward
        # pass, and the ranks would differ after it. `average_statistics` averages them instead.
        # torch 2.13 renamed the option
        is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        keep_buffers: Any = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
        model = DistributedDataParallel(task, **keep_buffers)
    log = RunLog(run, start=start, total=num_steps, tensorboard=options.tensorboard, progress=options.progress) \
        if process.is_main else None  # fmt: skip
    samples = stream_of_batches(dataset, config, process, start, num_steps)
    prefetcher = Prefetcher(dataset, samples, device, workers=options.workers)
    batches = iter(prefetcher)

    def save(step: int) -> None:
        if process.is_main:
            trainer = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save_checkpoint(run, step, info, task.state_dict(), trainer)

    def measure(step: int) -> None:
        if validate is not None:
            results = validate(task)
            if log is not None:
                log.validation(step, results)

    try:
        with stop_signals() as stop:
            is_due = start > 0 and (start % save_every == 0 or start == num_steps)
            if validate is not None and is_due and not is_validated(run, start, process):
                measure(start)  # the run was stopped between the checkpoint and its validation
            for step in range(start, num_steps):
                began, waited = time.perf_counter(), prefetcher.waited
                set_training(task, config)
                losses, tokens = forward_backward(model, batches, config, process, step)
                average_statistics(task)  # after every step, so that saving and validating do not change the run
                norm = torch.nn.utils.clip_grad_norm_(task.parameters(), optim.clip)
                record = reduce_losses({**losses, "grad_norm": norm / process.world, "stop": stop.flag(device)})
                if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                    raise TrainingError(
                        f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']} for samples "
                        f"{', '.join(gather(tokens))}. Nothing was saved after it; the newest checkpoint in {run} is intact. "
                        "Look at these samples ('occfeat-targets preview --token'), or lower the learning rate"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                lr = schedule.get_last_lr()[0]
                schedule.step()
                must_stop, done = record.pop("stop") > 0, step + 1
                if log is not None:
                    seconds = time.perf_counter() - began
                    log.step({
                        "step": step, "epoch": done * optim.samples_per_step / len(dataset), **record, "lr": lr,
                        "samples_per_s": optim.samples_per_step / seconds,
                        "data_wait": (prefetcher.waited - waited) / seconds,
                    })  # fmt: skip
                if done % save_every == 0 or done == num_steps or must_stop:
                    save(done)
                    if not must_stop:
                        measure(done)
                if must_stop and done < num_steps:
                    return False
        return True
    finally:
        batches.close()  # type: ignore[attr-defined]
        if log is not None:
            log.close()


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


def stream_of_batches(
    dataset: KeyframeDataset, config: Config, process: Process, start: int, num_steps: int
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, keyframe) of this rank's samples from step `start` on, one list per forward pass."""
    batch, local = config.optim.batch, config.optim.batch // process.world
    for number in range(start * config.optim.accumulation, num_steps * config.optim.accumulation):
        first = number * batch + process.rank * local
        yield [dataset.stream(position) for position in range(first, first + local)]


def is_validated(run: Path, step: int, process: Process) -> bool:
    """Whether rank 0's log has validation results after `step` steps."""
    found = process.is_main and any("validation" in r and r["step"] == step - 1 for r in read_log(run))
    return bool(sum_over_processes(torch.tensor(float(found), device=process.device)) > 0)


def seed_step(*numbers: int) -> None:
    """Seed torch's random numbers (stochastic depth, dropout) from (seed, step, micro-batch, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast if requested, or by default on a GPU; weights stay float32."""
    enabled = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def set_training(task: Task, config: Config) -> None:
    """Set training mode; frozen BatchNorms stay in evaluation mode."""
    task.train()
    if config.network.freeze_batchnorm:
        freeze_batchnorm(task)


def reduce_losses(values: dict[str, Tensor]) -> dict[str, float]:
    """Sums over all ranks, with one all-reduce and one device synchronisation."""
    stacked = torch.stack([v.detach().double() for v in values.values()])
    return dict(zip(values, sum_over_processes(stacked).tolist(), strict=True))


class StopRequest:
    """Whether this process has received a stop signal."""

    is_set = False

    def flag(self, device: torch.device) -> Tensor:
        return torch.tensor(float(self.is_set), device=device)

    def set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """SIGTERM and SIGUSR1 (sent by Slurm before a job's time limit) stop the run after the current step."""
    request = StopRequest()
    before = {number: signal.signal(number, request.set) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
