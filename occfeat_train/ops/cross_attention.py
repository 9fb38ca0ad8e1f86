"""Cross-view attention: a query attends to the tokens of all cameras, with one softmax over all of them.

A query has another value for each camera, because its position is embedded relative to the camera. In torch's
scaled_dot_product_attention a query has one value for all keys, so it cannot be used. Here, the attention is computed camera
by camera, and each camera's result is weighted by its share of the whole softmax. Scores exist for one camera at a time, and
the backward pass computes them again, so memory does not grow with queries * cameras * tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_attention(
    queries: Float[Tensor, "B V heads Q D"],
    keys: Float[Tensor, "B V heads T D"],
    values: Float[Tensor, "B V heads T E"],
    is_key: Bool[Tensor, "B V T"],
) -> Float[Tensor, "B heads Q E"]:
    """sum of softmax(queries keys / sqrt(D)) values, where the softmax is over the tokens of all cameras that are keys.

    The result is zero in a sample without keys. Half-precision inputs are computed in float32, also under autocast, and the
    result has the dtype of the values.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    scaled = queries.to(exact) * queries.shape[-1] ** -0.5
    with torch.autocast(queries.device.type, enabled=False):
        out: Tensor = _CrossAttention.apply(scaled, keys.to(exact), values.to(exact), is_key)
    return out.to(values.dtype)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, is_key: Tensor) -> Tensor:
        sums, parts = [], []
        for q, k, v, mask in zip(*(t.unbind(1) for t in (queries, keys, values, is_key)), strict=True):
            scores = _scores(q, k, mask)
            sums.append(scores.logsumexp(-1, keepdim=True))
            parts.append(_exp(scores, sums[-1]) @ v)
        total = torch.stack(sums).logsumexp(0)
        shares = _exp(torch.stack(sums), total)
        out = (shares * torch.stack(parts)).sum(0)
        ctx.save_for_backward(queries, keys, values, is_key, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """With probabilities p and dp = grad v: the gradient of the scores is p (dp - sum of p dp), and the sum is grad out."""
        queries, keys, values, is_key, out, total = ctx.saved_tensors
        along = (grad * out).sum(-1, keepdim=True)
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        with torch.autocast(grad.device.type, enabled=False):
            for q, k, v, mask in zip(*(t.unbind(1) for t in (queries, keys, values, is_key)), strict=True):
                probability = _exp(_scores(q, k, mask), total)
                found[2].append(probability.mT @ grad)
                scores = (grad @ v.mT).sub_(along).mul_(probability)
                found[0].append(scores @ k)
                found[1].append(scores.mT @ q)
        return *(torch.stack(grads, 1) for grads in found), None


def _scores(queries: Tensor, keys: Tensor, is_key: Tensor) -> Tensor:
    """(B, heads, Q, T) of one camera, minus infinity where a token is no key."""
    return (queries @ keys.mT).masked_fill_(~is_key[:, None, None], -torch.inf)


def _exp(scores: Tensor, log_sum: Tensor) -> Tensor:
    """exp(scores - log_sum), zero where the sum has no term and both are minus infinity."""
    return (scores - log_sum.clamp(min=torch.finfo(log_sum.dtype).min)).exp_()
