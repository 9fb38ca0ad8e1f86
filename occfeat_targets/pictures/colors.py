"""The colours of a preview: scales for heights and depths, map classes, and teacher features as RGB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.labels import LABEL_KINDS

Colors = NDArray[np.uint8]  # (..., 3) RGB
RGB = tuple[int, int, int]

PAPER: RGB = (18, 20, 24)
EMPTY: RGB = (34, 37, 43)
INK: RGB = (236, 238, 240)
FAINT: RGB = (150, 156, 164)
ALARM: RGB = (222, 64, 28)
CAMERA: RGB = (255, 150, 220)
VEHICLE = LABEL_KINDS["vehicles"].dark["vehicles"]
HATCH: RGB = (122, 126, 132)
OCCUPIED_ONLY: RGB = (104, 122, 160)
COINCIDENT: RGB = (88, 240, 120)
MAP_COLORS = LABEL_KINDS["map"].dark

# Turbo at equal steps, without its ends, which are too dark on a photograph.
_RAMP = np.array(
    [
        (70, 107, 227), (65, 142, 253), (41, 177, 240), (24, 206, 209), (37, 228, 172), (82, 246, 125), (139, 254, 80),
        (185, 246, 53), (222, 221, 55), (246, 189, 57), (254, 149, 44), (245, 105, 24), (225, 66, 9),
    ],
    np.float64,
)  # fmt: skip


@dataclass(frozen=True)
class ColorScale:
    """Colours for values in low..high [m]; values outside are clamped. name: the measured quantity."""

    name: str
    low: float
    high: float
    is_reversed: bool = False

    def colors(self, values: NDArray[Any]) -> Colors:
        """(...) values [m] -> (..., 3) RGB."""
        position = np.clip((np.asarray(values, np.float64) - self.low) / (self.high - self.low), 0, 1)
        position = (1 - position if self.is_reversed else position) * (len(_RAMP) - 1)
        steps = np.arange(len(_RAMP))
        return np.rint(np.stack([np.interp(position, steps, channel) for channel in _RAMP.T], axis=-1)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class FeatureColors:
    """The first three principal components of teacher features as red, green and blue.

    mean: (C,); axes: (C, 3); low, high: (3,) percentiles 2 and 98 of the components, shown as 0 and 255.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def fit(cls, tokens: NDArray[Any]) -> FeatureColors:
        """Fit to (n, C) tokens. The sign of an axis makes its largest loading positive, so the colours are reproducible."""
        tokens = np.asarray(tokens, np.float64)
        mean = tokens.mean(axis=0)
        centered = tokens - mean
        _, vectors = np.linalg.eigh(centered.T @ centered)
        axes = np.zeros((tokens.shape[1], 3))
        axes[:, : vectors.shape[1]] = vectors[:, ::-1][:, :3]
        largest = np.abs(axes).argmax(axis=0)
        axes *= np.where(axes[largest, range(3)] < 0, -1, 1)
        low, high = np.percentile(centered @ axes, [2, 98], axis=0)
        return cls(mean, axes, low, high)

    def __call__(self, features: NDArray[Any]) -> Colors:
        """(..., C) features -> (..., 3) RGB. A component that does not vary is mid-grey."""
        components = (np.asarray(features, np.float64) - self.mean) @ self.axes
        span = self.high - self.low
        varies = span > 1e-9
        scaled = np.where(varies, (components - self.low) / np.where(varies, span, 1), 0.5)
        return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
