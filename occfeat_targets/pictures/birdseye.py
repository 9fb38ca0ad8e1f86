"""Bird's-eye pictures of a grid: occupancy, labels, and their coincidence. Forward is up, right is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_targets.pictures.colors import (
    CAMERA,
    COINCIDENT,
    EMPTY,
    FAINT,
    HATCH,
    INK,
    MAP_COLORS,
    OCCUPIED_ONLY,
    RGB,
    VEHICLE,
    Colors,
    ColorScale,
)
from occfeat_targets.pictures.drawing import font

Mask = NDArray[np.bool_]

# Outline of the ego vehicle on the ground of the ego frame (x forward from the rear axle, y left) [m], and its arrow.
_EGO_OUTLINE = np.array([(-0.9, -0.87, 0), (3.2, -0.87, 0), (3.2, 0.87, 0), (-0.9, 0.87, 0)])
_EGO_ARROW = np.array([(7.5, 0, 0), (4.2, -1.6, 0), (4.2, 1.6, 0)])
_RINGS = (1, 2, 5, 10, 25, 50, 100, 200)  # [m]
BODY_HEIGHT = (0.3, 2.0)  # [m] above the ground: heights where vehicles have LiDAR returns and the road has none


@dataclass(frozen=True)
class BirdsEye:
    """The mapping of a grid's (forward, right) plane to a picture of at most size x size px."""

    grid: VoxelGrid
    size: int = 600

    @property
    def pixels_per_metre(self) -> float:
        spans = [high - low for low, high in zip(self.grid.lower[1:], self.grid.upper[1:], strict=True)]
        scale = self.size / max(spans)
        cell = min(self.grid.cell_size[1:])
        return int(scale * cell) / cell if scale * cell >= 1 else scale  # whole pixels per cell if they fit

    @property
    def width(self) -> int:
        return max(1, round((self.grid.upper[2] - self.grid.lower[2]) * self.pixels_per_metre))

    @property
    def height(self) -> int:
        return max(1, round((self.grid.upper[1] - self.grid.lower[1]) * self.pixels_per_metre))

    @property
    def _extent(self) -> float:
        """The farthest bound from the origin [m]."""
        return max(map(abs, (*self.grid.lower[1:], *self.grid.upper[1:])))

    def pixels(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """(..., >=2) (right, forward) [m] -> (..., 2) continuous (x, y) of the picture."""
        right, forward = np.asarray(points[..., 0], np.float64), np.asarray(points[..., 1], np.float64)
        offsets = [right - self.grid.lower[2], self.grid.upper[1] - forward]
        return np.stack(offsets, axis=-1) * self.pixels_per_metre

    def enlarge(self, cells: NDArray[Any]) -> NDArray[np.uint8]:
        """(H, W[, 3]) cells with the rearmost row first -> (height, width[, 3]) uint8 pixels with the foremost row on top."""
        picture = Image.fromarray(np.ascontiguousarray(cells[::-1]).astype(np.uint8))
        return np.array(picture.resize((self.width, self.height), Image.Resampling.NEAREST))

    def draw(self, colors: Colors, grid_from_ego: Matrix, hatched: Mask | None = None) -> Image.Image:
        """A picture of (H, W, 3) cell colours with rings around the ego vehicle, its outline, and an arrow forward.

        hatched: (H, W) cells to hatch.
        """
        pixels = self.enlarge(colors)
        if hatched is not None:
            y, x = np.indices(pixels.shape[:2])
            pixels[(self.enlarge(hatched) > 0) & ((x + y) % 6 < 3)] = HATCH
        picture = Image.fromarray(pixels)
        draw = ImageDraw.Draw(picture)
        center, *outline = self.pixels(transform(grid_from_ego, np.concatenate([np.zeros((1, 3)), _EGO_OUTLINE])))
        for metres in [r for r in _RINGS if self._extent / 8 <= r <= self._extent]:
            radius = metres * self.pixels_per_metre
            draw.ellipse([*(center - radius), *(center + radius)], outline=FAINT)
            at = (center[0] - 5, min(center[1] + radius, self.height) - 3)
            draw.text(at, f"{metres} m", INK, font(13), anchor="rd", stroke_width=2, stroke_fill=EMPTY)
        draw.polygon([tuple(p) for p in outline], fill=INK, outline=(0, 0, 0))
        draw.polygon([tuple(p) for p in self.pixels(transform(grid_from_ego, _EGO_ARROW))], fill=INK, outline=(0, 0, 0))
        return picture

    def draw_cameras(self, picture: Image.Image, grid_from_cams: Matrix, names: tuple[str, ...]) -> None:
        """A line from every camera along its optical axis, with its initials. grid_from_cams: (cams, 4, 4)."""
        draw, length = ImageDraw.Draw(picture), 0.25 * self._extent
        axis = np.array([(0, 0, 0), (0, 0, length), (0, 0, 1.15 * length)], np.float64)
        for grid_from_cam, name in zip(grid_from_cams, names, strict=True):
            ends = self.pixels(transform(grid_from_cam, axis))
            draw.line([tuple(p) for p in ends[:2]], CAMERA, 2)
            initials = "".join(word[0] for word in name.removeprefix("CAM_").split("_") if word)
            draw.text(tuple(ends[2]), initials, CAMERA, font(15), anchor="mm", stroke_width=3, stroke_fill=EMPTY)

    def draw_ticks(self, sheet: Image.Image, left: int, top: int) -> None:
        """Metres along the left and the lower edge of a picture that was pasted at (left, top)."""
        draw = ImageDraw.Draw(sheet)
        step = next((s for s in (1, 2, 5, 10, 25, 50) if self._extent / s <= 5), 100)
        for axis, (low, high) in enumerate(zip(self.grid.lower[1:], self.grid.upper[1:], strict=True)):
            for metres in range(int(np.ceil(low / step)) * step, int(np.floor(high)) + 1, step):
                x, y = self.pixels(np.array([metres if axis else low, low if axis else metres])) + np.array([left, top])
                if axis == 0:
                    draw.line([left - 5, y, left - 1, y], FAINT)
                    draw.text((left - 7, y), f"{metres}", FAINT, font(12), anchor="rm")
                else:
                    bottom = top + self.height
                    draw.line([x, bottom, x, bottom + 4], FAINT)
                    draw.text((x, bottom + 6), f"{metres}", FAINT, font(12), anchor="ma")


def occupancy_colors(volume: Mask, grid: VoxelGrid, scale: ColorScale) -> Colors:
    """(Z, H, W) -> (H, W, 3): the colour of a column is the height of its highest occupied voxel's centre."""
    highest = volume.shape[0] - 1 - volume[::-1].argmax(axis=0)
    up = grid.lower[0] + (highest + 0.5) * grid.cell_size[0]
    return np.where(volume.any(axis=0)[..., None], scale.colors(up), np.array(EMPTY, np.uint8))


def label_colors(map_masks: Mask | None, vehicles: Mask | None, shape: tuple[int, int]) -> Colors:
    """(K, H, W) map classes, (H, W) vehicles -> (H, W, 3), vehicles on top."""
    colors = np.full((*shape, 3), EMPTY, np.uint8)
    if map_masks is not None:
        for name, color in MAP_COLORS.items():
            colors[map_masks[MAP_CLASSES.index(name)]] = color
    if vehicles is not None:
        colors[vehicles] = VEHICLE
    return colors


def occupied_at_body_height(volume: Mask, grid: VoxelGrid, ego_from_grid: Matrix) -> Mask:
    """(Z, H, W) -> (H, W): columns with an occupied voxel whose centre is at BODY_HEIGHT above the ego's ground.

    Cells taller than that range count if they contain its middle.
    """
    height = transform(ego_from_grid, grid.voxel_centers())[..., 2]
    middle, reach = sum(BODY_HEIGHT) / 2, (BODY_HEIGHT[1] - BODY_HEIGHT[0]) / 2
    result: Mask = (volume & (np.abs(height - middle) <= max(reach, grid.cell_size[0] / 2))).any(axis=0)
    return result


def coincidence_colors(vehicles: Mask, occupied: Mask) -> Colors:
    """(H, W), (H, W) -> (H, W, 3): vehicle cells, occupied columns, and where they coincide."""
    colors = np.full((*vehicles.shape, 3), EMPTY, np.uint8)
    pairs: list[tuple[Mask, RGB]] = [
        (vehicles, VEHICLE), (occupied, OCCUPIED_ONLY), (vehicles & occupied, COINCIDENT),
    ]  # fmt: skip
    for mask, color in pairs:
        colors[mask] = color
    return colors
