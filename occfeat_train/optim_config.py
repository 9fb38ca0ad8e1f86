"""The optimiser, the schedule and the batches of a run: a part of its config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from occfeat_train.conversion import require_one_of

_LARGEST = 1_000_000_000  # of a number below, far above sensible ones, so that products of them are finite
_LARGEST_STEP = 1_000_000  # samples


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule (paper 4.1). batch: samples per forward pass, over all ranks.

    accumulation: forward passes per optimiser step. accumulate: whether the gradient of a step is that of the ``mean`` of their
    losses, or of the ``sum`` (Simple-BEV), which clipping sees. clip: L2 norm of the gradient (Simple-BEV).
    schedule_tail: steps that the one-cycle schedule plans after the last one (Simple-BEV: 100).
    """

    optimizer: Literal["adam", "adamw"] = "adam"
    schedule: Literal["constant", "onecycle"] = "constant"
    lr: float = 1e-3
    weight_decay: float = 1e-7
    epochs: float = 50
    batch: int = 16
    accumulation: int = 1
    accumulate: Literal["mean", "sum"] = "mean"
    clip: float = 5.0
    schedule_tail: int = 0

    def __post_init__(self) -> None:
        require_one_of(self, "optimizer", "schedule", "accumulate")
        for name in ("lr", "epochs", "batch", "accumulation", "clip"):
            if not 0 < getattr(self, name) <= _LARGEST:
                raise ValueError(
                    f"optim.{name}={getattr(self, name)}: a number above 0 and at most {_LARGEST:,} expected"
                )
        if self.samples_per_step > _LARGEST_STEP:
            raise ValueError(
                f"optim.batch={self.batch} and optim.accumulation={self.accumulation}: at most {_LARGEST_STEP:,} samples per step expected"
            )
        if not 0 <= self.schedule_tail <= _LARGEST:
            raise ValueError(f"optim.schedule_tail={self.schedule_tail}: 0 to {_LARGEST:,} steps expected")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"optim.weight_decay={self.weight_decay}: at least 0 expected")

    @property
    def samples_per_step(self) -> int:
        return self.batch * self.accumulation

    def num_steps(self, num_samples: int) -> int:
        """Optimiser steps of the whole run. The epochs are one stream of samples; only an incomplete last batch is left out."""
        return max(int(self.epochs * num_samples) // self.samples_per_step, 1)
