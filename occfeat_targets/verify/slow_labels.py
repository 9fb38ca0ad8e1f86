"""Slow references of ``labels`` for `verify` and the tests: Shapely and loops, all in metres.

Due to rounding, a cell centre within TIE of a boundary may be on either side of it. Each function therefore also returns
``is_decided``; compare only where it is true: ``((fast == slow) | ~is_decided).all()``.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from occfeat_targets.cache.geometry import Matrix, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import DIVIDER_WIDTH, TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.targets.labels import map_window

Mask = NDArray[np.bool_]
TIE = 1e-6  # [m]


class Reference(Protocol):
    """Slow reference of one kind of labels, the counterpart of `targets.labels.Draw`."""

    def __call__(
        self, keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix, geometry: MapGeometry | None
    ) -> tuple[Mask, Mask | None, Mask]:
        """Masks (K, H, W), validity (H, W) or None, and is_decided, (K, H, W) or (H, W); all bool.

        grid_from_ego: (4, 4) to the grid ``spec.grid``. geometry: the map of the location, if the kind needs maps.
        """


def vehicle_reference(
    keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix, geometry: MapGeometry | None
) -> tuple[Mask, Mask, Mask]:
    """`Reference` of the kind ``vehicles``."""
    compat = spec.compat == "simple-bev"
    vehicles, is_valid, is_decided = reference_vehicles(
        keyframe.vehicle_corners, keyframe.visibility, spec.grid, grid_from_ego, compat=compat
    )
    return vehicles[None], is_valid, is_decided


def map_reference(
    keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix, geometry: MapGeometry | None
) -> tuple[Mask, None, Mask]:
    """`Reference` of the kind ``map``."""
    assert geometry is not None, "the kind needs maps"
    grid_from_global = grid_from_ego @ np.linalg.inv(keyframe.global_from_ego)
    ground_z = keyframe.global_from_ego[2, 3]
    near = geometry.near(*map_window(spec.grid, grid_from_global, ground_z, spec.divider_width))
    masks, is_decided = reference_map(near, spec.grid, grid_from_global, ground_z, line_width=spec.divider_width)
    return masks, None, is_decided


def _cell_centers(grid: VoxelGrid) -> NDArray[np.float64]:
    """(H, W, 2) (right, forward) [m]; float64; ``voxel_centers`` is float32."""
    (_, rows, columns), (_, bottom, left), (_, size_h, size_w) = grid.shape, grid.lower, grid.cell_size
    right, forward = left + (np.arange(columns) + 0.5) * size_w, bottom + (np.arange(rows) + 0.5) * size_h
    return np.stack(np.meshgrid(right, forward), axis=-1)


def _within(bounds: tuple[float, ...], points: NDArray[np.float64], margin: float) -> Mask:
    """Mask of (H, W, 2) points inside a bounding box with a margin; a shape is compared only with these points."""
    within: Mask = ((points >= np.array(bounds[:2]) - margin) & (points <= np.array(bounds[2:]) + margin)).all(axis=-1)
    return within


def _inside(area: Any, points: NDArray[np.float64]) -> tuple[Mask, Mask]:
    """Masks of (H, W, 2) points inside a polygon, and within TIE of its boundary."""
    inside, on_edge = np.zeros((2, *points.shape[:2]), np.bool_)
    close = _within(area.bounds, points, TIE)
    if close.any():
        boundary = area.exterior if area.geom_type == "Polygon" else area
        shapely.prepare([area, boundary])
        inside[close] = shapely.contains(area, shapely.points(points[close]))
        on_edge[close] = shapely.dwithin(boundary, shapely.points(points[close]), TIE)
    return inside, on_edge


def reference_map(
    geometry: MapGeometry,
    grid: VoxelGrid,
    grid_from_global: Matrix,
    ground_z: float,
    *,
    line_width: float = DIVIDER_WIDTH,
) -> tuple[Mask, Mask]:
    """Reference of ``draw_map``. Returns masks (K, H, W) bool and is_decided (K, H, W) bool."""
    centers = _cell_centers(grid)
    masks, is_tie = np.zeros((2, len(geometry.classes), *grid.map_shape), np.bool_)

    def on_plane(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        on_ground = np.column_stack([xy, np.full(len(xy), ground_z)])
        plane: NDArray[np.float64] = transform(grid_from_global, on_ground)[:, :2]
        return plane

    for polygon, channel in enumerate(geometry.polygon_class):
        inside, on_edge = np.zeros((2, *grid.map_shape), np.bool_)
        first, last = geometry.polygon_offsets[polygon : polygon + 2]
        for ring in range(first, last):
            vertices = geometry.vertices[geometry.ring_offsets[ring] : geometry.ring_offsets[ring + 1]]
            in_ring, on_ring = _inside(shapely.Polygon(on_plane(vertices)), centers)
            inside = in_ring if ring == first else inside & ~in_ring
            on_edge |= on_ring
        masks[channel] |= inside
        is_tie[channel] |= on_edge
    for line, channel in enumerate(geometry.line_class):
        vertices = geometry.line_vertices[geometry.line_offsets[line] : geometry.line_offsets[line + 1]]
        path = shapely.LineString(on_plane(vertices))
        close = _within(path.bounds, centers, line_width)
        distance = shapely.distance(path, shapely.points(centers[close]))
        masks[channel, close] |= distance <= line_width / 2
        is_tie[channel, close] |= np.abs(distance - line_width / 2) <= TIE
    return masks, ~is_tie


def top_face(box: NDArray[np.float64], grid: VoxelGrid) -> tuple[Mask, Mask]:
    """Cells (H, W) in the truncated top face of a box, and those where OpenCV's treatment of borders decides: near it, and of a
    face that leaves the grid also those along its edges, which OpenCV clips.

    box: (8, 3) corners in the grid [m].
    """
    first_center, (_, size_h, size_w) = _cell_centers(grid)[0, 0], grid.cell_size
    highest = sorted(box.tolist(), key=lambda corner: -corner[2])[:4]
    w_h = [(np.array(corner[:2]) - first_center) / (size_w, size_h) for corner in highest]
    top = shapely.MultiPoint([(math.trunc(w), math.trunc(h)) for w, h in w_h]).convex_hull
    pixels = shapely.points(np.stack(np.meshgrid(*map(np.arange, grid.map_shape[::-1])), axis=-1))
    inside = shapely.covers(top, pixels)
    near = shapely.dwithin(top, pixels, 2.0) & ~inside
    near[[0, -1]] |= ~inside[[0, -1]]
    near[:, [0, -1]] |= ~inside[:, [0, -1]]
    height, width = grid.map_shape
    if not shapely.box(0, 0, width - 1, height - 1).covers(top):
        near |= shapely.dwithin(top.exterior if top.geom_type == "Polygon" else top, pixels, 1.0)
    return inside, near


def reference_vehicles(
    corners: NDArray[np.floating[Any]],
    visibility: ArrayLike,
    grid: VoxelGrid,
    grid_from_boxes: Matrix,
    *,
    compat: bool = False,
) -> tuple[Mask, Mask, Mask]:
    """Reference of ``draw_vehicles``. Returns vehicles, is_valid and is_decided, (H, W) bool each.

    With compat, only cells in the truncated top face (drawn) and cells further than 2 cells from it (not drawn) are
    decided, because the boundary cells depend on OpenCV. Along the map's border OpenCV clips a face's edges one by one
    and may paint even further away; of such a face, cells along its edges are not decided either.
    """
    centers = _cell_centers(grid)
    vehicles, is_hidden, is_tie = np.zeros((3, *grid.map_shape), np.bool_)
    _, size_h, size_w = grid.cell_size
    boxes = transform(grid_from_boxes, np.asarray(corners, np.float64))
    for box, token in zip(boxes, np.ravel(visibility), strict=True):
        if compat:
            inside, on_edge = top_face(box, grid)
        else:
            inside, on_edge = _inside(shapely.MultiPoint(box[:, :2]).convex_hull, centers)
            off_center = np.abs(centers - box[:, :2].mean(axis=0)) - np.array([size_w, size_h]) / 2
            if not inside.any():
                inside = (off_center <= 0).all(axis=-1)
            if not (inside & ~on_edge).any():
                on_edge |= (off_center <= TIE).all(axis=-1)
        vehicles |= inside
        is_hidden |= inside & (token == 1)
        is_tie |= on_edge
    return vehicles, ~is_hidden, ~is_tie
