"""Records one scene: all sensors at their own times, their files, and the visibility of each object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occfeat_targets.synth.camera import count_visible, render
from occfeat_targets.synth.lidar import cast_sweep
from occfeat_targets.synth.rig import (
    CAMERAS,
    KEYFRAME_PERIOD_US,
    LIDAR_CHANNEL,
    SWEEP_PERIOD_US,
    Camera,
    quaternion,
)
from occfeat_targets.synth.scene import Scene
from occfeat_targets.synth.tables import Tables
from occfeat_targets.synth.tokens import stream

ANNOTATION_RANGE = 80.0
JPEG_QUALITY = 92
# Margin of boxes around a shape [m], so that returns with range noise stay inside. At the bottom boxes end slightly above
# the ground, to exclude its returns.
_BOX_MARGIN, _BOX_FLOOR = 0.04, 0.006


@dataclass(frozen=True)
class Shot:
    """One sensor record: `at_us` is counted from the scene's first keyframe, `keyframe` is the sample it belongs to."""

    camera: Camera | None
    at_us: int
    keyframe: int

    @property
    def channel(self) -> str:
        return self.camera.channel if self.camera else LIDAR_CHANNEL

    @property
    def is_key(self) -> bool:
        return self.camera is not None or self.at_us == self.keyframe * KEYFRAME_PERIOD_US


def plan_shots(keyframes: int, sweeps_per_keyframe: int) -> Iterator[Shot]:
    """All records of a scene, sorted by keyframe; other sweeps belong to the next keyframe."""
    for k in range(keyframes):
        key_us = k * KEYFRAME_PERIOD_US
        for camera in CAMERAS:
            yield Shot(camera, key_us + camera.delay_us, k)
        for back in range(sweeps_per_keyframe - 1 if k else 0, -1, -1):
            yield Shot(None, key_us - back * SWEEP_PERIOD_US, k)


@dataclass(frozen=True)
class Film:
    """Folders and names of a scene's files. start_us: timestamp of its first keyframe."""

    scene: Scene
    name: str
    logfile: str
    start_us: int
    seed: int
    root: Path
    image_size: tuple[int, int]

    def filename(self, shot: Shot) -> str:
        folder, suffix = ("samples" if shot.is_key else "sweeps"), ("jpg" if shot.camera else "pcd.bin")
        return f"{folder}/{shot.channel}/{self.logfile}__{shot.channel}__{self.start_us + shot.at_us}.{suffix}"

    def _candidates(self, keyframe: int) -> NDArray[np.int64]:
        """Actors near enough to be annotated in a keyframe."""
        t = keyframe * KEYFRAME_PERIOD_US * 1e-6
        away = self.scene.actor_poses(t)[:, :2] - self.scene.ego.at(t)[:2]
        return np.nonzero(np.hypot(*away.T) < ANNOTATION_RANGE)[0]

    def shoot(self, shot: Shot) -> NDArray[np.int64]:
        """Record one shot and write its file.

        Returns per actor: for a camera (n, 2) pixels without and with occlusion, for the LiDAR (n,) its returns.
        """
        t = shot.at_us * 1e-6
        world, ego = self.scene.world(t), self.scene.ego_pose(t)
        first, count = len(self.scene.scenery), len(self.scene.actors)
        path = self.root / self.filename(shot)
        if shot.camera is None:
            sweep = cast_sweep(ego, world, stream(self.seed, self.name, "lidar", shot.at_us))
            sweep.points.tofile(path)
            hits = sweep.objects[sweep.objects >= first] - first
            return np.bincount(hits, minlength=count).astype(np.int64)
        pose, intrinsics = ego @ shot.camera.ego_from_sensor, shot.camera.intrinsics(self.image_size)
        picture = render(pose, intrinsics, self.image_size, world, self.scene.light)
        Image.fromarray(picture.rgb).save(path, quality=JPEG_QUALITY)
        wanted = self._candidates(shot.keyframe)
        seen = np.zeros((count, 2), np.int64)
        seen[wanted] = count_visible(pose, intrinsics, world, picture, wanted + first)
        return seen

    def _annotate(self, tables: Tables, keyframe: int, returns: NDArray[np.int64], seen: NDArray[np.int64]) -> None:
        """Boxes of one keyframe, for all candidates with returns in its sweep."""
        poses = self.scene.actor_poses(keyframe * KEYFRAME_PERIOD_US * 1e-6)
        for n in self._candidates(keyframe):
            if returns[n] == 0:
                continue
            actor, (x, y, z, yaw) = self.scene.actors[n], poses[n]
            low, high = actor.shape.bounds
            low = np.array([low[0] - _BOX_MARGIN, low[1] - _BOX_MARGIN, low[2] + _BOX_FLOOR])
            high = high + _BOX_MARGIN
            cos, sin = np.cos(yaw), np.sin(yaw)
            turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
            length, width, height = (high - low).tolist()
            tables.add_annotation(
                self.name,
                self.start_us + keyframe * KEYFRAME_PERIOD_US,
                int(n),
                actor.category,
                actor.attribute,
                centre=np.array([x, y, z]) + turn @ ((low + high) / 2),
                size=[width, length, height],
                rotation=quaternion(turn),
                visible_share=seen[n, 1] / seen[n, 0] if seen[n, 0] else 0.0,
                num_lidar_pts=int(returns[n]),
            )

    def make(
        self,
        tables: Tables,
        keyframes: int,
        sweeps_per_keyframe: int,
        pool: Executor,
        tick: Callable[[], object],
    ) -> None:
        """Record all shots on the pool's threads, then add them to the tables in temporal order."""
        shots = list(plan_shots(keyframes, sweeps_per_keyframe))
        count = len(self.scene.actors)
        returns, seen = np.zeros((keyframes, count), np.int64), np.zeros((keyframes, count, 2), np.int64)
        for shot, counts in zip(shots, pool.map(self.shoot, shots), strict=True):
            if shot.camera is not None:
                seen[shot.keyframe] += counts
            elif shot.is_key:
                returns[shot.keyframe] = counts
            tick()
        stamps = [self.start_us + k * KEYFRAME_PERIOD_US for k in range(keyframes)]
        for shot in shots:
            tables.add_data(
                self.name, shot.channel, self.start_us + shot.at_us, stamps[shot.keyframe], self.filename(shot),
                self.scene.ego_pose(shot.at_us * 1e-6),
            )  # fmt: skip
        for k in range(keyframes):
            self._annotate(tables, k, returns[k], seen[k])
