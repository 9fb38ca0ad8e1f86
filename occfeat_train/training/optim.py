"""Optimiser and schedule of a run (paper 4.1; open details follow Simple-BEV)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from occfeat_train.config import OptimConfig

WARM_UP = 0.05  # fraction of the steps; linear (Simple-BEV): lr / 25 to lr, then down to lr / 250,000


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, num_steps: int, *, fused: bool = False
) -> tuple[Optimizer, LRScheduler]:
    """num_steps: steps of the whole run. fused: use one kernel for all parameters on a GPU."""
    kind = {"adam": Adam, "adamw": AdamW}[config.optimizer]
    optimizer = kind(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    schedule: LRScheduler
    if config.schedule == "constant":
        schedule = ConstantLR(optimizer, factor=1, total_iters=0)
    else:
        total = num_steps + max(config.schedule_tail, 1)  # the schedule is stepped once more than it is used
        schedule = OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=total,
            pct_start=max(WARM_UP, 2 / total),  # at least one step, because OneCycleLR divides by it
            anneal_strategy="linear",
            cycle_momentum=False,
        )
    return optimizer, schedule
