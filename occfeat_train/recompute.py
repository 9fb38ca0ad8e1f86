"""Memory for arithmetic: a module whose inside is not kept for the backward but computed again there.

Used by `backbones`, whose first blocks work on large maps with little arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x): the same values, gradients, running statistics and random numbers, of which only x is kept.

    Without gradients it is a plain call, and where torch.compile traces it, whose partitioner decides what to keep.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        plain: Tensor = module(x)
        return plain
    again: Tensor = checkpoint(
        module, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _statistics_counted(module))
    )
    return again


@contextlib.contextmanager
def _statistics_counted(module: nn.Module) -> Iterator[None]:
    """In it, BatchNorms in training normalise as before, and count nothing a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
