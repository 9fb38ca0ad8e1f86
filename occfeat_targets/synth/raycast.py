"""Ray casting: intersections with solids and objects, and traversal of the grid's columns.

Directions are unit vectors, so distances are metres. Normals and texture coordinates are computed once, at the hit.
"""

from __future__ import annotations

import numpy as np

from occfeat_targets.synth.ground import hit_ground
from occfeat_targets.synth.kernels import kernel
from occfeat_targets.synth.shapes import AXLE, BOX, ELLIPSOID, TAPERED, UPRIGHT

FAR = 1e9
GROUND, SKY = -1, -2
_EPS = 1e-6


@kernel
def _hit_slabs(ox, oy, oz, dx, dy, dz, hx, hy, hz):  # type: ignore[no-untyped-def]
    """(entry, exit) of an axis-aligned box around 0; entry > exit is a miss."""
    ax, ay, az = 1.0 / dx, 1.0 / dy, 1.0 / dz
    x0, x1 = (-hx - ox) * ax, (hx - ox) * ax
    y0, y1 = (-hy - oy) * ay, (hy - oy) * ay
    z0, z1 = (-hz - oz) * az, (hz - oz) * az
    return max(min(x0, x1), min(y0, y1), min(z0, z1)), min(max(x0, x1), max(y0, y1), max(z0, z1))


@kernel
def _hit_tapered(ox, oy, oz, dx, dy, dz, s):  # type: ignore[no-untyped-def]
    """Entry into a box whose front, rear and sides lean inwards; FAR if missed."""
    hx, hy, hz = s[8], s[9], s[10]
    height = 0.5 / hz
    near, far = (-hz - oz) / dz, (hz - oz) / dz
    if near > far:
        near, far = far, near
    for k in range(4):
        # Inside where n . p <= limit; the lean makes the limit fall with height.
        if k < 2:
            lean = s[11 + k] * height
            nd, no = (dx, ox) if k == 0 else (-dx, -ox)
            limit = hx
        else:
            lean = s[13] * height
            nd, no = (dy, oy) if k == 2 else (-dy, -oy)
            limit = hy
        nd += lean * dz
        room = limit - lean * (oz + hz) - no
        if abs(nd) < 1e-12:
            if room < 0:
                return FAR
        elif nd < 0:
            near = max(near, room / nd)
        else:
            far = min(far, room / nd)
    return near if near <= far and near > _EPS else FAR


@kernel
def _hit_cylinder(oa, ob, oc, da, db, dc, radius, half):  # type: ignore[no-untyped-def]
    """Entry into a cylinder along the c axis; FAR if missed."""
    near, far = (-half - oc) / dc, (half - oc) / dc
    if near > far:
        near, far = far, near
    a = da * da + db * db
    b = oa * da + ob * db
    disc = b * b - a * (oa * oa + ob * ob - radius * radius)
    if disc < 0 or a < 1e-14:
        return FAR
    root = np.sqrt(disc)
    near, far = max(near, (-b - root) / a), min(far, (-b + root) / a)
    return near if near <= far and near > _EPS else FAR


@kernel
def _hit_solid(ox, oy, oz, dx, dy, dz, s):  # type: ignore[no-untyped-def]
    """Distance to a solid, ray in its object's axes; FAR if missed."""
    ox, oy, oz = ox - s[5], oy - s[6], oz - s[7]
    kind = int(s[0])
    if kind == BOX:
        near, far = _hit_slabs(ox, oy, oz, dx, dy, dz, s[8], s[9], s[10])
        return near if near <= far and near > _EPS else FAR
    if kind == TAPERED:
        return _hit_tapered(ox, oy, oz, dx, dy, dz, s)
    if kind == UPRIGHT:
        return _hit_cylinder(ox, oy, oz, dx, dy, dz, s[8], s[10])
    if kind == AXLE:
        return _hit_cylinder(ox, oz, oy, dx, dz, dy, s[8], s[9])
    ox, oy, oz, dx, dy, dz = ox / s[8], oy / s[9], oz / s[10], dx / s[8], dy / s[9], dz / s[10]
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    disc = b * b - a * (ox * ox + oy * oy + oz * oz - 1.0)
    if disc < 0:
        return FAR
    t = (-b - np.sqrt(disc)) / a
    return t if t > _EPS else FAR


@kernel
def hit_object(ox, oy, oz, dx, dy, dz, k, best, w):  # type: ignore[no-untyped-def]
    """Global ray against object k -> (distance, solid), or (best, -1) if it hits nothing nearer than `best`."""
    o = w.objects[k]
    rx, ry, rz = ox - o[0], oy - o[1], oz - o[2]
    c, s = o[3], o[4]
    lx, ly = c * rx + s * ry, c * ry - s * rx
    mx, my = c * dx + s * dy, c * dy - s * dx
    # An exact zero would make 0 / 0 in the slabs.
    mx = mx if mx != 0.0 else 1e-300
    my = my if my != 0.0 else 1e-300
    near, far = _hit_slabs(lx - o[5], ly - o[6], rz - o[7], mx, my, dz, o[8], o[9], o[10])
    found = -1
    if near > far or far < 0 or near >= best:
        return best, found
    first = int(o[11])
    for j in range(first, first + int(o[12])):
        t = _hit_solid(lx, ly, rz, mx, my, dz, w.solids[j])
        if t < best:
            best, found = t, j
    return best, found


@kernel
def trace(ox, oy, oz, dx, dy, dz, limit, any_hit, w):  # type: ignore[no-untyped-def]
    """First hit of a ray within `limit` -> (distance, object, solid).

    object is GROUND or SKY (distance FAR) if no solid is hit. With `any_hit`, the search ends at the first solid found
    and the ground is not tested; this is enough for shadows.
    """
    dx = dx if dx != 0.0 else 1e-300
    dy = dy if dy != 0.0 else 1e-300
    dz = dz if dz != 0.0 else 1e-300
    best, hit, solid = limit, SKY, -1
    if not any_hit:
        ground = hit_ground(ox, oy, oz, dx, dy, dz, w.ground)
        if ground < best:
            best, hit = ground, GROUND
    size, rows, columns = w.grid[2], w.tops.shape[0], w.tops.shape[1]
    # Nothing is above the highest top.
    reach = min(best, (w.grid[3] - oz) / dz) if dz > 0 else best
    px, py = (ox - w.grid[0]) / size, (oy - w.grid[1]) / size
    i, j = int(np.floor(px)), int(np.floor(py))
    step_x, step_y = (1 if dx > 0 else -1), (1 if dy > 0 else -1)
    delta_x, delta_y = size / abs(dx), size / abs(dy)
    next_x = ((i + 1 - px) if dx > 0 else (px - i)) * delta_x
    next_y = ((j + 1 - py) if dy > 0 else (py - j)) * delta_y
    entry = 0.0
    # An object can be in several columns: skip the two objects tested last.
    last, before = -1, -1
    while entry < best and entry < reach and 0 <= i < columns and 0 <= j < rows:
        leave = min(next_x, next_y)
        lowest = oz + dz * (entry if dz > 0 else min(leave, best))
        if lowest < w.tops[j, i]:
            cell = j * columns + i
            for n in range(w.starts[cell], w.starts[cell + 1]):
                k = w.items[n]
                if k != last and k != before:
                    t, found = hit_object(ox, oy, oz, dx, dy, dz, k, best, w)
                    last, before = k, last
                    if found >= 0:
                        best, hit, solid = t, k, found
                        if any_hit:
                            return best, hit, solid
        entry = leave
        if next_x < next_y:
            next_x += delta_x
            i += step_x
        else:
            next_y += delta_y
            j += step_y
    return (best if hit != SKY else FAR), hit, solid


@kernel
def normal_at(lx, ly, lz, s):  # type: ignore[no-untyped-def]
    """Outward unit normal of a solid at a point on it; both in the solid's own axes."""
    kind = int(s[0])
    hx, hy, hz = s[8], s[9], s[10]
    if kind == ELLIPSOID:
        x, y, z = lx / (hx * hx), ly / (hy * hy), lz / (hz * hz)
        n = 1.0 / np.sqrt(x * x + y * y + z * z)
        return x * n, y * n, z * n
    if kind == UPRIGHT:
        if hz - abs(lz) < 1e-5:
            return 0.0, 0.0, np.sign(lz)
        n = 1.0 / np.hypot(lx, ly)
        return lx * n, ly * n, 0.0
    if kind == AXLE:
        if hy - abs(ly) < 1e-5:
            return 0.0, np.sign(ly), 0.0
        n = 1.0 / np.hypot(lx, lz)
        return lx * n, 0.0, lz * n
    lean_x = s[11] if lx > 0 else s[12]
    slope_x, slope_y = lean_x / (2 * hz), s[13] / (2 * hz)
    room_x = hx - slope_x * (lz + hz) - abs(lx)
    room_y = hy - slope_y * (lz + hz) - abs(ly)
    room_z = hz - abs(lz)
    if room_z <= room_x and room_z <= room_y:
        return 0.0, 0.0, np.sign(lz)
    if room_x <= room_y:
        n = 1.0 / np.sqrt(1.0 + slope_x * slope_x)
        return np.sign(lx) * n, 0.0, slope_x * n
    n = 1.0 / np.sqrt(1.0 + slope_y * slope_y)
    return 0.0, np.sign(ly) * n, slope_y * n
