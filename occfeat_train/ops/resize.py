"""Bilinear resize of maps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def resize(x: Float[Tensor, "N C _h _w"], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
    """To (height, width), in the dtype and memory format of x, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cuda":
            return resize_by_products(x, size)
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resize_by_products(x: Float[Tensor, "N C _h _w"], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
    """As products with a matrix for the rows and one for the columns; channels-last.

    On a GPU, torch's own function takes several times as long for channels-last maps: 2.4 of the 70 ms of a step on an H200.
    """
    batch, channels, h, w = x.shape
    rows, columns = (_weights(before, after, x) for before, after in zip((h, w), size, strict=True))
    resized = rows @ x.permute(0, 2, 3, 1).reshape(batch, h, w * channels)
    resized = columns @ resized.view(batch * size[0], w, channels)
    return resized.view(batch, *size, channels).permute(0, 3, 1, 2)


def _weights(before: int, after: int, x: Tensor) -> Float[Tensor, "after before"]:
    """Weights of one axis, in the dtype of x: the resized unit vectors."""
    unit = torch.eye(before, device=x.device)[None]
    return functional.interpolate(unit, size=after, mode="linear", align_corners=False)[0].T.to(x.dtype)
