"""What a transformer does to each of its many rows alone, a few rows at a time, in few and large pieces of memory.

Stands under `bevformer`: at 200 x 200 cells a map is 20 MB and the hidden values of a layer's two linear layers 164 MB.
On a CPU a few rows go through everything while they are in the core's cache, and again in the backward: that is faster
than the way to memory. On other devices and in autocast the plain functions run, as they do there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS = 2048  # of 128 channels in float32: 1 MB
_HIDDEN_ROWS = 512  # of 1028: 2 MB
_MAPPED = 2**25  # glibc maps what is larger by itself


@torch.compiler.disable  # type: ignore[untyped-decorator]
def by_rows(
    function: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """function(*rows, *parameters), of which row i depends on row i of each (n, ...) of `rows` only.

    Keeps rows and parameters for the backward, not what is between. Differentiable once.
    """
    if not goes_by_rows(rows[0]):
        return function(*rows, *parameters)
    found: tuple[Tensor, ...] = _ByRows.apply(function, len(rows), *rows, *parameters)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def feed_forward(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """x + second(relu(first(x))) for x (n, C). Keeps x for the backward, where it doesn't go by rows everything."""
    if not goes_by_rows(x):
        return x + second(first(x).relu())
    out: Tensor = _FeedForward.apply(x, first.weight, first.bias, second.weight, second.bias)
    return out


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """On a CPU, a map of its own piece of memory, whose pages exist once they are written and go when it goes.

    glibc finds no room for an aligned piece in the hole that an equal one has left; of maps of 20 MB it would keep
    1.5 GB of holes.
    """
    count = torch.Size(shape).numel()
    padded = max(count, _MAPPED // dtype.itemsize + 1) if count * dtype.itemsize > 2**20 else count
    return torch.empty(padded, dtype=dtype)[:count].view(shape)


def goes_by_rows(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], count: int, *given: Tensor) -> Any:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*given)
        out: list[Tensor] = []
        for first, *chunk in _chunks(_ROWS, *given[:count]):
            for i, part in enumerate(function(*chunk, *given[count:])):
                if not first:
                    out.append(empty((len(given[0]), *part.shape[1:]), part.dtype))
                out[i][first : first + len(part)] = part
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        rows, parameters = kept[: ctx.count], kept[ctx.count :]
        leaves = [p.detach().requires_grad_() for p in parameters]
        needed = ctx.needs_input_grad[2 : 2 + ctx.count]
        out = [empty(t.shape, t.dtype) if is_needed else None for t, is_needed in zip(rows, needed, strict=True)]
        for first, *chunk in _chunks(_ROWS, *rows, *grads):
            with torch.enable_grad():
                given = [t.detach().requires_grad_(is_needed) for t, is_needed in zip(chunk, needed, strict=False)]
                found = ctx.function(*given, *leaves)
            torch.autograd.backward(found, chunk[ctx.count :])
            for target, t in zip(out, given, strict=True):
                if target is not None:
                    target[first : first + len(t)] = t.grad
        return None, None, *out, *(leaf.grad for leaf in leaves)


class _FeedForward(torch.autograd.Function):
    """By hand, as it is four fifths of the arithmetic: the second product is not computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        out = empty(x.shape, x.dtype)
        hidden = x.new_empty(_HIDDEN_ROWS, len(w1))
        for _, row, target in _chunks(_HIDDEN_ROWS, x, out):
            h = torch.addmm(b1, row, w1.T, out=hidden[: len(row)]).relu_()
            torch.addmm(b2, h, w2.T, out=target).add_(row)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        grad_x = empty(x.shape, x.dtype)
        grad_w1, grad_b1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
        hidden, grad_hidden = x.new_empty(2, _HIDDEN_ROWS, len(w1))
        for _, row, g, target in _chunks(_HIDDEN_ROWS, x, grad, grad_x):
            h = torch.addmm(b1, row, w1.T, out=hidden[: len(row)]).relu_()
            grad_h = torch.mm(g, w2, out=grad_hidden[: len(row)])
            torch.ops.aten.threshold_backward.grad_input(grad_h, h, 0, grad_input=grad_h)
            grad_w2.addmm_(g.T, h)
            grad_w1.addmm_(grad_h.T, row)
            grad_b1 += grad_h.sum(0)
            torch.addmm(g, grad_h, w1, out=target)
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0)


def _chunks(size: int, *tensors: Tensor) -> Any:
    """(first row, rows of each tensor) after another."""
    for first in range(0, len(tensors[0]), size):
        yield first, *(t[first : first + size] for t in tensors)
