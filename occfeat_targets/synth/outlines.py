"""Outlines of the ground's regions, in street coordinates: rings of straight pieces and arcs.

An outline is a list of rings, the exterior first and then its holes; a ring is an (n, 2) array, not closed. They
describe the same regions as `ground.classify`, as polygons.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.synth.layout import (
    CORNER_RADIUS,
    LANE_WIDTH,
    WALKWAY_WIDTH,
    Block,
    District,
    Rect,
    Stretch,
    Vector2,
)

Ring = NDArray[np.float64]
Outline = list[Ring]
# Longest straight piece of a bent outline: over 2 m a road deviates from it by only a few millimetres.
_PIECE = 2.0
_ARC_PIECES = 12


def bend(points: Ring, district: District, closed: bool) -> Ring:
    """(n, 2) street coordinates -> (m, 2) global, in pieces short enough to follow the bends."""
    ends = np.roll(points, -1, axis=0) if closed else points[1:]
    pieces = []
    for a, b in zip(points, ends, strict=False):
        count = max(1, int(np.ceil(np.hypot(*(b - a)) / _PIECE)))
        pieces.append(a + (b - a) * (np.arange(count) / count)[:, None])
    if not closed:
        pieces.append(points[-1:])
    return district.to_global(np.concatenate(pieces))


def rectangle(rect: Rect) -> Ring:
    """Counter-clockwise from the lowest corner."""
    return np.array([[rect.u0, rect.v0], [rect.u1, rect.v0], [rect.u1, rect.v1], [rect.u0, rect.v1]])


def band(stretch: Stretch, along: tuple[float, float], left: tuple[float, float]) -> Outline:
    """The rectangle of a stretch between two distances along it and two offsets to the left."""
    (a, b), (p, q) = along, left
    return [np.array([stretch.point(s, o) for s, o in ((a, p), (b, p), (b, q), (a, q))])]


def _rounded(rect: Rect, radius: float) -> list[Ring]:
    """The four arcs of a rounded rectangle, counter-clockwise from its lower right corner."""
    arcs = []
    for k, (u, v) in enumerate(np.roll(rectangle(rect.grown(-radius)), -1, axis=0)):
        angle = np.pi / 2 * (k - 1 + np.arange(_ARC_PIECES + 1) / _ARC_PIECES)
        arcs.append(np.column_stack([u + radius * np.cos(angle), v + radius * np.sin(angle)]))
    return arcs


def _opening(block: Block) -> tuple[int, Ring] | None:
    """Where a driveway cuts the edge of a block: the arc it follows, and (2, 2) its two curb ends in ring order."""
    drive, rect = block.driveway, block.rect
    if drive is None:
        return None
    if drive.u1 == rect.u1:
        return 0, np.array([[rect.u1, drive.v0], [rect.u1, drive.v1]])
    return 2, np.array([[rect.u0, drive.v1], [rect.u0, drive.v0]])


def raised_land(block: Block) -> Ring:
    """A block's pavement and what it encloses, without its car park and driveway."""
    arcs = _rounded(block.rect, CORNER_RADIUS)
    opening, park = _opening(block), block.car_park
    if opening is None or park is None:
        return np.concatenate(arcs)
    after, ends = opening
    corners = rectangle(park)
    # Walk round the car park clockwise, from where the driveway meets it back to there.
    detour = corners[[1, 0, 3, 2]] if after == 0 else corners[[3, 2, 1, 0]]
    mouth = ends.copy()
    mouth[:, 0] = park.u1 if after == 0 else park.u0
    way = np.concatenate([ends[:1], mouth[:1], detour, mouth[1:], ends[1:]])
    return np.concatenate([*arcs[: after + 1], way, *arcs[after + 1 :]])


def walkway(block: Block) -> Outline:
    """The pavement along a block's edge: a ring, or a C where a driveway cuts it."""
    outer = _rounded(block.rect, CORNER_RADIUS)
    inner = _rounded(block.rect.grown(-WALKWAY_WIDTH), CORNER_RADIUS - WALKWAY_WIDTH)
    opening = _opening(block)
    if opening is None:
        return [np.concatenate(outer), np.concatenate(inner)]
    after, ends = opening
    inside = ends + np.array([-WALKWAY_WIDTH if after == 0 else WALKWAY_WIDTH, 0.0])
    order = [(after + 1 + k) % 4 for k in range(4)]
    there = np.concatenate([ends[1:], *(outer[k] for k in order), ends[:1]])
    back = np.concatenate([inside[:1], *(inner[k][::-1] for k in reversed(order)), inside[1:]])
    return [np.concatenate([there, back])]


def outer_walkway(district: District) -> Outline:
    """The pavement outside the ring of outermost roads."""
    return [rectangle(district.ring.grown(WALKWAY_WIDTH)), rectangle(district.ring)]


def drivable_area(district: District) -> Outline:
    """Roads, car parks and driveways: everything inside the ring except the raised land."""
    return [rectangle(district.ring), *(raised_land(block) for block in district.blocks)]


def turning_curve(begin: Vector2, end: Vector2, direction: Vector2) -> Ring:
    """(9, 2) from one lane's end to another's begin: straight, or a parabola that leaves along `direction`."""
    a, b, step = np.array(begin), np.array(end), np.array(direction)
    corner = a + step * float((b - a) @ step)
    t = np.linspace(0, 1, 9)[:, None]
    curve: Ring = (1 - t) ** 2 * a + 2 * t * (1 - t) * corner + t**2 * b
    return curve


def lane_strip(middle: Ring) -> Outline:
    """The strip of a lane's width around its middle line."""
    ahead = np.gradient(middle, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    aside = np.column_stack([-ahead[:, 1], ahead[:, 0]]) * (LANE_WIDTH / 2)
    return [np.concatenate([middle - aside, (middle + aside)[::-1]])]
