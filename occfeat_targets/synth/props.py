"""Static objects without annotations: trees, lamps, signals, signs, benches, bins, buildings."""

from __future__ import annotations

import numpy as np

from occfeat_targets.synth.materials import (
    BARK,
    CLOTH,
    CONCRETE,
    CURTAIN_WALL,
    FACADE,
    LAMP,
    LEAF,
    METAL,
    SIGN,
    SIGNAL_HEAD,
)
from occfeat_targets.synth.shapes import (
    BLACK,
    BOX,
    ELLIPSOID,
    GREY,
    SHIRTS,
    UPRIGHT,
    WHITE,
    Shape,
    compose,
    pick,
    solid,
)

_WALLS = (
    (0.62, 0.56, 0.45), (0.50, 0.26, 0.18), (0.66, 0.64, 0.60), (0.58, 0.46, 0.30), (0.45, 0.50, 0.54), (0.70, 0.60, 0.50),
    (0.36, 0.20, 0.15), (0.55, 0.60, 0.52),
)  # fmt: skip


def tree(rng: np.random.Generator) -> Shape:
    """A street tree: trunk and a crown of several lobes, 5-10 m tall."""
    height, spread = rng.uniform(5, 10), rng.uniform(1.5, 2.6)
    trunk = rng.uniform(0.35, 0.45) * height
    green = pick(((0.10, 0.22, 0.04), (0.14, 0.24, 0.05), (0.07, 0.17, 0.05), (0.20, 0.24, 0.05)), rng)
    solids = [solid(UPRIGHT, BARK, (0.16, 0.11, 0.07), (0, 0, (trunk + 0.6) / 2), (0.17, 0.17, (trunk + 0.6) / 2))]
    for k in range(4):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.55) * spread * (k > 0)
        z = trunk + (height - trunk) * (0.5 if k == 0 else rng.uniform(0.25, 0.7))
        half = (height - trunk) * (0.5 if k == 0 else rng.uniform(0.2, 0.3))
        shade = 1.0 if k == 0 else rng.uniform(0.8, 1.25)
        colour = (green[0] * shade, green[1] * shade, green[2] * shade)
        side = spread * (0.75 if k == 0 else 0.6)
        solids.append(
            solid(ELLIPSOID, LEAF, colour, (reach * np.cos(angle), reach * np.sin(angle), z), (side, side, half))
        )
    return compose(*solids)


def bush(rng: np.random.Generator) -> Shape:
    """Two lobes of leaves, under 1.5 m."""
    h, w = rng.uniform(0.4, 0.7), rng.uniform(0.5, 1.0)
    green = pick(((0.10, 0.22, 0.04), (0.16, 0.22, 0.06)), rng)
    return compose(
        solid(ELLIPSOID, LEAF, green, (0, 0, h), (w, w, h)),
        solid(ELLIPSOID, LEAF, green, (0.6 * w, 0.2 * w, 0.8 * h), (0.7 * w, 0.8 * w, 0.8 * h)),
    )


def lamp_post() -> Shape:
    """A street lamp whose arm reaches forward over the road."""
    return compose(
        solid(UPRIGHT, METAL, GREY, (0, 0, 4.0), (0.09, 0.09, 4.0)),
        solid(BOX, METAL, GREY, (0.9, 0, 7.95), (0.95, 0.05, 0.05)),
        solid(BOX, LAMP, WHITE, (1.7, 0, 7.85), (0.35, 0.14, 0.06)),
    )


def traffic_signal() -> Shape:
    """A signal on a post; its lamps look along +x."""
    return compose(
        solid(UPRIGHT, METAL, GREY, (-0.16, 0, 1.7), (0.07, 0.07, 1.7)),
        solid(BOX, SIGNAL_HEAD, BLACK, (0, 0, 2.85), (0.13, 0.17, 0.48)),
    )


def road_sign(rng: np.random.Generator) -> Shape:
    """A retro-reflecting sign on a pole, facing +x."""
    colour = pick(((0.05, 0.15, 0.5), (0.55, 0.04, 0.04), (0.04, 0.3, 0.12)), rng)
    return compose(
        solid(UPRIGHT, METAL, GREY, (-0.06, 0, 1.3), (0.04, 0.04, 1.3)),
        solid(BOX, SIGN, colour, (0, 0, 2.25), (0.015, 0.35, 0.35)),
    )


def bench() -> Shape:
    """A concrete bench with a wooden seat."""
    return compose(
        solid(BOX, BARK, (0.30, 0.17, 0.08), (0, 0, 0.44), (0.25, 0.9, 0.03)),
        *[solid(BOX, CONCRETE, GREY, (0, side * 0.7, 0.2), (0.2, 0.06, 0.21)) for side in (-1, 1)],
    )


def bin_() -> Shape:
    """A litter bin."""
    return compose(solid(UPRIGHT, METAL, (0.05, 0.16, 0.08), (0, 0, 0.5), (0.27, 0.27, 0.5)))


def building(length: float, depth: float, rng: np.random.Generator) -> Shape:
    """A block of flats over shops, or a glass tower, `length` along y and `depth` along x [m]."""
    tower = rng.random() < 0.2
    height = float(rng.uniform(18, 38) if tower else 3.2 * rng.integers(2, 7) + 0.9)
    colour = pick(((0.10, 0.16, 0.20), (0.12, 0.18, 0.17), (0.16, 0.16, 0.17)) if tower else _WALLS, rng)
    half = (depth / 2, length / 2)
    solids = [solid(BOX, CURTAIN_WALL if tower else FACADE, colour, (0, 0, height / 2), (*half, height / 2))]
    if rng.random() < 0.7:
        x, y = rng.uniform(-0.4, 0.4, 2) * half
        solids.append(
            solid(BOX, CONCRETE, (0.45, 0.44, 0.42), (x, y, height + 1.1), (0.3 * half[0], 0.25 * half[1], 1.1))
        )
    if not tower and rng.random() < 0.5:
        # An awning over the shop fronts.
        solids.append(solid(BOX, CLOTH, pick(SHIRTS, rng), (half[0] + 0.5, 0, 2.75), (0.5, 0.8 * half[1], 0.06)))
    return compose(*solids)
