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

from occfeat_train.ops.threads import in_threads

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
        rows, parameters = given[:count], given[count:]
        out = [empty((len(rows[0]), *t.shape[1:]), t.dtype) for t in function(*(t[:1] for t in rows), *parameters)]

        def work(chunks: range) -> None:
            for first in chunks:
                chunk = slice(first, first + _ROWS)
                for target, found in zip(out, function(*(t[chunk] for t in rows), *parameters), strict=True):
                    target[chunk] = found

        _in_spans(work, len(rows[0]), _ROWS)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        rows, parameters = kept[: ctx.count], kept[ctx.count :]
        needed = ctx.needs_input_grad[2 : 2 + ctx.count]
        out = [empty(t.shape, t.dtype) if is_needed else None for t, is_needed in zip(rows, needed, strict=True)]

        def work(chunks: range) -> list[Tensor]:
            leaves = [p.detach().requires_grad_() for p in parameters]
            for first in chunks:
                chunk = slice(first, first + _ROWS)
                with torch.enable_grad():
                    given = [
                        t[chunk].detach().requires_grad_(is_needed) for t, is_needed in zip(rows, needed, strict=True)
                    ]
                    found = ctx.function(*given, *leaves)
                torch.autograd.backward(found, [g[chunk] for g in grads])
                for target, t in zip(out, given, strict=True):
                    if target is not None:
                        target[chunk] = t.grad
            return [leaf.grad for leaf in leaves if leaf.grad is not None]

        return None, None, *out, *_summed(_in_spans(work, len(rows[0]), _ROWS))


class _FeedForward(torch.autograd.Function):
    """By hand, as it is four fifths of the arithmetic: the second product is not computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        out = empty(x.shape, x.dtype)

        def work(chunks: range) -> None:
            hidden = x.new_empty(_HIDDEN_ROWS, len(w1))
            for first in chunks:
                row, target = (t[first : first + _HIDDEN_ROWS] for t in (x, out))
                h = torch.addmm(b1, row, w1.T, out=hidden[: len(row)]).relu_()
                torch.addmm(b2, h, w2.T, out=target).add_(row)

        _in_spans(work, len(x), _HIDDEN_ROWS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        grad_x = empty(x.shape, x.dtype)

        def work(chunks: range) -> list[Tensor]:
            grad_w1, grad_b1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
            hidden, grad_hidden = x.new_empty(2, _HIDDEN_ROWS, len(w1))
            for first in chunks:
                row, g, target = (t[first : first + _HIDDEN_ROWS] for t in (x, grad, grad_x))
                h = torch.addmm(b1, row, w1.T, out=hidden[: len(row)]).relu_()
                grad_h = torch.mm(g, w2, out=grad_hidden[: len(row)])
                torch.ops.aten.threshold_backward.grad_input(grad_h, h, 0, grad_input=grad_h)
                grad_w2.addmm_(g.T, h)
                grad_w1.addmm_(grad_h.T, row)
                grad_b1 += grad_h.sum(0)
                torch.addmm(g, grad_h, w1, out=target)
            return [grad_w1, grad_b1, grad_w2]

        return grad_x, *_summed(_in_spans(work, len(x), _HIDDEN_ROWS)), grad.sum(0)


def _in_spans(work: Callable[[range], Any], count: int, size: int) -> list[Any]:
    """work(first rows of its chunks of `size`) on as many threads of our own as torch has, results in order.

    Each computes alone: torch's threads would meet after every product of a chunk, and wait for the slowest.
    """
    threads, chunks = torch.get_num_threads(), -(-count // size)
    spans = [range(chunks * i // threads * size, chunks * (i + 1) // threads * size, size) for i in range(threads)]

    def alone(span: range) -> Any:
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(span)

    try:
        return list(in_threads(alone, [span for span in spans if span]))
    finally:
        torch.set_num_threads(threads)


def _summed(grads: list[list[Tensor]]) -> list[Tensor]:
    """Over threads, in their order."""
    return [sum(parts[1:], parts[0]) for parts in zip(*grads, strict=True)]
