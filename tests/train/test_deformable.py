"""Deformable attention: values and gradients against a loop, and closed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from occfeat_train.networks.bevformer import (
    HEADS,
)
from occfeat_train.ops.deformable import Reads, deformable, deformable_torch
from tests.train import deformable_twin

BACKENDS = [pytest.param(deformable, id="numba"), pytest.param(deformable_torch, id="torch")]
Deformable = Callable[[Tensor, Tensor, Reads], Tensor]


def random_reads(seed: int, batch: int = 2, queries: int = 5, cams: int = 2) -> tuple[Reads, Tensor]:
    """Samples of 2 maps of 3 x 4; queries that read 0 to 2 maps; anchors up to a token outside."""
    rng = np.random.default_rng(seed)
    seen = torch.from_numpy(rng.random((batch, queries, cams)) < 0.5)
    sample, _, cam = seen.nonzero(as_tuple=True)
    starts = nn.functional.pad(seen.sum(2).flatten().cumsum(0), (1, 0))
    anchors = torch.from_numpy(rng.uniform([-1.5, -1.5], [4.5, 3.5], (len(cam), 2, 2)))
    return Reads(batch, sample * cams + cam, starts, anchors), seen


def random_inputs(seed: int, batch: int = 2, queries: int = 5, points: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(2 * batch, 3, 4, HEADS, 3, generator=rng, dtype=torch.float64)
    places = torch.randn(batch * queries, HEADS, points, 3, generator=rng, dtype=torch.float64)
    return values, places


def looped(values: Tensor, places: Tensor, reads: Reads) -> Tensor:
    offsets, weights = places[..., :2], places[..., 2].softmax(-1)
    out = torch.zeros(*weights.shape[:2], values.shape[-1], dtype=values.dtype)
    for pair, query in enumerate(reads.queries.tolist()):
        for head in range(weights.shape[1]):
            for p in range(weights.shape[2]):
                x, y = reads.anchors[pair, p % reads.anchors.shape[1]] + offsets[query, head, p]
                read = deformable_twin.sample(values[reads.maps[pair], :, :, head], x, y)
                out[query, head] = out[query, head] + weights[query, head, p] * read
    return out


def value_and_gradients(function: Deformable, inputs: tuple[Tensor, ...], reads: Reads) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves, reads)  # type: ignore[arg-type]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("function", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_equal_the_slow_reference(function: Deformable, seed: int, three_threads: None) -> None:
    reads, seen = random_reads(seed)
    inputs = random_inputs(seed)
    assert not seen.any(2).all() and seen.all(2).any()
    expected = value_and_gradients(looped, inputs, reads)
    found = value_and_gradients(function, tuple(t.float() for t in inputs), reads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_sampling_passes_gradcheck() -> None:
    reads, _ = random_reads(3)
    inputs = tuple(t.requires_grad_() for t in random_inputs(3))
    assert torch.autograd.gradcheck(lambda *given: deformable(*given, reads), inputs)


@pytest.mark.parametrize("function", BACKENDS)
def test_a_position_on_a_token_reads_it_and_one_a_token_outside_reads_zero(function: Deformable) -> None:
    values = torch.arange(12.0).view(1, 3, 4, 1, 1)
    places = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [4.0, 1.0], [2.0, 3.0], [-0.5, 0.0], [1e6, -1e6]])
    count = len(places)
    reads = Reads(1, torch.zeros(count, dtype=torch.int64), torch.arange(count + 1), places[:, None])
    read = function(values, torch.zeros(count, 1, 1, 3), reads).flatten()
    assert read.tolist() == [6, 0, 0, 0, 0, 0]  # half of token 0 is also 0
    assert function(values + 1, torch.zeros(count, 1, 1, 3), reads)[4].item() == 0.5


def test_gradients_are_reproducible_and_do_not_depend_on_the_number_of_threads() -> None:
    reads, _ = random_reads(0, queries=300)
    inputs = tuple(t.float() for t in random_inputs(0, queries=300))
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 4, 4):
        torch.set_num_threads(threads)
        runs.append(value_and_gradients(deformable, inputs, reads))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_bfloat16_values_are_read_in_float32() -> None:
    reads, _ = random_reads(1)
    values, places = (t.float() for t in random_inputs(1))
    low = values.bfloat16().requires_grad_()
    out = deformable(low, places, reads)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, deformable(low.float(), places, reads))
    assert torch.equal(deformable(low, places, reads, torch.bfloat16), out.bfloat16())
    out.sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6), st.sampled_from([2, 4, 8]))
def test_both_backends_agree_on_random_reads(seed: int, batch: int, queries: int, points: int) -> None:
    reads, _ = random_reads(seed, batch, queries)
    inputs = random_inputs(seed, batch, queries, points)
    expected = value_and_gradients(deformable_torch, inputs, reads)
    found = value_and_gradients(deformable, tuple(t.float() for t in inputs), reads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
