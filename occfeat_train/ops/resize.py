"""Bilinear resize of maps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def resize(x: Float[Tensor, "N C _h _w"], size: tuple[int, int]) -> Float[Tensor, "N C H W"]:
    """To (height, width), in the dtype and memory format of x. On a GPU, autocast would return float32."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
