"""Samples per second of the training loop on a cache, against the same steps on one batch that is resident on the device.

    python pipelines/benchmarks/loop.py [--batch 1] [--device cuda --batch 16] [--set network.lifting=bevformer ...]

The cache contains random bytes at the default sizes (2.3 MB of images and 2.1 MB of features per keyframe). The run is
`occfeat-train pretrain` with the paper's recipe. The limit is measured twice after it. The loop additionally reads, chooses
the augmentation, copies and logs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _timing import machine
from loader import write

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.store import Cache
from occfeat_train.cli import main as occfeat_train
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.tasks.build import build_task
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.log import read_log
from occfeat_train.training.step import Trainer


def train(cache: Cache, run: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """The log of a run of options.steps steps without its first two, which include compilation and unprefetched data."""
    epochs = (options.steps * options.batch + 0.5) / len(cache)
    arguments = [
        "pretrain", "--cache", cache.path.parent, "--out", run, "--batch", options.batch, "--epochs", epochs,
        "--backbone-weights", "none", "--device", options.device, "--loader-threads", options.loader_threads, "--no-progress",
        "--compile" if options.compile else "--no-compile",
    ]  # fmt: skip
    for assignment in options.overrides:
        arguments += ["--set", assignment]
    occfeat_train([str(a) for a in arguments], standalone_mode=False)
    return read_log(run)[2:]


def resident_samples_per_second(cache: Cache, config: Config, device: torch.device, steps: int) -> float:
    """From the median time of complete optimiser steps on one batch."""
    dataset = KeyframeDataset(CacheReader(cache), config, training=True)
    task, process = build_task(config, cache.spec.grid, 384), Process(0, 1, device)
    trainer, times = Trainer(task, config, process, steps + 2), []
    batch = dataset.batch([dataset.stream(i) for i in range(config.optim.batch)]).to(device)
    for _ in range(steps + 2):
        start = time.perf_counter()
        trainer.take_step(itertools.repeat(batch))
        times.append(time.perf_counter() - start)
    return config.optim.samples_per_step / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--loader-threads", type=int, default=2, help="threads that prefetch samples")
    parser.add_argument("--keyframes", type=int, default=64)
    parser.add_argument("--directory", type=Path, default=None, help="folder for temporary 0.6 GB")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        cache, _ = write(Path(directory), options.keyframes)
        run = Path(directory) / "run"
        records = train(cache, run, options)
        checkpoint = find_checkpoint(run)
        limits = [
            resident_samples_per_second(cache, checkpoint.info.config, device, options.steps // 2) for _ in range(2)
        ]
        rate = statistics.median(record["samples_per_s"] for record in records)
        waits = [record["data_wait"] for record in records]
    print(f"\n{machine() if device.type == 'cpu' else torch.cuda.get_device_name()}")
    print(f"batch {options.batch}{', compiled' if options.compile else ''} {' '.join(options.overrides)}\n")
    print("| loop, samples/s | resident batch, samples/s | ratio | waiting for data, mean | maximum |")
    print("|---|---|---|---|---|")
    limit = statistics.mean(limits)
    print(
        f"| {rate:.3g} | {limits[0]:.3g}, {limits[1]:.3g} | {rate / limit:.1%} "
        f"| {statistics.mean(waits):.3%} | {max(waits):.3%} |"
    )


if __name__ == "__main__":
    main()
