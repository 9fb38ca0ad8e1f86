"""The map expansion's file format: layers of records over shared polygons, lines and nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import LineString, MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from occfeat_targets.synth.layout import District
from occfeat_targets.synth.tokens import token

Record = dict[str, Any]
VERSION = "1.3"
_POLYGON_LAYERS = (
    "drivable_area", "road_segment", "road_block", "lane", "lane_connector", "ped_crossing", "walkway", "stop_line",
    "carpark_area",
)  # fmt: skip
_LAYERS = ("polygon", "line", "node", *_POLYGON_LAYERS, "road_divider", "lane_divider", "traffic_light")
# The longest straight piece of an outline: within 2 m no road bends by more than a few millimetres.
_PIECE = 2.0


def bend(geometry: BaseGeometry, district: District) -> BaseGeometry:
    """A geometry in street coordinates -> the same in the global frame, cut fine enough to follow the bends."""
    bent: BaseGeometry = shapely.transform(shapely.segmentize(geometry, _PIECE), district.to_global)
    return bent


def polygons_of(geometry: BaseGeometry) -> list[Polygon]:
    """The polygons of a (multi)polygon."""
    return list(geometry.geoms) if isinstance(geometry, MultiPolygon) else [geometry]


class MapFile:
    """Collects the records of one location. All geometry comes in street coordinates of the district named with it."""

    def __init__(self, seed: int, location: str) -> None:
        self._seed, self.location = seed, location
        self.layers: dict[str, list[Record]] = {name: [] for name in _LAYERS}
        self.connectivity: dict[str, dict[str, list[str]]] = {}
        self.arcline_paths: dict[str, list[Record]] = {}
        self._nodes: dict[tuple[float, float], str] = {}
        self.drivable: list[Polygon] = []

    def add(self, layer: str, **fields: Any) -> str:
        """Append a record, return its token."""
        records = self.layers[layer]
        name = token(self._seed, "map", self.location, layer, len(records))
        records.append({"token": name, **fields})
        return name

    def node(self, x: float, y: float) -> str:
        """Token of the node at a global position; equal positions share it."""
        key = (round(float(x), 4), round(float(y), 4))
        if key not in self._nodes:
            self._nodes[key] = self.add("node", x=key[0], y=key[1])
        return self._nodes[key]

    def _chain(self, coordinates: NDArray[np.float64]) -> list[str]:
        return [self.node(x, y) for x, y in coordinates]

    def line(self, line: LineString, district: District) -> str:
        return self.add("line", node_tokens=self._chain(shapely.get_coordinates(bend(line, district))))

    def polygon(self, polygon: Polygon, district: District) -> str:
        bent = bend(polygon, district)
        return self.add(
            "polygon",
            exterior_node_tokens=self._chain(shapely.get_coordinates(bent.exterior)[:-1]),
            holes=[{"node_tokens": self._chain(shapely.get_coordinates(hole)[:-1])} for hole in bent.interiors],
        )

    def drive_along(self, name: str, line: LineString, district: District) -> None:
        """Give a lane or lane connector its arcline path: a chain of straight pieces along its middle."""
        points = shapely.get_coordinates(bend(line, district))
        path = []
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            yaw, length = float(np.arctan2(y1 - y0, x1 - x0)), float(np.hypot(x1 - x0, y1 - y0))
            path.append({
                "start_pose": [float(x0), float(y0), yaw],
                "end_pose": [float(x1), float(y1), yaw],
                "shape": "LSL",
                "radius": 999.999,
                "segment_length": [0.0, length, 0.0],
            })  # fmt: skip
        self.arcline_paths[name] = path
        self.connectivity.setdefault(name, {"incoming": [], "outgoing": []})

    def connect(self, before: str, after: str) -> None:
        """Traffic goes from one lane or connector on to another."""
        for name in (before, after):
            self.connectivity.setdefault(name, {"incoming": [], "outgoing": []})
        self.connectivity[before]["outgoing"].append(after)
        self.connectivity[after]["incoming"].append(before)

    def write(self, path: Path, canvas_edge: list[float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "version": VERSION,
            **self.layers,
            "arcline_path_3": self.arcline_paths,
            "connectivity": self.connectivity,
            "canvas_edge": canvas_edge,
        }
        path.write_text(json.dumps(content))
