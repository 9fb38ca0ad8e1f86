"""Other programs on the device: the command line, the loader, and the all-reduce of one process."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from occfeat_train.cli import main as occfeat_train
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.prefetch import Prefetcher
from occfeat_train.distributed import average_gradients
from occfeat_train.tasks.base import Task
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.log import read_log
from pipelines.gpu_check.inputs import config_of, random_batch, random_cache, task_on
from pipelines.gpu_check.measure import Check, distance


def cli(check: Check) -> None:
    """`pretrain`, the same command after its last checkpoint was deleted, and `evaluate`, on a cache of random bytes."""
    cache = random_cache(check)
    out = Path(tempfile.mkdtemp(dir=check.scratch)) / "run"
    batch, steps = check.batch, 2 if check.small else 30
    common = ["--cache", cache.cache.path.parent, "--device", check.device.type, "--no-progress"]
    pretrain = ["pretrain", *common, "--no-tensorboard", "--out", out, "--backbone-weights", "none", "--batch", batch]
    pretrain += ["--epochs", (steps * batch + 0.5) / len(cache), "--save-every", steps // 2, "--loader-threads", 6]
    if check.small:
        pretrain += ["--set", "network.image_size=32x64", "--set", "network.channels=32"]

    def run(arguments: list[Any]) -> None:
        began = time.perf_counter()
        occfeat_train([str(a) for a in arguments], standalone_mode=False)
        check.record(f"{arguments[0]}: whole command", seconds=round(time.perf_counter() - began, 1))

    run(pretrain)
    records = read_log(out)
    settled = records[len(records) // 3 :]
    check.record("pretrain", samples_per_s=round(statistics.median(r["samples_per_s"] for r in settled), 1),
                 data_wait=round(statistics.mean(r["data_wait"] for r in settled), 4))  # fmt: skip
    shutil.rmtree(find_checkpoint(out).path)
    run(pretrain)
    continued = read_log(out)
    off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(continued, records, strict=True))
    check.record("continued from half way", largest_relative_difference_of_losses=float(f"{off:.1e}"), ok=off < 0.05)
    run(["evaluate", out, *common, "--batch", batch])
    evaluated = json.loads((out / "evaluation" / "val.json").read_text())["samples"]
    check.record("evaluate", samples=evaluated, ok=evaluated == len(cache))


def loader(check: Check) -> None:
    """Samples/s that arrive on the device if nothing else runs, by number of threads."""
    config = config_of(check.small) if check.small else Config()
    dataset = KeyframeDataset(random_cache(check), config, training=True)
    for workers in (1, 2) if check.small else (1, 2, 4, 8):
        count = 4 if check.small else 24
        samples = [[dataset.stream(i * check.batch + j) for j in range(check.batch)] for i in range(count)]
        began, size = time.perf_counter(), 0
        for batch in Prefetcher(dataset, samples, check.device, workers=workers):
            size += batch.nbytes
        check.synchronize()
        seconds = time.perf_counter() - began
        rate = round(count * check.batch / seconds)
        check.record(f"{workers} threads", samples_per_s=rate, gb_per_s=round(size / seconds / 1e9, 2))


def ranks(check: Check) -> None:
    """Gradients after an all-reduce of one process, compared with those before."""
    store = Path(tempfile.mkdtemp(dir=check.scratch)) / "store"
    dist.init_process_group("nccl" if check.is_cuda else "gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        config = config_of(True)
        task, batch = task_on(config, True, check.device), random_batch(config, 2, True).to(check.device)
        task(batch)["loss"].backward()
        before = gradient(task)
        average_gradients(task)
        off = distance(gradient(task), before)
        check.record("all-reduce of gradients", distance=off, ok=off == 0)
    finally:
        dist.destroy_process_group()


def gradient(task: Task) -> Tensor:
    return torch.cat([p.grad.detach().flatten().cpu() for p in task.parameters() if p.grad is not None])
