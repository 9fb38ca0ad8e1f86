"""Cross-view attention: closed forms, and values and gradients against a softmax of all scores at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from occfeat_train.ops.cross_attention import cross_attention


def attend_dense(queries: Tensor, keys: Tensor, values: Tensor, is_key: Tensor) -> Tensor:
    """Slow reference: one query and one head at a time, over the list of all keys of all cameras."""
    batch, cams, heads, rows, width = queries.shape
    out = []
    for b, head, row in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, rows))).tolist():
        scores, read = [], []
        for cam in range(cams):
            for token in range(keys.shape[3]):
                if is_key[b, cam, token]:
                    scores.append(queries[b, cam, head, row] @ keys[b, cam, head, token] / math.sqrt(width))
                    read.append(values[b, cam, head, token])
        nothing = (queries[b, 0, head, row] * 0).sum() + torch.zeros_like(values[b, 0, head, 0])
        out.append(torch.stack(scores).softmax(0) @ torch.stack(read) if scores else nothing)
    return torch.stack(out).view(batch, heads, rows, -1)


def random_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2 samples, 3 cameras, 2 heads, 4 queries and 5 tokens of 3 channels. The second sample's last camera is masked."""
    random = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, 2, n, 3, generator=random, dtype=dtype) for n in (4, 5, 5))
    is_key = torch.rand(2, 3, 5, generator=random) < 0.7
    is_key[1, 2] = False
    return 2 * queries, 2 * keys, values, is_key


def test_equal_scores_average_the_tokens_of_all_cameras() -> None:
    """Camera 0 has one key, camera 1 three: each of the four has the same weight."""
    values = torch.tensor([[[8.0], [99], [99]], [[1], [2], [5]]])[None, :, None]
    is_key = torch.tensor([[[True, False, False], [True, True, True]]])
    found = cross_attention(torch.zeros(1, 2, 1, 1, 4), torch.randn(1, 2, 1, 3, 4), values, is_key)
    assert found.item() == pytest.approx(4)


def test_a_query_may_differ_between_cameras() -> None:
    """Scores log 3 in camera 0 and log 1 in camera 1: weights 3/4 and 1/4, although both keys are equal."""
    queries = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1, 1)
    values = torch.tensor([4.0, 8]).view(1, 2, 1, 1, 1)
    found = cross_attention(queries, torch.ones(1, 2, 1, 1, 1), values, torch.ones(1, 2, 1, dtype=torch.bool))
    assert found.item() == pytest.approx(5)


def test_values_and_gradients_equal_the_slow_reference() -> None:
    *inputs, is_key = random_inputs()
    ours, slow = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    found, expected = cross_attention(*ours, is_key), attend_dense(*slow, is_key)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(weight)
    expected.backward(weight)
    for mine, theirs in zip(ours, slow, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=0)
    assert ours[2].grad is not None and not ours[2].grad[1, 2].any()


def test_a_sample_without_keys_is_zero_and_has_no_gradient() -> None:
    *inputs, is_key = random_inputs()
    leaves = [t.requires_grad_() for t in inputs]
    is_key[1] = False
    found = cross_attention(*leaves, is_key)
    found.sum().backward()
    assert found[0].all() and not found[1].any()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad[0].any() and not leaf.grad[1].any()


def test_very_large_scores_are_finite() -> None:
    queries, keys, values, is_key = random_inputs(torch.float32)
    is_key[:] = True
    found = cross_attention(1e6 * queries, 1e6 * keys, values, is_key)
    best = torch.einsum("bvhqd,bvhtd->bhqvt", queries, keys).flatten(-2).argmax(-1)
    tokens = values.transpose(1, 2).flatten(2, 3)
    expected = torch.gather(tokens, 2, best[..., None].expand(-1, -1, -1, 3))
    torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_float32_also_under_autocast() -> None:
    *inputs, is_key = random_inputs()
    rounded = [t.bfloat16() for t in inputs]
    expected = cross_attention(*(t.double() for t in rounded), is_key)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_attention(*rounded, is_key)
        exact = cross_attention(*(t.float() for t in rounded), is_key)
    assert found.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, expected.bfloat16())


def test_no_scores_are_kept_for_the_backward_pass() -> None:
    """Kept are tensors of queries or of tokens, none of queries times tokens."""
    saved: list[Tensor] = []
    queries, tokens = torch.randn(1, 2, 1, 30, 4).requires_grad_(), torch.randn(1, 2, 1, 40, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_attention(queries, tokens, tokens, torch.ones(1, 2, 40, dtype=torch.bool))
    assert saved and max(t.numel() for t in saved) == tokens.numel() < 30 * 40
