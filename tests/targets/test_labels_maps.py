"""Map labels: closed forms, the slow reference, properties."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from occfeat_targets.cache.geometry import (
    GRID_FROM_CAMERA_AXES,
    GRID_FROM_EGO_AXES,
    inverse_rigid,
    rigid,
)
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.sources.map_geometry import MAP_LAYERS, MapGeometry, map_classes
from occfeat_targets.targets.labels import draw_map, map_window
from occfeat_targets.verify.slow_labels import reference_map
from tests.targets.label_inputs import (
    GRID,
    ODD_GRID,
    Tables,
    assert_equal_where_decided,
    random_map,
    random_pose,
    square,
)


def test_map_classes_are_the_papers_five_in_order() -> None:
    assert list(map_classes()) == ["road", "sidewalk", "crosswalk", "parking_area", "road_divider"]
    assert map_classes() == MAP_LAYERS
    assert map_classes("road+lane")["road_divider"] == ("road_divider", "lane_divider")
    with pytest.raises(ValueError, match="road\\+lane"):
        map_classes("lane")


def test_square_road_hole_and_divider_have_the_correct_cells_and_channels() -> None:
    tables = Tables()
    tables.add_polygon("drivable_area", square(0, 0, 10), square(2, 2, 3))
    tables.add_polygon("carpark_area", square(1, 1, 6))
    tables.add_line("road_divider", [(-80, -20), (80, -20)])
    tables.add_line("lane_divider", [(-80, 20), (80, 20)])
    masks = draw_map(MapGeometry.from_tables(tables), GRID, GRID_FROM_EGO_AXES, 0.0)
    assert masks.sum(axis=(1, 2)).tolist() == [20 * 20 - 6 * 6, 0, 0, 12 * 12, 200 * 2]
    assert masks[0, 100:120, 80:100].sum() == 364
    assert not masks[0, 104:110, 90:96].any()
    assert masks[3, 102:114, 86:98].all()
    assert masks[4, :, 139:141].all()
    both = draw_map(MapGeometry.from_tables(tables, map_classes("road+lane")), GRID, GRID_FROM_EGO_AXES, 0.0)
    assert both[4].sum() == 2 * masks[4].sum()
    assert both[4, :, 59:61].all()


def test_map_is_drawn_at_the_pose() -> None:
    tables = Tables()
    tables.add_polygon("walkway", square(1010, 2020, 1))
    # The ego at (1000, 2000), facing global +y: the square is 20 m ahead and 10 m to the right.
    global_from_ego = rigid([np.sqrt(0.5), 0, 0, np.sqrt(0.5)], [1000, 2000, 3])
    grid_from_global = GRID_FROM_EGO_AXES @ inverse_rigid(global_from_ego)
    # Shifted by a millimetre, so that no cell centre depends on rounding of the pose.
    grid_from_global[:2, 3] += 0.001
    masks = draw_map(MapGeometry.from_tables(tables), GRID, grid_from_global, 3.0)
    assert masks[1].sum() == masks.sum() == 4
    assert masks[1, 140:142, 120:122].all()


def test_ground_below_a_pitched_grid_moves_with_its_height() -> None:
    tables = Tables()
    tables.add_polygon("walkway", square(10.1, -0.9, 2))
    pitch = 0.1
    grid_from_global = GRID_FROM_EGO_AXES @ rigid([np.cos(pitch / 2), 0, np.sin(pitch / 2), 0], [0, 0, 0])
    # A rotation by `pitch` about the left axis moves (x, z) to x cos + z sin ahead.
    for z in (-20.0, 0.0, 20.0):
        mask = draw_map(MapGeometry.from_tables(tables), GRID, grid_from_global, z)[1]
        ahead = np.flatnonzero(mask.any(axis=1)) * 0.5 - 50
        edges = np.array([10.1, 12.1]) * np.cos(pitch) + z * np.sin(pitch)
        assert np.abs([ahead[0] - edges[0], ahead[-1] + 0.5 - edges[1]]).max() <= 0.25


@pytest.mark.parametrize("grid", [GRID, ODD_GRID])
@pytest.mark.parametrize("seed", range(3))
def test_map_equals_the_slow_reference(seed: int, grid: VoxelGrid) -> None:
    rng = np.random.default_rng(seed)
    geometry, pose = random_map(rng), random_pose(rng)
    fast = draw_map(geometry, grid, pose, 1.5, line_width=0.8)
    slow, is_decided = reference_map(geometry, grid, pose, 1.5, line_width=0.8)
    assert slow.any(axis=(1, 2)).all()
    assert is_decided.mean() > 0.999
    assert_equal_where_decided(fast, slow, is_decided)


@pytest.mark.parametrize("seed", range(10))
def test_near_keeps_all_shapes_in_the_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    geometry, pose = random_map(rng, reach=200.0), random_pose(rng)
    part = geometry.near(*map_window(GRID, pose, 1.5, 2.0))
    assert 0 < len(part.polygon_class) < len(geometry.polygon_class)
    assert 0 < len(part.line_class) < len(geometry.line_class)
    slow, is_decided = reference_map(geometry, GRID, pose, 1.5, line_width=2.0)
    assert_equal_where_decided(draw_map(part, GRID, pose, 1.5, line_width=2.0), slow, is_decided)


def test_near_drops_holes_outside_the_window_and_survives_pickling() -> None:
    tables = Tables()
    tables.add_polygon("walkway", square(500, 500, 1))
    tables.add_polygon("drivable_area", square(-100, -100, 200), square(80, 80, 3), square(0, 0, 3))
    part = pickle.loads(pickle.dumps(MapGeometry.from_tables(tables).near([-10, -10], [10, 10])))
    assert part.ring_offsets.tolist() == [0, 4, 8]
    assert part.polygon_offsets.tolist() == [0, 2]
    assert part.polygon_class.tolist() == [0]
    np.testing.assert_array_equal(part.vertices[4:], square(0, 0, 3))
    nothing = part.near([900, 900], [901, 901])
    assert len(nothing.vertices) == 0
    assert not draw_map(nothing, GRID, GRID_FROM_EGO_AXES, 0.0).any()


def test_window_contains_the_grids_corners_and_half_the_width_of_a_line() -> None:
    low, high = map_window(GRID, GRID_FROM_EGO_AXES, 0.0, 2.0)
    np.testing.assert_allclose([low, high], [[-51, -51], [51, 51]])
    with pytest.raises(ValueError, match="perpendicular"):
        map_window(GRID, GRID_FROM_CAMERA_AXES, 0.0)


def test_line_just_outside_the_grid_reaches_inside_by_its_width() -> None:
    tables = Tables()
    tables.add_line("road_divider", [(50.2, -80), (50.2, 80)])  # 0.45 m from the centres of the foremost row
    masks = draw_map(MapGeometry.from_tables(tables), GRID, GRID_FROM_EGO_AXES, 0.0)
    assert masks[4, 199].all()
    assert masks.sum() == 200


def test_shapes_without_enough_nodes_are_ignored() -> None:
    tables = Tables()
    tables.add_polygon("walkway", [(0, 0), (1, 1)], square(0, 0, 1))
    tables.add_polygon("walkway", square(0, 0, 4), [], [(1, 1)])
    for points in ([], [(1, 1)]):
        tables.add_line("road_divider", points)
    geometry = MapGeometry.from_tables(tables)
    assert geometry.polygon_offsets.tolist() == [0, 1]
    assert geometry.line_offsets.tolist() == [0]


def test_missing_records_and_tables_are_named() -> None:
    tables = Tables()
    tables.add_polygon("walkway", square(0, 0, 4))
    tables.node.pop()
    with pytest.raises(ValueError, match=r"walkway-p0.*'n3'"):
        MapGeometry.from_tables(tables)
    tables.node.append({"token": "n3", "x": np.nan, "y": 0})
    with pytest.raises(ValueError, match="not finite"):
        MapGeometry.from_tables(tables)
    del tables.carpark_area
    tables.node[-1]["x"] = 0
    with pytest.raises(ValueError, match="carpark_area"):
        MapGeometry.from_tables(tables)
