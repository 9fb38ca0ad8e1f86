"""Activation checkpointing that updates BatchNorm statistics only once.

Used by `encoder` for its first blocks, which have large maps and little arithmetic, and by `bevformer` for its layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *given: Any, call: Callable[..., Any] | None = None) -> Any:
    """module(*given) with activation checkpointing: same values, gradients, running statistics and random numbers.

    call: called instead of the module, which it calls. Its only random numbers may be those of active nn.Dropout modules.
    Only the inputs are saved for the backward pass. It is a plain call where gradients are off. It is also a plain call
    for a module with BatchNorms under torch.compile, which cannot exclude their statistics from the recomputation and
    chooses itself which activations to save.
    """
    call = call or module
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    if not torch.is_grad_enabled() or (norms and torch.compiler.is_compiling()):
        return call(*given)
    is_random = any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in module.modules())
    if not norms:
        return checkpoint(call, *given, use_reentrant=False, preserve_rng_state=is_random)
    contexts = contextlib.nullcontext(), _statistics_counted(norms)
    return checkpoint(call, *given, use_reentrant=False, preserve_rng_state=is_random, context_fn=lambda: contexts)


@contextlib.contextmanager
def _statistics_counted(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Context in which BatchNorms in training mode normalise as usual but do not update their running statistics."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
