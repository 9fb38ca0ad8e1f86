"""Losses of Simple-BEV's three heads: closed forms, loops in float64, the reference's own values and gradients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_train.tasks.instance_losses import cell_loss, center_loss, gaussian, offset_loss, weighted_sum

DOUBLE = torch.float64


def test_the_gaussian_is_that_of_three_cells_and_ends_where_it_is_below_a_thousandth() -> None:
    squared = torch.tensor([0, 9, 124, 125, 255], dtype=torch.uint8).view(1, 1, 1, 5)
    expected = [1, math.exp(-0.5), math.exp(-124 / 18), 0, 0]
    assert gaussian(squared, DOUBLE).flatten().tolist() == pytest.approx(expected)


def test_cells_of_a_batch_have_one_mean() -> None:
    """A sample with one valid cell has a third of the weight of one with three."""
    logits = torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.9]]).double().logit().view(2, 1, 2, 2)
    target = torch.tensor([[True, False, False, False], [False] * 4]).view(2, 1, 2, 2)
    valid = torch.tensor([[True, False, False, False], [True, True, True, False]]).view(2, 1, 2, 2)
    expected = -(2.13 * math.log(0.25) + 3 * math.log(0.1)) / (4 + 1e-6)
    assert cell_loss(logits, target, valid, 2.13).item() == pytest.approx(expected)


def test_centres_and_background_have_the_same_weight() -> None:
    target = torch.tensor([[1.0, 0.2, 0.0, 0.0]]).view(1, 1, 1, 4)
    predicted = torch.tensor([[0.4, 0.2, 0.3, 0.0]]).view(1, 1, 1, 4)
    assert center_loss(predicted, target).item() == pytest.approx(0.5 * (0.36 + 0.09 / 3), rel=1e-5)


def test_offsets_are_compared_with_twice_the_offset_on_vehicle_cells_only() -> None:
    offset = torch.tensor([[[[3, 0]], [[-1, 5]]]], dtype=torch.int16)
    predicted = torch.tensor([[[[4.0, 9.0]], [[-2.5, 9.0]]]])
    cells = torch.tensor([[[[True, False]]]])
    assert offset_loss(predicted, offset, cells).item() == pytest.approx(2.0 + 0.5, rel=1e-5)
    assert offset_loss(predicted, offset, torch.zeros_like(cells)).item() == 0


def test_losses_are_weighted_by_10_a_half_and_a_half_and_their_learned_variances() -> None:
    one, zero = torch.ones(()), torch.zeros(())
    assert weighted_sum(one, zero, zero, torch.zeros(3)).item() == 10
    assert weighted_sum(zero, one, zero, torch.zeros(3)).item() == 0.5
    assert weighted_sum(zero, zero, one, torch.zeros(3)).item() == 0.5
    learned = torch.tensor([0.4, -0.3, 0.2])
    expected = 10 / math.exp(0.4) + 0.5 / math.exp(-0.3) + 0.5 / math.exp(0.2) + 0.5 * (0.4 - 0.3 + 0.2)
    assert weighted_sum(one, one, one, learned).item() == pytest.approx(expected)


def loop_losses(
    outputs: dict[str, Tensor], cells: Tensor, valid: Tensor, squared: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses, cell by cell."""
    sums = {name: [torch.zeros((), dtype=DOUBLE), 1e-6] for name in ("seg", "near", "far", "offset")}

    def add(name: str, value: Tensor) -> None:
        sums[name][0], sums[name][1] = sums[name][0] + value, sums[name][1] + 1

    for b, _, h, w in np.ndindex(*cells.shape):
        p, d2 = torch.sigmoid(outputs["seg"][b, 0, h, w]), squared[b, 0, h, w].item()
        if valid[b, 0, h, w]:
            add("seg", -2.13 * p.log() if cells[b, 0, h, w] else -(1 - p).log())
        target = math.exp(-d2 / 18) if d2 <= 124 else 0.0
        add("near" if d2 <= 12 else "far", (outputs["center"][b, 0, h, w] - target) ** 2)
        if valid[b, 0, h, w] and cells[b, 0, h, w]:
            x, z = (outputs["offset"][b, axis, h, w] - 2 * offset[b, axis, h, w].item() for axis in (0, 1))
            add("offset", x.abs() + z.abs())
    seg, near, far, off = (total / number for total, number in sums.values())
    return seg, 0.5 * (near + far), off


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_values_and_gradients_equal_a_loop_over_cells(seed: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    shape = (2, 1, 3, 4)
    cells, valid = (torch.rand(shape, generator=rng) < p for p in (share, 0.7))
    squared = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    squared[:, :, 0] //= 12
    offset = torch.randint(-9, 10, (2, 2, 3, 4), generator=rng, dtype=torch.int16)
    outputs = {
        name: torch.randn(2, n, 3, 4, generator=rng, dtype=DOUBLE).requires_grad_()
        for name, n in (("seg", 1), ("center", 1), ("offset", 2))
    }
    found = (
        cell_loss(outputs["seg"], cells, valid, 2.13),
        center_loss(outputs["center"], gaussian(squared, DOUBLE)),
        offset_loss(outputs["offset"], offset, cells & valid),
    )
    expected = loop_losses(outputs, cells, valid, squared, offset)
    learned = torch.randn(3, generator=rng, dtype=DOUBLE).requires_grad_()
    totals = [weighted_sum(*losses, learned) for losses in (found, expected)]
    torch.testing.assert_close(found, expected)
    given_tensors = [*outputs.values(), learned]
    gradients = [torch.autograd.grad(total, given_tensors, allow_unused=True) for total in totals]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_values_and_gradients_are_those_of_the_reference_repository() -> None:
    with np.load(Path(__file__).parent / "golden" / "losses" / "simple_bev.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file}
    outputs = {name: golden[name].clone().requires_grad_() for name in ("seg", "center", "offset")}
    weights = golden["weights"].clone().requires_grad_()
    cells, valid = golden["labels"], golden["valid"]
    parts = (
        cell_loss(outputs["seg"], cells, valid, 2.13),
        center_loss(outputs["center"], gaussian(golden["squared_distance"], torch.float32)),
        offset_loss(outputs["offset"], golden["offset_target"], cells & valid),
    )
    loss = weighted_sum(*parts, weights)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"])
    factors = torch.tensor([10.0, 0.5, 0.5]) * torch.exp(-golden["weights"])
    torch.testing.assert_close(torch.stack(parts) * factors, golden["parts"])
    for name, value in {**outputs, "weights": weights}.items():
        torch.testing.assert_close(value.grad, golden[f"grad_{name}"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_outputs_are_float32(dtype: torch.dtype) -> None:
    cells = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    outputs = torch.ones(1, 2, 2, 2, dtype=dtype)
    found = (
        cell_loss(outputs[:, :1], cells, cells, 2.13),
        center_loss(outputs[:, :1], torch.ones(1, 1, 2, 2)),
        offset_loss(outputs, torch.zeros(1, 2, 2, 2, dtype=torch.int16), cells),
    )
    assert {loss.dtype for loss in found} == {torch.float32}
