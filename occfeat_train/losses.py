"""The losses: eq. 2 and 3 of the paper, and the segmentation's. Each is a mean over samples of a sample's own mean, so
that a batch split over micro-batches or processes has the same loss and gradient as whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def occupancy_loss(logits: Tensor, occupied: Tensor) -> Tensor:
    """Eq. 2: binary cross-entropy averaged over all voxels. logits: (B, Z, H, W); occupied: the same shape, bool."""
    return F.binary_cross_entropy_with_logits(logits.float(), occupied.float())


def feature_loss(predicted: Tensor, target: Tensor, sample: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Eq. 3: negative cosine similarity, averaged over a sample's occupied and seen voxels, then over samples.

    predicted, target: (n, N_y). sample: (n,) int64, whose voxel it is, of num_samples. Voxels without a valid view are
    the caller's to leave out (end of 3.3). A sample without any voxel adds nothing, and counts in the mean.
    Returns the loss and the cosines (n,).
    """
    cosine = F.cosine_similarity(predicted.float(), target.float(), dim=1)
    count = torch.bincount(sample, minlength=num_samples)
    return -(cosine / (count[sample] * num_samples)).sum(), cosine.detach()


def segmentation_loss(logits: Tensor, target: Tensor, valid: Tensor, pos_weight: float) -> Tensor:
    """Binary cross-entropy over valid cells: logits, target (bool): (B, K, H, W); valid: (B, 1, H, W) bool."""
    weight = torch.tensor(pos_weight, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target.float(), pos_weight=weight, reduction="none")
    mask = valid.float().expand_as(loss)
    return ((loss * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)).mean()
