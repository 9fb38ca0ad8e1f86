"""Appearance of surfaces for cameras and LiDAR: procedural textures, one function for both sensors.

Colours are linear RGB in 0..1. `reflectivity` is the reflected fraction of a LiDAR pulse at normal incidence; it is above 1
for retro-reflectors and almost 0 for glass. `foot` is the size of a pixel on the surface [m]; finer texture is faded to its
mean, so that distant surfaces do not flicker.
"""

from __future__ import annotations

import numpy as np

from occfeat_targets.synth.ground import (
    CAR_PARK,
    CURB,
    DRIVEWAY,
    LAWN,
    NO_PAINT,
    OUTSKIRTS,
    PLAZA,
    WALKWAY,
    WHITE,
    YARD,
    classify,
    street_coordinates,
)
from occfeat_targets.synth.kernels import kernel

(
    FACADE, CURTAIN_WALL, CONCRETE, BARK, LEAF, METAL, CAR_BODY, CAR_CABIN, TYRE, CLOTH, SKIN, BUS_BODY, CARGO,
    STRIPED, LAMP, SIGNAL_HEAD, SIGN,
) = range(17)  # fmt: skip


@kernel
def hash3(i, j, k):  # type: ignore[no-untyped-def]
    """Three integers -> a pseudo-random number in 0..1."""
    h = (np.int64(i) * 374761393 + np.int64(j) * 668265263 + np.int64(k) * 2147483629) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65535.0


@kernel
def noise2(x, y, seed):  # type: ignore[no-untyped-def]
    """Smooth noise in 0..1 on the unit lattice."""
    fx, fy = np.floor(x), np.floor(y)
    i, j = np.int64(fx), np.int64(fy)
    a, b = x - fx, y - fy
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = hash3(i, j, seed) * (1 - a) + hash3(i + 1, j, seed) * a
    high = hash3(i, j + 1, seed) * (1 - a) + hash3(i + 1, j + 1, seed) * a
    return low * (1 - b) + high * b


@kernel
def _detail(x, y, scale, seed, foot):  # type: ignore[no-untyped-def]
    """Noise of wavelength `scale` [m] around 0, faded where a pixel is coarser."""
    weight = 1.0 - foot / scale
    return (noise2(x / scale, y / scale, seed) - 0.5) * weight if weight > 0 else 0.0


@kernel
def ground_surface(x, y, g, foot):  # type: ignore[no-untyped-def]
    """Global x, y on the ground -> r, g, b, reflectivity, gloss."""
    u, v = street_coordinates(x, y, g)
    region, paint = classify(u, v, g)
    coarse = _detail(u, v, 3.7, 1, foot)
    fine = _detail(u, v, 0.13, 2, foot)
    if paint != NO_PAINT:
        wear = 0.82 + 0.25 * _detail(u, v, 0.4, 3, foot) + 0.2 * coarse
        if paint == WHITE:
            return 0.78 * wear, 0.78 * wear, 0.75 * wear, 0.45 * wear, 0.0
        return 0.75 * wear, 0.55 * wear, 0.10 * wear, 0.38 * wear, 0.0
    if region in (WALKWAY, PLAZA):
        size = 0.6 if region == WALKWAY else 1.2
        tile = hash3(np.int64(np.floor(u / size)), np.int64(np.floor(v / size)), 5) - 0.5
        joint = 0.8 if foot < 0.05 and (u % size < 0.03 or v % size < 0.03) else 1.0
        c = (0.42 + 0.09 * tile * (foot < size) + 0.05 * coarse + 0.04 * fine) * joint
        if region == PLAZA:
            return c * 1.05, c * 0.85, c * 0.70, 0.14, 0.0
        return c, 0.97 * c, 0.90 * c, 0.15, 0.0
    if region == CURB:
        c = 0.50 + 0.08 * fine
        return c, c, 0.97 * c, 0.16, 0.0
    if region in (LAWN, OUTSKIRTS):
        c = 0.20 + 0.10 * coarse + 0.12 * _detail(u, v, 0.22, 4, foot) + 0.05 * fine
        return 0.62 * c + 0.02, c, 0.28 * c, 0.28 + 0.3 * fine, 0.0
    if region == YARD:
        c = 0.27 + 0.06 * coarse + 0.04 * fine
        return c, 0.96 * c, 0.90 * c, 0.13, 0.0
    fine += 0.8 * _detail(u, v, 0.035, 8, foot)
    # Asphalt: lighter and cracked in car parks, with darker tyre tracks and patches on the road.
    c = 0.13 + 0.035 * coarse + 0.05 * fine + 0.02 * _detail(u, v, 0.9, 6, foot)
    if region in (CAR_PARK, DRIVEWAY):
        c += 0.05
    elif hash3(np.int64(np.floor(u / 9.0)), np.int64(np.floor(v / 7.0)), 7) > 0.9:
        c *= 0.75
    return c, c, 1.04 * c, 0.06 + 0.12 * c, 0.0


@kernel
def leaf_normal(nx, ny, nz, lx, ly, lz, foot):  # type: ignore[no-untyped-def]
    """The normal of a crown, perturbed by its leaves."""
    ruffle = 1.9 * max(0.0, 1.0 - foot / 0.4)
    p, q = lx + 0.8 * lz, ly - 0.6 * lz
    nx += ruffle * (noise2(4.1 * p, 4.1 * q, 21) - 0.5) + 0.7 * ruffle * (noise2(9.7 * p, 9.7 * q, 24) - 0.5)
    ny += ruffle * (noise2(4.1 * q, 4.1 * (p + lz), 22) - 0.5)
    nz += ruffle * (noise2(3.7 * (p - q), 3.7 * lz, 23) - 0.5)
    n = 1.0 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-9)
    return nx * n, ny * n, nz * n


@kernel
def _facade(s, z, height, seed, r, g, b, foot):  # type: ignore[no-untyped-def]
    """A wall at s along it and z up: shop fronts below, rows of windows above."""
    floor_height, bay = 3.2, 2.4 + 1.2 * hash3(seed, 1, 0)
    floor, column = np.int64(np.floor(z / floor_height)), np.int64(np.floor(s / bay))
    fz, fs = z / floor_height - floor, s / bay - column
    grime = 1.0 + 0.16 * _detail(s, z, 2.3, seed, foot) - 0.10 * (z < 1.0)
    lit = hash3(column, floor, seed)
    if z > height - 0.9:
        return 0.8 * r, 0.8 * g, 0.8 * b, 0.2, 0.0
    if floor == 0:
        if fz > 0.82:
            tint = hash3(np.int64(np.floor(s / 9.0)), 3, seed)
            return 0.25 + 0.5 * tint, 0.55 - 0.35 * tint, 0.2 + 0.4 * (1 - tint) * lit, 0.25, 0.0
        if 0.08 < fs < 0.92 and fz > 0.12:
            return 0.06 + 0.12 * lit, 0.07 + 0.11 * lit, 0.08 + 0.08 * lit, 0.02, 0.35
        return 0.55 * r, 0.55 * g, 0.55 * b, 0.18, 0.0
    side = 0.16 + 0.14 * hash3(seed, 2, 0)
    if side < fs < 1 - side and 0.25 < fz < 0.82:
        if foot < 0.1 and (fs < side + 0.05 or fs > 0.95 - side or fz < 0.29 or abs(fs - 0.5) < 0.015):
            return 0.75, 0.75, 0.73, 0.2, 0.0
        c = 0.05 + 0.10 * lit * lit
        return c, 1.1 * c, 1.25 * c, 0.02, 0.45
    if fz < 0.06:
        grime *= 0.8
    elif foot < 0.04 and r > 1.5 * b:
        # Red walls are brick: courses of 75 mm, every other one shifted.
        course = np.int64(np.floor(z / 0.075))
        brick = np.int64(np.floor(s / 0.24 + 0.5 * (course % 2)))
        grime *= 0.88 + 0.24 * hash3(brick, course, seed) if z / 0.075 - course > 0.12 else 1.12
    return r * grime, g * grime, b * grime, 0.15 + 0.2 * g, 0.0


@kernel
def _car(material, lx, ly, lz, hx, hy, hz, nx, nz, r, g, b):  # type: ignore[no-untyped-def]
    """Painted metal, with lamps and plates on a body and glass between the pillars of a cabin."""
    if material == CAR_CABIN:
        up = (lz + hz) / (2 * hz)
        if nz < 0.85 and 0.10 < up < 0.90:
            along = abs(lx + 0.06 * hx)
            # A windscreen spans between the corner pillars, a side window between those and the middle one.
            glass = abs(ly) < 0.82 * hy if abs(nx) > 0.3 else 0.04 * hx < along < 0.70 * hx
            if glass:
                return 0.03, 0.035, 0.04, 0.02, 0.5
        return r, g, b, 0.30, 0.15
    if nx > 0.7 and abs(ly) > 0.58 * hy and 0.1 < lz / hz < 0.75:
        return 0.85, 0.85, 0.80, 0.7, 0.2
    if nx < -0.7 and abs(ly) > 0.62 * hy and 0.15 < lz / hz < 0.85:
        return 0.55, 0.02, 0.02, 0.7, 0.2
    if abs(nx) > 0.7 and abs(ly) < 0.26 and -0.45 < lz / hz < -0.05:
        return 0.80, 0.78, 0.55, 1.3, 0.0
    if lz < -0.72 * hz or (nx > 0.7 and abs(ly) < 0.5 * hy and -0.05 < lz / hz < 0.5):
        return 0.03, 0.03, 0.03, 0.08, 0.0
    return r, g, b, 0.30, 0.15


@kernel
def surface(material, r, g, b, lx, ly, lz, hx, hy, hz, nx, ny, nz, seed, foot):  # type: ignore[no-untyped-def]
    """Surface of a solid -> r, g, b, reflectivity, gloss.

    r, g, b: its base colour; lx, ly, lz: the point from its centre, in its own axes; hx, hy, hz: its half extents;
    nx, ny, nz: its normal there, in its own axes; seed: distinguishes similar objects.
    """
    s = ly + hy if abs(nx) > abs(ny) else lx + hx
    z = lz + hz
    if material in (FACADE, CURTAIN_WALL):
        if nz > 0.5:
            c = 0.30 + 0.08 * _detail(lx, ly, 0.5, seed, foot)
            return c, c, c, 0.18, 0.0
        if material == FACADE:
            return _facade(s, z, 2 * hz, seed, r, g, b, foot)
        if foot < 0.3 and (s % 1.6 < 0.09 or z % 3.4 < 0.14):
            return 0.35, 0.36, 0.38, 0.3, 0.1
        pane = 0.8 + 0.4 * hash3(np.int64(np.floor(s / 1.6)), np.int64(np.floor(z / 3.4)), seed)
        return r * pane, g * pane, b * pane, 0.03, 0.55
    if material in (CAR_BODY, CAR_CABIN):
        return _car(material, lx, ly, lz, hx, hy, hz, nx, nz, r, g, b)
    if material == LEAF:
        c = 1.0 + 0.9 * _detail(lx + 1.7 * ly, lz + 0.6 * lx - 0.8 * ly, 0.28, seed, foot)
        c += 0.7 * _detail(lx - 0.9 * ly, lz + 0.7 * ly, 0.9, seed + 1, foot)
        return r * c, g * c, b * c, 0.35 * c, 0.0
    if material == BARK:
        c = 1.0 + 0.7 * _detail(np.arctan2(ly, lx) * hx, 0.25 * lz, 0.08, seed, foot)
        return r * c, g * c, b * c, 0.25, 0.0
    if material == BUS_BODY:
        if nz < 0.5 and 0.42 < z / (2 * hz) < 0.82 and (abs(nx) > 0.5 or lx % 1.5 > 0.12):
            return 0.03, 0.035, 0.04, 0.02, 0.45
        band = 0.35 if 0.20 < z / (2 * hz) < 0.27 else 1.0
        return r * band, g * band, b * band, 0.32, 0.12
    if material == CARGO:
        rib = 0.86 if abs(ny) > 0.5 and lx % 0.5 < 0.06 and foot < 0.1 else 1.0
        return r * rib, g * rib, b * rib, 0.3, 0.0
    if material == STRIPED:
        if (s + z) % 0.6 < 0.3:
            return 0.80, 0.80, 0.78, 1.1, 0.0
        return r, g, b, 0.6, 0.0
    if material == SIGNAL_HEAD:
        lamp = np.int64(3 * z / (2 * hz))
        offset = np.hypot(ly, z - (lamp + 0.5) * 2 * hz / 3)
        if abs(nx) > 0.5 and offset < 0.7 * hy:
            lit = lamp == np.int64(hash3(seed, 9, 9) > 0.5) * 2
            glow = 2.0 if lit else 0.15
            return (
                glow * (lamp > 0),
                glow * (0.75 if lamp == 1 else 1.0 if lamp == 0 else 0.0),
                0.1 * glow,
                0.3,
                0.0,
            )
        return 0.02, 0.02, 0.02, 0.1, 0.0
    if material == SIGN:
        if abs(nx) > 0.5 and abs(ly) < 0.88 * hy and abs(lz) < 0.88 * hz:
            return r, g, b, 2.0, 0.0
        return 0.8, 0.8, 0.8, 2.0, 0.0
    if material == LAMP:
        return 0.9, 0.9, 0.85, 0.2, 0.0
    if material == TYRE:
        rim = np.hypot(lx, lz) < 0.6 * hx
        return (0.45, 0.45, 0.46, 0.4, 0.2) if rim else (0.025, 0.025, 0.025, 0.05, 0.0)
    if material == METAL:
        return r, g, b, 0.35, 0.1
    if material == CONCRETE:
        c = 1.0 + 0.15 * _detail(s, z, 0.7, seed, foot)
        return r * c, g * c, b * c, 0.2, 0.0
    return r, g, b, 0.25, 0.0
