"""Losses of Simple-BEV's three heads, as its train_nuscenes.py computes them.

Unlike the losses of `losses.py`, each is one mean over all cells of a batch, not a mean of the samples' means. Several ranks
take the mean of their own batches' means. They are computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16, UInt8
from torch import Tensor

from occfeat_train.tasks.losses import exact

SIGMA = 3.0  # [cells] of the Gaussian about a centre
SMALLEST = 0.001  # values of the Gaussian below it are 0
OFFSET_SCALE = 2  # the reference adds an offset's minimum and maximum along an axis of one entry
SEGMENTATION_WEIGHT = 10.0
_EPS = 1e-6  # added to numbers of cells


def masked_mean(values: Float[Tensor, "*shape"], mask: Tensor) -> Float[Tensor, ""]:
    """Mean over the cells of a mask of the same shape; 0 if it has none."""
    return (values * mask).sum() / (_EPS + mask.sum())


def cell_loss(
    logits: Float[Tensor, "B 1 H W"], target: Bool[Tensor, "B 1 H W"], valid: Bool[Tensor, "B 1 H W"], pos_weight: float
) -> Float[Tensor, ""]:
    """Binary cross-entropy over the valid cells of a batch."""
    logits = exact(logits)
    weight = logits.new_full((1,), pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits), pos_weight=weight, reduction="none")
    return masked_mean(loss, valid.to(loss))


def gaussian(squared_distance: UInt8[Tensor, "B 1 H W"], dtype: torch.dtype) -> Float[Tensor, "B 1 H W"]:
    """1 at the centre of a vehicle, exp(-d^2 / (2 SIGMA^2)) at a distance of d cells, 0 where that is below SMALLEST.

    squared_distance: to the nearest centre [cells^2], 255 for that or more.
    """
    value = torch.exp(-squared_distance.to(dtype) / (2 * SIGMA**2))
    return torch.where(value < SMALLEST, 0, value)


def center_loss(predicted: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
    """Mean of two mean squared errors: over the cells whose target is above 0.5, and over those where it is below.

    Cells of hardly visible vehicles count, too. predicted: after the sigmoid.
    """
    squared = (exact(predicted) - target).square()
    near, far = (target > 0.5).to(squared), (target < 0.5).to(squared)
    return 0.5 * (masked_mean(squared, near) + masked_mean(squared, far))


def offset_loss(
    predicted: Float[Tensor, "B 2 H W"], offset: Int16[Tensor, "B 2 H W"], cells: Bool[Tensor, "B 1 H W"]
) -> Float[Tensor, ""]:
    """Sum of both absolute errors, averaged over the valid cells of vehicles.

    offset: from the centre of its vehicle to a cell, along right and forward [cells]; the target is OFFSET_SCALE times that.
    """
    predicted = exact(predicted)
    error = (predicted - OFFSET_SCALE * offset.to(predicted.dtype)).abs().sum(1, keepdim=True)
    return masked_mean(error, cells.to(error))


def weighted_sum(
    segmentation: Float[Tensor, ""],
    center: Float[Tensor, ""],
    offset: Float[Tensor, ""],
    log_variance: Float[Tensor, " 3"],
) -> Float[Tensor, ""]:
    """10 segmentation / e^a + center / (2 e^b) + offset / (2 e^c) + (a + b + c) / 2 with the learned log_variance (a, b, c)."""
    losses = torch.stack([SEGMENTATION_WEIGHT * segmentation, 0.5 * center, 0.5 * offset])
    return (losses * torch.exp(-log_variance)).sum() + 0.5 * log_variance.sum()
