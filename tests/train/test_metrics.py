"""Metrics: closed forms, and a loop over cells as the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.tasks.metrics import DISTANCES, THRESHOLDS, LossMetric, PretrainingMetric, SegmentationMetric
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.tasks.segmentation import Segmentation

# 10 x 12 cells of 8 m, not centred, so that all three distance bands occur.
GRID = VoxelGrid((1, 10, 12), (-1, -36, -52), (1, 44, 44))


def metric_of(logits: Tensor, target: Tensor, valid: Tensor | None = None, *, grid: VoxelGrid = GRID, split: int = 0):
    """The metric after (B, K, H, W) logits and targets, in batches of `split`."""
    metric = SegmentationMetric([f"class{k}" for k in range(logits.shape[1])], grid)
    valid = torch.ones_like(target[:, :1]) if valid is None else valid
    for part in range(0, len(logits), split or len(logits)):
        chosen = slice(part, part + (split or len(logits)))
        metric.update(logits[chosen], target[chosen], valid[chosen])
    return metric


def random_case(seed: int, samples: int = 3, classes: int = 2, grid: VoxelGrid = GRID) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    shape = (samples, classes, *grid.map_shape)
    return torch.randn(shape), torch.rand(shape) < 0.4, torch.rand(samples, 1, *grid.map_shape) < 0.8


def count_cells(logits: Tensor, target: Tensor, valid: Tensor, grid: VoxelGrid) -> np.ndarray:
    """(thresholds, classes, bands, 2) intersections and unions, counted cell by cell."""
    counts = np.zeros((len(THRESHOLDS), logits.shape[1], len(DISTANCES), 2), np.int64)
    centers = grid.voxel_centers()[0].astype(np.float64)
    for b, k, h, w in np.ndindex(*logits.shape):
        if not valid[b, 0, h, w]:
            continue
        probability = 1 / (1 + math.exp(-float(logits[b, k, h, w])))
        distance = math.hypot(*centers[h, w, :2])
        band = next(i for i, (low, high) in enumerate(DISTANCES) if low <= distance < high)
        for i, threshold in enumerate(THRESHOLDS):
            counts[i, k, band, 0] += probability >= threshold and bool(target[b, k, h, w])
            counts[i, k, band, 1] += probability >= threshold or bool(target[b, k, h, w])
    return counts


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_the_iou_of_a_split_is_not_the_mean_over_its_batches():
    """One batch finds 1 of 1 cells, the other 0 of 3. The IoU is 25 %; the mean of the batches' IoUs would be 50 %."""
    grid = VoxelGrid((1, 2, 2))
    target = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).view(2, 1, 2, 2).bool()
    logits = torch.tensor([[9.0, -9, -9, -9], [-9, -9, -9, -9]]).view(2, 1, 2, 2)
    assert metric_of(logits, target, grid=grid, split=1).results()["iou"] == pytest.approx(25)


def test_a_perfect_prediction_has_iou_100_and_an_inverted_one_0():
    _, target, _ = random_case(0)
    logits = torch.where(target, 3.0, -3.0)
    assert metric_of(logits, target).results()["iou"] == 100
    assert metric_of(-logits, target).results()["iou"] == 0


def test_an_empty_union_has_no_iou():
    nothing = torch.zeros(2, 2, *GRID.map_shape, dtype=torch.bool)
    metric = metric_of(torch.full(nothing.shape, -9.0), nothing)
    results = metric.results()
    assert results["iou"] is results["iou_best"] is results["per_class"]["class0"] is None
    assert results["per_class_best"]["class1"]["iou"] is None
    assert set(results["by_distance"].values()) == {None}
    assert Segmentation.columns(results)["IoU at 0.5 [%]"] == "-"


def test_a_class_with_an_empty_union_is_not_part_of_the_mean():
    target = torch.zeros(1, 2, *GRID.map_shape, dtype=torch.bool)
    target[0, 0, 3, 3] = True
    results = metric_of(torch.where(target, 9.0, -9.0), target).results()
    assert results["per_class"] == {"class0": 100, "class1": None}
    assert results["iou"] == 100


def test_the_best_threshold_is_chosen_for_the_mean_and_for_each_class():
    grid = VoxelGrid((1, 1, 4))
    probability = torch.tensor([[[[0.62, 0.52, 0.1, 0.1]], [[0.42, 0.1, 0.1, 0.1]]]])
    target = torch.tensor([[[[1, 0, 0, 0]], [[1, 0, 0, 0]]]]).bool()
    results = metric_of(probability.logit(), target, grid=grid).results()
    assert results["iou"] == pytest.approx((50 + 0) / 2)
    assert (results["iou_best"], results["threshold_best"]) == (pytest.approx((50 + 100) / 2), 0.35)
    assert results["per_class_best"]["class0"] == {"iou": 100, "threshold": 0.55}
    assert results["per_class_best"]["class1"] == {"iou": 100, "threshold": 0.35}


@pytest.mark.parametrize(("size", "band"), [(20.0, 1), (35.0, 2), (19.9, 0), (34.9, 1)])
def test_a_cell_on_the_border_of_two_bands_counts_once_in_the_farther_band(size, band):
    grid = VoxelGrid((1, 1, 3), (-1, -1, -1.5 * size), (1, 1, 1.5 * size))  # centres at -size, 0 and size
    metric = metric_of(torch.full((1, 1, 1, 3), 9.0), torch.tensor([[[[True, False, True]]]]), grid=grid)
    expected = torch.zeros(3, dtype=torch.int64)
    expected[band] = 2
    assert torch.equal(metric.counts[3, 0, :, 0], expected)
    assert metric.counts[3, 0, :, 1].sum() == 3


def test_cells_that_are_not_valid_do_not_count():
    logits, target, valid = random_case(1)
    garbled = torch.where(valid, logits, -logits * 100)
    assert torch.equal(metric_of(logits, target, valid).counts, metric_of(garbled, target, valid).counts)
    assert not metric_of(logits, target, torch.zeros_like(valid)).counts.any()


# -- the twin ---------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3))
def test_counts_and_ious_equal_a_loop_over_cells(seed, samples, classes):
    logits, target, valid = random_case(seed, samples, classes)
    metric = metric_of(logits, target, valid)
    counts = count_cells(logits, target, valid, GRID)
    np.testing.assert_array_equal(metric.counts.numpy(), counts)
    half, results = counts[THRESHOLDS.index(0.5)], metric.results()
    ious = 100 * half.sum(1)[:, 0] / half.sum(1)[:, 1]
    assert results["iou"] == pytest.approx(ious.mean())
    assert list(results["per_class"].values()) == pytest.approx(ious)
    by_distance = (100 * half[..., 0] / half[..., 1]).mean(0)
    assert list(results["by_distance"].values()) == pytest.approx(by_distance)
    assert list(results["by_distance"]) == ["0-20 m", "20-35 m", "35-inf m"]
    means = (100 * counts.sum(2)[..., 0] / counts.sum(2)[..., 1]).mean(1)
    assert results["iou_best"] == pytest.approx(means.max())
    assert results["samples"] == samples


@pytest.mark.parametrize("split", [1, 2, 5])
def test_the_batch_size_does_not_change_the_result(split):
    case = random_case(2, samples=5)
    whole, parts = metric_of(*case), metric_of(*case, split=split)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.results() == parts.results()


def test_counts_are_exact_under_autocast_and_on_a_map_of_the_papers_size():
    """Evaluation uses autocast, and bfloat16 cannot represent 257."""
    grid = VoxelGrid()
    target = torch.ones(1, 1, *grid.map_shape, dtype=torch.bool)
    target[0, 0, 0, :37] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric = metric_of(torch.ones(1, 1, *grid.map_shape), target, grid=grid)
    assert metric.counts[3, 0].sum(0).tolist() == [40_000 - 37, 40_000]


def test_a_table_names_the_threshold_of_each_class_and_band():
    results = metric_of(*random_case(3)).results()
    columns = Segmentation.columns(results)
    at_half = {**results["per_class"], **results["by_distance"]}
    assert list(columns)[1:-1] == [f"{name}, at 0.5" for name in ("class0", "class1", "0-20 m", "20-35 m", "over 35 m")]
    assert list(columns.values())[1:-1] == [f"{iou:.1f}" for iou in at_half.values()]
    assert columns["IoU at 0.5 [%]"] == f"{results['iou']:.1f}"
    assert columns["IoU at the best threshold [%]"] == f"{results['iou_best']:.1f} ({results['threshold_best']:g})"


# -- pretraining ------------------------------------------------------------------------------------------------------


def test_occupancy_iou_and_cosine_are_those_of_the_whole_split():
    metric = PretrainingMetric()
    logits = torch.tensor([2.0, 2, -2, -2]).view(1, 1, 2, 2)
    metric.update(logits, torch.tensor([True, False, True, False]).view(1, 1, 2, 2), torch.tensor([1.0, 0.5, 0.0]))
    metric.update(-logits, torch.tensor([False, False, True, True]).view(1, 1, 2, 2), torch.tensor([-1.0]))
    assert metric.results() == {"samples": 2, "occupancy_iou": pytest.approx(60), "cosine": pytest.approx(0.5 / 4)}
    assert list(Pretraining.columns(metric.results()).values()) == ["60.0", "0.125"]


def test_metrics_that_do_not_apply_are_none():
    occupied = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    metric = PretrainingMetric()
    metric.update(None, occupied, torch.empty(0))
    assert metric.results() == {"samples": 3, "occupancy_iou": None, "cosine": None}
    assert list(Pretraining.columns(metric.results()).values()) == ["-", "-"]
    metric = PretrainingMetric()
    metric.update(torch.ones(3, 1, 2, 2), occupied, None)
    assert metric.results() == {"samples": 3, "occupancy_iou": 100, "cosine": None}


# -- any other task ---------------------------------------------------------------------------------------------------


def test_a_mean_loss_weighs_samples_alike():
    metric = LossMetric()
    metric.update({"loss": torch.tensor(1.0), "part": torch.tensor(2.0)}, 3)
    metric.update({"loss": torch.tensor(5.0), "part": torch.tensor(2.0)}, 1)
    metric.reduce()
    assert metric.results() == {"samples": 4, "loss": 2.0, "part": 2.0}
