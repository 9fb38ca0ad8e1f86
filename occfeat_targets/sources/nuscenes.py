"""nuScenes: from a split to a list of keyframes with all paths and transforms.

Tables are read once, when a build is planned. The results are small, need no tables, and can be sent to workers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.spec import CAMERAS, EGO_BOX
from occfeat_targets.common.suggest import did_you_mean
from occfeat_targets.sources.keyframe import DatasetError, Split, require_dataroot
from occfeat_targets.sources.map_geometry import MapGeometry, map_classes
from occfeat_targets.sources.nuscenes_keyframes import LIDAR, KeyframeReader
from occfeat_targets.sources.splits import own_splits, split_scenes
from occfeat_targets.sources.sweeps import read_sweep
from occfeat_targets.sources.tables import Record, Tables, read_records

SYNTHETIC_VEHICLE = "occfeat-synthetic-city"
_VERSIONS_OF_SPLIT = {"mini_train": "v1.0-mini", "mini_val": "v1.0-mini", "test": "v1.0-test"}


class NuScenes:
    """nuScenes, or a data set in its format such as the synthetic city; see `sources.source.Source`."""

    cameras = CAMERAS
    slow_reader = "occfeat_targets.verify.slow_nuscenes:read_slow_source"
    max_returns = 40_000  # nuScenes' sweeps have about 34,700
    ego_box = EGO_BOX

    def read_split(
        self,
        root: Path,
        split: str,
        *,
        version: str | None,
        num_sweeps: int,
        with_boxes: bool,
        with_tracks: bool = False,
    ) -> Split:
        return read_split(
            root, split, version=version, cameras=self.cameras, num_sweeps=num_sweeps, with_boxes=with_boxes, with_tracks=with_tracks,
        )  # fmt: skip

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
    """(dataroot, version) for both layouts: root/v1.0-trainval and root/trainval/v1.0-trainval.

    Raises DatasetError that names the versions found under `root`.
    """
    require_dataroot(root)
    if (root / "sample.json").is_file():
        raise DatasetError(f"{root} is the folder of the tables: pass the one above it, {root.parent}, as --dataroot")
    found = {p.name: p.parent for p in [*root.glob("*/v1.0-*"), *root.glob("v1.0-*")] if (p / "sample.json").is_file()}
    if version is None:
        usual = _VERSIONS_OF_SPLIT.get(split, "v1.0-trainval")
        version = usual if usual in found or len(found) != 1 else next(iter(found))
        if version == "v1.0-mini" != usual and split in split_scenes():
            raise DatasetError(
                f"{root} has only v1.0-mini, which holds few scenes of {split}: pass --split mini_train or mini_val, or --version v1.0-mini "
                f"to build those scenes as {split}"
            )
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
    root: Path,
    split: str,
    *,
    version: str | None,
    cameras: Sequence[str],
    num_sweeps: int,
    with_boxes: bool,
    with_tracks: bool = False,
) -> Split:
    """Load the tables and compute all keyframes of a split, in the split's scene order, then by time.

    Problems of single keyframes (no sweep, a NaN in the LiDAR's pose) and views are recorded in them.
    Raises DatasetError if the data set has no scene of the split, or its tables do not load.
    """
    dataroot, version = find_dataroot(root, split, version)
    file = dataroot / version / "splits.json"
    official = split_scenes()
    splits = own_splits(file) | official
    if split not in splits:
        raise DatasetError(
            f"no split {split!r}{did_you_mean(split, splits) or ':'} choose one of {', '.join(splits)}, or list its scenes in {file}"
        )
    tables = Tables(dataroot / version)
    for table in ("scene", "log", "sample", "sensor", "calibrated_sensor"):
        tables.load(table)
    scenes: dict[str, Record] = {}
    for scene in tables.all("scene"):
        if scene["name"] in scenes:
            raise DatasetError(
                f"{scene.place}: the name {scene['name']} is also that of {scenes[scene['name']].place}; re-extract the tables"
            )
        scenes[scene["name"]] = scene
    present = [name for name in splits[split] if name in scenes]
    if not present:
        raise DatasetError(
            f"{dataroot / version} has none of the {len(splits[split])} scenes of split {split!r} "
            f"(it has {', '.join(sorted(scenes)[:5]) or 'no scenes'}...): choose another --split or --version, or list a split of your own "
            f"in {file}"
        )
    missing = tuple(name for name in splits[split] if name not in scenes)
    logs = {name: tables.get("log", scenes[name]["log_token"]) for name in present}
    samples = [(name, sample) for name in present for sample in _samples_of(tables, scenes[name])]
    wanted = {sample["token"] for _, sample in samples}
    files = _load_files(tables, wanted, {LIDAR, *cameras}, num_sweeps)
    has_annotations = any(True for _ in read_records(tables.file("sample_annotation"), may_be_empty=True))
    if with_tracks and not has_annotations:
        raise DatasetError(f"{version} has no annotations, which --dynamic boxes needs: pass --dynamic carve")
    needs_boxes = has_annotations and (with_boxes or with_tracks)
    vehicles, objects = _load_boxes(tables, wanted, with_tracks) if needs_boxes else ({}, {})
    boxes = vehicles if with_boxes else {}
    reader = KeyframeReader(tables, dataroot, files, boxes, objects, tuple(cameras), num_sweeps)
    keyframes = tuple(reader.keyframe(sample, name, logs[name]["location"]) for name, sample in samples)
    return Split(
        name=split,
        version=version,
        dataroot=dataroot,
        keyframes=keyframes,
        missing_scenes=missing,
        locations=tuple(sorted({k.location for k in keyframes})),
        has_annotations=has_annotations,
        is_synthetic=any(log.get("vehicle") == SYNTHETIC_VEHICLE for log in logs.values()),
        tables=tables.files if split in official else (*tables.files, file),
        table_order=tuple(name for name in scenes if name in logs),
    )


def _samples_of(tables: Tables, scene: Record) -> list[Record]:
    """Raises DatasetError if the chain of samples ends before the scene's last one."""
    samples = list(tables.follow("sample", scene["first_sample_token"], "next"))
    if not samples or samples[-1]["token"] != scene["last_sample_token"]:
        raise DatasetError(
            f"{scene.place}: its samples end after {len(samples)}, and not with its last_sample_token; re-extract the tables"
        )
    return samples


def _load_files(
    tables: Tables, samples: Collection[str], channels: Collection[str], num_sweeps: int
) -> dict[tuple[str, str], str]:
    """Load the records of these samples' files and their poses. Returns {(sample token, channel): token of its file}."""
    channel_of = {
        record["token"]: tables.get("sensor", record["sensor_token"])["channel"]
        for record in tables.all("calibrated_sensor")
    }
    files, poses = {}, set()

    def is_needed(record: dict[str, Any]) -> bool:
        if not record["is_key_frame"] and num_sweeps == 1:
            return False
        calibration, sample = record["calibrated_sensor_token"], record["sample_token"]
        channel = channel_of.get(calibration) or tables.get("calibrated_sensor", calibration)["channel"]
        if channel not in channels or not (record["is_key_frame"] or channel == LIDAR):
            return False
        if sample not in samples:
            tables.get("sample", sample)  # of another split, or an error
            return False
        if record["is_key_frame"]:
            files[sample, channel] = record["token"]
        poses.add(record.get("ego_pose_token"))
        return True

    fields = ("token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "height", "width", "filename", "prev")
    tables.load("sample_data", is_needed, fields)
    tables.load("ego_pose", lambda record: record["token"] in poses, ("translation", "rotation"))
    return files


def _load_boxes(
    tables: Tables, samples: Collection[str], with_tracks: bool
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Load boxes. Returns {sample token: tokens of its vehicles}, and with tracks {sample token: tokens of all its boxes}.

    Vehicles are the boxes whose category contains "vehicle" (also bicycles), as in Simple-BEV.
    """
    for table in ("category", "instance"):
        tables.load(table)
    is_vehicle = {
        record["token"]: "vehicle" in tables.get("category", record["category_token"])["name"]
        for record in tables.all("instance")
    }
    vehicles: dict[str, list[str]] = {}
    objects: dict[str, list[str]] = {}

    def is_needed(record: dict[str, Any]) -> bool:
        sample, instance = record["sample_token"], record["instance_token"]
        if instance not in is_vehicle:
            tables.get("instance", instance)
        if sample not in samples:
            tables.get("sample", sample)  # of another split, or an error
            return False
        if is_vehicle[instance]:
            vehicles.setdefault(sample, []).append(record["token"])
        if with_tracks:
            objects.setdefault(sample, []).append(record["token"])
        return is_vehicle[instance] or with_tracks

    fields = ("translation", "size", "rotation", "visibility_token", *(("sample_token", "prev") if with_tracks else ()))
    tables.load("sample_annotation", is_needed, fields)
    return vehicles, objects


def read_map(dataroot: Path, location: str, dividers: str) -> MapGeometry:
    """The map expansion of a location. Raises DatasetError if it is missing or too old."""
    file = map_file(dataroot, location)
    try:
        tables = json.loads(file.read_bytes())
        if (version := str(tables.get("version", "1.0"))) < "1.3":
            raise ValueError(f"outdated map version {version}: unpack nuScenes-map-expansion-v1.3.zip")
        return MapGeometry.from_tables(SimpleNamespace(**tables), map_classes(dividers))
    except FileNotFoundError as err:
        raise DatasetError(
            f"no map expansion {file}: unpack nuScenes-map-expansion-v1.3.zip into "
            f"{dataroot / 'maps'}, or build without map labels (--label-kinds vehicles)"
        ) from err
    except (ValueError, AttributeError, TypeError, KeyError, OSError) as err:
        raise DatasetError(f"the map expansion {file} does not load: {err}") from err


def map_file(dataroot: Path, location: str) -> Path:
    return dataroot / "maps" / "expansion" / f"{location}.json"
