"""The map of a location, from the same plan as the ground: map expansion layers and the raster of the drivable area."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import shapely
from shapely.geometry import LineString, Polygon, box

from occfeat_targets.synth.layout import (
    CORNER_RADIUS,
    CROSSING_BAND,
    LANE_WIDTH,
    STOP_BAND,
    WALKWAY_WIDTH,
    Block,
    District,
    Node,
    Rect,
    Stretch,
    Vector2,
    stretches,
)
from occfeat_targets.synth.mapfile import MapFile, bend, polygons_of
from occfeat_targets.synth.traffic import turn_left, turn_right

# Sizes of the real maps [m], which code about nuScenes may have wired in.
CANVAS_EDGES = {"singapore-onenorth": [1585.6, 2025.0], "singapore-hollandvillage": [2808.3, 2922.9]}
MASK_RESOLUTION = 0.1
_ARC_PIECES = 12
_SUBPIXEL_BITS = 4


def _box(rect: Rect) -> Polygon:
    return box(rect.u0, rect.v0, rect.u1, rect.v1)


def _band(stretch: Stretch, along: tuple[float, float], left: tuple[float, float]) -> Polygon:
    """The rectangle of a stretch between two distances along it and two offsets to the left."""
    (a, b), (p, q) = along, left
    return Polygon([stretch.point(s, o) for s, o in ((a, p), (b, p), (b, q), (a, q))])


def raised_land(block: Block) -> Polygon:
    """A block's pavement and what it surrounds, without its car park and driveway (street coordinates)."""
    land = _box(block.rect).buffer(-CORNER_RADIUS).buffer(CORNER_RADIUS, quad_segs=_ARC_PIECES)
    for lot in (block.car_park, block.driveway):
        if lot is not None:
            land = land.difference(_box(lot))
    return land


def _walkway(block: Block) -> Polygon:
    edge = _box(block.rect).buffer(-CORNER_RADIUS)
    outer = edge.buffer(CORNER_RADIUS, quad_segs=_ARC_PIECES)
    strip = outer.difference(edge.buffer(CORNER_RADIUS - WALKWAY_WIDTH, quad_segs=_ARC_PIECES))
    return strip if block.driveway is None else strip.difference(_box(block.driveway))


def _areas(m: MapFile, d: District) -> str:
    """Drivable area, walkways, car parks; returns the drivable area's token."""
    ring = _box(d.ring)
    drivable = polygons_of(ring.difference(shapely.union_all([raised_land(b) for b in d.blocks])))
    m.drivable += [bend(p, d) for p in drivable]
    area = m.add("drivable_area", polygon_tokens=[m.polygon(p, d) for p in drivable])
    outside = box(*ring.buffer(WALKWAY_WIDTH, join_style="mitre").bounds).difference(ring)
    for strip in [outside, *(_walkway(b) for b in d.blocks)]:
        for piece in polygons_of(strip):
            m.add("walkway", polygon_token=m.polygon(piece, d))
    for block in d.blocks:
        if block.car_park is not None:
            heading = float(d.heading(np.array([block.car_park.u0, block.car_park.v0]), np.array([0.0, 1.0])))
            polygon = m.polygon(_box(block.car_park), d)
            m.add("carpark_area", polygon_token=polygon, orientation=heading, road_block_token="")
    return area


def _segments(m: MapFile, d: District, drivable_area: str) -> dict[frozenset[Node], str]:
    """Junctions and the road segments between them; returns the latter by their two nodes."""
    for avenue in d.avenues:
        for street in d.streets:
            polygon = m.polygon(box(avenue.low, street.low, avenue.high, street.high), d)
            m.add("road_segment", polygon_token=polygon, is_intersection=True, drivable_area_token=drivable_area)
    segments = {}
    for s in stretches(d):
        if (key := frozenset((s.tail, s.head))) not in segments:
            width = s.road.half_width
            polygon = m.polygon(_band(s, (0, s.length), (-width, width)), d)
            segments[key] = m.add(
                "road_segment", polygon_token=polygon, is_intersection=False, drivable_area_token=drivable_area
            )
            ends = s.point(STOP_BAND[1], 0), s.point(s.length - STOP_BAND[1], 0)
            m.add("road_divider", line_token=m.line(LineString(ends), d), road_segment_token=segments[key])
    return segments


def _divider(m: MapFile, d: District, s: Stretch, left: float, kind: str) -> list[dict[str, str]]:
    """The chain of a lane's border, as the lane and lane divider layers want it."""
    line = bend(LineString([s.point(0, left), s.point(s.length, left)]), d)
    return [{"node_token": m.node(x, y), "segment_type": kind} for x, y in shapely.get_coordinates(line)]


def _lanes(m: MapFile, d: District, s: Stretch, segment: str) -> list[str]:
    """Road block, lanes, lane dividers, crossing, stop line and signal of one driving direction; returns the lanes."""
    width = s.road.half_width
    edges = [m.line(LineString([s.point(at, 0), s.point(at, width)]), d) for at in (0.0, s.length)]
    block = m.add(
        "road_block", polygon_token=m.polygon(_band(s, (0, s.length), (0, width)), d), from_edge_line_token=edges[0],
        to_edge_line_token=edges[1], road_segment_token=segment,
    )  # fmt: skip
    lanes = []
    for lane in range(s.road.lanes):
        middle = s.lane_middle(lane)
        left, right = middle + LANE_WIDTH / 2, middle - LANE_WIDTH / 2
        ends = [m.line(LineString([s.point(at, right), s.point(at, left)]), d) for at in (0.0, s.length)]
        name = m.add(
            "lane",
            polygon_token=m.polygon(_band(s, (0, s.length), (right, left)), d),
            lane_type="CAR",
            from_edge_line_token=ends[0],
            to_edge_line_token=ends[1],
            left_lane_divider_segments=_divider(m, d, s, left, "DASHED_WHITE" if lane else "SOLID_YELLOW"),
            right_lane_divider_segments=_divider(m, d, s, right, "DASHED_WHITE"),
        )
        m.drive_along(name, LineString([s.point(0, middle), s.point(s.length, middle)]), d)
        lanes.append(name)
        if lane > 0:
            span = LineString([s.point(STOP_BAND[1], left), s.point(s.length - STOP_BAND[1], left)])
            chain = [{"node_token": m.node(x, y), "segment_type": "DASHED_WHITE"}
                     for x, y in shapely.get_coordinates(bend(span, d))]  # fmt: skip
            m.add("lane_divider", line_token=m.line(span, d), lane_divider_segments=chain)

    # Every arm of a junction has one crossing; it is the head end of exactly one driving direction.
    near, far = (s.length - distance for distance in CROSSING_BAND)
    crossing = _band(s, (far, near), (-width, width))
    m.add("ped_crossing", polygon_token=m.polygon(crossing, d), road_segment_token=segment)
    post = s.point(s.length - STOP_BAND[0], width + 0.5)
    x, y = d.to_global(np.array(post))
    light = m.add(
        "traffic_light",
        line_token=m.line(LineString([post, s.point(s.length - STOP_BAND[0], width + 0.9)]), d),
        traffic_light_type="VERTICAL",
        from_road_block_token=block,
        items=[
            {"color": c, "shape": "CIRCLE", "rel_pos": {"tx": 0.0, "ty": 0.0, "tz": z, "rx": 0.0, "ry": 0.0, "rz": 0.0},
             "to_road_block_tokens": []}
            for c, z in (("RED", 0.32), ("YELLOW", 0.0), ("GREEN", -0.32))
        ],
        pose={"tx": float(x), "ty": float(y), "tz": 2.85, "rx": 0.0, "ry": 0.0,
              "rz": float(d.heading(np.array(post), -np.array(s.direction)))},
    )  # fmt: skip
    stop = _band(s, (s.length - STOP_BAND[1], s.length - STOP_BAND[0]), (0, s.road.lanes * LANE_WIDTH))
    m.add(
        "stop_line", polygon_token=m.polygon(stop, d), stop_line_type="TRAFFIC_LIGHT", ped_crossing_tokens=[],
        traffic_light_tokens=[light], road_block_token=block,
    )  # fmt: skip
    return lanes


def _curve(begin: Vector2, end: Vector2, direction: Vector2) -> LineString:
    """From one lane's end to another's begin: straight, or a parabola that leaves along `direction`."""
    a, b, step = np.array(begin), np.array(end), np.array(direction)
    corner = a + step * float((b - a) @ step)
    t = np.linspace(0, 1, 9)[:, None]
    return LineString((1 - t) ** 2 * a + 2 * t * (1 - t) * corner + t**2 * b)


def _connectors(m: MapFile, d: District, lanes: dict[Stretch, list[str]]) -> None:
    """Lane connectors over every junction: straight on from each lane, left from the leftmost, right from the rightmost."""
    for before, names in lanes.items():
        for after, others in lanes.items():
            if after.tail != before.head or after.head == before.tail:
                continue
            step = (int(before.direction[0]), int(before.direction[1]))
            towards = (int(after.direction[0]), int(after.direction[1]))
            if towards == turn_left(step):
                pairs = [(0, 0)]
            elif towards == turn_right(step):
                pairs = [(len(names) - 1, len(others) - 1)]
            else:
                pairs = [(k, k) for k in range(min(len(names), len(others)))]
            for k, n in pairs:
                begin = before.point(before.length, before.lane_middle(k))
                curve = _curve(begin, after.point(0, after.lane_middle(n)), before.direction)
                strip = curve.buffer(LANE_WIDTH / 2, cap_style="flat")
                name = m.add("lane_connector", polygon_token=m.polygon(strip, d))
                m.drive_along(name, curve, d)
                m.connect(names[k], name)
                m.connect(name, others[n])


def write_map(root: Path, seed: int, location: str, districts: Sequence[District]) -> str:
    """Write maps/expansion/<location>.json and the drivable-area mask; returns the mask's path within `root`."""
    m = MapFile(seed, location)
    for d in districts:
        area = _areas(m, d)
        segments = _segments(m, d, area)
        lanes = {s: _lanes(m, d, s, segments[frozenset((s.tail, s.head))]) for s in stretches(d)}
        _connectors(m, d, lanes)
    m.write(root / "maps" / "expansion" / f"{location}.json", CANVAS_EDGES[location])

    # MapMask puts the origin at the lower left, so the raster may end where the city does.
    width, height = np.ceil(np.max([p.bounds[2:] for p in m.drivable], axis=0) + 20).astype(int)
    mask = np.zeros((round(height / MASK_RESOLUTION), round(width / MASK_RESOLUTION)), np.uint8)
    for polygon in m.drivable:
        rings = []
        for ring in (polygon.exterior, *polygon.interiors):
            pixels = shapely.get_coordinates(ring) / MASK_RESOLUTION * [1, -1] + [0, mask.shape[0]]
            rings.append(np.round(pixels * 2**_SUBPIXEL_BITS).astype(np.int32))
        cv2.fillPoly(mask, rings, 255, shift=_SUBPIXEL_BITS)
    filename = f"maps/{location}.png"
    cv2.imwrite(str(root / filename), mask)
    return filename
