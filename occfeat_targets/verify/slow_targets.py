"""Slow, independent computation of a keyframe's targets from the tables, for `verify` and the tests.

It shares no step with the fast path: plain JSON tables instead of the devkit, pyquaternion instead of our rotations,
float64 NumPy instead of the voxelizer, full JPEG decodes instead of scaled ones, Shapely instead of the rasteriser. It
shares only definitions: the grid, and the axes of its frames.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import EGO_FRAME

BORDER = 1e-4  # [m]; a return this close to a cell's border may be on either side

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class SourceKeyframe:
    """A keyframe from the tables, in float64. Matrices (4, 4), named a_from_b; images, sweeps: file paths."""

    token: str
    location: str
    global_from_ego: Matrix
    images: list[Path]
    source_sizes: list[tuple[int, int]]
    intrinsics: list[Matrix]
    ego_from_cam: list[Matrix]
    cam_from_ego: list[Matrix]
    sweeps: list[Path]
    ego_from_sensor: list[Matrix]
    vehicle_corners: NDArray[np.float64]
    visibility: NDArray[np.uint8]


def read_source(
    dataroot: Path, version: str, tokens: Collection[str], cameras: Sequence[str], num_sweeps: int
) -> dict[str, SourceKeyframe]:
    """{sample token: keyframe} from the JSON tables. Raises KeyError or OSError if they are incomplete."""

    def table(name: str) -> dict[str, dict[str, Any]]:
        records = json.loads((dataroot / version / f"{name}.json").read_text())
        return {record["token"]: record for record in records}

    samples = {token: record for token, record in table("sample").items() if token in tokens}
    data, poses, calibration = table("sample_data"), table("ego_pose"), table("calibrated_sensor")
    sensors, scenes, logs = table("sensor"), table("scene"), table("log")
    instances, categories = table("instance"), table("category")
    keyframe_data: dict[str, dict[str, dict[str, Any]]] = {token: {} for token in tokens}
    for record in data.values():
        if record["is_key_frame"] and record["sample_token"] in samples:
            channel = sensors[calibration[record["calibrated_sensor_token"]]["sensor_token"]]["channel"]
            keyframe_data[record["sample_token"]][channel] = record
    boxes: dict[str, list[dict[str, Any]]] = {token: [] for token in tokens}
    for box in table("sample_annotation").values():
        if box["sample_token"] in samples:
            name = categories[instances[box["instance_token"]]["category_token"]]["name"]
            if "vehicle" in name:
                boxes[box["sample_token"]].append(box)
    found = {}
    for token, sample in samples.items():
        channels = keyframe_data[token]
        lidar = channels["LIDAR_TOP"]
        global_from_ego = _matrix(poses[lidar["ego_pose_token"]])
        ego_from_cam = [_matrix(calibration[channels[c]["calibrated_sensor_token"]]) for c in cameras]
        global_from_ego_at_image = [_matrix(poses[channels[c]["ego_pose_token"]]) for c in cameras]
        sweeps = [lidar]
        while len(sweeps) < num_sweeps and sweeps[-1]["prev"]:
            sweeps.append(data[sweeps[-1]["prev"]])
        found[token] = SourceKeyframe(
            token=token,
            location=logs[scenes[sample["scene_token"]]["log_token"]]["location"],
            global_from_ego=global_from_ego,
            images=[dataroot / channels[c]["filename"] for c in cameras],
            source_sizes=[(channels[c]["height"], channels[c]["width"]) for c in cameras],
            intrinsics=[
                np.array(calibration[channels[c]["calibrated_sensor_token"]]["camera_intrinsic"]) for c in cameras
            ],
            ego_from_cam=ego_from_cam,
            cam_from_ego=[
                np.linalg.inv(global_from_image_ego @ from_cam) @ global_from_ego
                for global_from_image_ego, from_cam in zip(global_from_ego_at_image, ego_from_cam, strict=True)
            ],
            sweeps=[dataroot / record["filename"] for record in sweeps],
            ego_from_sensor=[
                np.linalg.inv(global_from_ego)
                @ _matrix(poses[record["ego_pose_token"]])
                @ _matrix(calibration[record["calibrated_sensor_token"]])
                for record in sweeps
            ],
            vehicle_corners=np.array([_corners(box, global_from_ego) for box in boxes[token]]).reshape(-1, 8, 3),
            visibility=np.array([int(box["visibility_token"] or 4) for box in boxes[token]], np.uint8),
        )
    return found


def _matrix(record: dict[str, Any]) -> Matrix:
    from pyquaternion import Quaternion

    matrix: Matrix = Quaternion(record["rotation"]).transformation_matrix
    matrix[:3, 3] = record["translation"]
    return matrix


def _corners(box: dict[str, Any], global_from_ego: Matrix) -> NDArray[np.float64]:
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


def grid_from_ego(source: SourceKeyframe, frame: str, cameras: Sequence[str]) -> Matrix:
    """(4, 4): (right, forward, up) of a reference frame's grid; the design's definition, written out."""
    if frame == EGO_FRAME:  # (-y, x, z - 0.5)
        return np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, -0.5], [0, 0, 0, 1]], np.float64)
    cam_from_ego = np.linalg.inv(source.ego_from_cam[list(cameras).index(frame)])
    return np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1], [0, 0, 0, 1]], np.float64) @ cam_from_ego


def occupancy_bounds(
    source: SourceKeyframe, frame_from_ego: Matrix, grid: VoxelGrid, ego_box: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two (Z, H, W) bool volumes in float64: voxels that must be occupied, and voxels that may be.

    They differ only where a return lies within BORDER of a cell's border. Raises ValueError if a file is no sweep.
    """
    must, may = np.zeros((2, *grid.shape), np.bool_)
    lower = np.array(grid.lower[::-1])
    size = np.array(grid.cell_size[::-1])
    shape = np.array(grid.shape[::-1])
    for path, ego_from_sensor in zip(source.sweeps, source.ego_from_sensor, strict=True):
        returns = _returns(path)
        own = (np.abs(returns[:, 0]) < ego_box) & (np.abs(returns[:, 1]) < ego_box)
        grid_from_sensor = frame_from_ego @ ego_from_sensor
        points = returns[~own] @ grid_from_sensor[:3, :3].T + grid_from_sensor[:3, 3]
        position = (points - lower) / size
        index = np.floor(position).astype(np.int64)
        to_border = np.abs(position - np.rint(position)) * size
        clear = (to_border > BORDER).all(axis=1)
        _mark(must, index[clear], shape)
        shifts = np.array([[dx, dy, dz] for dx in (-1, 0, 1) for dy in (-1, 0, 1) for dz in (-1, 0, 1)]) * BORDER
        for shift in shifts:
            _mark(may, np.floor((points + shift - lower) / size).astype(np.int64), shape)
    return must, may


def _returns(path: Path) -> Matrix:
    """(n, 3) coordinates [m] of a sweep, if a spinning LiDAR of 32 beams can have sent them."""
    values = np.fromfile(path, "<f4").astype(np.float64)
    rows = values[: len(values) // 5 * 5].reshape(-1, 5)
    rings, distances = set(rows[:, 4].tolist()), np.linalg.norm(rows[:, :3], axis=1)
    if len(rows) * 20 != path.stat().st_size or not rings <= set(range(32)) or not (distances < 200).all():
        raise ValueError(f"{path} is no nuScenes sweep: ring {rows[0, 4]}, {distances[0]:.3g} m in its first return")
    return rows[:, :3]


def _mark(volume: NDArray[np.bool_], index: NDArray[np.int64], shape: NDArray[np.int64]) -> None:
    inside = ((index >= 0) & (index < shape)).all(axis=1)
    right, forward, up = index[inside].T
    volume[up, forward, right] = True


def map_tables(dataroot: Path, location: str) -> SimpleNamespace:
    """The map expansion's tables as attributes, for MapGeometry.from_tables."""
    return SimpleNamespace(**json.loads((dataroot / "maps" / "expansion" / f"{location}.json").read_text()))
