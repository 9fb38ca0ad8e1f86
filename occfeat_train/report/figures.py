"""Figures of a report: NumPy in, PNG out. Grids are drawn as in `occfeat-targets preview`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import RGB
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.birdseye import Mask, draw_cells
from occfeat_targets.pictures.cameras import Cameras
from occfeat_targets.pictures.canvas import DPI, default_style, png
from occfeat_targets.pictures.colors import EMPTY, HEIGHTS, Colors, hex_color

HIT: RGB = (26, 112, 64)
FALSE_ALARM: RGB = (240, 146, 24)
MISSED: RGB = (40, 74, 200)
UNSCORED: RGB = (184, 184, 196)
LINE_COLORS = ("#0058cc", "#c43b0f", "#0ac079", "#a9568e", "#3fcbfe", "#ebc200", "#35003b", "#72272a")  # of runs
OUTCOMES = {"hit": HIT, "false alarm": FALSE_ALARM, "missed": MISSED}


@dataclass(frozen=True)
class KeyEntry:
    """An entry of a key below pictures: the name of one colour, or of a ramp of several (``#rrggbb``)."""

    name: str
    colors: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """A run's prediction for one keyframe. merits: its metric in words. pictures: {caption: PNG}. note: below them."""

    merits: str
    pictures: Mapping[str, bytes]
    key: Sequence[KeyEntry]
    note: str = ""


def key_of(colors: Mapping[str, RGB]) -> list[KeyEntry]:
    return [KeyEntry(name.replace("_", " "), (hex_color(color),)) for name, color in colors.items()]


def key_of_heights(grid: VoxelGrid) -> KeyEntry:
    ramp = (HEIGHTS(np.linspace(0, 1, 6))[:, :3] * 255).round().astype(int)
    colors = tuple(hex_color((r, g, b)) for r, g, b in ramp.tolist())
    return KeyEntry(f"height, {grid.lower[0]:g} to {grid.upper[0]:g} m", colors)


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
    return mixed_outcomes(
        np.stack([(predicted & true).sum(axis), (predicted & ~true).sum(axis), (~predicted & true).sum(axis)], -1)
    )


def mixed_outcomes(counts: NDArray[np.integer[Any]]) -> Colors:
    """Colours of cells from their numbers of hits, false alarms and misses (..., 3)."""
    total = counts.sum(-1, keepdims=True)
    mixed = counts @ np.array(list(OUTCOMES.values()), np.float64) / np.maximum(total, 1)
    return np.where(total > 0, mixed, EMPTY).round().astype(np.uint8)


def topmost(voxels: NDArray[np.int64], colors: Colors, grid: VoxelGrid) -> Colors:
    """Colours (n, 3) of voxels with ascending flat indices (n,) -> (H, W, 3): the highest voxel of each column."""
    picture = np.full((*grid.map_shape, 3), EMPTY, np.uint8)
    _, h, w = np.unravel_index(voxels, grid.shape)
    picture[h, w] = colors  # ascending indices: the highest comes last
    return picture


@default_style()
def draw_map(
    colors: Colors,
    grid: VoxelGrid,
    grid_from_ego: Matrix,
    *,
    hatched: Mask | None = None,
    outlined: Mask | None = None,
) -> bytes:
    """A PNG of (H, W, 3) cells from above. hatched, outlined: (H, W) cells."""
    (_, rear, left), (_, front, right) = grid.lower, grid.upper
    figure, axes = _figure(3.2, 3.2 * (front - rear) / (right - left) + 0.1)
    draw_cells(axes, colors, grid, grid_from_ego, hatched=hatched, outlined=outlined)
    return png(figure)


@default_style()
def draw_from_behind(colors: Colors, grid: VoxelGrid, grid_from_ego: Matrix) -> bytes:
    """A PNG of (Z, W, 3) cells with exaggerated heights; a triangle marks the ego vehicle."""
    (low, _, left), (high, _, right) = grid.lower, grid.upper
    figure, axes = _figure(3.2, 1.6)
    extent = (left, right, low, high)
    axes.imshow(colors, extent=extent, origin="lower", interpolation="nearest", aspect="auto")
    axes.autoscale(False)
    ego = transform(grid_from_ego, np.zeros((1, 3)))[0]
    axes.plot(ego[0], ego[2], marker="^", color="#111", markeredgecolor="white", markersize=8)
    axes.set_xlabel("right [m]", size=9)
    axes.set_ylabel("up [m]", size=9)
    return png(figure)


@default_style()
def draw_cameras(reader: CacheReader, keyframe: int, width: int = 900) -> bytes:
    """A PNG of a keyframe's images, `width` px wide."""
    cameras = Cameras(reader, keyframe, width)
    figure = Figure((width / DPI, cameras.height / DPI), DPI)
    cameras.draw(figure)
    return png(figure)


@default_style()
def draw_curves(
    name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], colors: Mapping[str, str]
) -> bytes:
    """A PNG of {run: (steps, values)}: values in a pale colour, their running mean in full colour. colors: {run: colour}."""
    figure, axes = _figure(3.6, 2.3)
    for run, (steps, values) in curves.items():
        few = len(values) < 20
        axes.plot(steps, values, color=colors[run], alpha=1 if few else 0.25, linewidth=1, marker="." if few else "")
        if not few:
            axes.plot(steps, smooth(values, len(values) // 20), color=colors[run], linewidth=1.6)
    axes.set_title(name, size=9, parse_math=False)
    axes.set_xlabel("step", size=9)
    axes.grid(color="#ddd", linewidth=0.5)
    return png(figure)


@default_style()
def draw_scores(lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> bytes:
    """A PNG of {name: (share of labels [%], mean IoU [%], standard deviation) of its points}, over a logarithmic axis of shares."""
    figure, axes = _figure(6.4, 3.4)
    for number, (name, points) in enumerate(lines.items()):
        shares, means, spreads = zip(*points, strict=True)
        color = LINE_COLORS[number % len(LINE_COLORS)]
        marker = "osD^v<>"[number % 7]
        axes.errorbar(shares, means, spreads, color=color, marker=marker, capsize=3, linewidth=1.6, label=name)
    axes.set_xscale("log")
    ticks = sorted({share for points in lines.values() for share, _, _ in points})
    axes.set_xticks(ticks, [f"{share:g}" for share in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("share of the labels [%]", size=9)
    axes.set_ylabel("IoU at 0.5 [%]", size=9)
    axes.grid(color="#ddd", linewidth=0.5)
    axes.legend(fontsize=8)
    return png(figure)


def smooth(values: Sequence[float], reach: int) -> NDArray[np.float64]:
    """Running mean over up to `reach` values on either side, fewer at the ends."""
    ones = np.ones(2 * reach + 1)
    total = np.convolve(np.asarray(values, np.float64), ones)
    count = np.convolve(np.ones(len(values)), ones)
    return (total / count)[reach : reach + len(values)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of a size in inches, shown at about half of its pixels."""
    figure = Figure((width, height), 150, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=8)
    return figure, axes
