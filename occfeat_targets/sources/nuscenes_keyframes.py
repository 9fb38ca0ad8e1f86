"""One keyframe of nuScenes from its records: paths, transforms and boxes. Problems are noted in the keyframe or its view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, rigid
from occfeat_targets.sources.keyframe import CameraView, Keyframe, Sweep, Track, broken_view
from occfeat_targets.sources.tables import Record, Tables

LIDAR = "LIDAR_TOP"


@dataclass(frozen=True)
class KeyframeReader:
    """Keyframes of loaded tables. files: {(sample token, channel): token}. boxes: {sample token: tokens of its vehicles}.

    objects: {sample token: tokens of all its boxes}, whose tracks are read.
    """

    tables: Tables
    dataroot: Path
    files: Mapping[tuple[str, str], str]
    boxes: Mapping[str, Sequence[str]]
    objects: Mapping[str, Sequence[str]]
    cameras: tuple[str, ...]
    num_sweeps: int

    def keyframe(self, sample: Record, scene: str, location: str) -> Keyframe:
        token = sample["token"]
        identity = {"token": token, "scene": scene, "timestamp_us": sample["timestamp"], "location": location}
        try:
            lidar = self._file(token, LIDAR)
            global_from_ego = _pose(self._referred("ego_pose", lidar))
            ego_from_global = inverse_rigid(global_from_ego)
            views = tuple(self._view(token, name, global_from_ego) for name in self.cameras)
            sweeps = []
            earlier = self.tables.follow("sample_data", lidar["token"], "prev")
            for record in islice(earlier, self.num_sweeps):  # the first keyframes of a scene have fewer
                pose, calibration = (self._referred(table, record) for table in ("ego_pose", "calibrated_sensor"))
                seconds = (record["timestamp"] - lidar["timestamp"]) / 1e6
                global_from_sensor = _pose(pose) @ _pose(calibration)
                sweeps.append(Sweep(self._path(record), ego_from_global @ global_from_sensor, seconds))
            corners, visibility = self._vehicles(token, ego_from_global)
            tracks = [self._track(box, sample["timestamp"], sweeps[-1].seconds) for box in self.objects.get(token, ())]
        except ValueError as err:
            return Keyframe(**identity, problem=str(err))
        return Keyframe(
            **identity,
            global_from_ego=global_from_ego,
            cameras=views,
            sweeps=tuple(sweeps),
            vehicle_corners=corners,
            visibility=visibility,
            tracks=tuple(track for track in tracks if len(track.seconds) > 1),
        )

    def _file(self, sample: str, channel: str) -> Record:
        if (sample, channel) not in self.files:
            raise ValueError(
                f"sample_data.json has no keyframe record of {channel}: re-extract the tables, or skip the sample"
            )
        return self.tables.get("sample_data", self.files[sample, channel])

    def _path(self, record: Record) -> Path:
        return self.dataroot / record["filename"]

    def _referred(self, table: str, sample_data: Record) -> Record:
        """The record in `table` that a sample_data record refers to."""
        return self.tables.get(table, sample_data[f"{table}_token"], sample_data["filename"])

    def _view(self, sample: str, channel: str, global_from_ego: Matrix) -> CameraView:
        try:
            return self._usable_view(self._file(sample, channel), global_from_ego)
        except ValueError as err:
            return broken_view(str(err))

    def _usable_view(self, record: Record, global_from_ego: Matrix) -> CameraView:
        calibration, pose = (self._referred(table, record) for table in ("calibrated_sensor", "ego_pose"))
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
        if (
            intrinsics.shape != (3, 3)
            or not np.isfinite(intrinsics).all()
            or not (np.diagonal(intrinsics)[:2] > 0).all()
        ):
            raise ValueError(
                f"calibrated_sensor.json: intrinsics {intrinsics.tolist()} of {record['filename']} are not those of a pinhole camera"
            )
        return CameraView(
            path=self._path(record),
            source_size=size,
            intrinsics=intrinsics,
            ego_from_cam=ego_from_cam,
            cam_from_ego=inverse_rigid(global_from_cam) @ global_from_ego,
        )

    def _vehicles(self, sample: str, ego_from_global: Matrix) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Corners and visibility of its vehicles."""
        boxes = [self.tables.get("sample_annotation", token) for token in self.boxes.get(sample, ())]
        corners = np.zeros((len(boxes), 8, 3))
        # The devkit's order (Box.corners): four of the front face, four of the back, each from the top left clockwise.
        signs = np.array(
            [[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1], [-1, 1, 1], [-1, -1, 1], [-1, -1, -1], [-1, 1, -1]]
        )
        for i, box in enumerate(boxes):
            width, length, height = _size(box)
            local = 0.5 * signs * np.array([length, width, height])
            global_from_box = _pose(box)
            corners[i] = local @ global_from_box[:3, :3].T + global_from_box[:3, 3]
        visibility = np.array([_visibility(box) for box in boxes], np.uint8)
        return corners @ ego_from_global[:3, :3].T + ego_from_global[:3, 3], visibility

    def _track(self, token: str, timestamp: int, earliest: float) -> Track:
        """A box and those of the same object at earlier keyframes, up to the first at or before `earliest` [s]."""
        boxes, seconds = [], []
        for box in self.tables.follow("sample_annotation", token, "prev"):
            _pose(box)  # checks it
            boxes.append(box)
            seconds.append((self.tables.get("sample", box["sample_token"])["timestamp"] - timestamp) / 1e6)
            if seconds[-1] <= earliest:
                break
        width, length, height = _size(boxes[0])
        poses = ([np.array(box[key], np.float64) for box in boxes] for key in ("rotation", "translation"))
        return Track(np.array([length, width, height]) / 2, np.array(seconds), *map(np.stack, poses))


def _pose(record: Record) -> Matrix:
    """global_from_ego of a record of ego_pose, ego_from_sensor of one of calibrated_sensor, global_from_box of a box."""
    rotation, translation = record["rotation"], record["translation"]
    try:
        return rigid(rotation, translation)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{record.place}: {err}; re-extract the tables") from err


def _size(box: Record) -> tuple[float, float, float]:
    """Width, length, height [m]."""
    try:
        width, length, height = map(float, box["size"])
    except (TypeError, ValueError):
        width = length = height = np.nan
    if not all(0 < side < np.inf for side in (width, length, height)):
        raise ValueError(f"{box.place}: size {box['size']}: three lengths above 0 expected; re-extract the tables")
    return width, length, height


def _visibility(box: Record) -> int:
    """1 to 4. A box without a visibility token counts as visible."""
    token = box.get("visibility_token") or "4"
    if str(token) not in ("1", "2", "3", "4"):
        raise ValueError(f"{box.place}: visibility_token is {token!r}: 1 to 4 expected; re-extract the tables")
    return int(token)
