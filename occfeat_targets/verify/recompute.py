"""Checks of one keyframe of a cache: each recomputes some of its arrays with slow, independent code and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.cache.store import Cache
from occfeat_targets.common.plural import count
from occfeat_targets.sources.keyframe import CameraView, Keyframe, broken_view
from occfeat_targets.targets.corrupted_views import downloaded_folder
from occfeat_targets.targets.corruptions import lost_cameras
from occfeat_targets.targets.images import load_image_reference
from occfeat_targets.verify.slow_corruptions import load_corrupted_reference
from occfeat_targets.verify.slow_instances import InstanceReference
from occfeat_targets.verify.slow_labels import Reference
from occfeat_targets.verify.slow_lidar import wrong_free_voxels, wrong_occupied_voxels
from occfeat_targets.verify.slow_targets import SlowSource, filled_part, grid_from_ego

MIN_PSNR = 40.0  # [dB], of a cached image to a full decode and resize; scaled decoding reaches 50 and more
MIN_COSINE = 0.99  # mean over tokens; bfloat16 and the scaled decode together give 0.999
MAX_CALIBRATION_ERROR = 1e-3  # [m, px]; float32 storage gives 1e-4

ReadView = Callable[[CameraView, tuple[int, int]], NDArray[np.uint8]]
Checked = Iterator[tuple[bool, str]]  # (is it correct, measurement)


Check = Callable[[CacheReader, int, SlowSource, Keyframe], Checked]


def _reads_sweeps(check: Check) -> Check:
    """A check that lists a damaged sweep and ends, instead of stopping the verification."""

    def listing(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
        try:
            yield from check(reader, keyframe, reference, source)
        except ValueError as err:
            yield False, str(err)

    return listing


def without_masked(source: Keyframe, is_seen: NDArray[np.bool_]) -> Keyframe:
    """The keyframe with a problem in each view that the cache masks."""
    views = zip(source.cameras, is_seen, strict=True)
    return replace(source, cameras=tuple(view if seen else broken_view("masked") for view, seen in views))


def _frames(spec: TargetSpec, source: Keyframe) -> list[NDArray[np.float64]]:
    """(4, 4) of each reference frame, zeros for those of masked cameras."""
    masked = {name for name, view in zip(spec.cameras, source.cameras, strict=True) if view.problem is not None}
    return [
        np.zeros((4, 4)) if frame in masked else grid_from_ego(source, frame, spec.cameras) for frame in spec.frames
    ]


def _views(source: Keyframe) -> list[tuple[int, CameraView]]:
    """(index, view) of each camera that is not masked."""
    return [(i, view) for i, view in enumerate(source.cameras) if view.problem is None]


def _masked(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    """Everything of masked cameras is zero."""
    spec = reader.cache.spec
    cameras = [i for i, view in enumerate(source.cameras) if view.problem is not None]
    if not cameras:
        return
    of = {"camera": cameras, "frame": [i for i, frame in enumerate(spec.frames) if frame in _names(spec, cameras)]}
    indexed = [(array.name, of[array.dims[0]]) for array in spec.arrays() if array.dims and array.dims[0] in of]
    filled = [name for name, masked in indexed if reader.read(name, keyframe)[masked].any()]
    text = count(len(cameras), "masked camera") + (f", but their {', '.join(filled)} are not zero" if filled else "")
    yield not filled, text


def _names(spec: TargetSpec, cameras: Sequence[int]) -> list[str]:
    return [spec.cameras[i] for i in cameras]


def _calibration(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    expected: dict[str, Any] = {"grid_from_ego": _frames(spec, source)}
    found = {"grid_from_ego": reader.read("grid_from_ego", keyframe)}
    for i, view in _views(source):
        top, left, bottom, right = area = filled_part(view.source_size, spec.image_size, spec.image_size)
        scale_y, scale_x = (bottom - top) / view.source_size[0], (right - left) / view.source_size[1]
        intrinsics = np.array([[scale_x, 0, left], [0, scale_y, top], [0, 0, 1]]) @ view.intrinsics
        for name, value in (("image_area", area), ("intrinsics", intrinsics), ("cam_from_ego", view.cam_from_ego)):
            expected[f"{name} {i}"], found[f"{name} {i}"] = value, reader.read(name, keyframe)[i]
    worst = max(float(np.abs(found[name] - np.array(value)).max()) for name, value in expected.items())
    yield worst <= MAX_CALIBRATION_ERROR, f"calibration within {worst:.1e}"


@_reads_sweeps
def _occupancy(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    volumes = spec.grid.unpack_volume(reader.read("occupancy", keyframe))
    wrong = 0
    for volume, frame in zip(volumes, _frames(spec, source), strict=True):
        if frame.any():
            wrong += wrong_occupied_voxels(reference, source, frame, spec, volume)
    yield wrong == 0, f"{int(volumes.sum())} occupied voxels, {count(wrong, 'voxel')} wrong"


@_reads_sweeps
def _rays(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    if not spec.rays:
        return
    rays, origins = (reader.read(name, keyframe) for name in ("rays", "ray_origin"))
    occupied = spec.grid.unpack_volume(reader.read("occupancy", keyframe))
    observed, free = spec.grid.unpack_volume(rays).swapaxes(0, 1)
    wrong = int((observed != (free | occupied)).sum() + (free & occupied).sum())
    worst = 0.0
    for i, frame in enumerate(_frames(spec, source)):
        if frame.any():
            origin = (frame @ source.sweeps[0].ego_from_sensor)[:3, 3]
            worst = max(worst, float(np.abs(origins[i] - origin).max()))
            wrong += wrong_free_voxels(reference, source, frame, spec, free[i], occupied[i])
    is_good = wrong == 0 and worst <= MAX_CALIBRATION_ERROR
    yield is_good, f"{int(free.sum())} free voxels, {wrong} bits of rays wrong, their origin within {worst:.1e}"


def _images(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    cached, size = reader.read("images", keyframe), reader.cache.spec.image_size
    read, worst = _read_student(reader.cache, source), np.inf
    for i, view in _views(source):
        area = filled_part(view.source_size, size, size)
        full, image = (
            _part(values, area) for values in (_fitted(view, size, size, read), cached[i].astype(np.float64))
        )
        error = float(np.mean((image - full) ** 2))
        worst = min(worst, 10 * np.log10(255**2 / error) if error else np.inf)
        if cached[i].sum(dtype=np.int64) != image.sum():
            yield False, f"the image of {reader.cache.spec.cameras[i]} is not black outside of its area"
    yield worst >= MIN_PSNR, f"images at {worst:.1f} dB of full decoding"


def _read_clean(view: CameraView, size: tuple[int, int]) -> NDArray[np.uint8]:
    return load_image_reference(view.path, [size])[0]


def _read_student(cache: Cache, source: Keyframe) -> ReadView:
    """How the student images of a keyframe are recomputed: corrupted, if the cache's are."""
    corruption = cache.spec.corruption
    if corruption is None:
        return _read_clean
    root = cache.provenance["nuscenes_c"]
    folder = None if root is None else downloaded_folder(Path(root), corruption)
    lost = lost_cameras(corruption, [view.path for view in source.cameras])
    lost_files = [view.path for view, is_lost in zip(source.cameras, lost, strict=True) if is_lost and folder is None]

    def read(view: CameraView, size: tuple[int, int]) -> NDArray[np.uint8]:
        if view.path in lost_files:
            return np.zeros((*size, 3), np.uint8)
        path = view.path if folder is None else folder / view.path.parent.name / view.path.name
        return load_corrupted_reference(path, size, corruption)

    return read


def _fitted(
    view: CameraView, size: tuple[int, int], student_size: tuple[int, int], read: ReadView = _read_clean
) -> NDArray[np.uint8]:
    """(size, 3) image of a view, fully decoded, with black borders."""
    top, left, bottom, right = area = filled_part(view.source_size, size, student_size)
    out = np.zeros((*size, 3), np.uint8)
    _part(out, area)[:] = read(view, (bottom - top, right - left))
    return out


def _part(image: NDArray[Any], area: list[int]) -> NDArray[Any]:
    top, left, bottom, right = area
    return image[top:bottom, left:right]


def _features(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    if spec.teacher is None:
        return
    from occfeat_targets.targets.teacher import load_teacher

    teacher = load_teacher(replace(spec.teacher, dtype="float32"))
    images = [_fitted(view, spec.teacher.input_size, spec.image_size) for _, view in _views(source)]
    expected = np.concatenate([teacher(image[None]) for image in images])
    is_seen = reader.read("camera_valid", keyframe)
    cached = reader.read_features(keyframe)[is_seen].astype(np.float32)
    cosine = (expected * cached).sum(-1) / (np.linalg.norm(expected, axis=-1) * np.linalg.norm(cached, axis=-1) + 1e-12)
    mean = float(cosine.mean())
    yield mean >= MIN_COSINE, f"features at cosine {mean:.5f} of float32 (worst token {float(cosine.min()):.5f})"
    ratio = float(np.linalg.norm(cached) / np.linalg.norm(expected))
    yield abs(ratio - 1) < 0.01, f"norm ratio {ratio:.4f}"


def _labels(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    kinds = [LABEL_KINDS[name] for name in spec.labels]
    needs_maps = any("maps" in kind.needs for kind in kinds)
    geometry = reference.read_map(source.location) if needs_maps else None
    wrong = 0
    for kind in kinds:
        draw: Reference = resolve_name(kind.reference)
        cached_masks, cached_valid = reader.read_labels(kind, keyframe)
        for i, frame in enumerate(_frames(spec, source)):
            if not frame.any():
                continue
            masks, is_valid, is_decided = draw(source, spec, frame, geometry)
            wrong += int(((cached_masks[i] != masks) & is_decided).sum())
            if cached_valid is not None:
                wrong += int(((cached_valid[i] != is_valid) & is_decided).sum())
    if spec.labels:
        yield wrong == 0, f"{count(wrong, 'label cell')} wrong"


def _instances(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    wrong = 0
    for kind in (LABEL_KINDS[name] for name in spec.labels):
        if not spec.instances or kind.instances_reference is None:
            continue
        draw: InstanceReference = resolve_name(kind.instances_reference)
        distances, offsets = (reader.read(name, keyframe) for name in (kind.center_array, kind.offset_array))
        for i, frame in enumerate(_frames(spec, source)):
            if frame.any():
                expected = draw(source, spec, frame)
                wrong += int(((distances[i] != expected.squared_distance) & expected.has_known_distance).sum())
                wrong += int(((offsets[i] != expected.offset) & expected.has_known_offset).any(axis=0).sum())
    if spec.instances:
        yield wrong == 0, f"centres or offsets of instances wrong in {count(wrong, 'cell')}"


@_reads_sweeps
def _points(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    if not spec.max_points:
        return
    points = reader.points(keyframe)
    expected = []
    for number, sweep in enumerate(source.sweeps):
        for x, y, z, intensity, *_ in reference.read_returns(sweep.path).tolist():
            if max(abs(x), abs(y)) >= spec.ego_box:
                expected.append([*(sweep.ego_from_sensor @ [x, y, z, 1])[:3], intensity, number])
    found = np.column_stack([points.xyz, points.intensity, points.sweep])
    if found.shape != np.shape(expected):
        yield False, f"{count(len(found), 'LiDAR point')}, {len(expected)} expected"
        return
    errors = [np.nan_to_num(found) - np.nan_to_num(expected)]
    errors += [points.origins - [sweep.ego_from_sensor[:3, 3] for sweep in source.sweeps]]
    errors += [points.times - [sweep.seconds for sweep in source.sweeps]]
    worst = max(float(np.abs(error).max()) for error in errors)
    yield worst <= MAX_CALIBRATION_ERROR, f"{count(len(found), 'LiDAR point')} within {worst:.1e}"


CHECKS = (_masked, _calibration, _occupancy, _rays, _points, _images, _features, _labels, _instances)
