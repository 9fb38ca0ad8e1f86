"""A scene: district, actors, light, the ego's drive, and the world at any time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.synth import cast
from occfeat_targets.synth.camera import Light
from occfeat_targets.synth.cast import Actor
from occfeat_targets.synth.ground import FIRST_RAISED, Ground, classify_points, pack_ground
from occfeat_targets.synth.layout import CURB_HEIGHT, District
from occfeat_targets.synth.rig import body_pose
from occfeat_targets.synth.scenery import Placed
from occfeat_targets.synth.traffic import Array, Clearance, Motion, drive, lane_path, random_walk
from occfeat_targets.synth.world import Stage, World

_EGO_LENGTH, _EGO_WIDTH, _EGO_MIDDLE = 4.1, 1.75, 1.3


@dataclass(frozen=True)
class Scene:
    """Objects are numbered scenery first, then actors, the same at all times."""

    district: District
    scenery: list[Placed]
    actors: list[Actor]
    ego: Motion
    sway: Array
    light: Light
    stage: Stage
    ground: Ground

    def ego_pose(self, t: float) -> Matrix:
        """(4, 4) global_from_ego at t seconds: the body pitches and rolls a little on its springs."""
        x, y, yaw = self.ego.at(t)
        pitch = np.radians(0.3 + 0.45 * np.sin(2 * np.pi * 0.7 * t + self.sway[0]))
        roll = np.radians(-0.2 + 0.5 * np.sin(2 * np.pi * 0.5 * t + self.sway[1]))
        return body_pose(float(x), float(y), 0.0, float(yaw), float(pitch), float(roll))

    def actor_poses(self, t: float) -> NDArray[np.float64]:
        """(n, 4) x, y, z, yaw of the actors; pedestrians off the pavement are lower."""
        poses = np.array([a.motion.at(t) for a in self.actors]).reshape(-1, 3)
        raised = classify_points(np.ascontiguousarray(poses[:, :2]), self.ground) >= FIRST_RAISED
        return np.column_stack([poses[:, :2], CURB_HEIGHT * raised, poses[:, 2]])

    def describe(self) -> str:
        """Weather and cast in a few words."""
        kinds = [a.category.split(".")[1] for a in self.actors]
        weather = (
            "overcast" if self.light.clouds == 1.0 else f"sun at {np.degrees(np.arcsin(self.light.sun[2])):.0f} degrees"
        )
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds)))
        return f"{weather}; {counts}"

    def world(self, t: float) -> World:
        """The world t seconds after the start of the scene."""
        fixed = np.array([p.pose for p in self.scenery]).reshape(-1, 4)
        return self.stage.at(np.concatenate([fixed, self.actor_poses(t)]))


def _ego_motion(district: District, duration: float, turns: bool, rng: np.random.Generator) -> Motion:
    """A drive through the inner junctions whose first turn is in the scene, or after its end."""
    n, m = len(district.avenues), len(district.streets)
    starts = [((0, j), (1, 0)) for j in range(1, m - 1)] + [((n - 1, j), (-1, 0)) for j in range(1, m - 1)]
    starts += [((i, 0), (0, 1)) for i in range(1, n - 1)] + [((i, m - 1), (0, -1)) for i in range(1, n - 1)]
    start, step = starts[rng.integers(len(starts))]
    speed = float(rng.uniform(7.5, 10.5))
    nodes = random_walk(district, start, step, speed * duration + 250, rng, turn_at=2)
    motion = drive(district, lane_path(district, nodes, rng), speed)
    turned = np.abs(motion.poses[:, 2] - motion.poses[0, 2]) > 0.5
    turn = float(motion.times[np.argmax(turned)])
    begin = turn - (float(rng.uniform(0.35, 0.6)) * duration if turns else duration + 2.0)
    return motion.shifted(-max(begin, 1.0))


def _light(rng: np.random.Generator) -> Light:
    """Sunny at some hour of the day, or overcast."""
    elevation, azimuth = np.radians(rng.uniform(24, 62)), rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    low = 1.0 - np.sin(elevation)
    if rng.random() < 0.25:
        return Light(sun, np.array([0.20, 0.20, 0.19]), np.array([0.62, 0.63, 0.66]), 1.0)
    sunlight = 1.15 * np.array([1.0, 0.97 - 0.12 * low, 0.90 - 0.28 * low])
    return Light(sun, sunlight, np.array([0.42, 0.46, 0.53]), float(rng.uniform(0.0, 0.6)))


def plan_scene(
    district: District, scenery: list[Placed], duration: float, turns: bool, rng: np.random.Generator
) -> Scene:
    """Sample a scene of `duration` seconds in a district; with `turns` the ego turns at a junction during it."""
    ego = _ego_motion(district, duration, turns, rng)
    clearance = Clearance(np.arange(-0.25, duration + 0.5, 0.2))
    # Clearance uses the middle of a body; the ego's origin is its rear axle.
    offset = _EGO_MIDDLE * np.column_stack([np.cos(ego.poses[:, 2]), np.sin(ego.poses[:, 2]), 0 * ego.times])
    clearance.try_add(Motion(ego.times, ego.poses + offset), _EGO_LENGTH + 1.0, _EGO_WIDTH)
    around = ego.at(duration / 2)[:2]
    actors = cast.parked(district, rng)
    actors += cast.waiting(district, clearance, rng)
    actors += cast.driving(district, duration, clearance, rng)
    actors += cast.walking(district, around, duration, clearance, rng)
    ground = pack_ground(district)
    return Scene(
        district=district,
        scenery=scenery,
        actors=actors,
        ego=ego,
        sway=rng.uniform(0, 2 * np.pi, 2),
        light=_light(rng),
        stage=Stage([p.shape for p in scenery] + [a.shape for a in actors], ground),
        ground=ground,
    )
