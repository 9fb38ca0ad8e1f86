"""Boxes, maps and poses for the tests of labels."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import (
    rigid,
    rotation_matrix,
)
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.sources.map_geometry import MapGeometry, map_classes

Array = NDArray[Any]
GRID = VoxelGrid()
ODD_GRID = VoxelGrid((4, 60, 90), (-3.0, -20.0, -31.0), (5.0, 43.0, 35.0))  # cells of 1.05 m x 0.733 m
LEVEL = np.eye(3)
REAL_SAMPLE = Path(
    os.environ.get("OCCFEAT_REAL_SAMPLE", Path(__file__).parents[2].parent / "shared/nuscenes-real-sample")
)


def box_corners(center: Any, length: float, width: float, height: float, rotation: Any = LEVEL) -> Array:
    """(8, 3) in the devkit's order: the front face starting at the upper left, then the back face; x is forward."""
    x = length / 2 * np.array([1, 1, 1, 1, -1, -1, -1, -1])
    y = width / 2 * np.array([1, -1, -1, 1, 1, -1, -1, 1])
    z = height / 2 * np.array([1, 1, -1, -1, 1, 1, -1, -1])
    corners: Array = np.stack([x, y, z], axis=1) @ np.asarray(rotation).T + center
    return corners


def random_pose(rng: np.random.Generator, tilt: float = 0.05) -> Array:
    """A pose with random yaw, and pitch and roll of about `tilt` [rad]."""
    yaw = rng.uniform(-np.pi, np.pi)
    level = rotation_matrix([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
    pose = rigid([1, *rng.normal(0, tilt / 2, 2), 0], rng.uniform(-5, 5, 3))
    pose[:3, :3] = pose[:3, :3] @ level
    return pose


def random_boxes(rng: np.random.Generator, n: int) -> Array:
    boxes = []
    for _ in range(n):
        yaw = rng.uniform(-np.pi, np.pi)
        rotation = rotation_matrix([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        length, width, height = rng.uniform([0.3, 0.1, 1.0], [14.0, 3.5, 4.0])
        center = rng.uniform([-60, -60, -2], [60, 60, 2])
        boxes.append(box_corners(center, length, width, height, rotation))
    return np.array(boxes)


class Tables(SimpleNamespace):
    """A map's tables in the form of NuScenesMap."""

    def __init__(self) -> None:
        layers: dict[str, list[Any]] = {layer: [] for names in map_classes("road+lane").values() for layer in names}
        super().__init__(node=[], polygon=[], line=[], **layers)

    def _nodes(self, points: Any) -> list[str]:
        start = len(self.node)
        self.node += [{"token": f"n{start + i}", "x": x, "y": y} for i, (x, y) in enumerate(points)]
        return [f"n{start + i}" for i in range(len(points))]

    def add_polygon(self, layer: str, exterior: Any, *holes: Any) -> None:
        token = f"p{len(self.polygon)}"
        rings = [{"node_tokens": self._nodes(hole)} for hole in holes]
        self.polygon.append({"token": token, "exterior_node_tokens": self._nodes(exterior), "holes": rings})
        reference = {"polygon_tokens": [token]} if layer == "drivable_area" else {"polygon_token": token}
        getattr(self, layer).append({"token": f"{layer}-{token}", **reference})

    def add_line(self, layer: str, points: Any) -> None:
        token = f"l{len(self.line)}"
        self.line.append({"token": token, "node_tokens": self._nodes(points)})
        getattr(self, layer).append({"token": f"{layer}-{token}", "line_token": token})


def square(left: float, bottom: float, side: float) -> list[tuple[float, float]]:
    return [(left, bottom), (left + side, bottom), (left + side, bottom + side), (left, bottom + side)]


def random_map(rng: np.random.Generator, reach: float = 90.0) -> MapGeometry:
    """Shapes anywhere within `reach` [m], and one of each kind within every test's grid."""
    tables = Tables()
    for layer in ("drivable_area", "walkway", "ped_crossing", "carpark_area"):
        tables.add_polygon(layer, square(rng.uniform(-8, 8), rng.uniform(-8, 8), 5.3), square(0.1, 0.1, 2.7))
    tables.add_line("road_divider", rng.uniform(-8, 8, (3, 2)))
    for layer in ("drivable_area", "walkway", "ped_crossing", "carpark_area"):
        for _ in range(12):
            center, radius = rng.uniform(-reach, reach, 2), rng.uniform(1, 25)
            angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
            ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
            shapes = center + radius * ring, center + radius * rng.uniform(0.1, 0.6) * ring[::-1]
            tables.add_polygon(layer, *shapes[: int(rng.integers(1, 3))])
    for layer in ("road_divider", "lane_divider"):
        for _ in range(8):
            tables.add_line(layer, rng.uniform(-reach, reach, 2) + rng.normal(0, 15, (5, 2)).cumsum(axis=0))
    return MapGeometry.from_tables(tables, map_classes("road+lane"))


def assert_equal_where_decided(fast: Array, slow: Array, is_decided: Array) -> None:
    np.testing.assert_array_equal(fast & is_decided, slow & is_decided)
