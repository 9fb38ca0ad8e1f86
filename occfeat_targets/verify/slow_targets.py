"""A data set as `verify` sees it, and slow, independent computation of calibration and image areas.

`verify` shares no step with the fast path: float64 NumPy instead of compiled kernels, full JPEG decodes instead of scaled ones. It
shares only definitions: keyframes, the grid, and the axes of its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.spec import EGO_FRAME, TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.sources.source import Source


@dataclass(frozen=True)
class SlowSource:
    """A data set as `verify` sees it.

    keyframes: {sample token: keyframe}. read_returns: path of a sweep -> (n, 4 or more) x, y, z [m], intensity; raises
    ValueError if the file is no sweep. read_map: location -> its map.
    """

    keyframes: Mapping[str, Keyframe]
    read_returns: Callable[[Path], NDArray[Any]]
    read_map: Callable[[str], MapGeometry]


def as_slow_source(source: Source, root: Path, split: str, version: str, spec: TargetSpec) -> SlowSource:
    """The data set through its own class, for a source without a slow reader: an error of that class is not found."""
    tracks: dict[str, bool] = {"with_tracks": True} if spec.uses_boxes else {}
    read = source.read_split(root, split, version=version, num_sweeps=spec.num_sweeps, with_boxes=True, **tracks)
    return SlowSource(
        {keyframe.token: keyframe for keyframe in read.keyframes},
        source.read_sweep,
        cache(lambda location: source.read_map(read, location, spec.dividers)),
    )


def grid_from_ego(keyframe: Keyframe, frame: str, cameras: Sequence[str]) -> Matrix:
    """(4, 4): (right, forward, up) of a reference frame's grid; the design's definition, written out."""
    if frame == EGO_FRAME:  # (-y, x, z - 0.5)
        return np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, -0.5], [0, 0, 0, 1]], np.float64)
    cam_from_ego = np.linalg.inv(keyframe.cameras[list(cameras).index(frame)].ego_from_cam)
    return np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1], [0, 0, 0, 1]], np.float64) @ cam_from_ego


def filled_part(source_size: tuple[int, int], size: tuple[int, int], student_size: tuple[int, int]) -> list[int]:
    """[top, left, bottom, right] [px] of an image of `size` that a camera fills: the design's definition, written out.

    The part is chosen in the student's image and covers the same fractions of any other, to the nearest pixel.
    """
    aspect, wanted = Fraction(source_size[1], source_size[0]), Fraction(student_size[1], student_size[0])
    part = [0, 0, *student_size]
    if 100 * aspect > 105 * wanted:  # too wide: black above and below
        used = round(student_size[1] / aspect)
        part = [(student_size[0] - used) // 2, 0, (student_size[0] - used) // 2 + used, student_size[1]]
    elif 100 * wanted > 105 * aspect:  # too narrow: black left and right
        used = round(student_size[0] * aspect)
        part = [0, (student_size[1] - used) // 2, student_size[0], (student_size[1] - used) // 2 + used]
    return [round(side * size[i % 2] / student_size[i % 2]) for i, side in enumerate(part)]
