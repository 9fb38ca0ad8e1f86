"""What devices can do."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed (it comes with torch's CUDA wheels for Linux) and supports this GPU."""
    is_supported = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return is_supported and find_spec("triton") is not None


def host_waits(device: torch.device) -> bool:
    """Whether the host must wait for the device where the size of a result depends on values, as that of `nonzero` does.

    A CUDA graph cannot contain such an operation.
    """
    return device.type != "cpu"
