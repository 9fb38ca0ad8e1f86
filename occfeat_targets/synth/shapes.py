"""Solids and what is composed of them: vehicles, people, street furniture, trees, buildings.

A shape lives in its own frame: x forward, y left, z up, origin on the ground below its middle. Its bounding box is what a
nuScenes annotation of it encloses, so no shape has parts that stick out alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.synth.materials import (
    BARK,
    BUS_BODY,
    CAR_BODY,
    CAR_CABIN,
    CARGO,
    CLOTH,
    CONCRETE,
    CURTAIN_WALL,
    FACADE,
    LAMP,
    LEAF,
    METAL,
    SIGN,
    SIGNAL_HEAD,
    SKIN,
    STRIPED,
    TYRE,
)

BOX, TAPERED, ELLIPSOID, UPRIGHT, AXLE = range(5)  # UPRIGHT and AXLE: cylinders along z and along y.
# A solid's row: kind, material, r, g, b, centre x, y, z, half extents x, y, z, taper front, rear, sides [m at the top].
SOLID_COLUMNS = 14

Vector = tuple[float, float, float]
_WHITE, _BLACK, _GREY = (0.7, 0.7, 0.68), (0.03, 0.03, 0.03), (0.25, 0.26, 0.28)
_PAINTS = (
    (0.75, 0.75, 0.74), (0.75, 0.75, 0.74), (0.42, 0.43, 0.45), (0.42, 0.43, 0.45), (0.05, 0.05, 0.055), (0.05, 0.05, 0.055),
    (0.45, 0.03, 0.03), (0.04, 0.10, 0.33), (0.05, 0.22, 0.40), (0.50, 0.35, 0.05), (0.04, 0.20, 0.10), (0.22, 0.14, 0.09),
)  # fmt: skip
_WALLS = (
    (0.62, 0.56, 0.45), (0.50, 0.26, 0.18), (0.66, 0.64, 0.60), (0.58, 0.46, 0.30), (0.45, 0.50, 0.54), (0.70, 0.60, 0.50),
    (0.36, 0.20, 0.15), (0.55, 0.60, 0.52),
)  # fmt: skip
_SHIRTS = (
    (0.6, 0.08, 0.06), (0.06, 0.12, 0.42), (0.7, 0.7, 0.68), (0.05, 0.05, 0.06), (0.65, 0.5, 0.08), (0.08, 0.35, 0.2),
    (0.45, 0.2, 0.45), (0.35, 0.36, 0.38),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """solids: (n, SOLID_COLUMNS), one row a solid."""

    solids: NDArray[np.float64]

    @cached_property
    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(3,) lowest and (3,) highest corner of the tight box about all solids [m]."""
        centre, half = self.solids[:, 5:8], self.solids[:, 8:11]
        return (centre - half).min(0), (centre + half).max(0)


def _solid(
    kind: int, material: int, colour: Vector, centre: Vector, half: Vector, taper: Vector = (0, 0, 0)
) -> list[float]:
    return [kind, material, *colour, *centre, *half, *taper]


def _shape(*solids: list[float]) -> Shape:
    return Shape(np.array(solids, np.float64))


def _pick(options: tuple[Vector, ...], rng: np.random.Generator) -> Vector:
    r, g, b = np.asarray(options[rng.integers(len(options))]) * rng.uniform(0.85, 1.15)
    return float(r), float(g), float(b)


def _wheels(xs: tuple[float, ...], track: float, radius: float, width: float) -> list[list[float]]:
    return [
        _solid(AXLE, TYRE, _BLACK, (x, side * (track - width), radius), (radius, width, radius))
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
    paint = _pick(_PAINTS, rng)
    rise = height - belt
    return _shape(
        _solid(TAPERED, CAR_BODY, paint, (0, 0, (belt + clearance) / 2), (length / 2, half_width - 0.04, (belt - clearance) / 2),
               (0.10, 0.05, 0.03)),
        _solid(TAPERED, CAR_CABIN, paint, ((x0 + x1) / 2, 0, belt + rise / 2), ((x1 - x0) / 2, half_width - 0.08, rise / 2),
               (1.1 * rise, 0.35 * rise if tall else 0.8 * rise, 0.30 * rise)),
        *_wheels((-0.30 * length, 0.31 * length), half_width, radius, 0.10),
    )  # fmt: skip


def truck(rng: np.random.Generator) -> Shape:
    """A box truck: cab, cargo body, chassis: 6-8.5 m long."""
    length, height, half_width = rng.uniform(6.0, 8.5), rng.uniform(2.8, 3.5), rng.uniform(1.05, 1.2)
    cab, paint = 1.8, _pick(_PAINTS, rng)
    front, rear = length / 2, -length / 2
    cargo = length - cab - 0.15
    return _shape(
        _solid(TAPERED, CAR_BODY, paint, (front - cab / 2, 0, 0.95), (cab / 2, half_width - 0.05, 0.45)),
        _solid(TAPERED, CAR_CABIN, paint, (front - cab / 2, 0, 1.85), (cab / 2, half_width - 0.05, 0.45), (0.35, 0, 0.08)),
        _solid(BOX, CARGO, _pick((_WHITE, (0.6, 0.62, 0.6), (0.2, 0.35, 0.5)), rng),
               (rear + cargo / 2, 0, (height + 0.85) / 2), (cargo / 2, half_width, (height - 0.85) / 2)),
        _solid(BOX, METAL, _BLACK, (0, 0, 0.7), (front - 0.2, 0.45, 0.15)),
        *_wheels((front - 0.9, rear + 1.3), half_width - 0.05, 0.45, 0.14),
    )  # fmt: skip


def bus(rng: np.random.Generator) -> Shape:
    """A city bus: 10-12 m long."""
    length, height, half_width = rng.uniform(10, 12), rng.uniform(3.0, 3.3), 1.27
    paint = _pick(((0.55, 0.05, 0.05), (0.10, 0.40, 0.15), (0.65, 0.62, 0.55), (0.08, 0.2, 0.5)), rng)
    return _shape(
        _solid(TAPERED, BUS_BODY, paint, (0, 0, (height + 0.3) / 2), (length / 2, half_width - 0.03, (height - 0.3) / 2),
               (0.12, 0.03, 0.06)),
        *_wheels((-0.27 * length, 0.30 * length), half_width, 0.48, 0.14),
    )  # fmt: skip


def _person(rng: np.random.Generator, hip: float, x: float, legs: list[list[float]]) -> list[list[float]]:
    """Torso, arms and head on top of `hip` [m], with the given legs."""
    shirt, skin = _pick(_SHIRTS, rng), _pick(((0.55, 0.36, 0.26), (0.35, 0.2, 0.13), (0.65, 0.45, 0.34)), rng)
    torso = 0.56
    return [
        *legs,
        _solid(TAPERED, CLOTH, shirt, (x, 0, hip + torso / 2), (0.13, 0.21, torso / 2), (0.03, 0.03, -0.0)),
        *[_solid(ELLIPSOID, CLOTH, shirt, (x + 0.04, side * 0.25, hip + 0.27), (0.08, 0.06, 0.31)) for side in (-1, 1)],
        _solid(ELLIPSOID, SKIN, skin, (x, 0, hip + torso + 0.13), (0.10, 0.09, 0.13)),
        _solid(ELLIPSOID, CLOTH, _pick((_BLACK, (0.12, 0.07, 0.04), (0.4, 0.3, 0.15)), rng),
               (x - 0.015, 0, hip + torso + 0.18), (0.11, 0.10, 0.10)),
    ]  # fmt: skip


def pedestrian(rng: np.random.Generator) -> Shape:
    """A person in mid-stride, 1.55-1.85 m tall."""
    hip, trousers = rng.uniform(0.78, 0.98), _pick((_BLACK, (0.06, 0.08, 0.18), (0.3, 0.26, 0.2), _GREY), rng)
    stride = rng.uniform(0.03, 0.16)
    legs = [
        _solid(TAPERED, CLOTH, trousers, (side * stride, side * 0.09, hip / 2), (0.09, 0.08, hip / 2), (0.0, 0.0, 0.0))
        for side in (-1, 1)
    ]
    return _shape(*_person(rng, hip, 0.0, legs))


def _rider(rng: np.random.Generator, hip: float, x: float) -> list[list[float]]:
    trousers = _pick((_BLACK, (0.06, 0.08, 0.18), _GREY), rng)
    legs = [
        _solid(TAPERED, CLOTH, trousers, (x + 0.16, side * 0.13, hip - 0.28 - 0.06 * side), (0.15, 0.07, 0.30))
        for side in (-1, 1)
    ]
    return _person(rng, hip, x, legs)


def bicycle(rng: np.random.Generator) -> Shape:
    """A bicycle with its rider."""
    frame = _pick(_PAINTS, rng)
    return _shape(
        _solid(AXLE, TYRE, _BLACK, (0.52, 0, 0.34), (0.34, 0.025, 0.34)),
        _solid(AXLE, TYRE, _BLACK, (-0.52, 0, 0.34), (0.34, 0.025, 0.34)),
        _solid(BOX, METAL, frame, (0, 0, 0.66), (0.40, 0.02, 0.03)),
        _solid(BOX, METAL, frame, (0.42, 0, 0.75), (0.03, 0.02, 0.32)),
        _solid(BOX, METAL, _BLACK, (0.40, 0, 1.05), (0.03, 0.26, 0.025)),
        *_rider(rng, 0.90, -0.12),
    )


def motorcycle(rng: np.random.Generator) -> Shape:
    """A motorcycle with its rider."""
    paint = _pick(_PAINTS, rng)
    return _shape(
        _solid(AXLE, TYRE, _BLACK, (0.70, 0, 0.31), (0.31, 0.07, 0.31)),
        _solid(AXLE, TYRE, _BLACK, (-0.68, 0, 0.31), (0.31, 0.08, 0.31)),
        _solid(ELLIPSOID, METAL, paint, (0.12, 0, 0.66), (0.52, 0.19, 0.24)),
        _solid(BOX, METAL, _BLACK, (-0.45, 0, 0.72), (0.42, 0.14, 0.07)),
        _solid(BOX, METAL, _BLACK, (0.48, 0, 1.02), (0.04, 0.34, 0.03)),
        *_rider(rng, 0.80, -0.18),
    )


def cone(rng: np.random.Generator) -> Shape:
    """A traffic cone, 0.7 m."""
    orange, height = (0.75, 0.17, 0.02), 0.03
    solids = [_solid(BOX, METAL, orange, (0, 0, 0.015), (0.19, 0.19, 0.015))]
    for radius, rise, colour in ((0.14, 0.22, orange), (0.10, 0.16, (0.8, 0.8, 0.8)), (0.07, 0.14, orange), (0.04, 0.15, orange)):
        solids.append(_solid(UPRIGHT, SIGN if colour != orange else METAL, colour, (0, 0, height + rise / 2), (radius, radius, rise / 2)))
        height += rise
    return _shape(*solids)


def barrier(rng: np.random.Generator) -> Shape:
    """A striped road-works barrier, set across its x axis: 2 m wide."""
    red = (0.6, 0.05, 0.04)
    return _shape(
        _solid(BOX, STRIPED, red, (0, 0, 0.80), (0.05, 1.0, 0.16)),
        _solid(BOX, STRIPED, red, (0, 0, 0.40), (0.04, 1.0, 0.10)),
        *[_solid(BOX, METAL, _GREY, (0, side * 0.85, 0.48), (0.22, 0.05, 0.48)) for side in (-1, 1)],
    )


def tree(rng: np.random.Generator) -> Shape:
    """A street tree: trunk and a crown of several lobes, 5-10 m tall."""
    height, spread = rng.uniform(5, 10), rng.uniform(1.5, 2.6)
    trunk = rng.uniform(0.35, 0.45) * height
    green = _pick(((0.10, 0.22, 0.04), (0.14, 0.24, 0.05), (0.07, 0.17, 0.05), (0.20, 0.24, 0.05)), rng)
    solids = [_solid(UPRIGHT, BARK, (0.16, 0.11, 0.07), (0, 0, (trunk + 0.6) / 2), (0.17, 0.17, (trunk + 0.6) / 2))]
    for k in range(4):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.55) * spread * (k > 0)
        z = trunk + (height - trunk) * (0.5 if k == 0 else rng.uniform(0.25, 0.7))
        half = (height - trunk) * (0.5 if k == 0 else rng.uniform(0.2, 0.3))
        shade = 1.0 if k == 0 else rng.uniform(0.8, 1.25)
        colour = (green[0] * shade, green[1] * shade, green[2] * shade)
        side = spread * (0.75 if k == 0 else 0.6)
        solids.append(_solid(ELLIPSOID, LEAF, colour, (reach * np.cos(angle), reach * np.sin(angle), z), (side, side, half)))
    return _shape(*solids)


def bush(rng: np.random.Generator) -> Shape:
    """Two lobes of leaves, under 1.5 m."""
    h, w = rng.uniform(0.4, 0.7), rng.uniform(0.5, 1.0)
    green = _pick(((0.10, 0.22, 0.04), (0.16, 0.22, 0.06)), rng)
    return _shape(
        _solid(ELLIPSOID, LEAF, green, (0, 0, h), (w, w, h)),
        _solid(ELLIPSOID, LEAF, green, (0.6 * w, 0.2 * w, 0.8 * h), (0.7 * w, 0.8 * w, 0.8 * h)),
    )


def lamp_post() -> Shape:
    """A street lamp whose arm reaches forward over the road."""
    return _shape(
        _solid(UPRIGHT, METAL, _GREY, (0, 0, 4.0), (0.09, 0.09, 4.0)),
        _solid(BOX, METAL, _GREY, (0.9, 0, 7.95), (0.95, 0.05, 0.05)),
        _solid(BOX, LAMP, _WHITE, (1.7, 0, 7.85), (0.35, 0.14, 0.06)),
    )


def traffic_signal() -> Shape:
    """A signal on a post; its lamps look along +x."""
    return _shape(
        _solid(UPRIGHT, METAL, _GREY, (-0.16, 0, 1.7), (0.07, 0.07, 1.7)),
        _solid(BOX, SIGNAL_HEAD, _BLACK, (0, 0, 2.85), (0.13, 0.17, 0.48)),
    )


def road_sign(rng: np.random.Generator) -> Shape:
    """A retro-reflecting sign on a pole, facing +x."""
    colour = _pick(((0.05, 0.15, 0.5), (0.55, 0.04, 0.04), (0.04, 0.3, 0.12)), rng)
    return _shape(
        _solid(UPRIGHT, METAL, _GREY, (-0.06, 0, 1.3), (0.04, 0.04, 1.3)),
        _solid(BOX, SIGN, colour, (0, 0, 2.25), (0.015, 0.35, 0.35)),
    )


def bench() -> Shape:
    """A concrete bench with a wooden seat."""
    return _shape(
        _solid(BOX, BARK, (0.30, 0.17, 0.08), (0, 0, 0.44), (0.25, 0.9, 0.03)),
        *[_solid(BOX, CONCRETE, _GREY, (0, side * 0.7, 0.2), (0.2, 0.06, 0.21)) for side in (-1, 1)],
    )


def bin_() -> Shape:
    """A litter bin."""
    return _shape(_solid(UPRIGHT, METAL, (0.05, 0.16, 0.08), (0, 0, 0.5), (0.27, 0.27, 0.5)))


def building(length: float, depth: float, rng: np.random.Generator) -> Shape:
    """A block of flats over shops, or a glass tower, `length` along y and `depth` along x [m]."""
    tower = rng.random() < 0.2
    height = float(rng.uniform(18, 38) if tower else 3.2 * rng.integers(2, 7) + 0.9)
    colour = _pick(((0.10, 0.16, 0.20), (0.12, 0.18, 0.17), (0.16, 0.16, 0.17)) if tower else _WALLS, rng)
    half = (depth / 2, length / 2)
    solids = [_solid(BOX, CURTAIN_WALL if tower else FACADE, colour, (0, 0, height / 2), (*half, height / 2))]
    if rng.random() < 0.7:
        x, y = rng.uniform(-0.4, 0.4, 2) * half
        solids.append(_solid(BOX, CONCRETE, (0.45, 0.44, 0.42), (x, y, height + 1.1), (0.3 * half[0], 0.25 * half[1], 1.1)))
    if not tower and rng.random() < 0.5:
        # An awning over the shop fronts.
        solids.append(_solid(BOX, CLOTH, _pick(_SHIRTS, rng), (half[0] + 0.5, 0, 2.75), (0.5, 0.8 * half[1], 0.06)))
    return _shape(*solids)
