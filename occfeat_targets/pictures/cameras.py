"""Pictures of the cameras: their arrangement, and points projected into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, project
from occfeat_targets.pictures.canvas import DPI, place

GAP = 8  # [px] between pictures
MAX_COLUMNS = 4


def arrange(cam_from_ego: Matrix) -> list[list[int]]:
    """(cams, 4, 4) -> rows of cameras, as around the vehicle seen from above.

    The cameras that look forward come first, from left to right, then those that look backward, also from left to right.
    """
    forward, left = cam_from_ego[:, 2, 0], cam_from_ego[:, 2, 1]  # of the optical axes
    yaw = np.arctan2(left, forward)
    order = np.argsort(np.where(forward >= 0, -yaw, yaw % (2 * np.pi)), kind="stable")
    rows = []
    for side in (order[forward[order] >= 0], order[forward[order] < 0]):
        rows += [part.tolist() for part in np.array_split(side, -(-len(side) // MAX_COLUMNS))] if len(side) else []
    return rows


class Tiles:
    """Positions of the cameras' pictures on a sheet `width` px wide, with `margin` px on the left and right.

    rows: of `arrange`. image_size: (height, width) of a camera's image. A row with fewer cameras is centred.
    """

    def __init__(self, rows: Sequence[Sequence[int]], image_size: Sequence[int], width: float, margin: float) -> None:
        self.rows, self.sheet_width = rows, width
        columns = max(3, *map(len, rows))
        self.width = (width - 2 * margin - (columns - 1) * GAP) // columns
        self.height = max(1, round(self.width * image_size[0] / image_size[1]))

    @property
    def total_height(self) -> int:
        """Height of all rows [px]."""
        return len(self.rows) * (self.height + GAP)

    def axes(self, figure: Figure | SubFigure) -> Mapping[int, Axes]:
        """{camera: axes} on a figure of this width and height."""
        found = {}
        for number, row in enumerate(self.rows):
            left = (self.sheet_width - len(row) * (self.width + GAP) + GAP) // 2
            top = number * (self.height + GAP)
            for column, camera in enumerate(row):
                found[camera] = place(figure, left + column * (self.width + GAP), top, self.width, self.height)
        return found


def draw_image(axes: Axes, image: NDArray[np.uint8], name: str, image_size: Sequence[int], smooth: bool = True) -> None:
    """Draw an image (h, w, 3) with its camera's name. The axes' units are pixels of `image_size` (height, width)."""
    height, width = image_size
    axes.imshow(image, extent=(0, width, height, 0), interpolation="bicubic" if smooth else "nearest", aspect="auto")
    axes.set_axis_off()
    axes.autoscale(False)
    style = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2.5}
    axes.annotate(
        name, (0, 1), (4, -4), xycoords="axes fraction", textcoords="offset points", va="top", fontsize=9,
        parse_math=False, bbox=style,
    )  # fmt: skip


def draw_points(
    axes: Axes,
    intrinsics: Matrix,
    points_cam: NDArray[Any],
    values: NDArray[Any],
    scale: ScalarMappable,
    image_size: Sequence[int],
    *,
    radius: float,
    limits: tuple[float, float],
    rim: float = 0,
    area: Sequence[int] | None = None,
) -> None:
    """Draw the points that the camera sees as dots, the nearest last.

    points_cam: (n, 3) [m]. values: (n,) coloured by `scale`. radius: of a dot [m], clamped to `limits` [px] on the sheet.
    rim: width of the black rim [px]. area: part of the image that shows the scene, see `project`.
    """
    pixels, depth, is_valid = project(intrinsics, points_cam, image_size, area)
    chosen = np.flatnonzero(is_valid)
    chosen = chosen[np.argsort(-depth[chosen], kind="stable")]
    enlargement = axes.bbox.width / image_size[1]
    radii = np.clip(radius * intrinsics[0, 0] * enlargement / depth[chosen], *limits)
    points_per_pixel = 72 / DPI
    u, v = pixels[chosen].T
    axes.scatter(
        u, v, (2 * radii * points_per_pixel) ** 2, scale.to_rgba(values[chosen]), edgecolors="black",
        linewidths=rim * points_per_pixel,
    )  # fmt: skip
