"""Keyframes of a data set: paths, transforms, boxes. Plain values, small enough to be sent to workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix


class DatasetError(ValueError):
    """A dataroot that lacks the requested data. The message says what was found and what to do."""


def require_dataroot(root: Path) -> None:
    """Raises DatasetError if there is no such directory."""
    if not root.is_dir():
        raise DatasetError(
            f"no directory {root}: pass --dataroot, or set NUSCENES_ROOT, to where the data set was unpacked"
        )


@dataclass(frozen=True)
class CameraView:
    """One image of a keyframe. intrinsics: (3, 3) of the source image; source_size: (height, width) [px].

    ego_from_cam: the calibration. cam_from_ego: from the ego frame at LiDAR time to this camera at its own timestamp.
    problem: why this view cannot be used; then the other values may be anything, see `broken_view`.
    """

    path: Path
    source_size: tuple[int, int]
    intrinsics: Matrix
    ego_from_cam: Matrix
    cam_from_ego: Matrix
    problem: str | None = None


def broken_view(problem: str) -> CameraView:
    """A view without a record or without a calibration. problem: why, and what to do."""
    return CameraView(Path(), (1, 1), np.zeros((3, 3)), np.zeros((4, 4)), np.zeros((4, 4)), problem)


@dataclass(frozen=True)
class Sweep:
    """One LiDAR sweep. ego_from_sensor: to the ego frame of the keyframe, through the global frame.

    seconds: time of the sweep relative to the keyframe's own sweep; negative for earlier ones.
    """

    path: Path
    ego_from_sensor: Matrix
    seconds: float = 0.0


@dataclass(frozen=True)
class Track:
    """An annotated object at the keyframe and before, for `targets.moving`. half_size: (3,) [m] along its own x, y, z.

    seconds: (k,) times relative to the keyframe, descending from 0. rotations: (k, 4) quaternions (w, x, y, z) and translations:
    (k, 3) [m] of global_from_box at these times.
    """

    half_size: NDArray[np.float64]
    seconds: NDArray[np.float64]
    rotations: NDArray[np.float64]
    translations: NDArray[np.float64]


@dataclass(frozen=True)
class Keyframe:
    """Everything a worker needs of one sample.

    cameras: in the requested order. sweeps: the keyframe's own first, then backwards in time.
    vehicle_corners: (n, 8, 3) in the ego frame at LiDAR time [m], in the devkit's corner order; visibility: (n,) 1..4.
    tracks: annotated objects of every kind that were annotated before, too; only if they are asked for.
    problem: why this keyframe cannot be built even with masked cameras, if the tables show it; then cameras and sweeps are empty.
    """

    token: str
    scene: str
    timestamp_us: int
    location: str
    global_from_ego: Matrix = field(default_factory=lambda: np.eye(4))
    cameras: tuple[CameraView, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    vehicle_corners: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 8, 3)))
    visibility: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    tracks: tuple[Track, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Split:
    """The keyframes of a split. missing_scenes: scenes of the split that are not in this data set.

    left_out_scenes: scenes in this data set that were not chosen. locations: map names. has_annotations: false for the
    test set. is_synthetic: made by 'occfeat-targets synth'. tables: files, besides maps, that all this was read from. If one changes,
    a build reads them again. table_order: the split's scenes in the order of the data set's own table; empty if it has none.
    """

    name: str
    version: str
    dataroot: Path
    keyframes: tuple[Keyframe, ...]
    missing_scenes: tuple[str, ...]
    locations: tuple[str, ...]
    has_annotations: bool
    is_synthetic: bool
    left_out_scenes: tuple[str, ...] = ()
    tables: tuple[Path, ...] = ()
    table_order: tuple[str, ...] = ()
