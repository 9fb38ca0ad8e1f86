"""The targets of one keyframe except teacher features: calibration, images, occupancy and labels, as cached.

This is the target side of the paper's Figure 2: from a keyframe's files and transforms to arrays.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import (
    GRID_FROM_CAMERA_AXES,
    GRID_FROM_EGO_AXES,
    Area,
    Matrix,
    fit,
    fit_intrinsics,
    inverse_rigid,
    scale_area,
)
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import EGO_FRAME, TargetSpec
from occfeat_targets.sources.keyframe import CameraView, Keyframe
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.sources.source import open_source
from occfeat_targets.targets.images import letterbox, load_image
from occfeat_targets.targets.instances import DrawInstances
from occfeat_targets.targets.labels import Draw
from occfeat_targets.targets.lidar import lidar_arrays
from occfeat_targets.targets.points import points_of

Seconds = MutableMapping[str, float]


class KeyframeError(ValueError):
    """A keyframe that cannot be built. The message names sample, scene, file and remedy."""


@dataclass(frozen=True)
class KeyframeTargets:
    """arrays: {name: one keyframe of that array}, without features. teacher_images: (cams, H, W, 3) uint8, or None.

    masked: {camera: why it was masked}.
    """

    arrays: Mapping[str, NDArray[Any]]
    teacher_images: NDArray[np.uint8] | None
    masked: Mapping[str, str]


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def grids_from_ego(keyframe: Keyframe, spec: TargetSpec) -> Matrix:
    """(F, 4, 4): from the ego frame at LiDAR time to (right, forward, up) of each reference frame's grid.

    Zeros for the frame of a camera whose view has a problem: it has no grid.
    """
    grids = np.zeros((len(spec.frames), 4, 4))
    for grid, name in zip(grids, spec.frames, strict=True):
        if name == EGO_FRAME:
            grid[:] = GRID_FROM_EGO_AXES
        elif (view := keyframe.cameras[spec.cameras.index(name)]).problem is None:
            grid[:] = GRID_FROM_CAMERA_AXES @ inverse_rigid(view.ego_from_cam)
    return grids


def build_keyframe(
    keyframe: Keyframe,
    spec: TargetSpec,
    maps: Mapping[str, MapGeometry],
    seconds: Seconds,
    *,
    mask_cameras: bool = False,
) -> KeyframeTargets:
    """Read a keyframe's files and compute its targets.

    maps: {location: geometry that covers the keyframe}. seconds: the time of each stage is added to it. mask_cameras: mask
    views that cannot be used, as long as one can.
    Raises KeyframeError that names the sample, the file and the problem.
    """
    try:
        if keyframe.problem is not None:
            raise ValueError(keyframe.problem)
        with timed(seconds, "images"):
            keyframe, images = _images(keyframe, spec, mask_cameras)
        frames = grids_from_ego(keyframe, spec)
        has_grid = frames.any(axis=(1, 2))
        with timed(seconds, "occupancy"):
            source = open_source(spec.source)
            returns = [source.read_sweep(sweep.path) for sweep in keyframe.sweeps]
            of_lidar = lidar_arrays(keyframe, returns, spec, frames[has_grid])
            points = {}
            if spec.max_points:
                of_all = points_of(keyframe, returns, spec.ego_box)
                points = of_all.to_arrays(spec.max_points, spec.num_sweeps)
        with timed(seconds, "labels"):
            labels = _labels(keyframe, spec, frames[has_grid], maps)
    except (ValueError, OSError) as err:
        raise KeyframeError(f"sample {keyframe.token} of {keyframe.scene}: {err}") from err
    in_grids = {**of_lidar, **labels}
    arrays = {
        "is_valid": np.array(True),
        "grid_from_ego": frames.astype(np.float32),
        **_calibration(keyframe, spec),
        "images": np.stack([sizes[0] for sizes in images]),
        **{name: _in_all_frames(values, has_grid) for name, values in in_grids.items()},
        **points,
    }
    teacher_images = None if spec.teacher is None else np.stack([sizes[1] for sizes in images])
    problems = zip(spec.cameras, (view.problem for view in keyframe.cameras), strict=True)
    return KeyframeTargets(arrays, teacher_images, {name: problem for name, problem in problems if problem is not None})


def _images(
    keyframe: Keyframe, spec: TargetSpec, mask_cameras: bool
) -> tuple[Keyframe, list[tuple[NDArray[np.uint8], ...]]]:
    """The keyframe with a problem noted in each masked view, and the images of each view, for student and teacher."""
    sizes = image_sizes(spec)
    views, images = [], []
    for view in keyframe.cameras:
        try:
            if view.problem is not None:
                raise ValueError(view.problem)
            images.append(_load_fitted(view, sizes))
        except (ValueError, OSError) as err:
            if not mask_cameras:
                raise
            view = replace(view, problem=str(err))
            images.append(tuple(np.zeros((*size, 3), np.uint8) for size in sizes))
        views.append(view)
    if all(view.problem is not None for view in views):
        raise ValueError(f"none of its {len(views)} cameras can be used; the first: {views[0].problem}")
    return replace(keyframe, cameras=tuple(views)), images


def image_sizes(spec: TargetSpec) -> list[tuple[int, int]]:
    """(height, width) [px] of the student's images, and of the teacher's if there is one."""
    return [spec.image_size] if spec.teacher is None else [spec.image_size, spec.teacher.input_size]


def fitted_areas(source_size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[Area]:
    """The part of an image of each size that a view fills: chosen in the first size, the same part of the others."""
    area = fit(source_size, sizes[0])
    return [scale_area(area, sizes[0], size) for size in sizes]


def fitted_sizes(source_size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(height, width) [px] of these parts."""
    return [(bottom - top, right - left) for top, left, bottom, right in fitted_areas(source_size, sizes)]


def _load_fitted(view: CameraView, sizes: Sequence[tuple[int, int]]) -> tuple[NDArray[np.uint8], ...]:
    """The view's image fitted into the first size, and into the others with the same part of them filled."""
    areas = fitted_areas(view.source_size, sizes)
    loaded = load_image(view.path, fitted_sizes(view.source_size, sizes), expected_size=view.source_size)
    return tuple(letterbox(part, used, size) for part, used, size in zip(loaded, areas, sizes, strict=True))


def _calibration(keyframe: Keyframe, spec: TargetSpec) -> dict[str, NDArray[Any]]:
    """Calibration, area and validity of each camera; zeros for masked ones."""
    cams = len(keyframe.cameras)
    intrinsics, cam_from_ego = np.zeros((cams, 3, 3)), np.zeros((cams, 4, 4))
    areas, is_valid = np.zeros((cams, 4), np.int32), np.zeros(cams, np.bool_)
    for i, view in enumerate(keyframe.cameras):
        if view.problem is None:
            area = fit(view.source_size, spec.image_size)
            areas[i], is_valid[i] = area, True
            intrinsics[i] = fit_intrinsics(view.intrinsics, view.source_size, area)
            cam_from_ego[i] = view.cam_from_ego
    return {
        "camera_valid": is_valid,
        "image_area": areas,
        "intrinsics": intrinsics.astype(np.float32),
        "cam_from_ego": cam_from_ego.astype(np.float32),
    }


def _in_all_frames(values: NDArray[Any], has_grid: NDArray[np.bool_]) -> NDArray[Any]:
    """(frames with a grid, ...) -> (F, ...), zeros in frames without one."""
    out = np.zeros((len(has_grid), *values.shape[1:]), values.dtype)
    out[has_grid] = values
    return out


def _labels(
    keyframe: Keyframe, spec: TargetSpec, frames: Matrix, maps: Mapping[str, MapGeometry]
) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for kind in (LABEL_KINDS[name] for name in spec.labels):
        draw: Draw = resolve_name(kind.draw)
        drawn = [draw(keyframe, spec, frame, maps.get(keyframe.location)) for frame in frames]
        masks = np.stack([masks.reshape(*kind.class_shape, *spec.grid.map_shape) for masks, _ in drawn])
        arrays[kind.array] = spec.grid.pack_map(masks)
        if kind.valid_array is not None:
            is_valid = np.stack([valid for _, valid in drawn if valid is not None])
            arrays[kind.valid_array] = spec.grid.pack_map(is_valid)
        if spec.instances and kind.instances is not None:
            draw_instances: DrawInstances = resolve_name(kind.instances)
            instances = [draw_instances(keyframe, spec, frame) for frame in frames]
            arrays[kind.center_array] = np.stack([each.squared_distance for each in instances])
            arrays[kind.offset_array] = np.stack([each.offset for each in instances])
    return arrays
