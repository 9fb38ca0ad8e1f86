"""The map of a location, from the same plan as the ground: expansion layers and a raster of the drivable area."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occfeat_targets.synth import outlines
from occfeat_targets.synth.layout import (
    CROSSING_BAND,
    LANE_WIDTH,
    STOP_BAND,
    District,
    Node,
    Rect,
    Stretch,
    stretches,
)
from occfeat_targets.synth.mapfile import MapFile
from occfeat_targets.synth.outlines import band, bend, rectangle
from occfeat_targets.synth.traffic import turn_left, turn_right
from occfeat_targets.targets.raster import fill_polygon

# Sizes of the real maps [m], which code for nuScenes may assume.
CANVAS_EDGES = {"singapore-onenorth": [1585.6, 2025.0], "singapore-hollandvillage": [2808.3, 2922.9]}
MASK_RESOLUTION = 0.1


def _areas(m: MapFile, d: District) -> str:
    """Drivable area, walkways, car parks; returns the drivable area's token."""
    area = m.add("drivable_area", polygon_tokens=[m.polygon(outlines.drivable_area(d), d)])
    for walkway in (outlines.outer_walkway(d), *(outlines.walkway(b) for b in d.blocks)):
        m.add("walkway", polygon_token=m.polygon(walkway, d))
    for block in d.blocks:
        if (park := block.car_park) is not None:
            heading = float(d.heading(np.array([park.u0, park.v0]), np.array([0.0, 1.0])))
            polygon = m.polygon([rectangle(park)], d)
            m.add("carpark_area", polygon_token=polygon, orientation=heading, road_block_token="")
    return area


def _segments(m: MapFile, d: District, drivable_area: str) -> dict[frozenset[Node], str]:
    """Junctions and the road segments between them; returns the latter by their two nodes."""
    for avenue in d.avenues:
        for street in d.streets:
            polygon = m.polygon([rectangle(Rect(avenue.low, avenue.high, street.low, street.high))], d)
            m.add("road_segment", polygon_token=polygon, is_intersection=True, drivable_area_token=drivable_area)
    segments = {}
    for s in stretches(d):
        if (key := frozenset((s.tail, s.head))) not in segments:
            width = s.road.half_width
            polygon = m.polygon(band(s, (0, s.length), (-width, width)), d)
            segments[key] = m.add(
                "road_segment",
                polygon_token=polygon,
                is_intersection=False,
                drivable_area_token=drivable_area,
            )
            ends = s.point(STOP_BAND[1], 0), s.point(s.length - STOP_BAND[1], 0)
            m.add("road_divider", line_token=m.line(ends, d), road_segment_token=segments[key])
    return segments


def _divider(
    m: MapFile, d: District, s: Stretch, left: float, kind: str, span: tuple[float, float]
) -> list[dict[str, str]]:
    """The chain of a lane's border between two distances along a stretch, in the format of the lane layers."""
    line = bend(np.array([s.point(at, left) for at in span]), d, closed=False)
    return [{"node_token": m.node(x, y), "segment_type": kind} for x, y in line]


def _lanes(m: MapFile, d: District, s: Stretch, segment: str) -> list[str]:
    """Road block, lanes, lane dividers, crossing, stop line and signal of one driving direction; returns the lanes."""
    width, whole = s.road.half_width, (0.0, s.length)
    edges = [m.line([s.point(at, 0), s.point(at, width)], d) for at in whole]
    block = m.add(
        "road_block", polygon_token=m.polygon(band(s, whole, (0, width)), d), from_edge_line_token=edges[0],
        to_edge_line_token=edges[1], road_segment_token=segment,
    )  # fmt: skip
    lanes = []
    for lane in range(s.road.lanes):
        middle = s.lane_middle(lane)
        left, right = middle + LANE_WIDTH / 2, middle - LANE_WIDTH / 2
        ends = [m.line([s.point(at, right), s.point(at, left)], d) for at in whole]
        name = m.add(
            "lane",
            polygon_token=m.polygon(band(s, whole, (right, left)), d),
            lane_type="CAR",
            from_edge_line_token=ends[0],
            to_edge_line_token=ends[1],
            left_lane_divider_segments=_divider(m, d, s, left, "DASHED_WHITE" if lane else "SOLID_YELLOW", whole),
            right_lane_divider_segments=_divider(m, d, s, right, "DASHED_WHITE", whole),
        )
        m.drive_along(name, np.array([s.point(0, middle), s.point(s.length, middle)]), d)
        lanes.append(name)
        if lane > 0:
            span = (STOP_BAND[1], s.length - STOP_BAND[1])
            line = m.line([s.point(at, left) for at in span], d)
            chain = _divider(m, d, s, left, "DASHED_WHITE", span)
            m.add("lane_divider", line_token=line, lane_divider_segments=chain)

    # Every arm of a junction has one crossing; it is the head end of exactly one driving direction.
    near, far = (s.length - distance for distance in CROSSING_BAND)
    crossing = band(s, (far, near), (-width, width))
    m.add("ped_crossing", polygon_token=m.polygon(crossing, d), road_segment_token=segment)
    post = s.point(s.length - STOP_BAND[0], width + 0.5)
    x, y = d.to_global(np.array(post))
    light = m.add(
        "traffic_light",
        line_token=m.line([post, s.point(s.length - STOP_BAND[0], width + 0.9)], d),
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
    stop = band(s, (s.length - STOP_BAND[1], s.length - STOP_BAND[0]), (0, s.road.lanes * LANE_WIDTH))
    m.add(
        "stop_line", polygon_token=m.polygon(stop, d), stop_line_type="TRAFFIC_LIGHT", ped_crossing_tokens=[],
        traffic_light_tokens=[light], road_block_token=block,
    )  # fmt: skip
    return lanes


def _connectors(m: MapFile, d: District, lanes: dict[Stretch, list[str]]) -> None:
    """Lane connectors over junctions: straight on from each lane, left from the leftmost, right from the rightmost."""
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
                curve = outlines.turning_curve(begin, after.point(0, after.lane_middle(n)), before.direction)
                name = m.add("lane_connector", polygon_token=m.polygon(outlines.lane_strip(curve), d))
                m.drive_along(name, curve, d)
                m.connect(names[k], name)
                m.connect(name, others[n])


def _mask(districts: Sequence[District]) -> NDArray[np.uint8]:
    """The drivable area as MapMask reads it: 255 inside, origin at the lower left, the centre of pixel p at p * 0.1 m.

    It covers only the city; the real masks cover the whole canvas and take hundreds of megabytes.
    """
    areas = [[bend(ring, d, closed=True) for ring in outlines.drivable_area(d)] for d in districts]
    width, height = np.ceil(np.max([rings[0].max(0) for rings in areas], axis=0) + 20) / MASK_RESOLUTION
    inside = np.zeros((round(height), round(width)), np.bool_)
    for rings in areas:
        vertices = np.concatenate(rings) / MASK_RESOLUTION * [1, -1] + [0.5, len(inside) + 0.5]
        fill_polygon(inside, vertices, np.cumsum([0, *map(len, rings)]))
    return inside.astype(np.uint8) * np.uint8(255)


def write_map(root: Path, seed: int, location: str, districts: Sequence[District]) -> str:
    """Write maps/expansion/<location>.json and the drivable-area mask; returns the mask's path within `root`."""
    m = MapFile(seed, location)
    for d in districts:
        area = _areas(m, d)
        segments = _segments(m, d, area)
        lanes = {s: _lanes(m, d, s, segments[frozenset((s.tail, s.head))]) for s in stretches(d)}
        _connectors(m, d, lanes)
    m.write(root / "maps" / "expansion" / f"{location}.json", CANVAS_EDGES[location])

    filename = f"maps/{location}.png"
    Image.fromarray(_mask(districts)).save(root / filename, compress_level=1)
    return filename
