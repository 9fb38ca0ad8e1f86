"""The two linear layers of a transformer's layer over many rows, whose hidden values never exist all at once.

Stands under `bevformer`: at 200 x 200 cells and 1028 hidden channels they would be 164 MB a layer, and twice that in the
backward. On a CPU a few hundred rows go through both layers while they are in the core's cache, and again in the
backward, which costs one product more and is faster than the way to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS = 512  # of 1028 channels in float32: 2 MB


@torch.compiler.disable  # type: ignore[untyped-decorator]
def feed_forward(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """x + second(relu(first(x))) for x (..., C): on a CPU by rows, on other devices and in autocast as it stands there.

    Keeps x for the backward, where it goes by rows, otherwise x and the hidden values.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return x + second(first(x).relu())
    out: Tensor = _FeedForward.apply(x, first.weight, first.bias, second.weight, second.bias)
    return out


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        out = torch.empty(x.shape, dtype=x.dtype)
        hidden = x.new_empty(_ROWS, len(w1))
        for row, target in _by_rows(x, out):
            h = torch.addmm(b1, row, w1.T, out=hidden[: len(row)]).relu_()
            torch.addmm(b2, h, w2.T, out=target).add_(row)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        grad_w1, grad_b1, grad_w2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
        hidden, grad_hidden = x.new_empty(2, _ROWS, len(w1))
        for row, g, target in _by_rows(x, grad, grad_x):
            h = torch.addmm(b1, row, w1.T, out=hidden[: len(row)]).relu_()
            grad_h = torch.mm(g, w2, out=grad_hidden[: len(row)])
            torch.ops.aten.threshold_backward.grad_input(grad_h, h, 0, grad_input=grad_h)
            grad_w2.addmm_(g.T, h)
            grad_w1.addmm_(grad_h.T, row)
            grad_b1 += grad_h.sum(0)
            torch.addmm(g, grad_h, w1, out=target)
        return grad_x, grad_w1, grad_b1, grad_w2, grad.flatten(0, -2).sum(0)


def _by_rows(*tensors: Tensor) -> Any:
    return zip(*(t.flatten(0, -2).split(_ROWS) for t in tensors), strict=True)
