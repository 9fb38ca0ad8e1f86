"""Grids from above: colours of their cells, and a drawing of these with the ego vehicle. Forward is up, right is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import hsv_to_rgb
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.pictures.colors import (
    CAMERA,
    COINCIDENT,
    EMPTY,
    FREE,
    OCCUPIED,
    OCCUPIED_ONLY,
    SOLID,
    Colors,
    hex_color,
    rgb,
)

Mask = NDArray[np.bool_]

# Outline of the ego vehicle on the ground of the ego frame (x forward from the rear axle, y left) [m]; its nose is pointed.
EGO_OUTLINE = np.array([(-0.9, -0.87, 0), (2.6, -0.87, 0), (4.2, 0, 0), (2.6, 0.87, 0), (-0.9, 0.87, 0)])
_RINGS = (1, 2, 5, 10, 25, 50, 100, 200)  # [m]
_HALO = [withStroke(linewidth=2.5, foreground="white")]
CENTER_SIGMA = 3  # [cells] of Simple-BEV's Gaussian about the centre of a vehicle
BODY_HEIGHT = (0.3, 2.0)  # [m] above the ground: heights where vehicles have LiDAR returns and the road has none


def occupancy_colors(volume: Mask, scale: ScalarMappable, grid: VoxelGrid) -> Colors:
    """(Z, H, W) -> (H, W, 3): the colour of a column is the height of its highest occupied voxel's centre."""
    highest = volume.shape[0] - 1 - volume[::-1].argmax(axis=0)
    up = grid.lower[0] + (highest + 0.5) * grid.cell_size[0]
    return np.where(volume.any(axis=0)[..., None], rgb(scale, up), np.array(EMPTY, np.uint8))


def observed_colors(occupied: Mask, free: Mask) -> Colors:
    """(Z, H, W), (Z, H, W) -> (H, W, 3): columns with an occupied voxel, others with a free one, and columns without either."""
    colors = np.full((*occupied.shape[1:], 3), EMPTY, np.uint8)
    colors[free.any(axis=0)] = FREE
    colors[occupied.any(axis=0)] = OCCUPIED
    return colors


def label_colors(masks: Mapping[str, Mask], shape: tuple[int, int]) -> Colors:
    """{kind of labels: (K, H, W) masks of its classes} -> (H, W, 3), solid kinds on top."""
    colors = np.full((*shape, 3), EMPTY, np.uint8)
    for kind in sorted((LABEL_KINDS[name] for name in masks), key=lambda kind: kind.is_solid):
        for name, color in kind.colors.items():
            colors[masks[kind.name][kind.classes.index(name)]] = color
    return colors


def instance_colors(squared_distance: NDArray[np.uint8], offset: NDArray[np.int16]) -> Colors:
    """(H, W), (2, H, W) -> (H, W, 3): the direction of the offset as a hue where there is one; elsewhere darker near a centre."""
    grey = 1 - 0.6 * np.exp(-squared_distance.astype(np.float64) / (2 * CENTER_SIGMA**2))
    right, forward = offset.astype(np.float64)
    hue = np.arctan2(forward, right) / (2 * np.pi) % 1
    hued = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.7), np.full_like(hue, 0.85)], axis=-1))
    shaded = grey[..., None] * np.array(EMPTY) / 255
    return (255 * np.where(offset.any(axis=0)[..., None], hued, shaded)).round().astype(np.uint8)


def occupied_at_body_height(volume: Mask, grid: VoxelGrid, ego_from_grid: Matrix) -> Mask:
    """(Z, H, W) -> (H, W): columns with an occupied voxel whose centre is at BODY_HEIGHT above the ego's ground.

    Cells taller than that range count if they contain its middle.
    """
    height = transform(ego_from_grid, grid.voxel_centers())[..., 2]
    middle, reach = sum(BODY_HEIGHT) / 2, (BODY_HEIGHT[1] - BODY_HEIGHT[0]) / 2
    result: Mask = (volume & (np.abs(height - middle) <= max(reach, grid.cell_size[0] / 2))).any(axis=0)
    return result


def coincidence_colors(solid: Mask, occupied: Mask) -> Colors:
    """(H, W), (H, W) -> (H, W, 3): cells of solid labels, occupied columns, and where they coincide."""
    colors = np.full((*solid.shape, 3), EMPTY, np.uint8)
    colors[solid], colors[occupied], colors[solid & occupied] = SOLID, OCCUPIED_ONLY, COINCIDENT
    return colors


def draw_cells(
    axes: Axes,
    colors: Colors,
    grid: VoxelGrid,
    grid_from_ego: Matrix,
    *,
    hatched: Mask | None = None,
    outlined: Mask | None = None,
) -> None:
    """Draw (H, W, 3) cells in metres, with the ego vehicle and rings around it. hatched, outlined: (H, W) cells."""
    (_, rear, left), (_, front, right) = grid.lower, grid.upper
    axes.imshow(colors, extent=(left, right, rear, front), origin="lower", interpolation="nearest")
    axes.autoscale(False)
    if hatched is not None and hatched.any():
        axes.contourf(*_steps(hatched, grid), levels=[0.5, 1.5], colors="none", hatches=["//////"])
    if outlined is not None and outlined.any():
        axes.contour(*_steps(outlined, grid), levels=[0.5], colors=["#c8102e"], linewidths=1)
    center, *outline = transform(grid_from_ego, np.concatenate([np.zeros((1, 3)), EGO_OUTLINE]))[:, :2]
    reach = max(map(abs, (rear, left, front, right)))
    for radius in (r for r in _RINGS if reach / 8 <= r <= reach):
        axes.add_patch(Circle(center, radius, fill=False, edgecolor="#888", linewidth=0.5))
        axes.annotate(
            f"{radius} m", center - radius / np.sqrt(2), fontsize=7, color="#666", ha="center", va="center",
            annotation_clip=True, path_effects=_HALO,
        )  # fmt: skip
    axes.fill(*np.transpose(outline), facecolor="#111", edgecolor="white", linewidth=0.6)
    axes.set_xlabel("right [m]", size=9)
    axes.set_ylabel("forward [m]", size=9, labelpad=1)
    axes.tick_params(labelsize=8)


def _steps(mask: Mask, grid: VoxelGrid) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """x, y and values of a mask for contours that follow the borders of its cells, also at the border of the grid."""
    (_, rear, left), (_, front, right) = grid.lower, grid.upper
    h, w = mask.shape
    values = np.pad(mask.astype(np.float64).repeat(2, axis=0).repeat(2, axis=1), 1)
    return np.linspace(left, right, w + 1).repeat(2), np.linspace(rear, front, h + 1).repeat(2), values


def draw_cameras(axes: Axes, grid_from_cams: Matrix, names: Sequence[str], length: float) -> None:
    """A line of `length` [m] along every camera's optical axis, with its name. grid_from_cams: (cams, 4, 4).

    Names of cameras that look in about the same direction stand one behind the other.
    """
    directions = grid_from_cams[:, :2, 2]  # of the optical axes
    for number, (grid_from_cam, name) in enumerate(zip(grid_from_cams, names, strict=True)):
        before = int((directions[:number] @ directions[number] > np.cos(np.deg2rad(12))).sum())
        ray = np.array([(0, 0, 0), (0, 0, length), (0, 0, (1.1 + 0.25 * before) * length)])
        start, end, label = transform(grid_from_cam, ray)[:, :2]
        axes.plot(*np.transpose([start, end]), color=hex_color(CAMERA), linewidth=1.2)
        right, forward = directions[number]
        axes.annotate(
            name, label, color=hex_color(CAMERA), fontsize=8, parse_math=False, path_effects=_HALO,
            ha="center" if abs(right) < 0.3 else "left" if right > 0 else "right",
            va="center" if abs(forward) < 0.3 else "bottom" if forward > 0 else "top",
        )  # fmt: skip
