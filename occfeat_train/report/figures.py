"""Figures of a report: grids seen from above and from behind, features as colours, curves. NumPy in, PNG out.

In every figure forward is up and right is right, with axes in metres; `foremost_first` flips an array of cells for this.
Matplotlib is imported only where it draws, because its import is slow.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS, MAP_CLASSES

Mask = NDArray[np.bool_]
Colors = NDArray[np.uint8]  # (..., 3) RGB
RGB = tuple[int, int, int]

EMPTY: RGB = (247, 247, 245)
HIT: RGB = (44, 146, 76)
FALSE_ALARM: RGB = (228, 120, 24)
MISSED: RGB = (56, 92, 190)
UNSCORED: RGB = (204, 204, 204)
VEHICLE = LABEL_KINDS["vehicles"].colors["vehicles"]
HEIGHTS = "viridis"  # Matplotlib's name
OUTCOMES = {"hit": HIT, "false alarm": FALSE_ALARM, "missed": MISSED}
MAP_COLORS = LABEL_KINDS["map"].colors
RUN_COLORS = ("#1f6fb4", "#d1602a", "#2c924c", "#8d5bb5", "#a5822c", "#c2457f", "#3f9ea6", "#6b6b6b")
# The ego vehicle on the ground of the ego frame (x forward from the rear axle, y left) [m], its nose pointed.
_EGO = np.array([(-0.9, -0.87, 0), (2.6, -0.87, 0), (4.2, 0, 0), (2.6, 0.87, 0), (-0.9, 0.87, 0)])


def foremost_first(cells: NDArray[Any]) -> NDArray[Any]:
    """(H, W[, 3]) cells with the rearmost row first -> with the foremost row first, as in a picture."""
    return cells[::-1]


def highest_colors(occupied: Mask) -> Colors:
    """(Z, H, W) -> (H, W, 3): the colour of each column is the height of its highest occupied cell, on the scale `HEIGHTS`."""
    from matplotlib import colormaps

    height = occupied.shape[0]
    ramp = (np.array([colormaps[HEIGHTS]((z + 0.5) / height)[:3] for z in range(height)]) * 255).round()
    highest = height - 1 - occupied[::-1].argmax(axis=0)
    return np.where(occupied.any(axis=0)[..., None], ramp[highest], EMPTY).astype(np.uint8)


def outcome_colors(predicted: Mask, true: Mask, valid: Mask | None = None) -> Colors:
    """Hits, false alarms and misses of cells (..., ) as colours; cells that are not valid are grey."""
    colors = np.full((*true.shape, 3), EMPTY, np.uint8)
    for mask, color in ((predicted & true, HIT), (predicted & ~true, FALSE_ALARM), (~predicted & true, MISSED)):
        colors[mask] = color
    if valid is not None:
        colors[~valid] = UNSCORED
    return colors


def outcome_shares(predicted: Mask, true: Mask, axis: int) -> Colors:
    """Colours of a volume's outcomes, averaged along an axis by their frequency."""
    counts = np.stack([(predicted & true).sum(axis), (predicted & ~true).sum(axis), (~predicted & true).sum(axis)], -1)
    total = counts.sum(-1, keepdims=True)
    mixed = counts @ np.array(list(OUTCOMES.values()), np.float64) / np.maximum(total, 1)
    return np.where(total > 0, mixed, EMPTY).round().astype(np.uint8)


def map_colors(masks: Mask) -> Colors:
    """(K, H, W) masks of the map's classes -> (H, W, 3)."""
    colors = np.full((*masks.shape[1:], 3), EMPTY, np.uint8)
    for name, color in MAP_COLORS.items():
        colors[masks[MAP_CLASSES.index(name)]] = color
    return colors


def topmost(voxels: NDArray[np.int64], colors: Colors, grid: VoxelGrid) -> Colors:
    """Colours (n, 3) of voxels with ascending flat indices (n,) -> (H, W, 3): the highest voxel of each column."""
    picture = np.full((*grid.map_shape, 3), EMPTY, np.uint8)
    _, h, w = np.unravel_index(voxels, grid.shape)
    picture[h, w] = colors  # ascending indices: the highest comes last
    return picture


@dataclass(frozen=True, eq=False)
class FeatureColors:
    """Three principal components of normalised features as red, green and blue; one mapping for targets and predictions.

    Features are normalised because eq. 3 is a cosine: the length of a predicted feature is not trained.
    mean: (C,); axes: (C, 3); low, high: (3,) percentiles 2 and 98 of the components, shown as 0 and 255.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def fit(cls, targets: NDArray[Any]) -> FeatureColors:
        """Fit to (n, C) target features. The sign of an axis makes its largest loading positive."""
        directions = _directions(targets)
        mean = directions.mean(axis=0)
        centered = directions - mean
        _, vectors = np.linalg.eigh(centered.T @ centered)
        axes = vectors[:, ::-1][:, :3]
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
        low, high = np.percentile(centered @ axes, [2, 98], axis=0)
        return cls(mean, axes, low, high)

    def __call__(self, features: NDArray[Any]) -> Colors:
        """(n, C) features -> (n, 3) RGB."""
        components = (_directions(features) - self.mean) @ self.axes
        scaled = (components - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _directions(features: NDArray[Any]) -> NDArray[np.float64]:
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def draw_map(
    colors: Colors,
    grid: VoxelGrid,
    grid_from_ego: Matrix,
    *,
    hatched: Mask | None = None,
    outlined: Mask | None = None,
) -> bytes:
    """A PNG of (H, W, 3) cells from above, with the ego vehicle, whose front is pointed. hatched, outlined: (H, W) cells."""
    (_, rear, left), (_, front, right) = grid.lower, grid.upper
    figure, axes = _figure(3.2, 3.2 * (front - rear) / (right - left) + 0.1)
    axes.imshow(foremost_first(colors), extent=(left, right, rear, front), interpolation="nearest")
    centers = grid.voxel_centers()[0]
    x, y = centers[0, :, 0], centers[:, 0, 1]
    if hatched is not None and hatched.any():
        axes.contourf(x, y, hatched.astype(float), levels=[0.5, 1.5], colors="none", hatches=["//////"])
    if outlined is not None and outlined.any():
        axes.contour(x, y, outlined.astype(float), levels=[0.5], colors=["#c8102e"], linewidths=1)
    ego = transform(grid_from_ego, _EGO)
    axes.fill(ego[:, 0], ego[:, 1], facecolor="#111", edgecolor="white", linewidth=0.6)
    axes.set(xlim=(left, right), ylim=(rear, front), aspect="equal", xlabel="right [m]", ylabel="forward [m]")
    return _png(figure)


def draw_from_behind(colors: Colors, grid: VoxelGrid, grid_from_ego: Matrix) -> bytes:
    """A PNG of (Z, W, 3) cells with exaggerated heights; a triangle marks the ego vehicle."""
    (low, _, left), (high, _, right) = grid.lower, grid.upper
    figure, axes = _figure(3.2, 1.6)
    axes.imshow(foremost_first(colors), extent=(left, right, low, high), interpolation="nearest", aspect="auto")
    ego = transform(grid_from_ego, np.zeros((1, 3)))[0]
    axes.plot(ego[0], ego[2], marker="^", color="#111", markeredgecolor="white", markersize=8)
    axes.set(xlim=(left, right), ylim=(low, high), xlabel="right [m]", ylabel="up [m]")
    return _png(figure)


def probability_colors(probability: NDArray[Any]) -> Colors:
    """(...) probabilities -> (..., 3): white to blue."""
    from matplotlib import colormaps

    colors: Colors = (colormaps["Blues"](np.asarray(probability, np.float64))[..., :3] * 255).round().astype(np.uint8)
    return colors


def draw_cameras(images: NDArray[np.uint8], width: int = 240) -> bytes:
    """A PNG of (V, h, w, 3) images, three per row, each at most `width` px wide."""
    from PIL import Image

    step = min(width / images.shape[2], 1)
    size = (round(images.shape[2] * step), round(images.shape[1] * step))
    gap, columns = 4, min(3, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size[0] + gap) - gap, rows * (size[1] + gap) - gap), "white")
    for number, image in enumerate(images):
        tile = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(tile, (number % columns * (size[0] + gap), number // columns * (size[1] + gap)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw_curves(
    name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], colors: Sequence[str]
) -> bytes:
    """A PNG of {run: (steps, values)}: values in a pale colour, their running mean in full colour."""
    figure, axes = _figure(3.6, 2.3)
    for (steps, values), color in zip(curves.values(), colors, strict=True):
        few = len(values) < 20
        axes.plot(steps, values, color=color, alpha=1 if few else 0.25, linewidth=1, marker="." if few else "")
        if not few:
            axes.plot(steps, smooth(values, len(values) // 20), color=color, linewidth=1.6)
    axes.set(title=name, xlabel="step")
    axes.grid(color="#ddd", linewidth=0.5)
    return _png(figure)


def smooth(values: Sequence[float], reach: int) -> NDArray[np.float64]:
    """Running mean over up to `reach` values on either side, fewer at the ends."""
    ones = np.ones(2 * reach + 1)
    total = np.convolve(np.asarray(values, np.float64), ones)
    count = np.convolve(np.ones(len(values)), ones)
    return (total / count)[reach : reach + len(values)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=8)
    for text, size in ((axes.xaxis.label, 8), (axes.yaxis.label, 8), (axes.title, 9)):
        text.set_fontsize(size)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
