"""Numerical precision of a run: bfloat16 autocast, or float32 without TF32."""

from __future__ import annotations

from typing import Any

import torch

_NATIVE = (8, 0)  # compute capability from which a GPU computes bfloat16; torch counts emulation as support, too


def resolve_precision(precision: str, device: torch.device) -> str:
    """`config.precision` on a device: "bfloat16" or "float32". On a GPU without bfloat16 it is always float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _NATIVE:
        return "float32"
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def note_on_precision(precision: str, device: torch.device) -> list[str]:
    """A line that says that the GPU has no bfloat16, if it would have been used."""
    if precision == "float32" or device.type != "cuda" or resolve_precision(precision, device) == "bfloat16":
        return []
    return [f"precision: float32, because {_name(device)} has no bfloat16"]


def require_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError if bfloat16 is asked for and the GPU has none."""
    if precision == "bfloat16" and resolve_precision(precision, device) != "bfloat16":
        raise ValueError(
            f"precision=bfloat16, but {_name(device)} has no bfloat16, which needs sm_80 (A100) or newer: leave "
            "precision=auto, which is float32 on this GPU"
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast if `resolve_precision` says so; weights stay float32."""
    enabled = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def forbid_tf32(precision: str, device: torch.device) -> None:
    """Make float32 mean float32 in this process, if a run computes in float32 on a GPU.

    By default torch lets cuDNN round the inputs of float32 convolutions to TF32, whose mantissa has 10 bits.
    """
    if device.type != "cuda" or resolve_precision(precision, device) != "float32":
        return
    convolution: Any = getattr(torch.backends.cudnn, "conv", None)
    if convolution is None:  # before torch 2.9, which warns about these switches
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    else:
        product: Any = torch.backends.cuda.matmul
        convolution.fp32_precision = product.fp32_precision = "ieee"


def _name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"this GPU ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"
