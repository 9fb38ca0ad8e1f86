"""Region and paint of the ground at a point, used by cameras, LiDAR and map alike.

`classify` is exact geometry in street coordinates, not a raster, so edges of paint are sharp at any distance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.synth.kernels import kernel
from occfeat_targets.synth.layout import (
    BAY_DEPTH,
    BAY_WIDTH,
    CORNER_RADIUS,
    CROSSING_BAND,
    CURB_HEIGHT,
    LANE_WIDTH,
    STOP_BAND,
    WALKWAY_WIDTH,
    District,
    Rect,
)

ROAD, CROSSING, STOP_LINE, CAR_PARK, DRIVEWAY, CURB, WALKWAY, LAWN, PLAZA, YARD, OUTSKIRTS = range(11)
NO_PAINT, WHITE, YELLOW = 0, 1, 2


# Regions from CURB on are CURB_HEIGHT above the road.
FIRST_RAISED = CURB
_CURB_WIDTH = 0.18
_CROSS_FROM, _CROSS_TO = CROSSING_BAND
_STOP_FROM, _STOP_TO = STOP_BAND


class Ground(NamedTuple):
    """A district as numbers for the kernels.

    frame: (7,) centre x, y, cos and sin of the angle, amplitude, wavenumber, phase; avenues, streets: (n, 4) centre,
    half width, lanes, parking; parks: (n, 8) car park u0, u1, v0, v1 and its driveway's; surfaces: (n - 1, m - 1).
    """

    frame: NDArray[np.float64]
    avenues: NDArray[np.float64]
    streets: NDArray[np.float64]
    parks: NDArray[np.float64]
    surfaces: NDArray[np.int64]


def pack_ground(district: District) -> Ground:
    """The kernels' view of a district."""

    def corners(rect: Rect) -> list[float]:
        return [rect.u0, rect.u1, rect.v0, rect.v1]

    roads = [
        np.array([[r.centre, r.half_width, r.lanes, r.parking] for r in group], np.float64)
        for group in (district.avenues, district.streets)
    ]
    parks = [corners(b.car_park) + corners(b.driveway) for b in district.blocks if b.car_park and b.driveway]
    shape = (len(district.avenues) - 1, len(district.streets) - 1)
    return Ground(
        frame=np.array(
            [*district.centre, np.cos(district.angle), np.sin(district.angle), district.amplitude,
             district.wavenumber, district.phase]
        ),
        avenues=roads[0],
        streets=roads[1],
        parks=np.array(parks, np.float64).reshape(-1, 8),
        surfaces=np.array([b.surface for b in district.blocks], np.int64).reshape(shape),
    )  # fmt: skip


@kernel
def street_coordinates(x, y, g):  # type: ignore[no-untyped-def]
    """Global x, y -> u, v; the same as `District.to_street`."""
    f = g.frame
    dx, dy = x - f[0], y - f[1]
    p, q = f[2] * dx + f[3] * dy, f[2] * dy - f[3] * dx
    return p - f[4] * np.sin(f[5] * q + f[6]), q


@kernel
def _road_paint(across, along, road, crossings):  # type: ignore[no-untyped-def]
    """Region and paint on a road outside junctions.

    across: offset from the centre line, negative where traffic runs towards larger `along`; along: the coordinate
    along the road; road: its row; crossings: rows of the roads it meets.
    """
    gap = 1e9
    towards = 1.0
    for k in range(crossings.shape[0]):
        d = along - crossings[k, 0]
        a = abs(d) - crossings[k, 1]
        if a < gap:
            gap = a
            towards = -1.0 if d > 0 else 1.0
    offset = abs(across)
    edge = road[2] * LANE_WIDTH
    if gap < _CROSS_FROM:
        return ROAD, NO_PAINT
    if gap < _CROSS_TO:
        stripe = (across + 100.0) % 1.0 < 0.5 and offset < road[1] - 0.3
        return CROSSING, WHITE if stripe else NO_PAINT
    if gap < _STOP_FROM:
        return ROAD, NO_PAINT
    if gap < _STOP_TO:
        # The approach to a junction ahead (towards > 0) is left of the centre line, at across < 0.
        if across * towards < 0 and offset < edge:
            return STOP_LINE, WHITE
        return ROAD, NO_PAINT
    if 0.08 < offset < 0.2:
        return ROAD, WHITE
    if offset < edge - 0.5:
        lane = offset / LANE_WIDTH
        nearest = np.floor(lane + 0.5)
        if nearest >= 1 and abs(offset - nearest * LANE_WIDTH) < 0.07 and along % 6.0 < 2.5:
            return ROAD, WHITE
        return ROAD, NO_PAINT
    if road[3] > 0:
        line = abs(offset - edge) < 0.05 or (offset > edge and along % 6.0 < 0.1)
        return ROAD, WHITE if line and gap > 15.0 else NO_PAINT
    if abs(offset - edge + 0.08) < 0.05 or abs(offset - edge - 0.1) < 0.05:
        return ROAD, YELLOW
    return ROAD, NO_PAINT


@kernel
def _car_park_paint(u, v, p):  # type: ignore[no-untyped-def]
    depth = min(v - p[2], p[3] - v)
    if depth > BAY_DEPTH + 0.06:
        return NO_PAINT
    d = (u - p[0] + 0.05) % BAY_WIDTH
    return WHITE if d < 0.1 or abs(depth - BAY_DEPTH) < 0.06 else NO_PAINT


@kernel
def classify(u, v, g):  # type: ignore[no-untyped-def]
    """Street coordinates -> (region, paint)."""
    avenues, streets = g.avenues, g.streets
    last_u, last_v = avenues.shape[0] - 1, streets.shape[0] - 1
    out_u = max(avenues[0, 0] - avenues[0, 1] - u, u - avenues[last_u, 0] - avenues[last_u, 1])
    out_v = max(streets[0, 0] - streets[0, 1] - v, v - streets[last_v, 0] - streets[last_v, 1])
    out = max(out_u, out_v)
    if out > 0:
        if out < _CURB_WIDTH:
            return CURB, NO_PAINT
        return (WALKWAY if out < WALKWAY_WIDTH else OUTSKIRTS), NO_PAINT

    i, j = 0, 0
    on_avenue, on_street = -1, -1
    for k in range(last_u + 1):
        d = u - avenues[k, 0]
        if abs(d) < avenues[k, 1]:
            on_avenue = k
        if d > 0:
            i = k
    for k in range(last_v + 1):
        d = v - streets[k, 0]
        if abs(d) < streets[k, 1]:
            on_street = k
        if d > 0:
            j = k
    if on_avenue >= 0:
        if on_street >= 0:
            return ROAD, NO_PAINT
        return _road_paint(u - avenues[on_avenue, 0], v, avenues[on_avenue], streets)
    if on_street >= 0:
        # Left of +u is +v: mirror, so that traffic towards +u runs at across < 0.
        return _road_paint(streets[on_street, 0] - v, u, streets[on_street], avenues)

    a = min(u - avenues[i, 0] - avenues[i, 1], avenues[i + 1, 0] - avenues[i + 1, 1] - u)
    b = min(v - streets[j, 0] - streets[j, 1], streets[j + 1, 0] - streets[j + 1, 1] - v)
    inside = min(a, b)
    if a < CORNER_RADIUS and b < CORNER_RADIUS:
        inside = CORNER_RADIUS - np.hypot(CORNER_RADIUS - a, CORNER_RADIUS - b)
        if inside < 0:
            return ROAD, NO_PAINT
    for k in range(g.parks.shape[0]):
        p = g.parks[k]
        if p[0] < u < p[1] and p[2] < v < p[3]:
            return CAR_PARK, _car_park_paint(u, v, p)
        if p[4] <= u <= p[5] and p[6] < v < p[7]:
            return DRIVEWAY, NO_PAINT
    if inside < _CURB_WIDTH:
        return CURB, NO_PAINT
    if inside < WALKWAY_WIDTH:
        return WALKWAY, NO_PAINT
    return LAWN + g.surfaces[i, j], NO_PAINT


@kernel
def is_raised(x, y, g):  # type: ignore[no-untyped-def]
    """Whether the ground at global (x, y) is the upper level."""
    u, v = street_coordinates(x, y, g)
    return classify(u, v, g)[0] >= FIRST_RAISED


@kernel
def hit_ground(ox, oy, oz, dx, dy, dz, g):  # type: ignore[no-untyped-def]
    """Distance along a downward ray to the ground: upper level, road, or the face of a curb."""
    if dz >= -1e-9:
        return 1e9
    upper = (CURB_HEIGHT - oz) / dz
    if upper > 0 and is_raised(ox + upper * dx, oy + upper * dy, g):
        return upper
    lower = -oz / dz
    if not is_raised(ox + lower * dx, oy + lower * dy, g):
        return lower
    # The ray passes below the upper level over the road and hits the curb's face: find the edge by bisection.
    low, high = max(upper, 0.0), lower
    for _ in range(14):
        middle = 0.5 * (low + high)
        if is_raised(ox + middle * dx, oy + middle * dy, g):
            high = middle
        else:
            low = middle
    return high


@kernel
def classify_points(xy, g):  # type: ignore[no-untyped-def]
    """(n, 2) global points -> (n,) regions."""
    regions = np.empty(xy.shape[0], np.int64)
    for k in range(xy.shape[0]):
        u, v = street_coordinates(xy[k, 0], xy[k, 1], g)
        regions[k] = classify(u, v, g)[0]
    return regions
