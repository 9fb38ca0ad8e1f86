"""Colours of the pictures: scales of heights and depths, cells, and features as RGB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.patches import Patch
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import RGB

Colors = NDArray[np.uint8]  # (..., 3) RGB

EMPTY: RGB = (247, 247, 245)
CAMERA: RGB = (194, 24, 122)
OCCUPIED_ONLY: RGB = (140, 150, 210)
COINCIDENT: RGB = (16, 96, 64)
SOLID: RGB = (216, 88, 20)
OCCUPIED, FREE = COINCIDENT, OCCUPIED_ONLY

# One ramp for one quantity. Their lightness grows, and the steps of blue and yellow are large, so that colour-blind people can
# read them too (tests/targets/test_colors.py).
HEIGHTS = LinearSegmentedColormap.from_list("heights", ["#0f25cd", "#2470af", "#5f8471", "#c5a447", "#f9ff2a"])
DEPTHS = LinearSegmentedColormap.from_list("depths", colormaps["inferno"](np.linspace(1, 0.3, 256)))

CORRELATIONS = colormaps["viridis"]


def height_scale(grid: VoxelGrid) -> ScalarMappable:
    """Colours of heights in a grid [m]."""
    return ScalarMappable(Normalize(grid.lower[0], grid.upper[0]), HEIGHTS)


def depth_scale() -> ScalarMappable:
    """Colours of depths [m]; the logarithm shows differences both near and far."""
    return ScalarMappable(LogNorm(2, 64), DEPTHS)


def correlation_scale(lowest: float) -> ScalarMappable:
    """Colours of cosines from `lowest` to 1."""
    return ScalarMappable(Normalize(lowest, 1), CORRELATIONS)


def rgb(scale: ScalarMappable, values: NDArray[Any]) -> Colors:
    """(...) values -> (..., 3); values outside of the scale are clamped."""
    return np.asarray(scale.to_rgba(np.asarray(values, np.float64), bytes=True))[..., :3]


def hex_color(color: RGB) -> str:
    """``#rrggbb``, for Matplotlib and HTML."""
    return "#" + bytes(color).hex()


def swatch(color: RGB, name: str) -> Patch:
    """An entry of a legend."""
    return Patch(facecolor=hex_color(color), edgecolor="#999", linewidth=0.5, label=name)


@dataclass(frozen=True, eq=False)
class FeatureColors:
    """The first three principal components of normalised features as red, green and blue.

    Features are normalised because eq. 3 is a cosine: the length of a predicted feature is not trained.
    mean: (C,); axes: (C, 3); low, high: (3,) percentiles 2 and 98 of the components, shown as 0 and 255.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray[Any]) -> FeatureColors:
        """Fit to (n, C) features. The sign of an axis makes its largest loading positive, so the colours are reproducible."""
        unit = directions(features)
        mean = unit.mean(axis=0)
        centered = unit - mean
        _, vectors = np.linalg.eigh(centered.T @ centered)
        axes = np.zeros((len(mean), 3))
        axes[:, : len(mean)] = vectors[:, ::-1][:, :3]
        axes *= np.where(axes[np.abs(axes).argmax(axis=0), range(3)] < 0, -1, 1)
        low, high = np.percentile(centered @ axes, [2, 98], axis=0)
        return cls(mean, axes, low, high)

    def __call__(self, features: NDArray[Any]) -> Colors:
        """(..., C) features -> (..., 3) RGB. A component that does not vary is mid-grey."""
        components = (directions(features) - self.mean) @ self.axes
        span = self.high - self.low
        varies = span > 1e-9
        scaled = np.where(varies, (components - self.low) / np.where(varies, span, 1), 0.5)
        return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def directions(features: NDArray[Any]) -> NDArray[np.float64]:
    """(..., C) features divided by their lengths; zeros stay zeros."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
