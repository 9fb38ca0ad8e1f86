"""Slow, independent reader of nuScenes for `verify` and the tests.

It shares no step with `sources.nuscenes`: whole JSON tables instead of parts, pyquaternion instead of our rotations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import CameraView, Keyframe, Sweep, Track, broken_view
from occfeat_targets.sources.map_geometry import MapGeometry, map_classes
from occfeat_targets.verify.slow_targets import SlowSource


def read_slow_source(root: Path, version: str, tokens: Collection[str], spec: TargetSpec) -> SlowSource:
    """What `verify` needs of these samples; without any, no table is read. Raises ValueError if `root` has no tables of this version or they lack something."""
    found = [p.parent for p in (root / version, *root.glob(f"*/{version}")) if (p / "sample.json").is_file()]
    if not found:
        raise ValueError(f"{root} holds no {version}: pass the --dataroot of the data set the cache was built from")
    try:
        what = spec.cameras, spec.num_sweeps
        keyframes = read_keyframes(found[0], version, tokens, *what, with_tracks=spec.uses_boxes) if tokens else {}
    except KeyError as err:
        raise ValueError(
            f"the tables of {found[0] / version} have no {err}: pass the --dataroot the cache was built from, or re-extract them"
        ) from err

    @cache
    def read_map(location: str) -> MapGeometry:
        file = found[0] / "maps" / "expansion" / f"{location}.json"
        return MapGeometry.from_tables(SimpleNamespace(**json.loads(file.read_text())), map_classes(spec.dividers))

    return SlowSource(keyframes, read_returns, read_map)


def read_keyframes(
    dataroot: Path,
    version: str,
    tokens: Collection[str],
    cameras: Sequence[str],
    num_sweeps: int,
    *,
    with_tracks: bool = False,
) -> dict[str, Keyframe]:
    """{sample token: keyframe} from the JSON tables. A view without a usable calibration has a problem.

    Raises KeyError or OSError if other parts of the tables are incomplete.
    """

    def table(
        name: str, is_needed: Callable[[dict[str, Any]], bool] = lambda record: True
    ) -> dict[str, dict[str, Any]]:
        file = dataroot / version / f"{name}.json"
        try:  # what is not needed is dropped while it is read, because the whole tables of nuScenes take gigabytes
            records = json.loads(file.read_bytes(), object_hook=lambda record: record if is_needed(record) else None)
        except ValueError as err:
            raise ValueError(f"{file} is no complete JSON file ({err}): re-extract the tables") from err
        return {record["token"]: record for record in records if record is not None}

    samples = table("sample", lambda record: record["token"] in tokens)
    scene_tokens = {record["scene_token"] for record in samples.values()}
    nearby = table("sample", lambda record: record["scene_token"] in scene_tokens)
    calibration, sensors, scenes, logs = (table(name) for name in ("calibrated_sensor", "sensor", "scene", "log"))
    data = table("sample_data", lambda record: record["sample_token"] in nearby)
    pose_tokens = {record["ego_pose_token"] for record in data.values()}
    poses = table("ego_pose", lambda record: record["token"] in pose_tokens)
    instances, categories = table("instance"), table("category")
    keyframe_data: dict[str, dict[str, dict[str, Any]]] = {token: {} for token in tokens}
    for record in data.values():
        if record["is_key_frame"] and record["sample_token"] in samples:
            channel = sensors[calibration[record["calibrated_sensor_token"]]["sensor_token"]]["channel"]
            keyframe_data[record["sample_token"]][channel] = record
    boxes: dict[str, list[dict[str, Any]]] = {token: [] for token in tokens}
    annotated = nearby if with_tracks else samples
    annotations = table("sample_annotation", lambda record: record["sample_token"] in annotated)
    for box in (box for box in annotations.values() if box["sample_token"] in samples):
        name = categories[instances[box["instance_token"]]["category_token"]]["name"]
        if "vehicle" in name:
            boxes[box["sample_token"]].append(box)

    def view(record: dict[str, Any], global_from_ego: Matrix) -> CameraView:
        try:
            calibrated = calibration[record["calibrated_sensor_token"]]
            global_from_cam = _matrix(poses[record["ego_pose_token"]]) @ _matrix(calibrated)
            return CameraView(
                path=dataroot / record["filename"],
                source_size=(int(record["height"]), int(record["width"])),
                intrinsics=np.array(calibrated["camera_intrinsic"]),
                ego_from_cam=_matrix(calibrated),
                cam_from_ego=np.linalg.inv(global_from_cam) @ global_from_ego,
            )
        except (KeyError, TypeError, ValueError) as err:  # a singular matrix is a ValueError
            return broken_view(f"no usable calibration: {err}")

    def tracks(token: str, earliest: float) -> Iterator[Track]:
        """Of the boxes of a sample, up to the first annotation at or before `earliest` [us]."""
        for box in [box for box in annotations.values() if box["sample_token"] == token]:
            chain = [box]
            while chain[-1]["prev"] and nearby[chain[-1]["sample_token"]]["timestamp"] > earliest:
                chain.append(annotations[chain[-1]["prev"]])
            if len(chain) > 1:
                seconds = [(nearby[b["sample_token"]]["timestamp"] - samples[token]["timestamp"]) * 1e-6 for b in chain]
                half_size = np.array([box["size"][1], box["size"][0], box["size"][2]]) / 2
                yield Track(
                    half_size,
                    *(
                        np.array(v, float)
                        for v in (seconds, [b["rotation"] for b in chain], [b["translation"] for b in chain])
                    ),
                )

    found = {}
    for token, sample in samples.items():
        channels = keyframe_data[token]
        lidar = channels["LIDAR_TOP"]
        global_from_ego = _matrix(poses[lidar["ego_pose_token"]])
        sweeps = [lidar]
        while len(sweeps) < num_sweeps and sweeps[-1]["prev"]:
            sweeps.append(data[sweeps[-1]["prev"]])
        found[token] = Keyframe(
            token=token,
            scene=scenes[sample["scene_token"]]["name"],
            timestamp_us=sample["timestamp"],
            location=logs[scenes[sample["scene_token"]]["log_token"]]["location"],
            global_from_ego=global_from_ego,
            cameras=tuple(
                view(channels[name], global_from_ego) if name in channels else broken_view("no record")
                for name in cameras
            ),
            sweeps=tuple(
                Sweep(
                    dataroot / record["filename"],
                    np.linalg.inv(global_from_ego)
                    @ _matrix(poses[record["ego_pose_token"]])
                    @ _matrix(calibration[record["calibrated_sensor_token"]]),
                    (record["timestamp"] - sample["timestamp"]) * 1e-6,
                )
                for record in sweeps
            ),
            vehicle_corners=np.array([_corners(box, global_from_ego) for box in boxes[token]]).reshape(-1, 8, 3),
            visibility=np.array([int(box.get("visibility_token") or 4) for box in boxes[token]], np.uint8),
            tracks=tuple(tracks(token, sweeps[-1]["timestamp"])) if with_tracks else (),
        )
    return found


def _matrix(record: dict[str, Any]) -> Matrix:
    from pyquaternion import Quaternion

    matrix: Matrix = Quaternion(record["rotation"]).transformation_matrix
    matrix[:3, 3] = record["translation"]
    return matrix


def _corners(box: dict[str, Any], global_from_ego: Matrix) -> Matrix:
    """(8, 3) corners in the ego frame, front face first, each face from the upper left clockwise seen from behind."""
    width, length, height = box["size"]
    corners = []
    for x in (length / 2, -length / 2):
        for y, z in (
            (width / 2, height / 2),
            (-width / 2, height / 2),
            (-width / 2, -height / 2),
            (width / 2, -height / 2),
        ):
            corners.append(np.linalg.inv(global_from_ego) @ _matrix(box) @ np.array([x, y, z, 1]))
    return np.array(corners)[:, :3]


def read_returns(path: Path) -> Matrix:
    """(n, 5) x, y, z [m], intensity, ring of a sweep, if a spinning LiDAR of 32 beams can have sent them."""
    values = np.fromfile(path, "<f4").astype(np.float64)
    rows = values[: len(values) // 5 * 5].reshape(-1, 5)
    rings, distances = set(rows[:, 4].tolist()), np.linalg.norm(rows[:, :3], axis=1)
    if len(rows) * 20 != path.stat().st_size or not rings <= set(range(32)) or not (distances < 200).all():
        raise ValueError(f"{path} is no nuScenes sweep: ring {rows[0, 4]}, {distances[0]:.3g} m in its first return")
    return rows
