"""Polygons and lines of a map as flat arrays, read once from nuScenes' tables; workers draw labels from them.

The devkit's drawing is not used: a hole of one polygon erases other polygons under it,
invalid polygons are skipped silently in all layers except drivable_area, and split lines fail with Shapely 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_targets.cache.spec import DIVIDERS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# nuScenes' layers of each map class, which the paper does not name; BEVFusion's.
MAP_LAYERS: dict[str, tuple[str, ...]] = {
    "road": ("drivable_area",),
    "sidewalk": ("walkway",),
    "crosswalk": ("ped_crossing",),
    "parking_area": ("carpark_area",),
    "road_divider": DIVIDERS["road"],
}
assert tuple(MAP_LAYERS) == MAP_CLASSES


def map_classes(dividers: str = "road") -> dict[str, tuple[str, ...]]:
    """The map classes with their nuScenes layers, in the order of the label channels.

    dividers: "road", or "road+lane" to draw lane dividers into road_divider too; else ValueError.
    """
    if dividers not in DIVIDERS:
        raise ValueError(f"dividers {dividers!r} is none of {', '.join(map(repr, DIVIDERS))}")
    return MAP_LAYERS | {"road_divider": DIVIDERS[dividers]}


@dataclass(frozen=True, eq=False)
class MapGeometry:
    """Polygons and lines of some map classes as flat arrays.

    classes: K class names; vertices: (v, 2) float64 global x, y [m];
    ring_offsets: (r + 1,) int64, ring i is ``vertices[ring_offsets[i]:ring_offsets[i + 1]]``;
    polygon_offsets: (p + 1,) int64 into the rings, exteriors first; polygon_class: (p,) int64 in 0..K-1;
    line_vertices (u, 2), line_offsets (n + 1,), line_class (n,): likewise, without the rings;
    ring_boxes, line_boxes: (r, 4), (n, 4) float64 min x, min y, max x, max y, derived.
    """

    classes: tuple[str, ...]
    vertices: Floats
    ring_offsets: Ints
    polygon_offsets: Ints
    polygon_class: Ints
    line_vertices: Floats
    line_offsets: Ints
    line_class: Ints
    ring_boxes: Floats = field(init=False, repr=False)
    line_boxes: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ring_boxes", _bounding_boxes(self.vertices, self.ring_offsets))
        object.__setattr__(self, "line_boxes", _bounding_boxes(self.line_vertices, self.line_offsets))

    @classmethod
    def from_tables(cls, tables: Any, layers: Mapping[str, Sequence[str]] = MAP_LAYERS) -> MapGeometry:
        """Geometry of the named layers, from a NuScenesMap or any object with its tables as attributes.

        tables: ``node`` {token, x, y}, ``polygon`` {token, exterior_node_tokens, holes: [{node_tokens}]},
        ``line`` {token, node_tokens}; per layer records with polygon_token, polygon_tokens or line_token.
        layers: class name -> layer names. nuScenes has holes and lines without nodes: a ring of fewer than 3
        nodes or a line of fewer than 2 is left out.

        Raises ValueError, naming layer and token, if a table or a record is missing; or a node is not finite.
        """
        names = ("node", "polygon", "line")
        nodes, polygons, lines = ({row["token"]: row for row in _table(tables, name)} for name in names)
        rings: list[list[Any]] = []
        paths: list[list[Any]] = []
        num_rings: list[int] = []
        polygon_class: list[int] = []
        line_class: list[int] = []

        def positions(tokens: Sequence[str]) -> list[Any]:
            return [(nodes[token]["x"], nodes[token]["y"]) for token in tokens]

        drawn = [(channel, layer) for channel, group in enumerate(layers.values()) for layer in group]
        for channel, layer, record in ((*it, record) for it in drawn for record in _table(tables, it[1])):
            try:
                if "line_token" in record:
                    path = positions(lines[record["line_token"]]["node_tokens"])
                    if len(path) >= 2:
                        paths.append(path)
                        line_class.append(channel)
                    continue
                tokens = record["polygon_tokens"] if "polygon_tokens" in record else [record["polygon_token"]]
                for polygon in (polygons[token] for token in tokens):
                    exterior = positions(polygon["exterior_node_tokens"])
                    holes = [positions(hole["node_tokens"]) for hole in polygon["holes"]]
                    if len(exterior) >= 3:
                        kept = [exterior, *(hole for hole in holes if len(hole) >= 3)]
                        rings += kept
                        num_rings.append(len(kept))
                        polygon_class.append(channel)
            except KeyError as err:
                raise ValueError(
                    f"map layer {layer}, record {record.get('token')}: {err} is in none of the map's tables; "
                    "unpack the nuScenes map expansion v1.3 again"
                ) from err
        polygon_channels, line_channels = np.array(polygon_class, np.int64), np.array(line_class, np.int64)
        polygon_part = *_flatten(rings), _offsets(num_rings), polygon_channels
        return cls(tuple(layers), *polygon_part, *_flatten(paths), line_channels)

    def near(self, xy_min: ArrayLike, xy_max: ArrayLike) -> MapGeometry:
        """The part of the map near a rectangle: polygons, holes and lines whose bounding boxes overlap it.

        xy_min, xy_max: (2,) global corners [m], as ``map_window`` gives them; lines have no width here.
        """
        low, high = np.asarray(xy_min, np.float64), np.asarray(xy_max, np.float64)
        keep_ring, keep_line = (
            ((boxes[:, :2] <= high) & (boxes[:, 2:] >= low)).all(axis=1) for boxes in (self.ring_boxes, self.line_boxes)
        )
        keep_polygon = keep_ring[self.polygon_offsets[:-1]]
        keep_ring &= np.repeat(keep_polygon, np.diff(self.polygon_offsets))
        rings_before = _offsets(keep_ring)
        ring_sizes, line_sizes = np.diff(self.ring_offsets), np.diff(self.line_offsets)
        return MapGeometry(
            self.classes,
            self.vertices[np.repeat(keep_ring, ring_sizes)],
            _offsets(ring_sizes[keep_ring]),
            _offsets(np.diff(rings_before[self.polygon_offsets])[keep_polygon]),
            self.polygon_class[keep_polygon],
            self.line_vertices[np.repeat(keep_line, line_sizes)],
            _offsets(line_sizes[keep_line]),
            self.line_class[keep_line],
        )


def _bounding_boxes(vertices: Floats, offsets: Ints) -> Floats:
    low, high = (reduce.reduceat(vertices, offsets[:-1], axis=0) for reduce in (np.minimum, np.maximum))
    return np.concatenate([low, high], axis=1)


def _offsets(sizes: ArrayLike) -> Ints:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _flatten(paths: list[list[Any]]) -> tuple[Floats, Ints]:
    vertices = np.array([xy for path in paths for xy in path], np.float64).reshape(-1, 2)
    if not np.isfinite(vertices).all():
        raise ValueError("a node of the map is not finite: unpack the nuScenes map expansion v1.3 again")
    return vertices, _offsets([len(path) for path in paths])


def _table(tables: Any, name: str) -> list[dict[str, Any]]:
    table = getattr(tables, name, None)
    if table is None:
        raise ValueError(f"the map has no table {name!r}: the nuScenes map expansion v1.3 is needed")
    return list(table)
