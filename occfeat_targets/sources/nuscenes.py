"""nuScenes through its devkit: from a split to a list of keyframes with all paths and transforms.

This is the only module that imports the devkit. Tables are read once, when a build is planned. The results are small, need
no tables, and can be sent to workers.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, rigid, rotation_matrix
from occfeat_targets.cache.spec import CAMERAS, EGO_BOX
from occfeat_targets.sources.keyframe import CameraView, DatasetError, Keyframe, Split, Sweep, broken_view
from occfeat_targets.sources.map_geometry import MapGeometry, map_classes
from occfeat_targets.sources.sweeps import read_sweep
from occfeat_targets.sources.tables import Record, describe_broken_table, get_record

LIDAR = "LIDAR_TOP"
SYNTHETIC_VEHICLE = "occfeat-synthetic-city"
_VERSIONS_OF_SPLIT = {"mini_train": "v1.0-mini", "mini_val": "v1.0-mini", "test": "v1.0-test"}


class NuScenes:
    """nuScenes, or a data set in its format such as the synthetic city; see `sources.source.Source`."""

    cameras = CAMERAS
    slow_reader = "occfeat_targets.verify.slow_nuscenes:read_slow_source"
    max_returns = 40_000  # nuScenes' sweeps have about 34,700
    ego_box = EGO_BOX

    def read_split(self, root: Path, split: str, *, version: str | None, num_sweeps: int, with_boxes: bool) -> Split:
        return read_split(
            root, split, version=version, cameras=self.cameras, num_sweeps=num_sweeps, with_boxes=with_boxes
        )

    def read_sweep(self, path: Path) -> NDArray[np.float32]:
        return read_sweep(path)

    def why_no_maps(self, split: Split) -> str | None:
        files = [self.map_file(split, location) for location in split.locations]
        missing = [str(file) for file in files if not file.is_file()]
        if not missing:
            return None
        some = f" (map labels need all {len(files)}, and the others are there)" if len(missing) < len(files) else ""
        where = split.dataroot / "maps"
        return f"no map expansion {', '.join(missing)}{some}: unpack nuScenes-map-expansion-v1.3.zip into {where}"

    def map_file(self, split: Split, location: str) -> Path:
        return map_file(split.dataroot, location)

    def read_map(self, split: Split, location: str, dividers: str) -> MapGeometry:
        return read_map(split.dataroot, location, dividers)


def find_dataroot(root: Path, split: str, version: str | None) -> tuple[Path, str]:
    """(dataroot for the devkit, version) for both layouts: root/v1.0-trainval and root/trainval/v1.0-trainval.

    Raises DatasetError that names the versions found under `root`.
    """
    if not root.is_dir():
        raise DatasetError(
            f"no directory {root}: pass --dataroot, or set NUSCENES_ROOT, to where nuScenes was unpacked"
        )
    found = {p.name: p.parent for p in [*root.glob("*/v1.0-*"), *root.glob("v1.0-*")] if (p / "sample.json").is_file()}
    if version is None:
        usual = _VERSIONS_OF_SPLIT.get(split, "v1.0-trainval")
        version = usual if usual in found or len(found) != 1 else next(iter(found))
    elif not version.startswith("v1.0-"):
        version = f"v1.0-{version}"
    if version not in found:
        raise DatasetError(
            f"{root} holds no {version} (found: {', '.join(sorted(found)) or 'no nuScenes tables at all'}): "
            f"expected the tables in {root / version} or {root / version.removeprefix('v1.0-') / version}; "
            "correct --dataroot, or choose an existing version with --version and --split"
        )
    return found[version], version


def read_split(
    root: Path, split: str, *, version: str | None, cameras: Sequence[str], num_sweeps: int, with_boxes: bool
) -> Split:
    """Load the tables and compute all keyframes of a split, in the split's scene order, then by time.

    Problems of single keyframes (no sweep, a NaN in the LiDAR's pose) and views are recorded in them.
    Raises DatasetError if the data set has no scene of the split, or its tables do not load.
    """
    _require_devkit()
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.splits import create_splits_scenes

    dataroot, version = find_dataroot(root, split, version)
    splits = create_splits_scenes()
    if split not in splits:
        raise DatasetError(f"no split {split!r}: the devkit knows {', '.join(splits)}")
    try:
        nusc = NuScenes(version, str(dataroot), verbose=False)
    except Exception as err:  # the devkit raises bare Exception for old tables
        broken = describe_broken_table(dataroot / version) or (
            f"{type(err).__name__}: {err}. A record that another table refers to, or a key of a record is missing"
        )
        raise DatasetError(f"the tables of {dataroot / version} do not load: {broken}: re-extract the tables") from err
    scenes = {scene["name"]: scene for scene in (get_record(nusc, "scene", scene["token"]) for scene in nusc.scene)}
    present = [name for name in splits[split] if name in scenes]
    if not present:
        raise DatasetError(
            f"{dataroot / version} has none of the {len(splits[split])} scenes of split {split!r} "
            f"(it has {', '.join(sorted(scenes)[:5]) or 'no scenes'}...): choose another --split or --version"
        )
    missing = tuple(name for name in splits[split] if name not in scenes)
    logs = {name: get_record(nusc, "log", scenes[name]["log_token"]) for name in present}
    keyframes = tuple(
        _keyframe(nusc, sample, name, logs[name]["location"], cameras, num_sweeps, with_boxes)
        for name in present
        for sample in _samples(nusc, scenes[name])
    )
    has_annotations = bool(nusc.sample_annotation)
    del nusc, scenes
    gc.collect()  # the devkit's tables are reference cycles: without this, gigabytes would stay in memory for the whole build
    return Split(
        name=split,
        version=version,
        dataroot=dataroot,
        keyframes=keyframes,
        missing_scenes=missing,
        locations=tuple(sorted({k.location for k in keyframes})),
        has_annotations=has_annotations,
        is_synthetic=any(log.get("vehicle") == SYNTHETIC_VEHICLE for log in logs.values()),
    )


def read_map(dataroot: Path, location: str, dividers: str) -> MapGeometry:
    """The map expansion of a location. Raises DatasetError if it is missing or too old."""
    _require_devkit()
    from nuscenes.map_expansion.map_api import NuScenesMap

    try:
        return MapGeometry.from_tables(NuScenesMap(str(dataroot), location), map_classes(dividers))
    except FileNotFoundError as err:
        raise DatasetError(
            f"no map expansion {map_file(dataroot, location)}: unpack nuScenes-map-expansion-v1.3.zip into "
            f"{dataroot / 'maps'}, or build without map labels (--label-kinds vehicles)"
        ) from err
    except Exception as err:  # the devkit raises bare Exception for an old map
        raise DatasetError(f"the map expansion {map_file(dataroot, location)} does not load: {err}") from err


def _require_devkit() -> None:
    """Raise DatasetError where the extra `targets` cannot have installed the devkit."""
    if sys.version_info >= (3, 13) and find_spec("nuscenes") is None:
        raise DatasetError(
            "nuScenes needs the package nuscenes-devkit, which asks for NumPy 1, and Python 3.13 has only NumPy 2: run "
            "'pip install --no-deps nuscenes-devkit' (it works with NumPy 2), or use Python 3.11 or 3.12"
        )


def map_file(dataroot: Path, location: str) -> Path:
    return dataroot / "maps" / "expansion" / f"{location}.json"


def _samples(nusc: Any, scene: Record) -> Iterator[Record]:
    token = scene["first_sample_token"]
    while token:
        sample = get_record(nusc, "sample", token)
        yield sample
        token = sample["next"]


def _keyframe(
    nusc: Any, sample: Record, scene: str, location: str, cameras: Sequence[str], num_sweeps: int, with_boxes: bool
) -> Keyframe:
    identity = {"token": sample["token"], "scene": scene, "timestamp_us": sample["timestamp"], "location": location}
    try:
        lidar = _sample_data(nusc, sample, LIDAR)
        global_from_ego = _pose(_referred(nusc, "ego_pose", lidar))
        ego_from_global = inverse_rigid(global_from_ego)
        views = tuple(_view(nusc, sample, name, global_from_ego) for name in cameras)
        sweeps = []
        for record in _backwards(nusc, lidar, num_sweeps):
            pose, calibration = (_referred(nusc, table, record) for table in ("ego_pose", "calibrated_sensor"))
            seconds = (record["timestamp"] - lidar["timestamp"]) / 1e6
            global_from_sensor = _pose(pose) @ _pose(calibration)
            sweeps.append(Sweep(_path(nusc, record), ego_from_global @ global_from_sensor, seconds))
        corners, visibility = _vehicles(nusc, sample, ego_from_global) if with_boxes else (np.zeros((0, 8, 3)), [])
    except ValueError as err:
        return Keyframe(**identity, problem=str(err))
    return Keyframe(
        **identity,
        global_from_ego=global_from_ego,
        cameras=views,
        sweeps=tuple(sweeps),
        vehicle_corners=corners,
        visibility=np.array(visibility, np.uint8),
    )


def _sample_data(nusc: Any, sample: Record, channel: str) -> Record:
    if channel not in sample["data"]:
        raise ValueError(
            f"sample_data.json has no keyframe record of {channel}: re-extract the tables, or skip the sample"
        )
    return get_record(nusc, "sample_data", sample["data"][channel])


def _path(nusc: Any, record: Record) -> Path:
    return Path(nusc.dataroot) / record["filename"]


def _referred(nusc: Any, table: str, sample_data: Record) -> Record:
    """The record in `table` that a sample_data record refers to."""
    return get_record(nusc, table, sample_data[f"{table}_token"], sample_data["filename"])


def _pose(record: Record) -> Matrix:
    """global_from_ego of a record of ego_pose, ego_from_sensor of one of calibrated_sensor."""
    rotation, translation = record["rotation"], record["translation"]
    try:
        return rigid(rotation, translation)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{record.place}: {err}; re-extract the tables") from err


def _view(nusc: Any, sample: Record, channel: str, global_from_ego: Matrix) -> CameraView:
    try:
        return _usable_view(nusc, _sample_data(nusc, sample, channel), global_from_ego)
    except ValueError as err:
        return broken_view(str(err))


def _usable_view(nusc: Any, record: Record, global_from_ego: Matrix) -> CameraView:
    calibration, pose = (_referred(nusc, table, record) for table in ("calibrated_sensor", "ego_pose"))
    ego_from_cam = _pose(calibration)
    global_from_cam = _pose(pose) @ ego_from_cam
    size = record["height"], record["width"]
    if not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"{record.place}: height and width of {record['filename']} are {size}: expected whole numbers above 0; "
            "re-extract the tables"
        )
    values = calibration["camera_intrinsic"]
    try:
        intrinsics = np.asarray(values, np.float64)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{calibration.place}: camera_intrinsic: {err}; re-extract the tables") from err
    if intrinsics.shape != (3, 3) or not np.isfinite(intrinsics).all() or not (np.diagonal(intrinsics)[:2] > 0).all():
        raise ValueError(
            f"calibrated_sensor.json: intrinsics {intrinsics.tolist()} of {record['filename']} are not those of a pinhole camera"
        )
    return CameraView(
        path=_path(nusc, record),
        source_size=size,
        intrinsics=intrinsics,
        ego_from_cam=ego_from_cam,
        cam_from_ego=inverse_rigid(global_from_cam) @ global_from_ego,
    )


def _backwards(nusc: Any, lidar: Record, num_sweeps: int) -> Iterator[Record]:
    """The keyframe's sweep and up to num_sweeps - 1 earlier ones; the first keyframes of a scene have fewer."""
    record = lidar
    yield record
    for _ in range(num_sweeps - 1):
        if not record["prev"]:
            return
        record = get_record(nusc, "sample_data", record["prev"])
        yield record


def _vehicles(nusc: Any, sample: Record, ego_from_global: Matrix) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Corners and visibility of all annotations whose category contains "vehicle" (also bicycles), as in Simple-BEV."""
    boxes = [get_record(nusc, "sample_annotation", token) for token in sample["anns"]]
    boxes = [box for box in boxes if "vehicle" in box["category_name"]]
    corners = np.zeros((len(boxes), 8, 3))
    # The devkit's order (Box.corners): four of the front face, four of the back, each from the top left clockwise.
    signs = np.array(
        [[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1], [-1, 1, 1], [-1, -1, 1], [-1, -1, -1], [-1, 1, -1]]
    )
    for i, box in enumerate(boxes):
        width, length, height = box["size"]
        local = 0.5 * signs * np.array([length, width, height])
        corners[i] = local @ rotation_matrix(box["rotation"]).T + np.asarray(box["translation"])
    if not np.isfinite(corners).all():
        raise ValueError("sample_annotation.json has a box that is not finite: re-extract the tables")
    visibility = np.array([_visibility(box) for box in boxes], np.uint8)
    return corners @ ego_from_global[:3, :3].T + ego_from_global[:3, 3], visibility


def _visibility(box: Record) -> int:
    """1 to 4. A box without a visibility token counts as visible."""
    token = box.get("visibility_token") or "4"
    if str(token) not in ("1", "2", "3", "4"):
        raise ValueError(f"{box.place}: visibility_token is {token!r}: 1 to 4 expected; re-extract the tables")
    return int(token)
