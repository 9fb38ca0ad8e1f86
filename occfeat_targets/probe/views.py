"""Mean over the views of bilinear samples (paper 3.3), in plain NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import inverse_rigid, project, transform
from occfeat_targets.cache.reader import CacheReader


@dataclass(frozen=True)
class Views:
    """Where the V cameras of a keyframe see n points.

    pixels: (V, n, 2) positions (u, v) in the cached images [px]; arbitrary where not seen. is_seen: (V, n).
    areas: (V, 4) (top, left, bottom, right) of the part of each image that shows the scene [px].
    image_size: (height, width) [px].
    """

    pixels: NDArray[np.float64]
    is_seen: NDArray[np.bool_]
    areas: NDArray[np.int32]
    image_size: tuple[int, int]

    @classmethod
    def of(cls, reader: CacheReader, keyframe: int, frame: int, points: NDArray[Any]) -> Views:
        """points: (n, 3) (right, forward, up) in the grid of reference frame number `frame` [m]. A masked camera sees none."""
        names = ("intrinsics", "cam_from_ego", "image_area", "grid_from_ego")
        intrinsics, cam_from_ego, areas, grid_from_ego = (reader.read(name, keyframe) for name in names)
        cam_from_grid = cam_from_ego.astype(np.float64) @ inverse_rigid(grid_from_ego[frame].astype(np.float64))
        image_size = reader.cache.spec.image_size
        found = [
            project(k, transform(matrix, points.astype(np.float64)), image_size, area)
            for k, matrix, area in zip(intrinsics.astype(np.float64), cam_from_grid, areas, strict=True)
        ]
        pixels, is_seen = np.stack([pixels for pixels, _, _ in found]), np.stack([seen for _, _, seen in found])
        return cls(pixels, is_seen, areas, image_size)

    def at(self, chosen: NDArray[Any]) -> Views:
        """The views of some of the points."""
        return Views(self.pixels[:, chosen], self.is_seen[:, chosen], self.areas, self.image_size)

    def mean(self, maps: NDArray[Any]) -> NDArray[np.float32]:
        """Maps (V, h, w, C) of the whole images -> (n, C), the mean over the cameras that see a point; zeros without one.

        Beyond the centres of the outermost tokens of a camera's area, these tokens are read: no view is attenuated.
        """
        total = np.zeros((self.is_seen.shape[1], maps.shape[-1]), np.float32)
        for values, pixels, is_seen, area in zip(maps, self.pixels, self.is_seen, self.areas, strict=True):
            size = np.array(values.shape[:2])
            scale = size / self.image_size
            first = np.clip(area[:2] * scale, 0, size - 1)
            last = np.maximum(np.minimum(area[2:] * scale - 1, size - 1), first)
            total[is_seen] += bilinear(values, np.clip(pixels[is_seen, ::-1] * scale - 0.5, first, last))
        return total / np.maximum(self.is_seen.sum(0), 1)[:, None].astype(np.float32)


def bilinear(values: NDArray[Any], positions: NDArray[np.float64]) -> NDArray[np.float32]:
    """A map (h, w, C) at n positions (row, column) within [0, h - 1] and [0, w - 1] -> (n, C)."""
    first = np.floor(positions).astype(np.intp)
    last = np.minimum(first + 1, np.array(values.shape[:2]) - 1)
    share = (positions - first).astype(np.float32)
    result = np.zeros((len(positions), values.shape[-1]), np.float32)
    for rows, down in ((first[:, 0], 1 - share[:, 0]), (last[:, 0], share[:, 0])):
        for columns, across in ((first[:, 1], 1 - share[:, 1]), (last[:, 1], share[:, 1])):
            result += (down * across)[:, None] * values[rows, columns].astype(np.float32)
    return result
