"""Simulation of LiDAR sweeps: range and intensity of the returns.

A sweep is instantaneous at its timestamp, like a motion-compensated real sweep. As in nuScenes' files every pulse has a row,
in firing order (ring by ring, column by column). A pulse without a return is a point at the sensor's origin with intensity 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.synth.kernels import kernel
from occfeat_targets.synth.materials import ground_surface, surface
from occfeat_targets.synth.raycast import GROUND, SKY, _hit_slabs, normal_at, trace
from occfeat_targets.synth.rig import COLUMN_AZIMUTHS, EGO_FROM_LIDAR, NUM_RINGS, RING_ELEVATIONS
from occfeat_targets.synth.world import World

MAX_RANGE = 105.0
RANGE_NOISE = 0.012
DROP_OUT = 0.006
NO_RETURN, EGO = -3, -4
# The ego's roof and the rack of the LiDAR, as boxes in the ego frame: low x, y, z, high x, y, z [m].
_EGO_BODY = np.array([[-0.15, -0.46, 1.35, 1.75, 0.46, 1.52], [0.80, -0.30, 1.52, 1.08, 0.30, 1.60]])
# A pulse is lost when reflectivity * cos(incidence) / range^2 falls below this.
_SENSITIVITY = 1.5e-6


class Sweep(NamedTuple):
    """points: (NUM_COLUMNS * NUM_RINGS, 5) float32 x, y, z in the LiDAR's axes, intensity 0..255, ring;
    objects: index of the object that each pulse hit, or GROUND, EGO, NO_RETURN.
    """

    points: NDArray[np.float32]
    objects: NDArray[np.int32]


@kernel
def _hit_ego(px, py, pz, dx, dy, dz, boxes):  # type: ignore[no-untyped-def]
    best = 1e9
    for k in range(boxes.shape[0]):
        b = boxes[k]
        hx, hy, hz = 0.5 * (b[3] - b[0]), 0.5 * (b[4] - b[1]), 0.5 * (b[5] - b[2])
        near, far = _hit_slabs(px - b[0] - hx, py - b[1] - hy, pz - b[2] - hz, dx, dy, dz, hx, hy, hz)
        if 0 < near <= far:
            best = min(best, near)
    return best


@kernel
def _cast(g, e, beams, noise, chance, boxes, w, points, objects):  # type: ignore[no-untyped-def]
    """g: global_from_lidar, e: ego_from_lidar; beams: (n, 3) unit directions; noise: (n,) standard normal;
    chance: (n,) 0..1.
    """
    for n in range(beams.shape[0]):
        bx, by, bz = beams[n]
        dx = g[0, 0] * bx + g[0, 1] * by + g[0, 2] * bz
        dy = g[1, 0] * bx + g[1, 1] * by + g[1, 2] * bz
        dz = g[2, 0] * bx + g[2, 1] * by + g[2, 2] * bz
        ex = e[0, 0] * bx + e[0, 1] * by + e[0, 2] * bz
        ey = e[1, 0] * bx + e[1, 1] * by + e[1, 2] * bz
        ez = e[2, 0] * bx + e[2, 1] * by + e[2, 2] * bz
        own = _hit_ego(e[0, 3], e[1, 3], e[2, 3], ex + 1e-12, ey + 1e-12, ez + 1e-12, boxes)
        ox, oy, oz = g[0, 3], g[1, 3], g[2, 3]
        t, k, j = trace(ox, oy, oz, dx, dy, dz, min(own, MAX_RANGE), False, w)
        reflect, facing = 0.0, 1.0
        if k == SKY:
            if own < MAX_RANGE:
                t, k, reflect = own, EGO, 0.12
        elif k == GROUND:
            facing = -dz
            _, _, _, reflect, _ = ground_surface(ox + t * dx, oy + t * dy, w.ground, 0.003 * t)
        else:
            o, s = w.objects[k], w.solids[j]
            c, sn = o[3], o[4]
            rx, ry = ox + t * dx - o[0], oy + t * dy - o[1]
            lx, ly, lz = c * rx + sn * ry - s[5], c * ry - sn * rx - s[6], oz + t * dz - o[2] - s[7]
            nx, ny, nz = normal_at(lx, ly, lz, s)
            facing = abs(nx * (c * dx + sn * dy) + ny * (c * dy - sn * dx) + nz * dz)
            _, _, _, reflect, _ = surface(
                int(s[1]), s[2], s[3], s[4], lx, ly, lz, s[8], s[9], s[10], nx, ny, nz, j, 0.003 * t
            )
        points[n, 4] = n % NUM_RINGS
        # Glass mostly transmits or reflects the pulse; only near normal incidence there is a return.
        lost = chance[n] < DROP_OUT or (reflect < 0.05 and k >= 0 and chance[n] < 0.95 - 0.5 * facing**4)
        if k == SKY or lost or (k != EGO and reflect * facing < _SENSITIVITY * t * t):
            objects[n] = NO_RETURN
            points[n, 0], points[n, 1], points[n, 2], points[n, 3] = 0.0, 0.0, 0.0, 0.0
            continue
        objects[n] = k
        t += RANGE_NOISE * noise[n]
        points[n, 0], points[n, 1], points[n, 2] = t * bx, t * by, t * bz
        strength = 255.0 * reflect * (0.25 + 0.75 * facing) * (1.0 + 0.08 * noise[n])
        points[n, 3] = np.floor(min(255.0, max(0.0, strength)))


def beam_directions() -> NDArray[np.float64]:
    """(NUM_COLUMNS * NUM_RINGS, 3) unit vectors in the LiDAR's axes, in firing order."""
    azimuth, elevation = np.meshgrid(COLUMN_AZIMUTHS, RING_ELEVATIONS, indexing="ij")
    flat = np.cos(elevation)
    beams = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
    return beams.reshape(-1, 3)


def cast_sweep(global_from_ego: Matrix, world: World, rng: np.random.Generator) -> Sweep:
    """One turn of the LiDAR; range noise and drop-out are sampled from `rng`."""
    beams = beam_directions()
    noise, chance = rng.standard_normal(len(beams)), rng.random(len(beams))
    points = np.empty((len(beams), 5), np.float32)
    objects = np.empty(len(beams), np.int32)
    pose = global_from_ego @ EGO_FROM_LIDAR
    _cast(pose, EGO_FROM_LIDAR, beams, noise, chance, _EGO_BODY, world, points, objects)
    return Sweep(points, objects)
