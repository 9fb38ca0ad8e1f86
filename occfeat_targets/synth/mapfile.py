"""The map expansion's file format: layers of records over shared polygons, lines and nodes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.synth.layout import District, Vector2
from occfeat_targets.synth.outlines import Outline, Ring, bend
from occfeat_targets.synth.tokens import token

Record = dict[str, Any]
VERSION = "1.3"
_POLYGON_LAYERS = (
    "drivable_area", "road_segment", "road_block", "lane", "lane_connector", "ped_crossing", "walkway", "stop_line",
    "carpark_area",
)  # fmt: skip
_LAYERS = ("polygon", "line", "node", *_POLYGON_LAYERS, "road_divider", "lane_divider", "traffic_light")


class MapFile:
    """Collects the records of one location. All geometry comes in street coordinates of the district named with it."""

    def __init__(self, seed: int, location: str) -> None:
        self._seed, self.location = seed, location
        self.layers: dict[str, list[Record]] = {name: [] for name in _LAYERS}
        self.connectivity: dict[str, dict[str, list[str]]] = {}
        self.arcline_paths: dict[str, list[Record]] = {}
        self._nodes: dict[tuple[float, float], str] = {}

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

    def line(self, points: Sequence[Vector2], district: District) -> str:
        """A line through the given points."""
        return self.add("line", node_tokens=self._chain(bend(np.array(points), district, closed=False)))

    def polygon(self, outline: Outline, district: District) -> str:
        """A polygon with its holes."""
        exterior, *holes = (self._chain(bend(ring, district, closed=True)) for ring in outline)
        return self.add("polygon", exterior_node_tokens=exterior, holes=[{"node_tokens": hole} for hole in holes])

    def drive_along(self, name: str, middle: Ring, district: District) -> None:
        """Give a lane or lane connector its arcline path: a chain of straight pieces along its middle."""
        points = bend(middle, district, closed=False)
        path = []
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
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
