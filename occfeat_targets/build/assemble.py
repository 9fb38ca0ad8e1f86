"""The targets of one keyframe except teacher features: calibration, images, occupancy and labels, as cached.

This is the target side of the paper's Figure 2: from a keyframe's files and transforms to arrays.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import (
    GRID_FROM_CAMERA_AXES,
    GRID_FROM_EGO_AXES,
    Matrix,
    inverse_rigid,
    scale_intrinsics,
)
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import EGO_FRAME, TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.sources.source import open_source
from occfeat_targets.targets.images import load_image
from occfeat_targets.targets.labels import Draw
from occfeat_targets.targets.occupancy import voxelize

Seconds = MutableMapping[str, float]


class KeyframeError(ValueError):
    """A keyframe that cannot be built. The message names sample, scene, file and remedy."""


@dataclass(frozen=True)
class KeyframeTargets:
    """arrays: {name: one keyframe of that array}, without features. teacher_images: (cams, H, W, 3) uint8, or None."""

    arrays: Mapping[str, NDArray[Any]]
    teacher_images: NDArray[np.uint8] | None


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def grids_from_ego(keyframe: Keyframe, spec: TargetSpec) -> Matrix:
    """(F, 4, 4): from the ego frame at LiDAR time to (right, forward, up) of each reference frame's grid."""
    calibration = {
        name: GRID_FROM_CAMERA_AXES @ inverse_rigid(view.ego_from_cam)
        for name, view in zip(spec.cameras, keyframe.cameras, strict=True)
    }
    return np.stack([GRID_FROM_EGO_AXES if name == EGO_FRAME else calibration[name] for name in spec.frames])


def build_keyframe(
    keyframe: Keyframe, spec: TargetSpec, maps: Mapping[str, MapGeometry], seconds: Seconds
) -> KeyframeTargets:
    """Read a keyframe's files and compute its targets.

    maps: {location: geometry that covers the keyframe}. seconds: the time of each stage is added to it.
    Raises KeyframeError that names the sample, the file and the problem.
    """
    try:
        if keyframe.problem is not None:
            raise ValueError(keyframe.problem)
        frames = grids_from_ego(keyframe, spec)
        with timed(seconds, "images"):
            images, teacher_images, intrinsics = _images(keyframe, spec)
        with timed(seconds, "occupancy"):
            occupancy = _occupancy(keyframe, spec, frames)
        with timed(seconds, "labels"):
            labels = _labels(keyframe, spec, frames, maps)
    except (ValueError, OSError) as err:
        raise KeyframeError(f"sample {keyframe.token} of {keyframe.scene}: {err}") from err
    arrays = {
        "is_valid": np.array(True),
        "intrinsics": intrinsics.astype(np.float32),
        "cam_from_ego": np.stack([view.cam_from_ego for view in keyframe.cameras]).astype(np.float32),
        "grid_from_ego": frames.astype(np.float32),
        "images": images,
        "occupancy": occupancy,
        **labels,
    }
    return KeyframeTargets(arrays, teacher_images)


def _images(
    keyframe: Keyframe, spec: TargetSpec
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, NDArray[np.float64]]:
    height, width = spec.image_size
    sizes = [spec.image_size] if spec.teacher is None else [spec.image_size, spec.teacher.input_size]
    resized = [load_image(view.path, sizes, expected_size=view.source_size) for view in keyframe.cameras]
    intrinsics = [
        scale_intrinsics(view.intrinsics, width / view.source_size[1], height / view.source_size[0])
        for view in keyframe.cameras
    ]
    teacher = None if spec.teacher is None else np.stack([images[1] for images in resized])
    return np.stack([images[0] for images in resized]), teacher, np.stack(intrinsics)


def _occupancy(keyframe: Keyframe, spec: TargetSpec, frames: Matrix) -> NDArray[np.uint8]:
    packed = np.zeros((len(frames), spec.grid.packed_bytes), np.uint8)
    source = open_source(spec.source)
    for sweep in keyframe.sweeps:
        grids_from_sensor = frames @ sweep.ego_from_sensor
        voxelize(source.read_sweep(sweep.path), grids_from_sensor, spec.grid, ego_box=spec.ego_box, out=packed)
    if not packed.any():
        raise ValueError(
            f"none of the returns of {keyframe.sweeps[0].path} are inside the grid {spec.grid}: "
            "restore the sweep if it is damaged, or correct --range"
        )
    return packed


def _labels(
    keyframe: Keyframe, spec: TargetSpec, frames: Matrix, maps: Mapping[str, MapGeometry]
) -> dict[str, NDArray[np.uint8]]:
    arrays: dict[str, NDArray[np.uint8]] = {}
    for kind in (LABEL_KINDS[name] for name in spec.labels):
        draw: Draw = resolve_name(kind.draw)
        drawn = [draw(keyframe, spec, frame, maps.get(keyframe.location)) for frame in frames]
        masks = np.stack([masks.reshape(*kind.class_shape, *spec.grid.map_shape) for masks, _ in drawn])
        arrays[kind.array] = spec.grid.pack_map(masks)
        if kind.valid_array is not None:
            is_valid = np.stack([valid for _, valid in drawn if valid is not None])
            arrays[kind.valid_array] = spec.grid.pack_map(is_valid)
    return arrays
