"""Map and vehicle labels: closed forms, the slow twins, properties, the real keyframe."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from occfeat_targets.geometry import (
    GRID_FROM_CAMERA_AXES,
    GRID_FROM_EGO_AXES,
    inverse_rigid,
    rigid,
    rotation_matrix,
    transform,
)
from occfeat_targets.grid import VoxelGrid
from occfeat_targets.labels import MAP_CLASSES, MapGeometry, draw_map, draw_vehicles, map_classes, map_window
from occfeat_targets.reference_labels import reference_map, reference_vehicles

Array = NDArray[Any]
GRID = VoxelGrid()
ODD_GRID = VoxelGrid((4, 60, 90), (-3.0, -20.0, -31.0), (5.0, 43.0, 35.0))  # cells of 1.05 m x 0.733 m
LEVEL = np.eye(3)
REAL_SAMPLE = Path(
    os.environ.get("OCCFEAT_REAL_SAMPLE", Path(__file__).parents[2].parent / "shared/nuscenes-real-sample")
)


def box_corners(center: Any, length: float, width: float, height: float, rotation: Any = LEVEL) -> Array:
    """(8, 3) in the devkit's order: the front face from the upper left on, then the back; x is forward."""
    x = length / 2 * np.array([1, 1, 1, 1, -1, -1, -1, -1])
    y = width / 2 * np.array([1, -1, -1, 1, 1, -1, -1, 1])
    z = height / 2 * np.array([1, 1, -1, -1, 1, 1, -1, -1])
    corners: Array = np.stack([x, y, z], axis=1) @ np.asarray(rotation).T + center
    return corners


def random_pose(rng: np.random.Generator, tilt: float = 0.05) -> Array:
    """A pose with any yaw, and pitch and roll of about `tilt` radians."""
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
    """A map's tables, filled shape by shape, as NuScenesMap holds them."""

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
    """Shapes anywhere within `reach`, and one of each kind where every test's grid sees it."""
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


# --- vehicles ----------------------------------------------------------------------------------------------


def test_box_of_4_m_by_2_m_on_cell_borders_is_8_by_4_cells() -> None:
    vehicles, is_valid = draw_vehicles(box_corners((3, 1, 0), 4, 2, 1.5)[None], [4], GRID, GRID_FROM_EGO_AXES)
    # x 1..5 m ahead, y 0..2 m to the left; row 100 and column 100 begin at 0.
    assert vehicles.sum() == 32
    assert vehicles[102:110, 96:100].all()
    assert is_valid.all()


def test_compat_draws_the_same_box_9_by_5() -> None:
    box = box_corners((3, 1, 0), 4, 2, 1.5)[None]
    vehicles, _ = draw_vehicles(box, [4], GRID, GRID_FROM_EGO_AXES, compat=True)
    assert vehicles.sum() == 45
    assert vehicles[101:110, 95:100].all()


def test_compat_truncates_toward_zero_at_the_grids_edge() -> None:
    # The box lies outside, 5 to 35 cm beyond the edge; its indices of -1 < i < 0 become 0, the first column.
    box = box_corners((0, 50.2, 0), 4, 0.3, 1.5)[None]
    vehicles, _ = draw_vehicles(box, [4], GRID, GRID_FROM_EGO_AXES, compat=True)
    assert vehicles[:, 0].sum() == 9
    assert not draw_vehicles(box, [4], GRID, GRID_FROM_EGO_AXES)[0].any()


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.24])
def test_box_of_30_cm_between_cell_centers_marks_the_cell_of_its_center(offset: float) -> None:
    center = np.array([10.0 + offset, -5.0 - offset, 0])
    vehicles, _ = draw_vehicles(box_corners(center, 0.3, 0.02, 1)[None], [4], GRID, GRID_FROM_EGO_AXES)
    assert vehicles.sum() == 1
    assert vehicles[120, 110]


def test_barely_visible_vehicle_is_drawn_and_its_cells_are_invalid() -> None:
    boxes = np.array([box_corners((3, 1, 0), 4, 2, 1.5), box_corners((5, 1, 0), 4, 2, 1.5)])
    vehicles, is_valid = draw_vehicles(boxes, np.array([1, 2], np.uint8), GRID, GRID_FROM_EGO_AXES)
    hidden, _ = draw_vehicles(boxes[:1], [4], GRID, GRID_FROM_EGO_AXES)
    np.testing.assert_array_equal(~is_valid, hidden)
    assert vehicles.sum() == 48
    assert vehicles[hidden].all()


def test_no_boxes_draw_nothing() -> None:
    vehicles, is_valid = draw_vehicles(np.zeros((0, 8, 3)), [], GRID, GRID_FROM_EGO_AXES)
    assert not vehicles.any()
    assert is_valid.all()


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("far", [60.0, 1e6, 1e12, 1e300])
def test_box_out_of_the_grid_draws_nothing(far: float, compat: bool) -> None:
    for center in ((far, 0, 0), (-far, 0, 0), (0, far, 0), (0, -far, 0)):
        box = box_corners(center, 4, 2, 1.5)[None]
        vehicles, is_valid = draw_vehicles(box, [1], GRID, GRID_FROM_EGO_AXES, compat=compat)
        assert not vehicles.any()
        assert is_valid.all()


@pytest.mark.parametrize("compat", [False, True])
def test_box_around_the_whole_grid_fills_it(compat: bool) -> None:
    box = box_corners((0, 0, 0), 1e9, 1e9, 3)[None]
    assert draw_vehicles(box, [4], GRID, GRID_FROM_EGO_AXES, compat=compat)[0].all()


@pytest.mark.parametrize(("corner", "token"), [(np.nan, 4), (np.inf, 4), (0.0, 0), (0.0, 5)])
def test_bad_box_is_named(corner: float, token: int) -> None:
    boxes = np.array([box_corners((3, 1, 0), 4, 2, 1.5)] * 2)
    boxes[1, 3, 0] += corner
    with pytest.raises(ValueError, match="box 1"):
        draw_vehicles(boxes, [4, token], GRID, GRID_FROM_EGO_AXES)
    with pytest.raises(ValueError, match="2 boxes but 1"):
        draw_vehicles(boxes, [4], GRID, GRID_FROM_EGO_AXES)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("grid", [GRID, ODD_GRID])
@pytest.mark.parametrize("seed", range(4))
def test_vehicles_equal_their_slow_twin(seed: int, grid: VoxelGrid, compat: bool) -> None:
    rng = np.random.default_rng(seed)
    boxes, visibility, pose = random_boxes(rng, 40), rng.integers(1, 5, 40), random_pose(rng)
    fast = draw_vehicles(boxes, visibility, grid, pose, compat=compat)
    *slow, is_decided = reference_vehicles(boxes, visibility, grid, pose, compat=compat)
    assert slow[0].sum() > 100
    assert (~slow[1]).any()
    assert is_decided.mean() > (0.7 if compat else 0.999)
    for drawn, expected in zip(fast, slow, strict=True):
        assert_equal_where_decided(drawn, expected, is_decided)


def test_compat_order_of_corners_survives_rounding_noise() -> None:
    # Top corners of a level box are equally high: noise must not draw a bow tie, which loses the middle.
    rng = np.random.default_rng(0)
    for _ in range(50):
        box = box_corners((3, 1, 0), 4, 2, 1.5) + rng.normal(0, 1e-12, (8, 3)) * [0, 0, 1]
        assert draw_vehicles(box[None], [4], GRID, GRID_FROM_EGO_AXES, compat=True)[0].sum() == 45


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-20, 20), st.integers(-20, 20))
def test_moving_a_box_by_whole_cells_shifts_its_cells(seed: int, ahead: int, left: int) -> None:
    rng = np.random.default_rng(seed)
    box = np.round(random_boxes(rng, 1) * 64) / 64  # so that the move itself does not round
    box[..., :2] += np.round(-box[0, :, :2].mean(axis=0))
    moved = box + np.array([ahead, left, 0]) * 0.5
    here, there = (draw_vehicles(b, [4], GRID, GRID_FROM_EGO_AXES)[0] for b in (box, moved))
    np.testing.assert_array_equal(np.roll(here, (ahead, -left), axis=(0, 1)), there)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_vehicles_of_two_lists_are_the_or_of_each(seed: int, compat: bool) -> None:
    rng = np.random.default_rng(seed)
    boxes, visibility, pose = random_boxes(rng, 6), rng.integers(1, 5, 6), random_pose(rng)
    parts = [draw_vehicles(boxes[i::2], visibility[i::2], GRID, pose, compat=compat) for i in (0, 1)]
    vehicles, is_valid = draw_vehicles(boxes, visibility, GRID, pose, compat=compat)
    np.testing.assert_array_equal(vehicles, parts[0][0] | parts[1][0])
    np.testing.assert_array_equal(is_valid, parts[0][1] & parts[1][1])


# --- maps --------------------------------------------------------------------------------------------------


def test_map_classes_are_the_papers_five_in_order() -> None:
    assert list(map_classes()) == ["road", "sidewalk", "crosswalk", "parking_area", "road_divider"]
    assert map_classes() == MAP_CLASSES
    assert map_classes("road+lane")["road_divider"] == ("road_divider", "lane_divider")
    with pytest.raises(ValueError, match="road\\+lane"):
        map_classes("lane")


def test_square_road_hole_and_divider_land_on_their_cells_and_channels() -> None:
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


def test_map_is_drawn_where_the_pose_says() -> None:
    tables = Tables()
    tables.add_polygon("walkway", square(1010, 2020, 1))
    # The ego at (1000, 2000), facing global +y: the square is 20 m ahead and 10 m to the right.
    global_from_ego = rigid([np.sqrt(0.5), 0, 0, np.sqrt(0.5)], [1000, 2000, 3])
    grid_from_global = GRID_FROM_EGO_AXES @ inverse_rigid(global_from_ego)
    # A millimetre aside, so that rounding of the pose does not decide about cells on the border.
    grid_from_global[:2, 3] += 0.001
    masks = draw_map(MapGeometry.from_tables(tables), GRID, grid_from_global, 3.0)
    assert masks[1].sum() == masks.sum() == 4
    assert masks[1, 140:142, 120:122].all()


def test_ground_below_a_pitched_grid_moves_with_its_height() -> None:
    tables = Tables()
    tables.add_polygon("walkway", square(10.1, -0.9, 2))
    pitch = 0.1
    grid_from_global = GRID_FROM_EGO_AXES @ rigid([np.cos(pitch / 2), 0, np.sin(pitch / 2), 0], [0, 0, 0])
    # A rotation by `pitch` about the left axis takes (x, z) to x cos + z sin ahead.
    for z in (-20.0, 0.0, 20.0):
        mask = draw_map(MapGeometry.from_tables(tables), GRID, grid_from_global, z)[1]
        ahead = np.flatnonzero(mask.any(axis=1)) * 0.5 - 50
        edges = np.array([10.1, 12.1]) * np.cos(pitch) + z * np.sin(pitch)
        assert np.abs([ahead[0] - edges[0], ahead[-1] + 0.5 - edges[1]]).max() <= 0.25


@pytest.mark.parametrize("grid", [GRID, ODD_GRID])
@pytest.mark.parametrize("seed", range(3))
def test_map_equals_its_slow_twin(seed: int, grid: VoxelGrid) -> None:
    rng = np.random.default_rng(seed)
    geometry, pose = random_map(rng), random_pose(rng)
    fast = draw_map(geometry, grid, pose, 1.5, line_width=0.8)
    slow, is_decided = reference_map(geometry, grid, pose, 1.5, line_width=0.8)
    assert slow.any(axis=(1, 2)).all()
    assert is_decided.mean() > 0.999
    assert_equal_where_decided(fast, slow, is_decided)


@pytest.mark.parametrize("seed", range(10))
def test_near_keeps_all_that_the_window_shows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    geometry, pose = random_map(rng, reach=200.0), random_pose(rng)
    part = geometry.near(*map_window(GRID, pose, 1.5, 2.0))
    assert 0 < len(part.polygon_class) < len(geometry.polygon_class)
    assert 0 < len(part.line_class) < len(geometry.line_class)
    slow, is_decided = reference_map(geometry, GRID, pose, 1.5, line_width=2.0)
    assert_equal_where_decided(draw_map(part, GRID, pose, 1.5, line_width=2.0), slow, is_decided)


def test_near_drops_holes_out_of_the_window_and_survives_a_pickle() -> None:
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


def test_window_holds_the_grids_corners_and_the_width_of_a_line() -> None:
    low, high = map_window(GRID, GRID_FROM_EGO_AXES, 0.0, 2.0)
    np.testing.assert_allclose([low, high], [[-51, -51], [51, 51]])
    with pytest.raises(ValueError, match="perpendicular"):
        map_window(GRID, GRID_FROM_CAMERA_AXES, 0.0)


def test_line_just_outside_the_grid_reaches_in_by_its_width() -> None:
    tables = Tables()
    tables.add_line("road_divider", [(50.2, -80), (50.2, 80)])  # 0.45 m from the centres of the foremost row
    masks = draw_map(MapGeometry.from_tables(tables), GRID, GRID_FROM_EGO_AXES, 0.0)
    assert masks[4, 199].all()
    assert masks.sum() == 200


def test_shapes_without_enough_nodes_are_left_out() -> None:
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


# --- the real keyframe -------------------------------------------------------------------------------------


def test_corner_order_is_the_devkits() -> None:
    classes = pytest.importorskip("nuscenes.utils.data_classes", reason="nuscenes-devkit is not installed")
    quaternion = pytest.importorskip("pyquaternion").Quaternion(axis=[0, 0, 1], angle=0.7)
    box = classes.Box([1, 2, 3], [2, 4, 1.5], quaternion)
    ours = box_corners((1, 2, 3), 4, 2, 1.5, quaternion.rotation_matrix)
    np.testing.assert_allclose(box.corners().T, ours, atol=1e-12)


@pytest.mark.skipif(not REAL_SAMPLE.is_dir(), reason=f"OCCFEAT_REAL_SAMPLE: no keyframe at {REAL_SAMPLE}")
@pytest.mark.parametrize("sensor", ["LIDAR_TOP", "CAM_FRONT"])
def test_lidar_points_in_vehicle_boxes_fall_on_vehicle_cells(sensor: str) -> None:
    devkit = pytest.importorskip("nuscenes", reason="nuscenes-devkit is not installed")
    points_in_box = pytest.importorskip("nuscenes.utils.geometry_utils").points_in_box
    nusc = devkit.NuScenes("v1.0-mini", str(REAL_SAMPLE), verbose=False)
    lidar = nusc.get("sample_data", nusc.sample[0]["data"]["LIDAR_TOP"])

    def pose(table: str, token: str) -> Array:
        record = nusc.get(table, token)
        return rigid(record["rotation"], record["translation"])

    global_from_ego = pose("ego_pose", lidar["ego_pose_token"])
    global_from_lidar = global_from_ego @ pose("calibrated_sensor", lidar["calibrated_sensor_token"])
    grid_from_global = GRID_FROM_EGO_AXES @ inverse_rigid(global_from_ego)
    if sensor != "LIDAR_TOP":
        camera = nusc.get("sample_data", nusc.sample[0]["data"][sensor])
        ego_from_camera = pose("calibrated_sensor", camera["calibrated_sensor_token"])
        grid_from_global = GRID_FROM_CAMERA_AXES @ inverse_rigid(global_from_ego @ ego_from_camera)

    sweep = np.fromfile(REAL_SAMPLE / lidar["filename"], np.float32).reshape(-1, 5)[:, :3].astype(float)
    points = transform(global_from_lidar, sweep)
    boxes = [box for box in nusc.get_boxes(lidar["token"]) if "vehicle" in box.name]
    corners = np.array([box.corners().T for box in boxes])
    vehicles, _ = draw_vehicles(corners, [4] * len(boxes), GRID, grid_from_global)
    compat, _ = draw_vehicles(corners, [4] * len(boxes), GRID, grid_from_global, compat=True)
    cells = transform(GRID.cells_from_grid @ grid_from_global, points)[:, :2]
    in_grid = ((cells >= 0) & (cells < 200)).all(axis=1)

    def on(mask: Array, chosen: Array) -> Array:
        w, h = np.floor(cells[chosen]).astype(int).T
        found: Array = mask[h, w]
        return found

    # The rule: a cell is a vehicle's if its centre is in the footprint, and no point of a cell is further than
    # half its diagonal, 0.36 m, from its centre. So points that deep inside a box (in one shrunk by as much on
    # every side) are on vehicle cells without exception; the others are on one or beside one.
    in_box, deep = np.zeros((2, len(points)), bool)
    for box in boxes:
        in_box |= points_in_box(box, points.T)
        box.wlh = np.maximum(box.wlh - 2 * 0.36, 0)
        deep |= points_in_box(box, points.T) if box.wlh.min() > 0 else False
    in_box, deep = in_box & in_grid, deep & in_grid
    padded = np.pad(vehicles, 1)
    beside = np.any([padded[i : i + 200, j : j + 200] for i in range(3) for j in range(3)], axis=0)
    assert in_box.sum() > 500
    assert deep.sum() > 100
    assert on(vehicles, deep).all()
    assert on(beside, in_box).all()
    # Measured: 99 % and 98 % (ego and camera frame) of all points in boxes are on vehicle cells.
    assert on(vehicles, in_box).mean() > 0.97
    assert on(compat, deep).mean() > 0.97
    assert compat.sum() > 1.2 * vehicles.sum()
