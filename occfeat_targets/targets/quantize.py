"""Teacher features as int8 with one scale per token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quantize(features: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(..., C) float32 -> int8 of the same shape and one float16 scale per token (...,); value = int8 * scale."""
    scale = (np.abs(features).max(axis=-1) / 127).astype(np.float16)
    # float16 may round the scale down, and the scale of a zero token is 0.
    scale = np.maximum(np.nextafter(scale, np.float16(np.inf)), np.finfo(np.float16).smallest_subnormal)
    return np.rint(features / scale[..., None].astype(np.float32)).astype(np.int8), scale


def quantization_cosine(features: NDArray[np.float32], quantized: NDArray[np.int8]) -> tuple[float, float]:
    """(mean, minimum) over tokens of the cosine between float16 features and their int8 form."""
    a = features.astype(np.float16).astype(np.float32)
    b = quantized.astype(np.float32)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(-1) / np.maximum(norm, np.finfo(np.float32).tiny)
    return float(cosine.mean()), float(cosine.min())
