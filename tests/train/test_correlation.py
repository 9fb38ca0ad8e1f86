"""Correlation maps: which voxels a query is made of, and the cosines to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS, MAP_CLASSES
from occfeat_train.report.correlation import (
    check_class,
    classes_of,
    contrast,
    cosines,
    outline,
    pick_class,
    pick_voxel,
    voxels_of,
)
from occfeat_train.report.voxel_predictions import Seen, VoxelPredictions

GRID = VoxelGrid((3, 4, 4), (-3, -4, -4), (3, 4, 4))  # cells of 2 m
CELLS = [(0, 1, 1), (0, 2, 2), (1, 1, 1), (1, 2, 3), (2, 2, 2)]  # (z, h, w), with features
ROAD, VEHICLES = [(1, 1), (2, 2), (2, 3)], [(2, 2)]


def made(
    features: np.ndarray | None = None,
    cells: list[tuple[int, int, int]] = CELLS,
    road: list[tuple[int, int]] = ROAD,
    vehicles: list[tuple[int, int]] = VEHICLES,
    hidden: list[tuple[int, int]] = [],  # noqa: B006
) -> VoxelPredictions:
    """Predictions with features at `cells`, and masks of labels. The teacher's features are the predicted ones, reversed."""
    voxels = np.array([np.ravel_multi_index(cell, GRID.shape) for cell in cells])
    assert (np.diff(voxels) > 0).all()
    values = np.eye(len(cells), 8) if features is None else features
    maps = {"vehicles": np.zeros((2, 1, 4, 4), np.bool_), "map": np.zeros((2, len(MAP_CLASSES), 4, 4), np.bool_)}
    valid = np.ones((2, 4, 4), np.bool_)
    for h, w in vehicles:
        maps["vehicles"][1, 0, h, w] = True
    for h, w in road:
        maps["map"][1, 0, h, w] = True
    for h, w in hidden:
        valid[1, h, w] = False

    def read_labels(kind: Any, keyframe: int) -> Any:
        assert keyframe == 3
        return maps[kind.name], valid if kind.name == "vehicles" else None

    spec = SimpleNamespace(grid=GRID, labels=("vehicles", "map"))
    identity = SimpleNamespace(scenes=["s"] * 4, tokens=["t"] * 4)
    cache = SimpleNamespace(spec=spec, identity=identity, path=SimpleNamespace(stem="val"))
    reader: Any = SimpleNamespace(cache=cache, read_labels=read_labels, __len__=lambda: 4)
    seen = Seen(voxels, values.astype(np.float32))
    target = Seen(voxels, values[:, ::-1].astype(np.float32))
    return VoxelPredictions(
        reader=type("Reader", (SimpleNamespace,), {"__len__": lambda _: 4})(**vars(reader)),
        keyframe=3, frame=1, grid_from_ego=np.eye(4), true=np.zeros(GRID.shape, np.bool_), guess=None,
        predicted=seen, target=target, imagined=None, results={},
    )  # fmt: skip


def slow_voxels_of(label: str, found: VoxelPredictions) -> list[bool]:
    """The definition, voxel by voxel."""
    road, vehicles = (found.reader.read_labels(LABEL_KINDS[name], 3)[0][1, 0] for name in ("map", "vehicles"))
    valid = found.reader.read_labels(LABEL_KINDS["vehicles"], 3)[1][1]
    cells = [np.unravel_index(voxel, GRID.shape) for voxel in found.predicted.voxels]
    result = []
    for z, h, w in cells:
        is_vehicle = bool(vehicles[h, w] and valid[h, w])
        if label == "vehicles":
            result.append(is_vehicle)
        else:
            is_lowest = not any((y, x) == (h, w) and below < z for below, y, x in cells)
            result.append(bool(road[h, w]) and not is_vehicle and is_lowest)
    return result


def test_objects_are_all_voxels_of_their_cells_and_ground_is_the_lowest_voxel_without_an_object():
    found = made()
    assert voxels_of("vehicles", found).tolist() == [False, True, False, False, True]
    assert voxels_of("road", found).tolist() == [True, False, False, True, False]


def test_cells_that_are_not_valid_belong_to_no_class():
    found = made(hidden=[(2, 2)])
    assert not voxels_of("vehicles", found).any()
    assert voxels_of("road", found).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("seed", range(20))
def test_voxels_of_a_class_equal_the_slow_definition(seed):
    rng = np.random.default_rng(seed)
    cells = sorted({tuple(map(int, cell)) for cell in rng.integers(0, GRID.shape, (12, 3))})
    pairs = [[(h, w) for h in range(4) for w in range(4) if rng.random() < share] for share in (0.6, 0.4, 0.2)]
    found = made(np.ones((len(cells), 2)), cells, *pairs)  # type: ignore[arg-type]
    for label in ("vehicles", "road"):
        assert voxels_of(label, found).tolist() == slow_voxels_of(label, found)


def test_cosines_ignore_lengths_and_a_feature_without_direction_has_cosine_zero():
    features = np.array([[2.0, 0], [0, 3], [-1, 0], [1, 1], [0, 0]])
    assert cosines(features, np.array([5.0, 0])) == pytest.approx([1, 0, -1, np.sqrt(0.5), 0])


def test_a_query_is_the_mean_of_unit_features_of_predictions_and_of_targets():
    features = np.zeros((5, 4))
    features[1], features[4] = (9, 0, 0, 0), (0, 2, 0, 0)  # the voxels of vehicles
    query = pick_class("vehicles", [made(features)])
    assert query.predicted == pytest.approx([0.5, 0.5, 0, 0])
    assert query.target == pytest.approx([0, 0, 0.5, 0.5])
    assert query.origin == "2 voxels of vehicles in s (val)"
    assert (query.name, query.label) == ("vehicles", "vehicles")


def test_a_class_is_taken_from_the_first_keyframe_that_has_it():
    without, features = made(vehicles=[]), np.full((5, 2), (3.0, 0))
    assert pick_class("vehicles", [without, made(features), without]).predicted == pytest.approx([1, 0])
    with pytest.raises(
        ValueError, match="--of vehicles: no voxel of that class in s, sample t, val 3 of 4: choose other --keyframes"
    ):
        pick_class("vehicles", [without])


def test_a_point_picks_the_voxel_with_a_feature_whose_centre_is_nearest():
    query = pick_voxel((-1.2, -1.3, 0.9), made())  # (1, 1, 1) is centred at -1, -1, 0; (0, 1, 1) at -1, -1, -2
    assert query.predicted.tolist() == np.eye(5, 8)[2].tolist()
    assert query.target.tolist() == np.eye(5, 8)[2, ::-1].tolist()
    assert query.name == "voxel -1,-1,0" and not query.label
    assert "the voxel at -1,-1,0 m (right, forward, up) in s (val)" in query.origin


def test_the_picked_cell_and_its_neighbours_are_outlined_in_the_keyframe_it_was_picked_in():
    found = made()
    query = pick_voxel((3, 1, 0), found)  # cell (2, 3), at the right border
    cells = outline(query, found)
    assert cells is not None
    assert sorted(zip(*map(np.ndarray.tolist, np.nonzero(cells)), strict=True)) == [
        (h, w) for h in (1, 2, 3) for w in (2, 3)
    ]
    assert outline(query, replace(found, keyframe=2)) is None
    vehicles = outline(pick_class("vehicles", [found]), found)
    assert vehicles is not None and np.argwhere(vehicles).tolist() == [[2, 2]]


def test_points_outside_of_the_grid_or_far_from_a_return_are_refused_with_what_is_there():
    with pytest.raises(
        ValueError, match=r"--voxel 0,9,0 is outside of the grid: .* within -4 to 4, -4 to 4, -3 to 3 m"
    ):
        pick_voxel((0, 9, 0), made())
    with pytest.raises(ValueError, match="outside"):
        pick_voxel((0, 4, 0), made())  # a cell does not cover its upper bound
    with pytest.raises(ValueError, match="no voxel with a LiDAR return within 2 m .* the nearest is --voxel -1,-1,-2"):
        pick_voxel((-3.9, -3.9, -2.9), made())


def test_contrast_compares_a_class_with_all_other_voxels():
    features = np.array([[0, 1], [1, 0], [0, 1], [1, 1], [1, 0]], np.float64)
    found = made(features)
    query = pick_class("vehicles", [found])
    inside, outside = contrast("vehicles", found, query) or (0, 0)
    assert inside == pytest.approx(1)
    assert outside == pytest.approx(np.sqrt(0.5) / 3)
    assert contrast("vehicles", made(vehicles=[]), query) is None
    everywhere = [(h, w) for h in range(4) for w in range(4)]
    assert contrast("vehicles", made(vehicles=everywhere), query) is None


def test_classes_that_a_cache_does_not_have_are_refused_with_those_it_has():
    spec: Any = SimpleNamespace(labels=("vehicles", "map"))
    assert list(classes_of(spec)) == ["vehicles", *MAP_CLASSES]
    check_class("road", spec)
    with pytest.raises(ValueError, match="--of vehicle: the cache has no such class: did you mean vehicles?"):
        check_class("vehicle", spec)
    with pytest.raises(ValueError, match="it has vehicles, road, sidewalk"):
        check_class("moon", spec)
    with pytest.raises(ValueError, match="it has no labels; --voxel needs no labels"):
        check_class("road", SimpleNamespace(labels=()))  # type: ignore[arg-type]


def test_merits_say_what_one_fixed_vector_reaches():
    features = np.array([[1, 0], [0, 1.0]] * 2 + [[1, 1]])
    found = replace(made(features), results={"occupancy_iou": 12.34, "cosine": 0.5})
    fixed = np.linalg.norm([2 + np.sqrt(0.5)] * 2) / 5
    assert found.merits == f"mean cosine 0.500 (the best fixed vector: {fixed:.3f})"
    assert replace(found, guess=found.true).merits.startswith("occupancy IoU 12.3 %, mean cosine")
