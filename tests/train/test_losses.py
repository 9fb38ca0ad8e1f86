"""The losses: closed forms, and the loss of a batch is the mean over its samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_train.tasks.losses import feature_loss, occupancy_loss, segmentation_loss

DOUBLE = torch.float64


def sigmoid_inverse(p: float) -> float:
    return math.log(p / (1 - p))


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("occupied", [True, False])
def test_occupancy_loss_of_logit_0_is_log_2(occupied):
    loss = occupancy_loss(torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), occupied))
    assert loss.item() == pytest.approx(math.log(2))


def test_occupancy_loss_is_the_mean_over_all_voxels():
    logits = torch.tensor([0.9, 0.1, 0.25, 0.5]).double().logit().view(1, 1, 2, 2)
    occupied = torch.tensor([True, False, True, False]).view(1, 1, 2, 2)
    expected = -(math.log(0.9) + math.log(0.9) + math.log(0.25) + math.log(0.5)) / 4
    assert occupancy_loss(logits, occupied).item() == pytest.approx(expected)


def test_confident_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([200.0, -200.0, 200.0, -200.0]).view(1, 1, 2, 2)
    occupied = torch.tensor([True, False, False, True]).view(1, 1, 2, 2)
    assert occupancy_loss(logits, occupied).item() == pytest.approx(100)


@pytest.mark.parametrize(("factor", "expected"), [(3.0, -1.0), (-0.5, 1.0)])
def test_feature_loss_is_minus_1_along_the_target_and_1_against_it(factor, expected):
    target = torch.tensor([[1.0, 2, -3], [4, 0, 1]])
    loss, cosine = feature_loss(factor * target, target, torch.zeros(2, dtype=torch.int64), 1)
    assert loss.item() == pytest.approx(expected)
    assert cosine.tolist() == pytest.approx([-expected] * 2)


def test_feature_loss_is_0_orthogonally_to_the_target():
    loss, _ = feature_loss(torch.tensor([[0.0, 2]]), torch.tensor([[5.0, 0]]), torch.tensor([0]), 1)
    assert loss.item() == 0


def test_every_sample_has_the_same_weight_whatever_its_number_of_voxels():
    target = torch.tensor([[1.0, 0]]).expand(4, 2)
    predicted = target * torch.tensor([[1.0], [-1], [-1], [-1]])
    loss, _ = feature_loss(predicted, target, torch.tensor([0, 1, 1, 1]), 2)
    assert loss.item() == pytest.approx((-1 + 1) / 2, abs=1e-6)


def test_a_sample_without_voxels_counts_with_a_feature_loss_of_0():
    target = torch.tensor([[1.0, 0]])
    loss, _ = feature_loss(target, target, torch.tensor([1]), 4)
    assert loss.item() == pytest.approx(-1 / 4)


def test_a_batch_without_voxels_has_loss_0_with_a_gradient():
    predicted = torch.empty(0, 3, requires_grad=True)
    loss, cosine = feature_loss(predicted, torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 2)
    loss.backward()
    assert loss.item() == 0
    assert cosine.shape == (0,)
    assert predicted.grad is not None


def test_a_prediction_of_zeros_has_a_finite_gradient():
    predicted = torch.zeros(1, 3, requires_grad=True)
    loss, _ = feature_loss(predicted, torch.ones(1, 3), torch.tensor([0]), 1)
    loss.backward()
    assert torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
def test_cosines_and_their_gradients_are_torchs(dtype, tolerance):
    """Also of a row of zeros in the target, which padding adds."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(50, 96, generator=generator).to(dtype)
    target = torch.randn(50, 96, generator=generator).half()
    target[3] = 0
    sample = torch.arange(50) % 3

    def value_and_gradient(cosines: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        weight = -1 / (sample.bincount()[sample] * 3).double()
        (cosines(x) * weight).sum().backward()
        return cosines(x).detach(), x.grad

    ours = predicted.clone().requires_grad_()
    loss, cosine = feature_loss(ours, target, sample, 3)
    loss.backward()
    expected = value_and_gradient(lambda x: torch.cosine_similarity(x, target.double(), dim=1), predicted.double())
    for found, exact in zip((cosine, ours.grad), expected, strict=True):
        assert (found.double() - exact).norm() <= tolerance * exact.norm()
    assert not ours.grad[3].any()


def test_the_returned_cosines_have_no_gradient():
    predicted, target = torch.ones(1, 3, requires_grad=True), torch.ones(1, 3)
    _, cosine = feature_loss(predicted, target, torch.tensor([0]), 1)
    assert not cosine.requires_grad


def test_a_positive_cell_is_weighted_by_pos_weight():
    logits = torch.tensor([sigmoid_inverse(0.8), sigmoid_inverse(0.8)]).view(1, 1, 1, 2)
    target = torch.tensor([True, False]).view(1, 1, 1, 2)
    loss = segmentation_loss(logits, target, torch.ones_like(target), 2.13)
    assert loss.item() == pytest.approx(-(2.13 * math.log(0.8) + math.log(0.2)) / 2, rel=1e-6)


def test_cells_that_are_not_valid_have_neither_loss_nor_gradient():
    logits = torch.tensor([0.0, 50, 0, -50]).view(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([False, False, False, True]).view(1, 1, 2, 2)
    valid = torch.tensor([True, False, True, False]).view(1, 1, 2, 2)
    loss = segmentation_loss(logits, target, valid, 2.13)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad.flatten().tolist() == pytest.approx([0.25, 0, 0.25, 0])


def test_one_validity_mask_applies_to_all_classes():
    logits, valid = torch.zeros(2, 5, 4, 4), torch.rand(2, 1, 4, 4) < 0.5
    valid[:, :, 0, 0] = True
    loss = segmentation_loss(logits, torch.zeros_like(logits).bool(), valid, 1.0)
    assert loss.item() == pytest.approx(math.log(2))


def test_a_sample_without_valid_cells_counts_with_a_loss_of_0():
    valid = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    logits = torch.zeros(2, 1, 3, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.zeros(2, 1, 3, 3, dtype=torch.bool), valid, 2.13)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2)
    assert not logits.grad[1].any()


def test_half_precision_inputs_are_summed_in_float32():
    torch.manual_seed(0)
    logits, target = torch.randn(1, 2, 100, 100), torch.rand(1, 2, 100, 100) < 0.5
    rounded = logits.bfloat16()
    assert occupancy_loss(rounded, target).item() == occupancy_loss(rounded.float(), target).item()
    valid = target[:, :1]
    ours = segmentation_loss(rounded, target, valid, 2.13)
    assert ours.item() == segmentation_loss(rounded.float(), target, valid, 2.13).item()
    predicted, sample = rounded.view(200, 100), torch.zeros(200, dtype=torch.int64)
    loss, _ = feature_loss(predicted, torch.randn(200, 100).half(), sample, 1)
    assert loss.dtype == torch.float32


# -- a batch is the mean of its samples -------------------------------------------------------------------------------


def assert_batch_is_the_mean(loss: Callable[[Tensor, list[int]], Tensor], given_: Tensor, samples: int) -> None:
    """loss(x, which): loss of a selection of samples of x. Compares the batch with the mean over single samples."""
    whole, parts = given_.clone().requires_grad_(), given_.clone().requires_grad_()
    together = loss(whole, list(range(samples)))
    alone = torch.stack([loss(parts, [b]) for b in range(samples)]).mean()
    together.backward()
    alone.backward()
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(whole.grad, parts.grad, atol=1e-12, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_an_occupancy_batch_is_the_mean_of_its_samples(seed, samples):
    torch.manual_seed(seed)
    occupied = torch.rand(samples, 2, 3, 4) < 0.3
    logits = torch.randn(samples, 2, 3, 4, dtype=DOUBLE)
    assert_batch_is_the_mean(lambda x, which: occupancy_loss(x[which], occupied[which]), logits, samples)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_a_feature_batch_is_the_mean_of_its_samples(seed, counts):
    torch.manual_seed(seed)
    sample = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    predicted, target = torch.randn(2, len(sample), 5, dtype=DOUBLE)

    def loss(x: Tensor, which: list[int]) -> Tensor:
        mine = torch.isin(sample, torch.tensor(which))
        return feature_loss(x[mine], target[mine], sample[mine] - which[0], len(which))[0]

    assert_batch_is_the_mean(loss, predicted, len(counts))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([0.05, 0.5, 1.0]))
def test_a_segmentation_batch_is_the_mean_of_its_samples(seed, samples, share):
    torch.manual_seed(seed)
    target, valid = torch.rand(samples, 3, 4, 5) < 0.3, torch.rand(samples, 1, 4, 5) < share
    logits = torch.randn(samples, 3, 4, 5, dtype=DOUBLE)
    assert_batch_is_the_mean(
        lambda x, which: segmentation_loss(x[which], target[which], valid[which], 2.13), logits, samples
    )
