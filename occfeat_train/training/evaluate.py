"""Evaluation over a whole split: every sample exactly once on any number of ranks, without augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from occfeat_targets.common.progress import progress_bar
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.prefetch import Prefetcher
from occfeat_train.distributed import Process
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import move_to_device
from occfeat_train.training.memory import evaluation_remedy, explains_memory
from occfeat_train.training.precision import autocast, forbid_tf32


@torch.no_grad()
def evaluate(
    task: Task,
    dataset: KeyframeDataset,
    process: Process,
    *,
    batch: int = 8,
    workers: int = 4,
    progress: bool = True,
    advance: Callable[[int], Any] | None = None,
) -> Any:
    """The task's metric over the data set, summed over all ranks.

    Keyframes are assigned to ranks in turn, so their numbers differ by at most one, and no sample is padded or repeated.
    batch: samples per forward pass and rank. advance: is told how many samples of this rank were measured. The task stays in evaluation mode.
    Raises MemoryShortage, a ValueError, if the GPU has too little memory.
    """
    forbid_tf32(task.config.precision, process.device)
    move_to_device(task, process.device)
    task.eval()
    metric = task.metric()
    mine = dataset.keyframes[process.rank :: process.world].tolist()
    samples = ([(0, keyframe) for keyframe in mine[i : i + batch]] for i in range(0, len(mine), batch))
    bar = progress_bar(
        len(mine), unit="sample", desc="evaluate", disable=not (progress and process.is_main), leave=False
    )
    with bar, explains_memory(process.device, "in evaluation", evaluation_remedy(batch)):
        for loaded in Prefetcher(dataset, samples, process.device, workers=workers):
            with autocast(process.device, task.config.precision):
                task.measure(loaded, metric)
            bar.update(len(loaded))
            if advance is not None:
                advance(len(loaded))
    metric.reduce()
    if metric.num_samples != len(dataset):
        raise RuntimeError(f"{metric.num_samples} samples were counted, the data set has {len(dataset)}")
    return metric
