"""Rendering of camera images, and the visible fraction of each object."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.synth.kernels import kernel
from occfeat_targets.synth.materials import LEAF, ground_surface, leaf_normal, noise2, surface
from occfeat_targets.synth.raycast import FAR, GROUND, SKY, hit_object, normal_at, trace
from occfeat_targets.synth.world import World

# Samples per object and camera for its visible fraction.
_VISIBILITY_SAMPLES = 400
_EDGE_CONTRAST = 26.0
_HAZE_DISTANCE = 750.0


class Light(NamedTuple):
    """sun: (3,) unit vector towards it; sunlight, skylight: (3,) linear RGB; clouds: fraction of the sky that they cover."""

    sun: NDArray[np.float64]
    sunlight: NDArray[np.float64]
    skylight: NDArray[np.float64]
    clouds: float


class Picture(NamedTuple):
    """rgb: (h, w, 3) uint8; depth: (h, w) float32 along the optical axis [m], inf for sky; objects: (h, w) int32 index
    of the object seen, GROUND or SKY.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]
    objects: NDArray[np.int32]


@kernel
def _sky(dx, dy, dz, light):  # type: ignore[no-untyped-def]
    """Linear r, g, b of the sky in a direction."""
    up = max(dz, 0.0)
    blend = np.exp(-4.5 * up)
    grey = light.clouds * 0.5
    r, g, b = 0.20 + 0.48 * blend, 0.36 + 0.38 * blend, 0.72 + 0.12 * blend
    r, g, b = r + (0.62 - r) * grey, g + (0.64 - g) * grey, b + (0.68 - b) * grey
    if up > 0.02:
        s, t = 1.6 * dx / (up + 0.12), 1.6 * dy / (up + 0.12)
        cloud = 0.55 * noise2(s, t, 11) + 0.28 * noise2(2.1 * s, 2.1 * t, 12) + 0.17 * noise2(4.3 * s, 4.3 * t, 13)
        cover = min(1.0, max(0.0, (cloud - 0.72 + 0.4 * light.clouds) * 4.0)) * min(1.0, 6 * up)
        r, g, b = r + (0.92 - r) * cover, g + (0.92 - g) * cover, b + (0.93 - b) * cover
    towards = dx * light.sun[0] + dy * light.sun[1] + dz * light.sun[2]
    if towards > 0.9:
        glow = 0.6 * ((towards - 0.9) / 0.1) ** 6 * (1 - light.clouds)
        r, g, b = r + glow, g + 0.9 * glow, b + 0.7 * glow
    level = light.skylight[2] / 0.5
    return r * level, g * level, b * level


@kernel
def _shade(ox, oy, oz, dx, dy, dz, t, k, j, foot, w, light):  # type: ignore[no-untyped-def]
    """Linear r, g, b of what a ray hit at distance t: object k's solid j, or the ground."""
    x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
    if k == GROUND:
        nx, ny, nz = 0.0, 0.0, 1.0
        r, g, b, _, gloss = ground_surface(x, y, w.ground, foot / max(0.05, -dz))
    else:
        o, s = w.objects[k], w.solids[j]
        c, sn = o[3], o[4]
        rx, ry = x - o[0], y - o[1]
        lx, ly, lz = c * rx + sn * ry - s[5], c * ry - sn * rx - s[6], z - o[2] - s[7]
        mx, my, nz = normal_at(lx, ly, lz, s)
        if int(s[1]) == LEAF:
            # Leaves face all directions: a perturbed normal makes the smooth lobes look irregular.
            mx, my, nz = leaf_normal(mx, my, nz, lx, ly, lz, foot)
        nx, ny = c * mx - sn * my, sn * mx + c * my
        slant = foot / max(0.1, -(nx * dx + ny * dy + nz * dz))
        r, g, b, _, gloss = surface(int(s[1]), s[2], s[3], s[4], lx, ly, lz, s[8], s[9], s[10], mx, my, nz, j, slant)
    facing = nx * light.sun[0] + ny * light.sun[1] + nz * light.sun[2]
    sun = 0.0
    if facing > 0:
        _, blocker, _ = trace(
            x + 2e-3 * nx,
            y + 2e-3 * ny,
            z + 2e-3 * nz,
            light.sun[0],
            light.sun[1],
            light.sun[2],
            120.0,
            True,
            w,
        )
        sun = facing if blocker == SKY else 0.0
    # Skylight comes from above, with a small part reflected from the ground.
    open_sky = 0.62 + 0.38 * nz
    r *= sun * light.sunlight[0] + open_sky * light.skylight[0]
    g *= sun * light.sunlight[1] + open_sky * light.skylight[1]
    b *= sun * light.sunlight[2] + open_sky * light.skylight[2]
    if gloss > 0:
        d = 2 * (dx * nx + dy * ny + dz * nz)
        mirror = dz - d * nz
        sr, sg, sb = _sky(dx - d * nx, dy - d * ny, abs(mirror), light)
        gloss *= 0.35 + 0.65 * (1 + 0.5 * d) ** 2 if mirror > 0 else 0.25
        r, g, b = r + gloss * (sr - r), g + gloss * (sg - g), b + gloss * (sb - b)
    haze = 1.0 - np.exp(-t / _HAZE_DISTANCE)
    sr, sg, sb = _sky(dx, dy, 0.03, light)
    return r + haze * (sr - r), g + haze * (sg - g), b + haze * (sb - b)


@kernel
def _display(value):  # type: ignore[no-untyped-def]
    """Linear light -> display 0..255: a soft shoulder instead of clipping, deep shadows."""
    v = np.sqrt(max(value, 0.0) * 1.3 / (1.0 + 0.3 * value))
    return min(255.0, 255.0 * v * (0.82 + 0.18 * min(v, 1.0)))


@kernel
def _sample(u, v, pose, k, w, light):  # type: ignore[no-untyped-def]
    """One ray through image position (u, v) -> display r, g, b (0..255), depth, object."""
    cx, cy = (u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1]
    n = 1.0 / np.sqrt(cx * cx + cy * cy + 1.0)
    dx = (pose[0, 0] * cx + pose[0, 1] * cy + pose[0, 2]) * n
    dy = (pose[1, 0] * cx + pose[1, 1] * cy + pose[1, 2]) * n
    dz = (pose[2, 0] * cx + pose[2, 1] * cy + pose[2, 2]) * n
    ox, oy, oz = pose[0, 3], pose[1, 3], pose[2, 3]
    t, hit, solid = trace(ox, oy, oz, dx, dy, dz, FAR, False, w)
    if hit == SKY:
        r, g, b = _sky(dx, dy, dz, light)
        t = np.inf
    else:
        r, g, b = _shade(ox, oy, oz, dx, dy, dz, t, hit, solid, t / k[0, 0], w, light)
    return _display(r), _display(g), _display(b), t * n, hit


@kernel
def _render(pose, k, w, light, rgb, depth, objects):  # type: ignore[no-untyped-def]
    height, width = depth.shape
    centre = np.empty((height, width, 3), np.float32)
    for row in range(height):
        for col in range(width):
            r, g, b, depth[row, col], objects[row, col] = _sample(col + 0.5, row + 0.5, pose, k, w, light)
            centre[row, col, 0], centre[row, col, 1], centre[row, col, 2] = r, g, b
    # Antialiasing: three more rays for pixels whose green value differs from a neighbour's.
    for row in range(height):
        for col in range(width):
            here = centre[row, col, 1]
            contrast = max(abs(here - centre[max(row - 1, 0), col, 1]), abs(here - centre[row, max(col - 1, 0), 1]))
            contrast = max(contrast, abs(here - centre[min(row + 1, height - 1), col, 1]))
            contrast = max(contrast, abs(here - centre[row, min(col + 1, width - 1), 1]))
            r, g, b = centre[row, col]
            if contrast > _EDGE_CONTRAST:
                for n in range(3):
                    u, v = col + (0.17, 0.83, 0.5)[n], row + (0.33, 0.17, 0.83)[n]
                    sr, sg, sb, _, _ = _sample(u, v, pose, k, w, light)
                    r, g, b = r + sr, g + sg, b + sb
                r, g, b = 0.25 * r, 0.25 * g, 0.25 * b
            rgb[row, col, 0], rgb[row, col, 1], rgb[row, col, 2] = (
                np.uint8(r + 0.5),
                np.uint8(g + 0.5),
                np.uint8(b + 0.5),
            )


def render(
    global_from_camera: Matrix, intrinsics: Matrix, image_size: tuple[int, int], world: World, light: Light
) -> Picture:
    """Image of a pinhole camera: a ray through each pixel's centre, a shadow ray to the sun, more rays at edges."""
    rgb = np.empty((*image_size, 3), np.uint8)
    depth = np.empty(image_size, np.float32)
    objects = np.empty(image_size, np.int32)
    _render(global_from_camera, intrinsics, world, light, rgb, depth, objects)
    return Picture(rgb, depth, objects)


@kernel
def _count_visible(pose, k, w, objects, wanted, counts):  # type: ignore[no-untyped-def]
    height, width = objects.shape
    ox, oy, oz = pose[0, 3], pose[1, 3], pose[2, 3]
    for n in range(wanted.shape[0]):
        o = w.objects[wanted[n]]
        u0, u1, v0, v1 = 1e9, -1e9, 1e9, -1e9
        behind = 0
        for corner in range(8):
            bx = o[5] + o[8] * (1 if corner & 1 else -1)
            by = o[6] + o[9] * (1 if corner & 2 else -1)
            rx, ry = o[0] + o[3] * bx - o[4] * by - ox, o[1] + o[4] * bx + o[3] * by - oy
            rz = o[2] + o[7] + o[10] * (1 if corner & 4 else -1) - oz
            depth = pose[0, 2] * rx + pose[1, 2] * ry + pose[2, 2] * rz
            if depth < 0.1:
                behind += 1
                continue
            u = k[0, 0] * (pose[0, 0] * rx + pose[1, 0] * ry + pose[2, 0] * rz) / depth + k[0, 2]
            v = k[1, 1] * (pose[0, 1] * rx + pose[1, 1] * ry + pose[2, 1] * rz) / depth + k[1, 2]
            u0, u1, v0, v1 = min(u0, u), max(u1, u), min(v0, v), max(v1, v)
        if behind == 8:
            continue
        if behind > 0:
            u0, u1, v0, v1 = 0.0, float(width), 0.0, float(height)
        left, right = max(0, int(np.floor(u0))), min(width, int(np.ceil(u1)))
        top, bottom = max(0, int(np.floor(v0))), min(height, int(np.ceil(v1)))
        if left >= right or top >= bottom:
            continue
        stride = max(1, int(np.sqrt((right - left) * (bottom - top) / _VISIBILITY_SAMPLES)))
        for row in range(top + stride // 2, bottom, stride):
            cy = (row + 0.5 - k[1, 2]) / k[1, 1]
            for col in range(left + stride // 2, right, stride):
                cx = (col + 0.5 - k[0, 2]) / k[0, 0]
                dx = pose[0, 0] * cx + pose[0, 1] * cy + pose[0, 2]
                dy = pose[1, 0] * cx + pose[1, 1] * cy + pose[1, 2]
                dz = pose[2, 0] * cx + pose[2, 1] * cy + pose[2, 2]
                _, found = hit_object(ox, oy, oz, dx, dy, dz, wanted[n], FAR, w)
                if found >= 0:
                    # A sample represents stride * stride pixels, so that cameras add up in pixels.
                    counts[n, 0] += stride * stride
                    if objects[row, col] == wanted[n]:
                        counts[n, 1] += stride * stride


def count_visible(
    global_from_camera: Matrix, intrinsics: Matrix, world: World, picture: Picture, wanted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(len(wanted), 2): pixels that each object covers without occlusion, and with occlusion.

    All pixels are counted for small objects, every n-th in both directions for large ones (about 400 samples).
    """
    counts = np.zeros((len(wanted), 2), np.int64)
    _count_visible(global_from_camera, intrinsics, world, picture.objects, wanted, counts)
    return counts
