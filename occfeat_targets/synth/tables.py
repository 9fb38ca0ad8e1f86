"""nuScenes' thirteen tables: the records of the city and the links between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.synth.rig import CAMERAS, EGO_FROM_LIDAR, LIDAR_CHANNEL, quaternion
from occfeat_targets.synth.tokens import token

Record = dict[str, Any]
VEHICLE = "occfeat-synthetic-city"
CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
# Lower bounds of the visible fractions of visibility tokens "1" to "4".
VISIBILITY_FROM = (0.0, 0.4, 0.6, 0.8)
_VISIBILITY_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
_TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
    "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip


class Tables:
    """Collects the records of a dataset. Tokens depend on the seed and the named object, not on the order."""

    def __init__(self, seed: int, image_size: tuple[int, int]) -> None:
        self._seed, self._image_size = seed, image_size
        self.records: dict[str, list[Record]] = {name: [] for name in _TABLES}
        self._last_data: dict[tuple[str, str], Record] = {}
        self._last_annotation: dict[str, Record] = {}
        self._instances: dict[str, Record] = {}
        for name in CATEGORIES:
            self._add("category", self.name("category", name), name=name, description="")
        for name in ATTRIBUTES:
            self._add("attribute", self.name("attribute", name), name=name, description="")
        for number, level in enumerate(_VISIBILITY_LEVELS, 1):
            self._add(
                "visibility",
                str(number),
                level=level,
                description=f"visible share in all images: {level[1:]} %",
            )
        self._add_sensor(LIDAR_CHANNEL, "lidar", EGO_FROM_LIDAR, [])
        for camera in CAMERAS:
            intrinsics = camera.intrinsics(image_size).tolist()
            self._add_sensor(camera.channel, "camera", camera.ego_from_sensor, intrinsics)

    def name(self, *parts: str | int) -> str:
        return token(self._seed, *parts)

    def _add(self, table: str, key: str, /, **fields: Any) -> Record:
        record = {"token": key, **fields}
        self.records[table].append(record)
        return record

    def _add_sensor(self, channel: str, modality: str, ego_from_sensor: Matrix, intrinsics: list[list[float]]) -> None:
        self._add("sensor", self.name("sensor", channel), channel=channel, modality=modality)
        self._add(
            "calibrated_sensor",
            self.name("calibrated_sensor", channel),
            sensor_token=self.name("sensor", channel),
            translation=ego_from_sensor[:3, 3].tolist(),
            rotation=quaternion(ego_from_sensor[:3, :3]),
            camera_intrinsic=intrinsics,
        )

    def add_log(self, logfile: str, location: str) -> None:
        self._add(
            "log",
            self.name("log", logfile),
            logfile=logfile,
            vehicle=VEHICLE,
            date_captured="2000-01-01",
            location=location,
        )

    def add_map(self, location: str, filename: str) -> None:
        """The map record of a location; call it after adding all its logs."""
        logs = [r["token"] for r in self.records["log"] if r["location"] == location]
        name = self.name("map", location)
        self._add("map", name, category="semantic_prior", filename=filename, log_tokens=logs)

    def add_scene(self, scene: str, logfile: str, description: str, timestamps: list[int]) -> None:
        """A scene and its samples; timestamps: of its keyframes [us]."""
        samples = [self.name("sample", scene, t) for t in timestamps]
        for k, (name, timestamp) in enumerate(zip(samples, timestamps, strict=True)):
            self._add(
                "sample",
                name,
                timestamp=timestamp,
                prev=samples[k - 1] if k else "",
                next=samples[k + 1] if k + 1 < len(samples) else "",
                scene_token=self.name("scene", scene),
            )
        self._add(
            "scene",
            self.name("scene", scene),
            log_token=self.name("log", logfile),
            nbr_samples=len(samples),
            first_sample_token=samples[0],
            last_sample_token=samples[-1],
            name=scene,
            description=description,
        )

    def add_data(
        self,
        scene: str,
        channel: str,
        timestamp: int,
        sample_timestamp: int,
        filename: str,
        global_from_ego: Matrix,
    ) -> None:
        """A sensor's file and the ego pose at its time; call in temporal order. Keyframes are in samples/."""
        name = self.name("sample_data", scene, channel, timestamp)
        is_camera = channel != LIDAR_CHANNEL
        self._add(
            "ego_pose",
            name,
            timestamp=timestamp,
            rotation=quaternion(global_from_ego[:3, :3]),
            translation=global_from_ego[:3, 3].tolist(),
        )
        record = self._add(
            "sample_data",
            name,
            sample_token=self.name("sample", scene, sample_timestamp),
            ego_pose_token=name,
            calibrated_sensor_token=self.name("calibrated_sensor", channel),
            timestamp=timestamp,
            fileformat="jpg" if is_camera else "pcd",
            is_key_frame=filename.startswith("samples/"),
            height=self._image_size[0] if is_camera else 0,
            width=self._image_size[1] if is_camera else 0,
            filename=filename,
            prev="",
            next="",
        )
        self._link(self._last_data, (scene, channel), record)

    @staticmethod
    def _link(last: dict[Any, Record], key: Any, record: Record) -> None:
        """Chain a record to the one before it under the same key."""
        if key in last:
            record["prev"] = last[key]["token"]
            last[key]["next"] = record["token"]
        last[key] = record

    def add_annotation(
        self,
        scene: str,
        sample_timestamp: int,
        actor: int,
        category: str,
        attribute: str,
        centre: NDArray[Any],
        size: list[float],
        rotation: list[float],
        visible_share: float,
        num_lidar_pts: int,
    ) -> None:
        """One object in one keyframe; call in temporal order. size: width, length, height [m]."""
        instance = self.name("instance", scene, actor)
        name = self.name("sample_annotation", scene, actor, sample_timestamp)
        record = self._add(
            "sample_annotation",
            name,
            sample_token=self.name("sample", scene, sample_timestamp),
            instance_token=instance,
            visibility_token=str(sum(visible_share >= bound for bound in VISIBILITY_FROM)),
            attribute_tokens=[self.name("attribute", attribute)] if attribute else [],
            translation=centre.tolist(),
            size=size,
            rotation=rotation,
            prev="",
            next="",
            num_lidar_pts=num_lidar_pts,
            num_radar_pts=0,
        )
        if instance not in self._instances:
            self._instances[instance] = self._add(
                "instance",
                instance,
                category_token=self.name("category", category),
                nbr_annotations=0,
                first_annotation_token=name,
                last_annotation_token=name,
            )
        self._instances[instance]["nbr_annotations"] += 1
        self._instances[instance]["last_annotation_token"] = name
        self._link(self._last_annotation, instance, record)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for table, records in self.records.items():
            (folder / f"{table}.json").write_text(json.dumps(records, indent=0))
