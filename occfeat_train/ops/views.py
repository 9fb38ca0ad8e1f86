"""Input of a network: a batch of surround images, and the transforms between cameras and grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Mean and standard deviation of RGB in [0, 1]; all pretrained backbones here were trained with these values.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Views:
    """Images of B samples, V cameras each, all of one size.

    images: (B, V, 3, H, W) float RGB, (value in [0, 1] - IMAGENET_MEAN) / IMAGENET_STD.
    intrinsics: (B, V, 3, 3) float64 of exactly these images, after any resize, crop and mirroring [px]. fx is negative if
    and only if the image is mirrored; the network mirrors the features of such a view back before the lifting.
    cam_from_grid: (B, V, 4, 4) float64, from the grid's (right, forward, up) to each camera's axes [m].
    """

    images: torch.Tensor
    intrinsics: torch.Tensor
    cam_from_grid: torch.Tensor


def check_shapes(features: torch.Tensor, views: Views) -> None:
    """Raises ValueError unless features (B, V, C, h, w), of any floating-point type, and views have the same B and V."""
    if features.dim() != 5 or not features.is_floating_point():
        raise ValueError(f"features of shape {tuple(features.shape)}, {features.dtype}: expected float (B, V, C, h, w)")
    batch, cams = features.shape[:2]
    for name, tail in (("images", (3, *views.images.shape[-2:])), ("intrinsics", (3, 3)), ("cam_from_grid", (4, 4))):
        if (shape := tuple(getattr(views, name).shape)) != (batch, cams, *tail):
            expected = (batch, cams, *tail)
            raise ValueError(f"{name} of shape {shape} beside features of {tuple(features.shape)}: expected {expected}")
