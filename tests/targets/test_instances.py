"""Centres and offsets of single vehicles: closed forms, the reference's own arrays, the slow reference, caches."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, GRID_FROM_EGO_AXES
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.pictures.birdseye import instance_colors
from occfeat_targets.pictures.sheet import Scene
from occfeat_targets.targets.instances import FAR, Instances, draw_instances, vehicle_instances
from occfeat_targets.targets.labels import draw_vehicles
from occfeat_targets.verify.slow_instances import reference_instances
from tests.targets.command_line import contents, run
from tests.targets.label_inputs import GRID, ODD_GRID, Array, box_corners, random_boxes, random_pose

VEHICLES = LABEL_KINDS["vehicles"]
SMALL = VoxelGrid((4, 40, 48), (-2.0, -10.0, -12.0), (2.0, 10.0, 12.0))


# -- one keyframe -----------------------------------------------------------------------------------------------------


def test_distances_and_offsets_of_one_box_are_whole_cells() -> None:
    # Column 96 and row 104 have their centres at 1.75 m left and 2.25 m ahead.
    found = draw_instances(box_corners((2.3, 1.7, 0), 4, 2, 1.5)[None], GRID, GRID_FROM_EGO_AXES)
    assert np.argwhere(found.squared_distance == 0).tolist() == [[104, 96]]
    assert found.squared_distance[104 + 3, 96 - 4] == 25
    assert found.squared_distance[104 + 15, 96] == 225 and found.squared_distance[104 + 16, 96] == FAR
    drawn, _ = draw_vehicles(box_corners((2.3, 1.7, 0), 4, 2, 1.5)[None], [4], GRID, GRID_FROM_EGO_AXES, compat=True)
    assert found.offset[:, 106, 95].tolist() == [-1, 2]
    rows, columns = np.nonzero(drawn)
    np.testing.assert_array_equal(found.offset[:, rows, columns], [columns - 96, rows - 104])
    assert not found.offset[:, ~drawn].any()


def test_a_centre_between_two_cells_is_rounded_to_the_even_one() -> None:
    for ahead, row in ((2.0, 104), (2.5, 104), (3.0, 106), (3.5, 106)):  # borders of cells: index n - 0.5
        found = draw_instances(box_corners((ahead, 0.25, 0), 4, 2, 1.5)[None], GRID, GRID_FROM_EGO_AXES)
        assert np.argwhere(found.squared_distance == 0)[0, 0] == row


def test_a_later_box_covers_an_earlier_one_and_both_keep_their_centres() -> None:
    boxes = np.array([box_corners((3.25, 0.25, 0), 4, 2, 1.5), box_corners((4.25, 0.25, 0), 8, 4, 1.5)])
    found = draw_instances(boxes, GRID, GRID_FROM_EGO_AXES)
    assert np.argwhere(found.squared_distance == 0).tolist() == [[106, 99], [108, 99]]
    assert found.offset[:, 106, 99].tolist() == [0, -2]
    first = draw_instances(boxes[::-1], GRID, GRID_FROM_EGO_AXES)
    assert first.offset[:, 106, 99].tolist() == [0, 0]
    np.testing.assert_array_equal(first.squared_distance, found.squared_distance)


def test_a_centre_outside_the_grid_still_counts() -> None:
    found = draw_instances(box_corners((51.25, 0.25, 0), 4, 2, 1.5)[None], GRID, GRID_FROM_EGO_AXES)
    assert found.squared_distance[199, 99] == 9
    assert found.offset[:, 199, 99].tolist() == [0, -3]
    far = draw_instances(box_corners((1e300, 0, 0), 4, 2, 1.5)[None], GRID, GRID_FROM_EGO_AXES)
    assert (far.squared_distance == FAR).all() and not far.offset.any()


def test_no_boxes_have_no_centres() -> None:
    found = draw_instances(np.zeros((0, 8, 3)), GRID, GRID_FROM_EGO_AXES)
    assert (found.squared_distance == FAR).all() and not found.offset.any()
    assert found.squared_distance.dtype == np.uint8 and found.offset.dtype == np.int16


def test_bad_boxes_are_refused() -> None:
    boxes = np.array([box_corners((3, 1, 0), 4, 2, 1.5)] * 2)
    boxes[1, 3, 0] = np.nan
    with pytest.raises(ValueError, match="box 1: finite corners expected"):
        draw_instances(boxes, GRID, GRID_FROM_EGO_AXES)
    with pytest.raises(ValueError, match=r"reaches \S+ cells from its centre: at most 32767 expected"):
        draw_instances(box_corners((4e4, 0, 0), 1e5, 2, 1.5)[None], GRID, GRID_FROM_EGO_AXES)


def test_the_targets_are_those_of_the_reference_repository() -> None:
    """Its offsets are twice ours: it adds the smallest and the largest value along an axis of one entry."""
    with np.load(Path(__file__).parent / "golden" / "simple_bev_instances.npz") as file:
        golden = dict(file)
    grid = VoxelGrid((8, 40, 40), (-5.0, -10.0, -10.0), (5.0, 10.0, 10.0))
    seg, valid = draw_vehicles(golden["corners"], golden["visibility"], grid, GRID_FROM_CAMERA_AXES, compat=True)
    np.testing.assert_array_equal(seg, golden["seg"])
    np.testing.assert_array_equal(valid, golden["valid"])
    assert (~valid).any() and seg.any()
    found = draw_instances(golden["corners"], grid, GRID_FROM_CAMERA_AXES)
    np.testing.assert_array_equal(2.0 * found.offset, golden["offset"])
    gauss = np.exp(found.squared_distance / -18.0)
    np.testing.assert_allclose(np.where(gauss < 1e-3, 0, gauss), golden["center"], atol=1e-6)


@pytest.mark.parametrize("grid", [pytest.param(GRID, marks=pytest.mark.slow), SMALL, ODD_GRID])
@pytest.mark.parametrize("seed", range(3))
def test_instances_equal_the_slow_reference(seed: int, grid: VoxelGrid) -> None:
    rng = np.random.default_rng(seed)
    boxes, pose = random_boxes(rng, 40), random_pose(rng)
    fast, slow = draw_instances(boxes, grid, pose), reference_instances(boxes, grid, pose)
    assert slow.has_known_distance.all() and slow.has_known_offset.mean() > 0.6
    np.testing.assert_array_equal(fast.squared_distance, slow.squared_distance)
    known = slow.has_known_offset
    np.testing.assert_array_equal(fast.offset[:, known], slow.offset[:, known])
    assert np.unique(fast.offset[:, known & fast.offset.any(axis=0)]).size > 5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_cells_of_instances_are_the_vehicles_of_compat(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes, pose = random_boxes(rng, 8), random_pose(rng)
    vehicles, _ = draw_vehicles(boxes, [4] * 8, SMALL, pose, compat=True)
    assert not draw_instances(boxes, SMALL, pose).offset[:, ~vehicles].any()


def test_a_rounding_that_the_reference_cannot_know_is_not_compared() -> None:
    slow = reference_instances(box_corners((2.0, 0.25, 0), 4, 2, 1.5)[None], SMALL, GRID_FROM_EGO_AXES)
    assert not slow.has_known_distance[24, 23] and slow.has_known_distance[0].any()
    assert not slow.has_known_offset[24, 23]


# -- caches -----------------------------------------------------------------------------------------------------------

BUILD = ["build", "--split", "mini_val", "--teacher", "none", "--label-kinds", "vehicles", "--compat", "simple-bev",
         "--frames", "both", "--image-size", "32x48", "--grid", "8x100x100", "--range", "-5", "5", "-25", "25", "-25", "25",
         "--workers", "0"]  # fmt: skip


def build(city: Path, out: Path, *more: str) -> CacheReader:
    run(*BUILD, "--dataroot", city, "--cache", out, *more)
    return CacheReader(out / "mini_val.zarr")


@pytest.fixture(scope="module")
def with_instances(city: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return build(city, tmp_path_factory.mktemp("instances"), "--instances")


def test_a_build_stores_verifies_and_draws_instances_in_every_frame(with_instances: CacheReader, city: Path) -> None:
    folder = with_instances.cache.path.parent
    squared = with_instances.read(VEHICLES.center_array, 0)
    offset = with_instances.read(VEHICLES.offset_array, 0)
    assert squared.shape == (7, 100, 100) and offset.shape == (7, 2, 100, 100)
    assert len({plane.tobytes() for plane in squared}) == 7
    vehicles = with_instances.read_labels(VEHICLES, 0)[0][:, 0]
    assert not offset.swapaxes(0, 1)[:, ~vehicles].any() and offset.any()
    where = ["--dataroot", city, "--cache", folder, "--split", "mini_val"]
    found = run("verify", *where, "--samples", "2").stdout
    assert found.count("centres or offsets of instances wrong in 0 cells") == 2
    assert "instances: squared distances to the centres of vehicles" in run("info", *where[2:]).stdout
    panel = Scene(with_instances, 0, 1).panels()[-1]
    assert panel.title == f"vehicles: {(squared[1] == 0).sum()} centres (dark), offsets of cells from them"
    np.testing.assert_array_equal(panel.colors, instance_colors(squared[1], offset[1]))


def test_instances_are_stored_with_all_labels_that_the_data_set_has(city: Path, tmp_path: Path) -> None:
    kinds, workers = BUILD.index("--label-kinds"), BUILD.index("--workers")
    options = [
        *BUILD[:kinds],
        *BUILD[kinds + 2 : workers],
        "--plan-only",
        "--dataroot",
        str(city),
        "--cache",
        str(tmp_path),
    ]
    assert "labels: vehicles, map (simple-bev)" in run(*options, "--instances").stdout


def test_instances_change_no_other_array(with_instances: CacheReader, city: Path, tmp_path: Path) -> None:
    build(city, tmp_path)
    plain, found = contents(tmp_path, "mini_val"), contents(with_instances.cache.path.parent, "mini_val")
    assert found.keys() - plain.keys() == {VEHICLES.center_array, VEHICLES.offset_array}
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name], values)
    assert (
        len(Scene(with_instances, 0, 0).panels())
        == len(Scene(CacheReader(tmp_path / "mini_val.zarr"), 0, 0).panels()) + 1
    )


def changed(values: Array) -> Array:
    return np.where(np.arange(values.shape[-1]) == 50, 7, values).astype(values.dtype)


@pytest.mark.parametrize("fault", ["distance", "offset"])
def test_verify_finds_wrong_instances(city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def wrong(keyframe, spec, grid_from_ego):
        right = vehicle_instances(keyframe, spec, grid_from_ego)
        if fault == "distance":
            return Instances(changed(right.squared_distance), right.offset)
        return Instances(right.squared_distance, changed(right.offset))

    monkeypatch.setattr("occfeat_targets.targets.instances.vehicle_instances", wrong)
    build(city, tmp_path, "--instances")
    result = run(
        "verify", "--dataroot", city, "--cache", tmp_path, "--split", "mini_val", "--samples", "1", check=False
    )
    assert result.returncode == 1
    numbers = set(re.findall(r"centres or offsets of instances wrong in ([\d,]+) cells", result.stdout))
    (number,) = numbers  # of the progress and of the summary
    assert int(number.replace(",", "")) > 200


def test_instances_without_simple_bevs_vehicle_labels_are_refused() -> None:
    for options in ({}, {"compat": "simple-bev", "labels": ("map",)}, {"compat": "simple-bev", "labels": ()}):
        with pytest.raises(ValueError, match="pass --compat simple-bev, and vehicles among --label-kinds"):
            TargetSpec(instances=True, **options)


def test_instances_change_the_fingerprint_and_the_estimated_size() -> None:
    plain = TargetSpec(compat="simple-bev")
    spec = dataclasses.replace(plain, instances=True)
    assert spec.fingerprint != plain.fingerprint and TargetSpec.from_dict(spec.to_dict()) == spec
    assert 4_000 < spec.bytes_per_keyframe - plain.bytes_per_keyframe < 8_000


def test_direction_of_an_offset_is_a_hue_and_nearness_to_a_centre_is_dark() -> None:
    squared = np.array([[0, 9, 255]], np.uint8)
    offset = np.zeros((2, 1, 3), np.int16)
    colors = instance_colors(squared, offset).astype(int)
    assert colors[0, :, 0].tolist() == sorted(colors[0, :, 0].tolist()) and colors[0, 2].tolist() == [247, 247, 245]
    offset[:, 0] = [[1, 0, -1], [0, 1, 0]]
    right, ahead, left = instance_colors(squared, offset).astype(int)[0]
    assert right.argmax() == 0 and ahead.argmax() == 1 and left.argmin() == 0
