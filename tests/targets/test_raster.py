"""The rasteriser: closed forms, a Shapely twin, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from occfeat_targets.targets.raster import draw_polylines, fill_polygon, fill_polygons

Array = NDArray[Any]
SIDE = 40
TIE = 1e-9  # a cell centre this close to an edge may fall on either side in floating point


def rectangle(left: float, bottom: float, right: float, top: float) -> Array:
    return np.array([[left, bottom], [right, bottom], [right, top], [left, top]], float)


def fill(*rings: Array, shape: tuple[int, int] = (SIDE, SIDE)) -> Array:
    mask = np.zeros(shape, bool)
    count = fill_polygon(mask, np.concatenate(rings), np.cumsum([0, *map(len, rings)]))
    assert count == mask.sum()
    return mask


def line(*points: tuple[float, float], width: float, size_w: float = 0.5, size_h: float = 0.5) -> Array:
    masks = np.zeros((1, SIDE, SIDE), bool)
    ends = np.array([0, len(points)])
    draw_polylines(masks, np.array([0]), np.array(points, float), ends, size_w, size_h, width)
    drawn: Array = masks[0]
    return drawn


def centers() -> Array:
    return np.stack(np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5), axis=-1)


def random_star(rng: np.random.Generator, center: tuple[float, float], radius: float, n: int) -> Array:
    """A star-shaped simple polygon: vertices by increasing angle about the centre."""
    angles = (np.arange(n) + rng.uniform(0, 0.9, n)) * 2 * np.pi / n
    reach = radius * rng.uniform(0.3, 1.0, n)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.array(center) + directions * reach[:, None]


def test_rectangle_on_cell_borders_fills_exactly_its_cells() -> None:
    expected = np.zeros((SIDE, SIDE), bool)
    expected[3:7, 10:18] = True
    np.testing.assert_array_equal(fill(rectangle(10, 3, 18, 7)), expected)


def test_first_axis_of_a_vertex_is_the_column() -> None:
    assert fill(rectangle(10, 3, 11, 4))[3, 10]


def test_edge_through_cell_centers_belongs_to_the_upper_right_cell() -> None:
    mask = fill(rectangle(2.5, 2.5, 4.5, 4.5))
    assert mask.sum() == 4
    assert mask[2:4, 2:4].all()


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_ring_may_have_either_orientation_and_may_be_closed(order: slice) -> None:
    ring = rectangle(10, 3, 18, 7)[order]
    np.testing.assert_array_equal(fill(ring), fill(rectangle(10, 3, 18, 7)))
    np.testing.assert_array_equal(fill(np.concatenate([ring, ring[:1]])), fill(ring))


def test_hole_is_not_filled() -> None:
    mask = fill(rectangle(0, 0, 10, 10), rectangle(2, 2, 5, 5))
    assert mask.sum() == 100 - 9
    assert not mask[2:5, 2:5].any()


def test_hole_reported_twice_and_hole_beyond_the_exterior_stay_holes() -> None:
    hole = rectangle(8, 2, 15, 5)
    mask = fill(rectangle(0, 0, 10, 10), hole, hole)
    assert mask.sum() == 100 - 6
    assert not mask[2:5, 8:].any()


def test_hole_of_one_polygon_does_not_erase_another() -> None:
    masks = np.zeros((1, SIDE, SIDE), bool)
    rings = [rectangle(2, 2, 5, 5), rectangle(0, 0, 10, 10), rectangle(1, 1, 6, 6)]
    offsets = np.cumsum([0, *map(len, rings)])
    fill_polygons(masks, np.array([0, 0]), np.concatenate(rings), offsets, np.array([0, 1, 3]))
    assert masks[0, 2:5, 2:5].all()
    assert masks.sum() == 100 - 25 + 9


def test_each_polygon_goes_into_its_channel() -> None:
    masks = np.zeros((3, SIDE, SIDE), bool)
    rings = np.concatenate([rectangle(0, 0, 2, 1), rectangle(0, 0, 3, 1)])
    fill_polygons(masks, np.array([2, 0]), rings, np.array([0, 4, 8]), np.array([0, 1, 2]))
    assert masks.sum(axis=(1, 2)).tolist() == [3, 0, 2]


def test_bow_tie_follows_the_even_odd_rule() -> None:
    mask = fill(np.array([[0, 0], [20, 20], [20, 0], [0, 20]], float))
    assert mask[10, 2]
    assert mask[10, 17]
    assert not mask[2, 10]
    assert not mask[17, 10]


@pytest.mark.parametrize("seed", range(20))
def test_triangles_that_share_edges_tile_without_overlap_or_gap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Shared edges occur in both directions. The hub and half of the rim lie on cell centres, where ties occur.
    hub = np.floor(rng.uniform(12, 28, 2)) + 0.5
    rim = random_star(rng, (hub[0], hub[1]), 18, 9)
    rim[::2] = np.floor(rim[::2]) + 0.5
    triangles = [np.array([hub, rim[i - 1], rim[i]])[:: 1 if i % 2 else -1] for i in range(len(rim))]
    drawn = np.sum([fill(triangle) for triangle in triangles], axis=0)
    np.testing.assert_array_equal(drawn, fill(rim))


@pytest.mark.parametrize("seed", range(20))
def test_polygon_with_holes_equals_shapely_at_every_center(seed: int) -> None:
    rng = np.random.default_rng(seed)
    center = rng.uniform(-5, SIDE + 5, 2)
    exterior = random_star(rng, (center[0], center[1]), rng.uniform(2, 30), int(rng.integers(3, 40)))
    holes = [random_star(rng, tuple(rng.uniform(5, 35, 2)), 6, 7) for _ in range(int(rng.integers(0, 4)))]
    points = shapely.points(centers())
    expected = shapely.contains(shapely.Polygon(exterior), points)
    for hole in holes:
        expected &= ~shapely.contains(shapely.Polygon(hole), points)
    rings = shapely.MultiLineString([np.concatenate([ring, ring[:1]]) for ring in (exterior, *holes)])
    is_decided = shapely.distance(rings, points) > TIE
    np.testing.assert_array_equal(fill(exterior, *holes)[is_decided], expected[is_decided])


def test_line_of_one_metre_on_a_border_of_half_metre_cells_is_two_cells_wide() -> None:
    mask = line((10, -5), (10, SIDE + 5), width=1.0)
    assert mask[:, 9:11].all()
    assert mask.sum() == 2 * SIDE


def test_line_width_is_in_metres_on_cells_that_are_not_square() -> None:
    upright = line((10, -50), (10, SIDE + 50), width=1.0, size_w=0.25, size_h=1.0)
    level = line((-50, 10), (SIDE + 50, 10), width=1.0, size_w=0.25, size_h=1.0)
    assert upright.sum() == 4 * SIDE
    assert upright[:, 8:12].all()
    # The centres lie exactly half a metre from the line, so they are included.
    assert level.sum() == 2 * SIDE
    assert level[9:11].all()


def test_line_ends_and_joints_are_round_and_a_point_is_a_disc() -> None:
    disc = line((20, 20), (20, 20), width=10.0)
    np.testing.assert_array_equal(disc, np.hypot(*(centers() - 20).transpose(2, 0, 1)) * 0.5 <= 5)


@pytest.mark.parametrize("seed", range(20))
def test_polyline_equals_distance_to_linestring_at_every_center(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(-10, SIDE + 10, (int(rng.integers(2, 8)), 2))
    size_w, size_h, width = rng.uniform(0.2, 1.5, 3)
    size = np.array([size_w, size_h])
    distance = shapely.distance(shapely.LineString(points * size), shapely.points(centers() * size))
    is_decided = np.abs(distance - width / 2) > TIE
    drawn = line(*map(tuple, points), width=width, size_w=size_w, size_h=size_h)
    np.testing.assert_array_equal(drawn[is_decided], (distance <= width / 2)[is_decided])


@pytest.mark.parametrize("far", [1e6, 1e15, 1e300])
def test_shapes_far_outside_draw_nothing_and_a_shape_around_the_grid_fills_it(far: float) -> None:
    assert not fill(rectangle(far, far, 2 * far, 2 * far)).any()
    assert not fill(rectangle(-2 * far, 3, -far, 7)).any()
    assert not line((far, far), (2 * far, far), width=1.0).any()
    assert fill(rectangle(-far, -far, far, far)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vertex_that_is_not_finite_does_not_write_out_of_bounds(value: float) -> None:
    frame = np.zeros((SIDE + 20, SIDE + 20), bool)
    for ring in (rectangle(2, 2, value, 9), rectangle(2, value, 9, 9), rectangle(value, value, 9, 9)):
        fill_polygon(frame[10:-10, 10:-10], ring, np.array([0, 4]))
        ends = np.array([0, 4])
        draw_polylines(frame[None, 10:-10, 10:-10], np.array([0]), ring, ends, 0.5, 0.5, 1.0)
    frame[10:-10, 10:-10] = False
    assert not frame.any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-12, 12), st.integers(-12, 12))
def test_translation_by_whole_cells_shifts_the_mask(seed: int, right: int, up: int) -> None:
    # Vertices are multiples of 1/64 of a cell, so the shift is exact.
    ring = np.round(random_star(np.random.default_rng(seed), (20, 20), 7, 9) * 64) / 64
    here, there = fill(ring), fill(ring + np.array([right, up]))
    np.testing.assert_array_equal(np.roll(here, (up, right), axis=(0, 1)), there)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_drawing_more_never_clears_a_cell(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((SIDE, SIDE)) < 0.3
    before = mask.copy()
    ring = random_star(rng, (20, 20), 15, 12)
    fill_polygon(mask, ring, np.array([0, 12]))
    draw_polylines(mask[None], np.array([0]), ring, np.array([0, 12]), 0.5, 0.5, 1.0)
    assert mask[before].all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_cell_count_of_a_convex_polygon_is_its_area_to_within_its_perimeter(seed: int) -> None:
    points = np.random.default_rng(seed).uniform(1, SIDE - 1, (12, 2))
    hull = shapely.MultiPoint(points).convex_hull
    count = fill(np.array(hull.exterior.coords)).sum()
    # Only cells cut by the boundary can be counted wrongly. A boundary of length s cuts at most sqrt(2) s + 4 cells.
    assert abs(count - hull.area) <= np.sqrt(2) * hull.length + 4
