"""Memory for arithmetic: a module whose inside is not kept for the backward but computed again there.

Used by `backbones`, whose first blocks work on large maps with little arithmetic, and by `bevformer` for its layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *given: Any) -> Any:
    """module(*given): the same values, gradients, running statistics and random numbers; only what is given is kept.

    A plain call without gradients; and for a module with BatchNorms where torch.compile traces it, which can't be told
    to leave their statistics alone, and decides itself what it keeps.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    if not torch.is_grad_enabled() or (norms and torch.compiler.is_compiling()):
        return module(*given)
    if not norms:
        return checkpoint(module, *given, use_reentrant=False)
    contexts = contextlib.nullcontext(), _statistics_counted(norms)
    return checkpoint(module, *given, use_reentrant=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _statistics_counted(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """In it, BatchNorms in training normalise as before, and count nothing a second time."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
