"""The training loop of all tasks: pretraining and finetuning differ only in task, data and config.

A run is a function of its config and its data. The samples of a step follow from its number (dataset.py), and so do its
random numbers (step.py). A checkpoint therefore needs only weights, optimiser and schedule to continue exactly.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from occfeat_train.config import Config
from occfeat_train.data.mixture import Samples
from occfeat_train.data.prefetch import Prefetcher
from occfeat_train.distributed import Process, sum_over_processes
from occfeat_train.tasks.base import Task
from occfeat_train.training.best import link_best
from occfeat_train.training.checkpoint import Checkpoint, RunInfo, save_checkpoint
from occfeat_train.training.log import RunLog, read_log
from occfeat_train.training.step import TakenStep, Trainer


@dataclass(frozen=True)
class LoopOptions:
    """Options that do not change the trained weights.

    save_every: steps between checkpoints, 0 for once per epoch. workers: threads that prefetch samples.
    """

    save_every: int = 0
    workers: int = 4
    tensorboard: bool = True
    progress: bool = True


def train(
    task: Task,
    info: RunInfo,
    dataset: Samples,
    run: Path,
    process: Process,
    resume: Checkpoint | None,
    options: LoopOptions,
    validate: Callable[[Task], dict[str, Any]] | None = None,
) -> bool:
    """Train a task to its last step, or until SIGTERM, SIGUSR1 or SIGINT (Ctrl-C).

    validate: called on all ranks at every checkpoint, and at the start of a continued run whose last validation is missing.
    Returns whether the run is finished; if not, the same call continues it. Raises TrainingError on a loss or gradient that is
    not finite; the newest checkpoint stays intact.
    """
    config, optim = info.config, info.config.optim
    num_steps = optim.num_steps(len(dataset))
    trainer = Trainer(task, config, process, num_steps, resume)
    start = trainer.step
    save_every = options.save_every or max(math.ceil(len(dataset) / optim.samples_per_step), 1)
    log = RunLog(run, start=start, total=num_steps, tensorboard=options.tensorboard, progress=options.progress) \
        if process.is_main else None  # fmt: skip
    samples = stream_of_batches(dataset, config, process, start, num_steps)
    prefetcher = Prefetcher(dataset, samples, process.device, workers=options.workers)
    batches = iter(prefetcher)
    taken = TakenSteps(log, prefetcher, optim.samples_per_step, len(dataset))

    def measure() -> None:
        if validate is not None:
            trainer.release_memory()
            results = validate(task)
            if log is not None:
                log.validation(trainer.step, results, task.columns(results))
                link_best(run, task.score)

    try:
        with stop_signals(process) as stop:
            is_due = start > 0 and (start % save_every == 0 or start == num_steps)
            if validate is not None and is_due and not is_validated(run, start, process):
                measure()  # the run was stopped between the checkpoint and its validation
            elif validate is not None and start > 0 and log is not None:
                link_best(run, task.score)  # or between the validation and the link
            must_stop = False
            taken.start_clock()
            while trainer.step < num_steps and not must_stop:
                taken.append(trainer.take_step(batches, stop=stop.is_set))
                is_due = trainer.step % save_every == 0 or trainer.step == num_steps
                must_stop = taken.read(0 if is_due else trainer.lag)
                if is_due or must_stop:
                    taken.read(0)
                    if process.is_main:
                        save_checkpoint(run, trainer.step, info, task.state_dict(), trainer.state())
                    if not must_stop:
                        measure()
                        taken.start_clock()
        return trainer.step == num_steps
    finally:
        batches.close()  # type: ignore[attr-defined]
        if log is not None:
            log.close()


class TakenSteps:
    """Steps whose results are not read yet. They are logged when they are read."""

    def __init__(
        self, log: RunLog | None, prefetcher: Prefetcher, samples_per_step: int, samples_per_epoch: int
    ) -> None:
        self._log, self._prefetcher, self._steps = log, prefetcher, deque[TakenStep]()
        self._samples_per_step, self._samples_per_epoch = samples_per_step, samples_per_epoch
        self.start_clock()

    def start_clock(self) -> None:
        """The time of the next step that is read begins now."""
        self._began, self._waited = time.perf_counter(), self._prefetcher.waited

    def append(self, step: TakenStep) -> None:
        self._steps.append(step)

    def read(self, left: int) -> bool:
        """Read and log all steps but the last `left`. Returns whether one of them was asked to stop the run."""
        must_stop = False
        while len(self._steps) > left:
            step = self._steps.popleft()
            record = step.record()
            must_stop |= record.pop("stop") > 0
            seconds, waited = time.perf_counter() - self._began, self._prefetcher.waited - self._waited
            self.start_clock()
            if self._log is not None:
                epoch = (step.number + 1) * self._samples_per_step / self._samples_per_epoch
                rates = {"samples_per_s": self._samples_per_step / seconds, "data_wait": waited / seconds}
                self._log.step({"step": step.number, "epoch": epoch, **record, **rates})
        return must_stop


def stream_of_batches(
    dataset: Samples, config: Config, process: Process, start: int, num_steps: int
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


class StopRequest:
    """Whether this process has received a stop signal."""

    def __init__(self, process: Process) -> None:
        self.is_set = False
        self._is_main = process.is_main

    def set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts at once
            if self._is_main:  # print is not safe in a signal handler
                os.write(2, b"\nstopping after the current step; press Ctrl-C again to stop without saving\n")


@contextlib.contextmanager
def stop_signals(process: Process) -> Iterator[StopRequest]:
    """SIGTERM, SIGUSR1 (sent by Slurm before a job's time limit) and Ctrl-C stop the run after the current step."""
    request = StopRequest(process)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, request.set) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
