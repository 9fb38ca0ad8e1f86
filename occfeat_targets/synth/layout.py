"""Roads, blocks and car parks of a district, in street coordinates and in the global frame.

Street coordinates (u, v) [m] are straight: avenues run along v at a constant u, streets along u at a constant v.
In the global frame they are bent and rotated (avenues are curved, districts are not axis-aligned), with an exact inverse:

    p = u + amplitude * sin(wavenumber * v + phase),  q = v,  (x, y) = centre + rotation(angle) @ (p, q)

Traffic keeps left, as in Singapore. Blocks are rounded rectangles of raised pavement around grass, a plaza, or
buildings with a car park; the ring formed by the outermost roads closes the district.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vector2 = tuple[float, float]
Node = tuple[int, int]

LANE_WIDTH = 3.4
PARKING_WIDTH = 2.3
GUTTER = 0.3
CORNER_RADIUS = 5.0
WALKWAY_WIDTH = 3.6
CURB_HEIGHT = 0.12
# Along a road, from the edge of the road it meets: the crossing's band and the stop line's.
CROSSING_BAND = (5.2, 8.6)
STOP_BAND = (9.4, 9.8)
BAY_WIDTH = 2.6
BAY_DEPTH = 5.0
DRIVEWAY_WIDTH = 6.0
LAWN, PLAZA, YARD = 0, 1, 2

DISTRICT_PITCH = 480.0
FIRST_DISTRICT = 260.0
DISTRICT_COLUMNS, DISTRICT_ROWS = 3, 4
NUM_SITES = DISTRICT_COLUMNS * DISTRICT_ROWS


@dataclass(frozen=True)
class Rect:
    """An axis-aligned rectangle in street coordinates [m]."""

    u0: float
    u1: float
    v0: float
    v1: float

    def grown(self, margin: float) -> Rect:
        return Rect(self.u0 - margin, self.u1 + margin, self.v0 - margin, self.v1 + margin)

    def overlaps(self, other: Rect) -> bool:
        return self.u0 < other.u1 and other.u0 < self.u1 and self.v0 < other.v1 and other.v0 < self.v1


@dataclass(frozen=True)
class Road:
    """A two-way road: `lanes` per direction, with or without a strip of parking bays at both sides."""

    centre: float
    lanes: int
    parking: bool

    @property
    def half_width(self) -> float:
        return self.lanes * LANE_WIDTH + GUTTER + (PARKING_WIDTH if self.parking else 0.0)

    @property
    def low(self) -> float:
        return self.centre - self.half_width

    @property
    def high(self) -> float:
        return self.centre + self.half_width


@dataclass(frozen=True)
class Block:
    """The land between two avenues and two streets; `rect` ends at the curbs."""

    rect: Rect
    surface: int
    car_park: Rect | None = None
    driveway: Rect | None = None


@dataclass(frozen=True)
class District:
    """One patch of the city, about 300 m across. Scenes of one district share its streets and buildings."""

    location: str
    site: int
    angle: float
    amplitude: float
    wavenumber: float
    phase: float
    avenues: tuple[Road, ...]
    streets: tuple[Road, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def centre(self) -> Array:
        """(2,) global position of street coordinates (0, 0), up to the bend [m]."""
        row, column = divmod(self.site, DISTRICT_COLUMNS)
        return FIRST_DISTRICT + DISTRICT_PITCH * np.array([column, row], np.float64)

    @property
    def ring(self) -> Rect:
        """The outer edge of the outermost roads."""
        return Rect(self.avenues[0].low, self.avenues[-1].high, self.streets[0].low, self.streets[-1].high)

    def to_global(self, uv: NDArray[Any]) -> Array:
        """(..., 2) street coordinates -> (..., 2) global x, y [m]."""
        uv = np.asarray(uv, np.float64)
        p = uv[..., 0] + self.amplitude * np.sin(self.wavenumber * uv[..., 1] + self.phase)
        q = uv[..., 1]
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.stack([cos * p - sin * q, sin * p + cos * q], axis=-1) + self.centre

    def to_street(self, xy: NDArray[Any]) -> Array:
        """(..., 2) global x, y -> (..., 2) street coordinates [m]."""
        offset = np.asarray(xy, np.float64) - self.centre
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        p = cos * offset[..., 0] + sin * offset[..., 1]
        q = cos * offset[..., 1] - sin * offset[..., 0]
        return np.stack([p - self.amplitude * np.sin(self.wavenumber * q + self.phase), q], axis=-1)

    def heading(self, uv: NDArray[Any], direction: NDArray[Any]) -> Array:
        """Global yaw [rad] of `direction` (..., 2), given in street coordinates at `uv` (..., 2)."""
        uv, direction = np.asarray(uv, np.float64), np.asarray(direction, np.float64)
        slope = self.amplitude * self.wavenumber * np.cos(self.wavenumber * uv[..., 1] + self.phase)
        p, q = direction[..., 0] + slope * direction[..., 1], direction[..., 1]
        return np.arctan2(q, p) + self.angle


@dataclass(frozen=True)
class Stretch:
    """A piece of road between two junctions, driven from `tail` to `head`: nodes are (avenue, street) indices.

    low, high: the edges of the two junctions, in street coordinates; direction: (du, dv), a unit step.
    """

    road: Road
    low: float
    high: float
    direction: Vector2
    tail: Node
    head: Node

    @property
    def length(self) -> float:
        return self.high - self.low

    def point(self, along: float, left: float) -> Vector2:
        """Street coordinates `along` metres after the junction behind, `left` metres left of the centre line."""
        du, dv = self.direction
        s = self.low + along if du + dv > 0 else self.high - along
        return (s, self.road.centre + du * left) if du else (self.road.centre - dv * left, s)

    def lane_middle(self, lane: int) -> float:
        """Offsets of lanes 0 (leftmost), 1, ... to the left of the centre line."""
        return (self.road.lanes - 0.5 - lane) * LANE_WIDTH


def stretches(district: District) -> Iterator[Stretch]:
    """Every piece of road of a district, once per driving direction."""
    for i, avenue in enumerate(district.avenues):
        for j, (below, above) in enumerate(zip(district.streets, district.streets[1:], strict=False)):
            yield Stretch(avenue, below.high, above.low, (0.0, 1.0), (i, j), (i, j + 1))
            yield Stretch(avenue, below.high, above.low, (0.0, -1.0), (i, j + 1), (i, j))
    for j, street in enumerate(district.streets):
        for i, (left, right) in enumerate(zip(district.avenues, district.avenues[1:], strict=False)):
            yield Stretch(street, left.high, right.low, (1.0, 0.0), (i, j), (i + 1, j))
            yield Stretch(street, left.high, right.low, (-1.0, 0.0), (i + 1, j), (i, j))


def _roads(rng: np.random.Generator) -> tuple[Road, ...]:
    gaps = rng.uniform(68, 92, 3)
    centres = np.concatenate([[0.0], np.cumsum(gaps)])
    centres += rng.uniform(-8, 8) - centres.mean()
    lanes = rng.choice([1, 2], 4, p=[0.45, 0.55])
    parking = rng.random(4) < 0.55
    return tuple(Road(float(c), int(n), bool(p)) for c, n, p in zip(centres, lanes, parking, strict=True))


def _block(rect: Rect, rng: np.random.Generator) -> Block:
    kind = rng.choice(3, p=[0.15, 0.15, 0.7])
    inner = rect.grown(-(WALKWAY_WIDTH + 2.5))
    depth = 2 * BAY_DEPTH + DRIVEWAY_WIDTH
    if kind != YARD or rng.random() < 0.35 or inner.u1 - inner.u0 < 25 or inner.v1 - inner.v0 < depth + 14:
        return Block(rect, int(kind))
    bays = int((rng.uniform(0.5, 0.8) * (inner.u1 - inner.u0)) // BAY_WIDTH)
    v0 = inner.v0 + rng.uniform(0.0, 1.0) * (inner.v1 - inner.v0 - depth)
    on_left = rng.random() < 0.5
    u0 = inner.u0 if on_left else inner.u1 - bays * BAY_WIDTH
    park = Rect(u0, u0 + bays * BAY_WIDTH, v0, v0 + depth)
    aisle = (v0 + BAY_DEPTH, v0 + BAY_DEPTH + DRIVEWAY_WIDTH)
    driveway = Rect(rect.u0, park.u0, *aisle) if on_left else Rect(park.u1, rect.u1, *aisle)
    return Block(rect, YARD, park, driveway)


def plan_district(location: str, site: int, rng: np.random.Generator) -> District:
    """Sample the streets of one district; `site` (0 .. NUM_SITES - 1) is its position in the location."""
    if not 0 <= site < NUM_SITES:
        raise ValueError(f"site {site} is outside 0..{NUM_SITES - 1}: a location holds {NUM_SITES} districts")
    avenues, streets = _roads(rng), _roads(rng)
    blocks = tuple(
        _block(Rect(left.high, right.low, bottom.high, top.low), rng)
        for left, right in itertools.pairwise(avenues)
        for bottom, top in itertools.pairwise(streets)
    )
    return District(
        location=location,
        site=site,
        angle=float(rng.uniform(-np.pi, np.pi)),
        amplitude=float(rng.uniform(4, 8)),
        wavenumber=float(1 / rng.uniform(38, 55)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        avenues=avenues,
        streets=streets,
        blocks=blocks,
    )
