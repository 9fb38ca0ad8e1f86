"""Pictures of a keyframe's cameras: their arrangement on a sheet, and points projected into them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, project, transform
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.canvas import DPI, place
from occfeat_targets.pictures.colors import Colors, rgb

GAP = 8  # [px] between pictures
MAX_COLUMNS = 4


class Dot(NamedTuple):
    """How a point is drawn: its radius [m], clamped to `limits` [px] on the sheet, and the width of its black rim [px]."""

    radius: float
    limits: tuple[float, float]
    rim: float


VOXEL, RETURN = Dot(0.1, (1.5, 6), 0.8), Dot(0.03, (0.8, 2.5), 0)


def arrange(cam_from_ego: Matrix, is_valid: NDArray[np.bool_]) -> list[list[int]]:
    """(cams, 4, 4), (cams,) -> rows of cameras, as around the vehicle seen from above.

    The cameras that look forward come first, from left to right, then those that look backward, also from left to right, and
    then those that are masked, whose directions are not known.
    """
    forward, left = cam_from_ego[:, 2, 0], cam_from_ego[:, 2, 1]  # of the optical axes
    yaw = np.arctan2(left, forward)
    order = np.argsort(np.where(forward >= 0, -yaw, yaw % (2 * np.pi)), kind="stable")
    rows: list[list[int]] = []
    for group in (is_valid & (forward >= 0), is_valid & (forward < 0), ~is_valid):
        row = order[group[order]]
        rows += [part.tolist() for part in np.array_split(row, max(-(-len(row) // MAX_COLUMNS), 1)) if len(part)]
    return rows


class Cameras:
    """The cameras of a keyframe as pictures on a sheet of `width` px, with `margin` px on the left and right.

    height: of all pictures [px]. cam_from_ego, is_valid: as in the cache.
    """

    def __init__(self, reader: CacheReader, keyframe: int, width: int, margin: int = 0) -> None:
        self.names, self._image_size = reader.cache.spec.cameras, reader.cache.spec.image_size
        self.is_valid = reader.read("camera_valid", keyframe)
        self.cam_from_ego = reader.read("cam_from_ego", keyframe).astype(np.float64)
        self._intrinsics = reader.read("intrinsics", keyframe).astype(np.float64)
        self._areas, self._images = reader.read("image_area", keyframe), reader.read("images", keyframe)
        self._rows, self._width = arrange(self.cam_from_ego, self.is_valid), width
        columns = max(3, *map(len, self._rows))
        across = (width - 2 * margin - (columns - 1) * GAP) // columns
        self._size = across, max(1, round(across * self._image_size[0] / self._image_size[1]))

    @property
    def height(self) -> int:
        return len(self._rows) * (self._size[1] + GAP)

    def draw(self, figure: Figure | SubFigure, colors: NDArray[np.uint8] | None = None) -> dict[int, Axes]:
        """Draw the images, or other colours (cams, h, w, 3), on a figure of this width and height. Shorter rows are centred.

        Returns {camera that is not masked: its axes}. The units of the axes are pixels of the cached image.
        """
        found = {}
        (width, height), (image_height, image_width) = self._size, self._image_size
        for number, row in enumerate(self._rows):
            left = (self._width - len(row) * (width + GAP) + GAP) // 2
            for column, camera in enumerate(row):
                axes = place(figure, left + column * (width + GAP), number * (height + GAP), width, height)
                axes.imshow(
                    self._images[camera] if colors is None else colors[camera], extent=(0, image_width, image_height, 0),
                    interpolation="bicubic" if colors is None else "nearest", aspect="auto",
                )  # fmt: skip
                axes.set_axis_off()
                axes.autoscale(False)
                axes.annotate(
                    self.names[camera], (0, 1), (4, -4), xycoords="axes fraction", textcoords="offset points", va="top",
                    fontsize=9, parse_math=False, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2.5},
                )  # fmt: skip
                if self.is_valid[camera]:
                    found[camera] = axes
                else:
                    middle = image_width / 2, image_height / 2
                    axes.text(*middle, "MASKED", color="white", size=width // 25, ha="center", va="center")
        return found

    def draw_points(
        self,
        axes: Axes,
        camera: int,
        dot: Dot,
        points: NDArray[Any],
        colors: Colors | ScalarMappable,
    ) -> None:
        """Draw the points that a camera sees, the nearest last.

        points: (n, 3) in the ego frame [m]. colors: (n, 3), or a scale of depths [m].
        """
        intrinsics, points_cam = self._intrinsics[camera], transform(self.cam_from_ego[camera], points)
        pixels, depth, is_seen = project(intrinsics, points_cam, self._image_size, self._areas[camera])
        chosen = np.flatnonzero(is_seen)
        chosen = chosen[np.argsort(-depth[chosen], kind="stable")]
        radii = np.clip(
            dot.radius * intrinsics[0, 0] * self._size[0] / self._image_size[1] / depth[chosen], *dot.limits
        )
        points_per_pixel = 72 / DPI
        u, v = pixels[chosen].T
        shown = rgb(colors, depth[chosen]) if isinstance(colors, ScalarMappable) else colors[chosen]
        axes.scatter(
            u, v, (2 * radii * points_per_pixel) ** 2, shown / 255,
            edgecolors="black", linewidths=dot.rim * points_per_pixel,
        )  # fmt: skip


def read_features(reader: CacheReader, keyframe: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Teacher features (cams, h, w, C) of a keyframe, and which tokens (cams, h, w) show a part of the scene.

    int8 features are multiplied by their scale. The other tokens are of masked cameras, or of the black part of an image.
    """
    spec = reader.cache.spec
    features = reader.read_features(keyframe)
    y, x = ((np.arange(n) + 0.5) * size / n for n, size in zip(features.shape[1:3], spec.image_size, strict=True))
    top, left, bottom, right = reader.read("image_area", keyframe).T[..., None]
    is_shown = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
    return features, is_shown & reader.read("camera_valid", keyframe)[:, None, None]
