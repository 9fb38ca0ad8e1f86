"""Static objects of a district: buildings, trees, lamps, signals, signs, benches. They are not annotated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occfeat_targets.synth import props
from occfeat_targets.synth.layout import (
    CORNER_RADIUS,
    CURB_HEIGHT,
    LAWN,
    STOP_BAND,
    WALKWAY_WIDTH,
    YARD,
    Block,
    District,
    Rect,
    Vector2,
)
from occfeat_targets.synth.shapes import Shape


@dataclass(frozen=True)
class Placed:
    """A shape at rest: global x, y, z [m] and yaw [rad]."""

    shape: Shape
    pose: tuple[float, float, float, float]


def place(district: District, shape: Shape, uv: Vector2, facing: Vector2, z: float = CURB_HEIGHT) -> Placed:
    """Put a shape at street coordinates, its x axis towards `facing` (given in street coordinates)."""
    x, y = district.to_global(np.array(uv))
    return Placed(shape, (float(x), float(y), z, float(district.heading(np.array(uv), np.array(facing)))))


def sides(rect: Rect) -> tuple[tuple[Vector2, Vector2, float, Vector2], ...]:
    """The four edges of a block: start corner, direction along, length, direction outwards."""
    du, dv = rect.u1 - rect.u0, rect.v1 - rect.v0
    return (
        ((rect.u0, rect.v0), (1.0, 0.0), du, (0.0, -1.0)),
        ((rect.u1, rect.v0), (0.0, 1.0), dv, (1.0, 0.0)),
        ((rect.u1, rect.v1), (-1.0, 0.0), du, (0.0, 1.0)),
        ((rect.u0, rect.v1), (0.0, -1.0), dv, (-1.0, 0.0)),
    )


def _along(start: Vector2, along: Vector2, outwards: Vector2, s: float, inside: float) -> Vector2:
    """The point `s` along an edge and `inside` metres inwards."""
    return (
        start[0] + s * along[0] - inside * outwards[0],
        start[1] + s * along[1] - inside * outwards[1],
    )


def _footprint(a: Vector2, b: Vector2) -> Rect:
    return Rect(min(a[0], b[0]), max(a[0], b[0]), min(a[1], b[1]), max(a[1], b[1]))


def _row_of_buildings(
    district: District, rect: Rect, setback: float, taken: list[Rect], rng: np.random.Generator
) -> list[Placed]:
    """Buildings along all edges of `rect`, facing outwards, none over a rectangle already taken."""
    placed = []
    for start, along, length, outwards in sides(rect):
        s = setback
        while s < length - setback - 8:
            size, depth = float(rng.uniform(10, 21)), float(rng.uniform(8, 13))
            size = min(size, length - setback - s)
            foot = _footprint(
                _along(start, along, outwards, s, setback),
                _along(start, along, outwards, s + size, setback + depth),
            )
            if not any(foot.overlaps(other) for other in taken):
                taken.append(foot)
                shape = props.building(size, depth, rng)
                middle = _along(start, along, outwards, s + size / 2, setback + depth / 2)
                placed.append(place(district, shape, middle, outwards))
            s += size + (0.0 if rng.random() < 0.5 else float(rng.uniform(1.5, 5)))
    return placed


def _inside(rect: Rect, rng: np.random.Generator) -> Vector2:
    return float(rng.uniform(rect.u0, rect.u1)), float(rng.uniform(rect.v0, rect.v1))


def _grounds(district: District, block: Block, rng: np.random.Generator) -> list[Placed]:
    """Objects on a lawn or a plaza: trees, bushes, benches."""
    inner = block.rect.grown(-(WALKWAY_WIDTH + 2))
    on_lawn = block.surface == LAWN
    placed = []
    for _ in range(int(rng.integers(14, 24) if on_lawn else rng.integers(5, 9))):
        placed.append(place(district, props.tree(rng), _inside(inner, rng), (1, 0)))
    for _ in range(int(rng.integers(4, 9))):
        placed.append(place(district, props.bush(rng), _inside(inner, rng), (1, 0)))
    for _ in range(int(rng.integers(3, 7))):
        angle = rng.uniform(0, 2 * np.pi)
        placed.append(place(district, props.bench(), _inside(inner, rng), (float(np.cos(angle)), float(np.sin(angle)))))
    return placed


def _street_furniture(district: District, block: Block, rng: np.random.Generator) -> list[Placed]:
    """Trees, lamps, bins and signs in the strip of pavement next to the curb."""
    placed = []
    for start, along, length, outwards in sides(block.rect):
        leafy = rng.random() < 0.7
        s, step = CORNER_RADIUS + 6.0, float(rng.uniform(7.5, 9.5))
        n = 0
        while s < length - CORNER_RADIUS - 5:
            point = _along(start, along, outwards, s, 0.75)
            drive = block.driveway
            blocked = drive is not None and drive.grown(1.5).overlaps(Rect(point[0], point[0], point[1], point[1]))
            if not blocked and n % 3 == 1:
                placed.append(place(district, props.lamp_post(), point, outwards))
            elif not blocked and leafy and rng.random() < 0.8:
                placed.append(place(district, props.tree(rng), point, outwards))
            elif not blocked and rng.random() < 0.5:
                turned = (-along[0], -along[1])
                small = props.bin_() if rng.random() < 0.5 else props.road_sign(rng)
                placed.append(place(district, small, point, turned))
            s += step
            n += 1
    return placed


def _signals(district: District) -> list[Placed]:
    """One signal per approach, left of the stop line, facing the waiting traffic."""
    placed = []
    gap = sum(STOP_BAND) / 2
    avenues, streets = district.avenues, district.streets
    for i, avenue in enumerate(avenues):
        for j, street in enumerate(streets):
            arms = (
                (j > 0, (avenue.low - 0.5, street.low - gap), (0.0, -1.0)),
                (j < len(streets) - 1, (avenue.high + 0.5, street.high + gap), (0.0, 1.0)),
                (i > 0, (avenue.low - gap, street.high + 0.5), (-1.0, 0.0)),
                (i < len(avenues) - 1, (avenue.high + gap, street.low - 0.5), (1.0, 0.0)),
            )
            for exists, uv, facing in arms:
                if exists:
                    placed.append(place(district, props.traffic_signal(), uv, facing))
    return placed


def build_scenery(district: District, rng: np.random.Generator) -> list[Placed]:
    """All static objects of a district, in a fixed order."""
    placed = []
    for block in district.blocks:
        if block.surface != YARD:
            placed += _grounds(district, block, rng)
        else:
            taken = [r.grown(1.0) for r in (block.car_park, block.driveway) if r is not None]
            placed += _row_of_buildings(district, block.rect, WALKWAY_WIDTH + 1.2, taken, rng)
        placed += _street_furniture(district, block, rng)
    beyond = district.ring.grown(WALKWAY_WIDTH + 18)
    placed += _row_of_buildings(district, beyond, 0.0, [], rng)
    placed += _signals(district)
    return placed
