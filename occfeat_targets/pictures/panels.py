"""Bird's-eye pictures in rows, with their titles, legends and colour bars, as bands of a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.cm import ScalarMappable
from matplotlib.figure import SubFigure
from matplotlib.patches import Patch

from occfeat_targets.cache.geometry import Matrix, inverse_rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.pictures.bands import COLUMNS, MARGIN, PANEL, RULER, Band, color_bar
from occfeat_targets.pictures.birdseye import Mask, draw_cameras, draw_cells
from occfeat_targets.pictures.cameras import Cameras
from occfeat_targets.pictures.canvas import place
from occfeat_targets.pictures.colors import Colors


@dataclass(frozen=True, eq=False)
class Panel:
    """A bird's-eye picture. colors: (H, W, 3). key: entries of its legend. hatched, outlined: (H, W) cells.

    scale: what its colours mean, shown as a colour bar below; unit: of the bar's values.
    """

    title: str
    colors: Colors
    key: list[Patch] = field(default_factory=list)
    hatched: Mask | None = None
    outlined: Mask | None = None
    scale: ScalarMappable | None = None
    unit: str = " m"

    @property
    def key_columns(self) -> int:
        return 1 if len(self.key) <= 3 else 2


def map_bands(panels: Sequence[Panel], grid: VoxelGrid, grid_from_ego: Matrix, cameras: Cameras) -> list[Band]:
    """Rows of up to COLUMNS panels; the directions of the cameras are drawn on the first."""
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    return [_row(row, grid, grid_from_ego, cameras, is_first=row is rows[0]) for row in rows]


def _row(panels: Sequence[Panel], grid: VoxelGrid, grid_from_ego: Matrix, cameras: Cameras, *, is_first: bool) -> Band:
    is_valid = cameras.is_valid
    grid_from_cams = grid_from_ego @ inverse_rigid(cameras.cam_from_ego[is_valid])
    names = [name for name, valid in zip(cameras.names, is_valid, strict=True) if valid]
    spans = [high - low for low, high in zip(grid.lower[1:], grid.upper[1:], strict=True)]
    scale = PANEL / max(spans)  # [px/m]
    cell = scale * min(grid.cell_size[1:])
    scale *= int(cell) / cell if cell >= 1 else 1  # whole pixels per cell if they fit
    height, width = (scale * span for span in spans)

    def draw(part: SubFigure) -> None:
        for column, panel in enumerate(panels):
            left = MARGIN + RULER + column * (PANEL + RULER)
            axes = place(part, left, 40, width, height)
            draw_cells(axes, panel.colors, grid, grid_from_ego, hatched=panel.hatched, outlined=panel.outlined)
            axes.set_title(panel.title, loc="left", size=12)
            if is_first and column == 0:
                draw_cameras(axes, grid_from_cams, names, PANEL / 8 / scale)
            if panel.scale is not None:
                color_bar(part, panel.scale, left, height + 115, panel.unit)
            else:
                axes.legend(
                    handles=panel.key, loc="upper left", bbox_to_anchor=(0, -50 / height), ncols=panel.key_columns,
                    frameon=False, borderaxespad=0, borderpad=0, fontsize=10,
                )  # fmt: skip

    rows = max(-(-len(panel.key) // panel.key_columns) for panel in panels)
    return height + 100 + 22 * max(rows, 2), draw
