"""Actors of a scene: annotated objects that are parked, waiting, driving, riding or walking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from occfeat_targets.synth import shapes
from occfeat_targets.synth.layout import (
    BAY_DEPTH,
    BAY_WIDTH,
    CROSSING_BAND,
    LANE_WIDTH,
    PARKING_WIDTH,
    STOP_BAND,
    WALKWAY_WIDTH,
    District,
    Vector2,
    stretches,
)
from occfeat_targets.synth.scenery import sides
from occfeat_targets.synth.shapes import Shape
from occfeat_targets.synth.traffic import Array, Clearance, Motion, drive, lane_path, random_walk, walk

_BAY_LENGTH = 6.0
_PARKED, _STOPPED, _MOVING = "vehicle.parked", "vehicle.stopped", "vehicle.moving"


@dataclass(frozen=True)
class Actor:
    """An annotated object. `attribute` is a nuScenes attribute name, or empty."""

    category: str
    attribute: str
    shape: Shape
    motion: Motion


@dataclass(frozen=True)
class Kind:
    """A kind of road user; `shift` moves it left of the lane's middle [m]."""

    category: str
    attribute: str
    make: Callable[[np.random.Generator], Shape]
    speeds: tuple[float, float]
    shift: float = 0.0


_KINDS = (
    Kind("vehicle.car", _MOVING, shapes.car, (7, 12)),
    Kind("vehicle.truck", _MOVING, shapes.truck, (6, 9)),
    Kind("vehicle.bus.rigid", _MOVING, shapes.bus, (5.5, 8)),
    Kind("vehicle.motorcycle", "cycle.with_rider", shapes.motorcycle, (7, 11)),
    Kind("vehicle.bicycle", "cycle.with_rider", shapes.bicycle, (3.5, 5.5), shift=1.0),
)
_KIND_ODDS = (0.62, 0.10, 0.07, 0.09, 0.12)


def _size(shape: Shape) -> tuple[float, float]:
    """(length, width)"""
    low, high = shape.bounds
    return float(high[0] - low[0]), float(high[1] - low[1])


def _resting(district: District, uv: Vector2, facing: Vector2) -> Motion:
    x, y = district.to_global(np.array(uv))
    return Motion.resting(float(x), float(y), float(district.heading(np.array(uv), np.array(facing))))


def parked(district: District, rng: np.random.Generator) -> list[Actor]:
    """Cars in the bays along the roads and in the car parks, and road works."""
    actors = []

    def add(uv: Vector2, facing: Vector2) -> None:
        wobble = rng.normal(0, 0.02, 2)
        facing = (facing[0] + wobble[0], facing[1] + wobble[1])
        actors.append(Actor("vehicle.car", _PARKED, shapes.car(rng), _resting(district, uv, facing)))

    for stretch in stretches(district):
        if stretch.road.parking:
            # Painted bays lie between multiples of their length along the road.
            first = np.ceil((stretch.low + 15) / _BAY_LENGTH)
            last = np.floor((stretch.high - 15) / _BAY_LENGTH)
            for bay in np.arange(first, last):
                if rng.random() < 0.6:
                    s = (bay + 0.5) * _BAY_LENGTH + rng.uniform(-0.3, 0.3)
                    du, dv = stretch.direction
                    along = s - stretch.low if du + dv > 0 else stretch.high - s
                    add(
                        stretch.point(along, stretch.road.lanes * LANE_WIDTH + PARKING_WIDTH / 2 + 0.1),
                        (du, dv),
                    )
    for block in district.blocks:
        if (park := block.car_park) is not None:
            for bay in range(round((park.u1 - park.u0) / BAY_WIDTH)):
                u = park.u0 + (bay + 0.5) * BAY_WIDTH
                for v, out in ((park.v0 + BAY_DEPTH / 2, 1.0), (park.v1 - BAY_DEPTH / 2, -1.0)):
                    if rng.random() < 0.55:
                        add((u, v), (0.0, out if rng.random() < 0.7 else -out))
    for stretch in stretches(district):
        if not stretch.road.parking and rng.random() < 0.25:
            start = rng.uniform(14, stretch.length - 26)
            for k in range(5):
                uv = stretch.point(start + 2.5 * k, stretch.road.half_width - 0.3)
                actors.append(
                    Actor(
                        "movable_object.trafficcone",
                        "",
                        shapes.cone(rng),
                        _resting(district, uv, stretch.direction),
                    )
                )
            for k in range(2):
                uv = stretch.point(start + 3 + 3 * k, stretch.road.half_width + 0.45)
                across = (-stretch.direction[1], stretch.direction[0])
                actors.append(Actor("movable_object.barrier", "", shapes.barrier(rng), _resting(district, uv, across)))
    return actors


def waiting(district: District, clearance: Clearance, rng: np.random.Generator) -> list[Actor]:
    """Short queues at stop lines, where they block no other actor."""
    actors = []
    for stretch in stretches(district):
        if rng.random() > 0.15:
            continue
        lane = int(rng.integers(stretch.road.lanes))
        left = stretch.lane_middle(lane)
        back = STOP_BAND[1] + 0.8
        for _ in range(int(rng.integers(1, 4))):
            shape = shapes.car(rng)
            length, width = _size(shape)
            motion = _resting(district, stretch.point(stretch.length - back - length / 2, left), stretch.direction)
            if not clearance.try_add(motion, length, width):
                break
            actors.append(Actor("vehicle.car", _STOPPED, shape, motion))
            back += length + float(rng.uniform(1.2, 2.5))
    return actors


def driving(district: District, duration: float, clearance: Clearance, rng: np.random.Generator) -> list[Actor]:
    """Vehicles and cyclists in the whole district, driving for `duration` seconds without collisions."""
    actors = []
    shape = (len(district.avenues), len(district.streets))
    for _ in range(110):
        kind = _KINDS[rng.choice(len(_KINDS), p=_KIND_ODDS)]
        start = (int(rng.integers(shape[0])), int(rng.integers(shape[1])))
        steps = [
            s
            for s in ((1, 0), (-1, 0), (0, 1), (0, -1))
            if 0 <= start[0] + s[0] < shape[0] and 0 <= start[1] + s[1] < shape[1]
        ]
        body, speed = kind.make(rng), float(rng.uniform(*kind.speeds))
        nodes = random_walk(district, start, steps[rng.integers(len(steps))], speed * duration + 150, rng)
        motion = drive(district, lane_path(district, nodes, rng, kind.shift), speed)
        motion = motion.shifted(-float(rng.uniform(0.5, max(1.0, motion.times[-1] - duration - 1.0))))
        if clearance.try_add(motion, *_size(body)):
            actors.append(Actor(kind.category, kind.attribute, body, motion))
    return actors


def _around(district: District, rng: np.random.Generator, length: float) -> Array:
    """A walk around a block on its pavement, from a random point: (n, 2) street coordinates."""
    block = district.blocks[rng.integers(len(district.blocks))]
    loop = block.rect.grown(-float(rng.uniform(1.8, WALKWAY_WIDTH - 0.5)))
    corners = np.array([side[0] for side in sides(loop)])
    if rng.random() < 0.5:
        corners = corners[::-1]
    k = int(rng.integers(4))
    corners = np.roll(corners, -k, axis=0)
    begin = corners[0] + rng.uniform(0.1, 0.9) * (corners[1] - corners[0])
    laps = 1 + int(length / np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).sum())
    return np.concatenate([begin[None], *[np.roll(corners, -1, axis=0)] * laps])


def _across(district: District, rng: np.random.Generator) -> Array:
    """A walk over a crossing from pavement to pavement: (2, 2) street coordinates."""
    options = list(stretches(district))
    stretch = options[rng.integers(len(options))]
    along = stretch.length - float(rng.uniform(CROSSING_BAND[0] + 0.5, CROSSING_BAND[1] - 0.5))
    reach = stretch.road.half_width + 2.5
    return np.array([stretch.point(along, reach), stretch.point(along, -reach)])


def walking(
    district: District, around: Array, duration: float, clearance: Clearance, rng: np.random.Generator
) -> list[Actor]:
    """Pedestrians on pavements and crossings near `around` (2,) global [m], and some standing still."""
    actors = []
    for attempt in range(260):
        speed, shape = float(rng.uniform(0.9, 1.7)), shapes.pedestrian(rng)
        attribute = "pedestrian.moving"
        if attempt % 5 == 0:
            motion = walk(district, _across(district, rng), speed)
            motion = motion.shifted(float(rng.uniform(-0.6, 0.3)) * motion.times[-1])
        elif attempt % 5 == 1:
            u, v = _around(district, rng, 0.0)[0]
            motion = _resting(district, (float(u), float(v)), (float(rng.normal()), float(rng.normal())))
            attribute = "pedestrian.standing"
        else:
            motion = walk(district, _around(district, rng, speed * (duration + 2)), speed).shifted(-1.0)
        if np.linalg.norm(motion.at(duration / 2)[:2] - around) > 75:
            continue
        if clearance.try_add(motion, 0.7, 0.7):
            actors.append(Actor("human.pedestrian.adult", attribute, shape, motion))
    return actors
