"""Sheets of a run's predictions for one keyframe: features as colours (paper, Figure 5), correlation maps (Figure 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure

from occfeat_targets.cache.geometry import inverse_rigid, transform
from occfeat_targets.pictures.bands import (
    MARGIN,
    WIDTH,
    Band,
    beside,
    color_bar,
    heading_band,
    stack,
    text_band,
    warning_bands,
)
from occfeat_targets.pictures.birdseye import Mask, occupancy_colors
from occfeat_targets.pictures.cameras import VOXEL, Cameras
from occfeat_targets.pictures.canvas import default_style, place
from occfeat_targets.pictures.colors import Colors, FeatureColors, correlation_scale, height_scale, rgb, swatch
from occfeat_targets.pictures.panels import Panel, map_bands
from occfeat_targets.pictures.voxels import draw_voxels
from occfeat_train.report.correlation import Query, contrast, cosines, outline
from occfeat_train.report.figures import OUTCOMES, outcome_colors, topmost
from occfeat_train.report.voxel_predictions import Seen, VoxelPredictions

IMAGES = 1160  # [px] width of the cameras' images, beside a view in perspective
VIEW = 400  # [px] smallest height of that view
Painter = Callable[[Seen, bool], Colors]  # colours (n, 3) of voxels with features; whether these are the teacher's


@dataclass(frozen=True, eq=False)
class FeatureSheets:
    """Draws the sheets of one run's predictions for one keyframe.

    run: its name. warnings: what is simulated.
    """

    run: str
    found: VoxelPredictions
    warnings: Sequence[str]

    @default_style()
    def features(self, colors: FeatureColors, fitted_to: str) -> Figure:
        """Predicted and target features as colours, and occupancy. fitted_to: what the colours were fitted to, in words."""

        def paint(seen: Seen, _: bool) -> Colors:
            return colors(seen.features)

        caption = f"three principal components as red, green and blue, fitted to {fitted_to}"
        return stack([*self._title(f"{self.run}: features", caption), *self._views(paint), *self._occupancy()])

    @default_style()
    def correlation(self, query: Query, lowest: float) -> Figure:
        """Cosines between a query's feature and all others; the teacher's features with its own query.

        lowest: cosine at the lower end of the colours.
        """
        scale = correlation_scale(lowest)

        def cosine(seen: Seen, is_target: bool) -> Colors:
            return rgb(scale, cosines(seen.features, query.target if is_target else query.predicted))

        caption = f"cosine to the mean feature of {query.origin}" + ", outlined below" * (query.voxel is not None)
        found = self.found
        panels: list[Panel] = []
        outlined = outline(query, found)
        for seen, name, is_target in (
            (found.predicted, "predicted, topmost voxel with LiDAR", False),
            (found.target, "teacher's own features there", True),
            (found.imagined, "predicted, topmost predicted voxel", False),
        ):
            if seen is not None:
                cells = topmost(seen.voxels, cosine(seen, is_target), found.grid)
                panels.append(Panel(name, cells, outlined=outlined, scale=scale, unit=""))
        split = contrast(query.label, found, query) if query.label else None
        notes = []
        if split is not None:
            notes = [
                f"mean cosine {split[0]:.2f} in voxels of {query.name} (outlined below), {split[1]:.2f} in all others"
            ]
        maps = map_bands(panels, found.grid, found.grid_from_ego, self._cameras(WIDTH, MARGIN))
        bands = [
            *self._title(f"{self.run}: correlation with {query.name}", caption, *notes),
            *self._views(cosine, scale),
        ]
        return stack([*bands, *maps])

    def _title(self, text: str, *captions: str) -> list[Band]:
        teacher = self.found.reader.cache.spec.teacher
        assert teacher is not None
        lines = [f"{self.found.name}; teacher {teacher.name} ({teacher.digest})", *captions]
        if self.found.merits:
            lines.insert(1, f"on this keyframe: {self.found.merits}")
        return [text_band(text, 20), *(text_band(line, 12, margin=2) for line in lines), *warning_bands(self.warnings)]

    def _cameras(self, width: int, margin: int = 0) -> Cameras:
        return Cameras(self.found.reader, self.found.keyframe, width, margin)

    def _views(self, paint: Painter, scale: ScalarMappable | None = None) -> list[Band]:
        """Rows of the cameras' images beside the voxels in perspective: predictions, the same where LiDAR is, and targets."""
        found, bands = self.found, [] if scale is None else [_bar(scale)]
        if found.imagined is not None:
            text = f"predicted features at the {count_imagined(found)} predicted to be occupied"
            bands += [heading_band(text), self._row(found.imagined, paint(found.imagined, False), dots=False)]
        text = f"predicted features at the {len(found.predicted.voxels)} voxels with LiDAR returns in view"
        bands += [heading_band(text), self._row(found.predicted, paint(found.predicted, False))]
        text = "target features there: the teacher's, averaged over the cameras"
        return [*bands, heading_band(text), self._row(found.target, paint(found.target, True))]

    def _row(self, seen: Seen, colors: Colors, *, dots: bool = True) -> Band:
        """The images, with the voxels as dots in them, beside the voxels in perspective."""
        found, cameras = self.found, self._cameras(IMAGES, MARGIN)
        height = max(VIEW, cameras.height)
        centers = found.grid.centers_of(seen.voxels).astype(np.float64)
        in_ego = transform(inverse_rigid(found.grid_from_ego), centers)

        def draw_images(part: SubFigure) -> None:
            for camera, axes in cameras.draw(part).items():
                if dots:
                    cameras.draw_points(axes, camera, VOXEL, in_ego, colors)

        def draw_perspective(part: SubFigure) -> None:
            axes = place(part, 0, 0, WIDTH - IMAGES - MARGIN, height)
            draw_voxels(axes, seen.voxels, colors, found.grid, found.grid_from_ego)

        return beside(height, (IMAGES, draw_images), (WIDTH - IMAGES, draw_perspective))

    def _occupancy(self) -> list[Band]:
        """Predicted against true occupancy from above."""
        found, grid = self.found, self.found.grid
        panels = [self._heights(found.true, "voxels with LiDAR returns")]
        if found.guess is not None:
            panels.append(self._heights(found.guess, "voxels predicted to be occupied"))
            colors = outcome_colors(found.guess.any(axis=0), found.true.any(axis=0))
            key = [swatch(color, name) for name, color in OUTCOMES.items()]
            panels.append(Panel("columns with an occupied voxel, right or wrong", colors, key))
        cameras = self._cameras(WIDTH, MARGIN)
        heading = "occupancy from above: the height of each column's highest voxel"
        return [heading_band(heading), *map_bands(panels, grid, found.grid_from_ego, cameras)]

    def _heights(self, volume: Mask, name: str) -> Panel:
        scale = height_scale(self.found.grid)
        return Panel(f"{int(volume.sum())} {name}", occupancy_colors(volume, scale, self.found.grid), scale=scale)


def count_imagined(found: VoxelPredictions) -> str:
    """``1234 voxels``, or how many of them have features."""
    assert found.guess is not None and found.imagined is not None
    number, used = int(found.guess.sum()), len(found.imagined.voxels)
    return f"{number} voxels" if number == used else f"{used} most certain of {number} voxels"


def _bar(scale: ScalarMappable) -> Band:
    def draw(part: SubFigure) -> None:
        part.text(MARGIN / WIDTH, 0.3, "cosine", size=14, va="center")
        color_bar(part, scale, MARGIN + 100, 30, "")

    return 52, draw
