"""Solids, and the annotated objects composed of them: vehicles, people, cones and barriers.

A shape has its own frame: x forward, y left, z up, origin on the ground below its middle. Its bounding box is its nuScenes
annotation, so no shape has thin parts that stick out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.synth.materials import (
    BUS_BODY,
    CAR_BODY,
    CAR_CABIN,
    CARGO,
    CLOTH,
    METAL,
    SIGN,
    SKIN,
    STRIPED,
    TYRE,
)

BOX, TAPERED, ELLIPSOID, UPRIGHT, AXLE = range(5)  # UPRIGHT and AXLE: cylinders along z and along y.
# A solid's row: kind, material, r, g, b, centre x, y, z, half extents x, y, z, taper front, rear, sides [m at the top].
SOLID_COLUMNS = 14

Vector = tuple[float, float, float]
WHITE, BLACK, GREY = (0.7, 0.7, 0.68), (0.03, 0.03, 0.03), (0.25, 0.26, 0.28)
_PAINTS = (
    (0.75, 0.75, 0.74), (0.75, 0.75, 0.74), (0.42, 0.43, 0.45), (0.42, 0.43, 0.45), (0.05, 0.05, 0.055), (0.05, 0.05, 0.055),
    (0.45, 0.03, 0.03), (0.04, 0.10, 0.33), (0.05, 0.22, 0.40), (0.50, 0.35, 0.05), (0.04, 0.20, 0.10), (0.22, 0.14, 0.09),
)  # fmt: skip
SHIRTS = (
    (0.6, 0.08, 0.06), (0.06, 0.12, 0.42), (0.7, 0.7, 0.68), (0.05, 0.05, 0.06), (0.65, 0.5, 0.08), (0.08, 0.35, 0.2),
    (0.45, 0.2, 0.45), (0.35, 0.36, 0.38),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """solids: (n, SOLID_COLUMNS), one row per solid."""

    solids: NDArray[np.float64]

    @cached_property
    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(3,) lowest and (3,) highest corner of the tight box around all solids [m]."""
        centre, half = self.solids[:, 5:8], self.solids[:, 8:11]
        return (centre - half).min(0), (centre + half).max(0)


def solid(
    kind: int, material: int, colour: Vector, centre: Vector, half: Vector, taper: Vector = (0, 0, 0)
) -> list[float]:
    """A row of `Shape.solids`."""
    return [kind, material, *colour, *centre, *half, *taper]


def compose(*solids: list[float]) -> Shape:
    """A shape of rows made by `solid`."""
    return Shape(np.array(solids, np.float64))


def pick(options: tuple[Vector, ...], rng: np.random.Generator) -> Vector:
    """One of several colours, a little lighter or darker."""
    r, g, b = np.asarray(options[rng.integers(len(options))]) * rng.uniform(0.85, 1.15)
    return float(r), float(g), float(b)


def _wheels(xs: tuple[float, ...], track: float, radius: float, width: float) -> list[list[float]]:
    return [
        solid(AXLE, TYRE, BLACK, (x, side * (track - width), radius), (radius, width, radius))
        for x in xs
        for side in (-1, 1)
    ]


def car(rng: np.random.Generator) -> Shape:
    """A saloon, a hatchback or a tall SUV: 3.9-4.9 m long."""
    tall = rng.random() < 0.4
    length, width = rng.uniform(3.9, 4.9), rng.uniform(1.72, 1.95)
    height = rng.uniform(1.62, 1.85) if tall else rng.uniform(1.40, 1.55)
    belt, clearance, radius = 0.57 * height, 0.2, 0.36 if tall else 0.32
    back = 0.46 if tall or rng.random() < 0.5 else 0.36
    x0, x1, half_width = -back * length, 0.24 * length, width / 2
    paint = pick(_PAINTS, rng)
    rise = height - belt
    return compose(
        solid(TAPERED, CAR_BODY, paint, (0, 0, (belt + clearance) / 2), (length / 2, half_width - 0.04, (belt - clearance) / 2),
               (0.10, 0.05, 0.03)),
        solid(TAPERED, CAR_CABIN, paint, ((x0 + x1) / 2, 0, belt + rise / 2), ((x1 - x0) / 2, half_width - 0.08, rise / 2),
               (1.1 * rise, 0.35 * rise if tall else 0.8 * rise, 0.30 * rise)),
        *_wheels((-0.30 * length, 0.31 * length), half_width, radius, 0.10),
    )  # fmt: skip


def truck(rng: np.random.Generator) -> Shape:
    """A box truck: cab, cargo body, chassis: 6-8.5 m long."""
    length, height, half_width = rng.uniform(6.0, 8.5), rng.uniform(2.8, 3.5), rng.uniform(1.05, 1.2)
    cab, paint = 1.8, pick(_PAINTS, rng)
    front, rear = length / 2, -length / 2
    cargo = length - cab - 0.15
    return compose(
        solid(TAPERED, CAR_BODY, paint, (front - cab / 2, 0, 0.95), (cab / 2, half_width - 0.05, 0.45)),
        solid(TAPERED, CAR_CABIN, paint, (front - cab / 2, 0, 1.85), (cab / 2, half_width - 0.05, 0.45), (0.35, 0, 0.08)),
        solid(BOX, CARGO, pick((WHITE, (0.6, 0.62, 0.6), (0.2, 0.35, 0.5)), rng),
               (rear + cargo / 2, 0, (height + 0.85) / 2), (cargo / 2, half_width, (height - 0.85) / 2)),
        solid(BOX, METAL, BLACK, (0, 0, 0.7), (front - 0.2, 0.45, 0.15)),
        *_wheels((front - 0.9, rear + 1.3), half_width - 0.05, 0.45, 0.14),
    )  # fmt: skip


def bus(rng: np.random.Generator) -> Shape:
    """A city bus: 10-12 m long."""
    length, height, half_width = rng.uniform(10, 12), rng.uniform(3.0, 3.3), 1.27
    paint = pick(((0.55, 0.05, 0.05), (0.10, 0.40, 0.15), (0.65, 0.62, 0.55), (0.08, 0.2, 0.5)), rng)
    return compose(
        solid(TAPERED, BUS_BODY, paint, (0, 0, (height + 0.3) / 2), (length / 2, half_width - 0.03, (height - 0.3) / 2),
               (0.12, 0.03, 0.06)),
        *_wheels((-0.27 * length, 0.30 * length), half_width, 0.48, 0.14),
    )  # fmt: skip


def _person(rng: np.random.Generator, hip: float, x: float, legs: list[list[float]]) -> list[list[float]]:
    """Torso, arms and head on top of `hip` [m], with the given legs."""
    shirt, skin = pick(SHIRTS, rng), pick(((0.55, 0.36, 0.26), (0.35, 0.2, 0.13), (0.65, 0.45, 0.34)), rng)
    torso = 0.56
    return [
        *legs,
        solid(TAPERED, CLOTH, shirt, (x, 0, hip + torso / 2), (0.13, 0.21, torso / 2), (0.03, 0.03, 0)),
        *[solid(ELLIPSOID, CLOTH, shirt, (x + 0.04, side * 0.25, hip + 0.27), (0.08, 0.06, 0.31)) for side in (-1, 1)],
        solid(ELLIPSOID, SKIN, skin, (x, 0, hip + torso + 0.13), (0.10, 0.09, 0.13)),
        solid(ELLIPSOID, CLOTH, pick((BLACK, (0.12, 0.07, 0.04), (0.4, 0.3, 0.15)), rng),
               (x - 0.015, 0, hip + torso + 0.18), (0.11, 0.10, 0.10)),
    ]  # fmt: skip


def pedestrian(rng: np.random.Generator) -> Shape:
    """A person in mid-stride, 1.55-1.85 m tall."""
    hip, trousers = rng.uniform(0.78, 0.98), pick((BLACK, (0.06, 0.08, 0.18), (0.3, 0.26, 0.2), GREY), rng)
    stride = rng.uniform(0.03, 0.16)
    legs = [
        solid(
            TAPERED,
            CLOTH,
            trousers,
            (side * stride, side * 0.09, hip / 2),
            (0.09, 0.08, hip / 2),
            (0.0, 0.0, 0.0),
        )
        for side in (-1, 1)
    ]
    return compose(*_person(rng, hip, 0.0, legs))


def _rider(rng: np.random.Generator, hip: float, x: float) -> list[list[float]]:
    trousers = pick((BLACK, (0.06, 0.08, 0.18), GREY), rng)
    legs = [
        solid(TAPERED, CLOTH, trousers, (x + 0.16, side * 0.13, hip - 0.28 - 0.06 * side), (0.15, 0.07, 0.30))
        for side in (-1, 1)
    ]
    return _person(rng, hip, x, legs)


def bicycle(rng: np.random.Generator) -> Shape:
    """A bicycle with its rider."""
    frame = pick(_PAINTS, rng)
    return compose(
        solid(AXLE, TYRE, BLACK, (0.52, 0, 0.34), (0.34, 0.025, 0.34)),
        solid(AXLE, TYRE, BLACK, (-0.52, 0, 0.34), (0.34, 0.025, 0.34)),
        solid(BOX, METAL, frame, (0, 0, 0.66), (0.40, 0.02, 0.03)),
        solid(BOX, METAL, frame, (0.42, 0, 0.75), (0.03, 0.02, 0.32)),
        solid(BOX, METAL, BLACK, (0.40, 0, 1.05), (0.03, 0.26, 0.025)),
        *_rider(rng, 0.90, -0.12),
    )


def motorcycle(rng: np.random.Generator) -> Shape:
    """A motorcycle with its rider."""
    paint = pick(_PAINTS, rng)
    return compose(
        solid(AXLE, TYRE, BLACK, (0.70, 0, 0.31), (0.31, 0.07, 0.31)),
        solid(AXLE, TYRE, BLACK, (-0.68, 0, 0.31), (0.31, 0.08, 0.31)),
        solid(ELLIPSOID, METAL, paint, (0.12, 0, 0.66), (0.52, 0.19, 0.24)),
        solid(BOX, METAL, BLACK, (-0.45, 0, 0.72), (0.42, 0.14, 0.07)),
        solid(BOX, METAL, BLACK, (0.48, 0, 1.02), (0.04, 0.34, 0.03)),
        *_rider(rng, 0.80, -0.18),
    )


def cone(rng: np.random.Generator) -> Shape:
    """A traffic cone, 0.7 m."""
    orange, height = (0.75, 0.17, 0.02), 0.03
    solids = [solid(BOX, METAL, orange, (0, 0, 0.015), (0.19, 0.19, 0.015))]
    for radius, rise, colour in (
        (0.14, 0.22, orange),
        (0.10, 0.16, (0.8, 0.8, 0.8)),
        (0.07, 0.14, orange),
        (0.04, 0.15, orange),
    ):
        solids.append(
            solid(
                UPRIGHT,
                SIGN if colour != orange else METAL,
                colour,
                (0, 0, height + rise / 2),
                (radius, radius, rise / 2),
            )
        )
        height += rise
    return compose(*solids)


def barrier(rng: np.random.Generator) -> Shape:
    """A striped road-works barrier, set across its x axis: 2 m wide."""
    red = (0.6, 0.05, 0.04)
    return compose(
        solid(BOX, STRIPED, red, (0, 0, 0.80), (0.05, 1.0, 0.16)),
        solid(BOX, STRIPED, red, (0, 0, 0.40), (0.04, 1.0, 0.10)),
        *[solid(BOX, METAL, GREY, (0, side * 0.85, 0.48), (0.22, 0.05, 0.48)) for side in (-1, 1)],
    )
