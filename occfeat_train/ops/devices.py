"""Devices that run the Triton kernels."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed (it comes with torch's CUDA wheels for Linux) and supports this GPU."""
    is_supported = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return is_supported and find_spec("triton") is not None
