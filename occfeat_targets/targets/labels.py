"""Bird's-eye labels on one grid: map classes from polygons and lines, vehicles and their validity from boxes.

A cell belongs to a shape if its centre does (``raster``). The rows of `cache.labels.LABEL_KINDS` name the functions of type
`Draw`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import DIVIDER_WIDTH, TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.targets.raster import Floats, Mask, draw_polylines, fill_polygon, fill_polygons

# Faces by corner, in the order of the devkit's Box.corners(): 0-3 are in front, 4-7 behind, upper left first.
_FACES = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])
_QUAD = np.array([0, 4])


class Draw(Protocol):
    """Draws one kind of labels of a keyframe on the grid of one reference frame."""

    def __call__(
        self, keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix, geometry: MapGeometry | None
    ) -> tuple[Mask, Mask | None]:
        """Masks (K, H, W) bool of the kind's classes, and which cells are valid (H, W) bool, or None if all are.

        grid_from_ego: (4, 4) to the grid ``spec.grid``. geometry: the map around the keyframe, if the kind needs maps.
        """


def vehicle_labels(
    keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix, geometry: MapGeometry | None
) -> tuple[Mask, Mask]:
    """`Draw` of the kind ``vehicles``."""
    compat = spec.compat == "simple-bev"
    vehicles, is_valid = draw_vehicles(
        keyframe.vehicle_corners, keyframe.visibility, spec.grid, grid_from_ego, compat=compat
    )
    return vehicles[None], is_valid


def map_labels(
    keyframe: Keyframe, spec: TargetSpec, grid_from_ego: Matrix, geometry: MapGeometry | None
) -> tuple[Mask, None]:
    """`Draw` of the kind ``map``."""
    assert geometry is not None, "the kind needs maps"
    grid_from_global = grid_from_ego @ inverse_rigid(keyframe.global_from_ego)
    ground_z = keyframe.global_from_ego[2, 3]
    return draw_map(geometry, spec.grid, grid_from_global, ground_z, line_width=spec.divider_width), None


def map_window(
    grid: VoxelGrid, grid_from_global: Matrix, ground_z: float, line_width: float = DIVIDER_WIDTH
) -> tuple[Floats, Floats]:
    """(2,) and (2,) corners of the global rectangle [m] that ``draw_map`` needs, for ``near``.

    Raises ValueError if the grid's plane is perpendicular to the ground.
    """
    cells_from_map = _cells_from_map(grid, grid_from_global, ground_z)
    height, width = grid.map_shape
    _, size_h, size_w = grid.cell_size
    # The determinant is the number of cells per square metre of ground; it is small if the grid is tilted strongly.
    if abs(np.linalg.det(cells_from_map[:, :2])) * size_h * size_w < 1e-6:
        raise ValueError("the grid's plane is perpendicular to the ground: check the pose of its frame")
    margin_w, margin_h = line_width / 2 / size_w, line_width / 2 / size_h
    edges_w, edges_h = (-margin_w, width + margin_w), (-margin_h, height + margin_h)
    corners = np.array([(w, h) for w in edges_w for h in edges_h])
    xy = np.linalg.solve(cells_from_map[:, :2], (corners - cells_from_map[:, 2]).T).T
    return xy.min(axis=0), xy.max(axis=0)


def draw_map(
    geometry: MapGeometry,
    grid: VoxelGrid,
    grid_from_global: Matrix,
    ground_z: float,
    *,
    line_width: float = DIVIDER_WIDTH,
) -> Mask:
    """(K, H, W) bool: the map classes on the grid's horizontal plane.

    grid_from_global: (4, 4). ground_z: height [m] at which the map's 2-D vertices are placed (the ego's global z) before
    they are transformed to the grid's frame with its pitch and roll and projected onto its plane.
    line_width [m]. Raises ValueError if the grid's plane is perpendicular to the ground.
    """
    masks = np.zeros((len(geometry.classes), *grid.map_shape), np.bool_)
    seen = geometry.near(*map_window(grid, grid_from_global, ground_z, line_width))
    cells_from_map = _cells_from_map(grid, grid_from_global, ground_z)

    def cells(xy: Floats) -> Floats:
        # Not a matrix product: with BLAS, rounding may depend on a vertex's position in the batch, but vertices shared by
        # two polygons must be identical so that the polygons tile.
        w, h = (row[0] * xy[:, 0] + row[1] * xy[:, 1] + row[2] for row in cells_from_map)
        return np.stack([w, h], axis=1)

    fill_polygons(masks, seen.polygon_class, cells(seen.vertices), seen.ring_offsets, seen.polygon_offsets)
    _, size_h, size_w = grid.cell_size
    lines = cells(seen.line_vertices)
    draw_polylines(masks, seen.line_class, lines, seen.line_offsets, size_w, size_h, float(line_width))
    return masks


def draw_vehicles(
    corners: NDArray[np.floating[Any]],
    visibility: ArrayLike,
    grid: VoxelGrid,
    grid_from_boxes: Matrix,
    *,
    compat: bool = False,
) -> tuple[Mask, Mask]:
    """Two (H, W) bool maps: vehicles, and is_valid, which is false for hardly visible vehicles.

    corners: (n, 8, 3) in the order of the devkit's Box.corners() [m], in the frame that grid_from_boxes, a
    (4, 4), maps to the grid; visibility: (n,) nuScenes visibility tokens, 1 (0-40 % visible) to 4. Boxes with
    visibility 1 stay in the vehicle map, but their cells are excluded from loss and IoU, also where a visible
    vehicle overlaps them (Simple-BEV).

    A box marks the cells whose centre is in its footprint, the projection of the box onto the grid's plane. On a
    pitched grid the bottom face alone would miss 5 cm per degree for a truck of 3 m height. A box that contains no
    cell centre marks the cell that contains the box's centre.

    compat: draw as aharley/simple_bev does (get_seg_bev): the top face with corners truncated to integers that
    denote cell centres, filled by OpenCV including the boundary; in float64 instead of float32.

    Raises ValueError on a corner that is not finite or a visibility outside 1..4, and names the box.
    """
    boxes = np.asarray(corners, np.float64).reshape(-1, 8, 3)
    tokens = np.asarray(visibility).reshape(-1)
    if len(boxes) != len(tokens):
        raise ValueError(f"{len(boxes)} boxes but {len(tokens)} visibilities: one per box expected")
    for i, (box, token) in enumerate(zip(boxes, tokens, strict=True)):
        if not np.isfinite(box).all() or token not in (1, 2, 3, 4):
            raise ValueError(
                f"box {i}: finite corners and a visibility of 1..4 expected, not {box.tolist()} and {token}"
            )
    draw = _draw_top_face if compat else _draw_footprint
    vehicles, is_hidden = np.zeros((2, *grid.map_shape), np.bool_)
    for cells, token in zip(transform(grid.cells_from_grid @ grid_from_boxes, boxes), tokens, strict=True):
        draw(vehicles, cells)
        if token == 1:
            draw(is_hidden, cells)
    return vehicles, ~is_hidden


def _draw_footprint(mask: Mask, corners: Floats) -> None:
    """Draw a box of (8, 3) corners (w, h, z) [cells] as the union of the projections of its faces."""
    quads = np.ascontiguousarray(corners[_FACES, :2])
    if sum([fill_polygon(mask, quad, _QUAD) for quad in quads]) == 0:
        w, h = np.floor(corners[:, :2].mean(axis=0))
        if 0 <= h < mask.shape[0] and 0 <= w < mask.shape[1]:
            mask[int(h), int(w)] = True


def _draw_top_face(mask: Mask, corners: Floats) -> None:
    fill_top_face(mask.view(np.uint8), corners, 1)


def fill_top_face(image: NDArray[np.uint8] | NDArray[np.int32], corners: Floats, value: int) -> None:
    """Set the cells of the top face of a box of (8, 3) corners (w, h, z) [cells], drawn as the reference does, to a value.

    image: (H, W).
    """
    import cv2  # only for compat; polygon fills, unlike lines, agree between OpenCV 4.11 and 5.0

    # Sorted by height, the first and last corners of a parallelogram are opposite; swapping the last two gives the order
    # around it. Height differences from rounding must not change the order, or the outline would cross itself.
    first, second, third, last = np.argsort(-corners[:, 2].round(6), kind="stable")[:4]
    top = corners[[first, second, last, third], :2] - 0.5
    pixels = np.clip(top, -(2.0**20), 2.0**20).astype(np.int32)
    if (pixels.max(axis=0) >= 0).all() and (pixels.min(axis=0) < image.shape[::-1]).all():
        cv2.fillPoly(image, [pixels], (value,))


def _cells_from_map(grid: VoxelGrid, grid_from_global: Matrix, ground_z: float) -> Floats:
    """(2, 3) affine map from global x, y at height ground_z to continuous (w, h) cells."""
    cells_from_global = (grid.cells_from_grid @ np.asarray(grid_from_global, np.float64))[:2]
    offset = cells_from_global[:, 2] * ground_z + cells_from_global[:, 3]
    return np.column_stack([cells_from_global[:, :2], offset])
