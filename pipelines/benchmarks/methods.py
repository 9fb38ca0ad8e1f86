"""CPU seconds of a pretraining step by pretext task, and of reading one sample with its targets.

    python pipelines/benchmarks/methods.py [--rounds 3] [--batch 1] [--threads 1]

Default network and sizes, float32. The cache contains random bytes, as many occupied voxels as a nuScenes keyframe, and 25,000
returns of flat ground. Steps alternate between the tasks, on one batch that is resident. CPU seconds depend little on other load.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _timing import machine
from loader import SPEC, write

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.store import Cache
from occfeat_train.config import Config, NetworkConfig, OptimConfig
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.tasks.build import build_task
from occfeat_train.training.step import Trainer

_SAMPLES = 16  # whose reading is measured


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU time of all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def contender(cache: Cache, config: Config) -> tuple[Callable[[], Any], float]:
    """One optimiser step, and the CPU seconds of reading a sample."""
    dataset = KeyframeDataset(CacheReader(cache), config, training=True)
    dataset.batch([(0, 0)])  # compiles
    reading = [cpu_seconds(lambda i=i: dataset.batch([dataset.stream(i)])) for i in range(_SAMPLES)]
    resident = dataset.batch([dataset.stream(i) for i in range(config.optim.batch)])
    made = build_task(config, cache.spec.grid, 384)
    trainer = Trainer(made, config, Process(0, 1, torch.device("cpu")), 10_000)
    return lambda: trainer.take_step(itertools.repeat(resident)), statistics.median(reading)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        cache, _ = write(Path(directory), _SAMPLES, replace(SPEC, max_points=40_000))
        base = Config(network=NetworkConfig(weights="none"), optim=OptimConfig(batch=options.batch))
        contenders = {
            "occfeat": contender(cache, base),
            "occfeat --occlusion zbuffer": contender(cache, base.override(["loss.occlusion=zbuffer"])),
            "img-also": contender(cache, replace(base, task="img-also")),
        }
        for step, _ in contenders.values():
            step()
        rounds = [{task: cpu_seconds(step) for task, (step, _) in contenders.items()} for _ in range(options.rounds)]
    print(f"\n{machine()}, batch {options.batch}\n")
    print("| task | CPU s per step | to occfeat | CPU ms per sample read |")
    print("|---|---|---|---|")
    for task, (_, reading) in contenders.items():
        seconds = statistics.median(each[task] for each in rounds)
        ratio = statistics.median(each[task] / each["occfeat"] for each in rounds)
        print(f"| {task} | {seconds:.2f} | {ratio:.2f} | {1e3 * reading:.1f} |")


if __name__ == "__main__":
    main()
