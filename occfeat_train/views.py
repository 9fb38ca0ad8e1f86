"""What the network is given: a batch of surround images and the geometry that ties them to the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Of RGB in [0, 1]; every pretrained backbone here was trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Views:
    """Images of B samples, S cameras each, all of one size.

    images: (B, S, 3, H, W) float RGB, (value in [0, 1] - IMAGENET_MEAN) / IMAGENET_STD.
    intrinsics: (B, S, 3, 3) float64 of exactly these images, after any resize and crop [px].
    cam_from_grid: (B, S, 4, 4) float64, from the grid's (right, forward, up) to each camera's axes [m].
    """

    images: torch.Tensor
    intrinsics: torch.Tensor
    cam_from_grid: torch.Tensor
