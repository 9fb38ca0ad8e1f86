"""pipelines/real_keyframes: priors, edges and wrong transforms, and the whole study in miniature."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occfeat_targets.cache.geometry import inverse_rigid, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.sources.splits import split_scenes
from pipelines.real_keyframes.__main__ import study
from pipelines.real_keyframes.edges import REACH, borders, edge_alignment, edge_ranks
from pipelines.real_keyframes.fitting import Settings
from pipelines.real_keyframes.priors import features_by_place, iou, mean_cosine, occupancy_by_place, places
from pipelines.real_keyframes.tables import report
from pipelines.real_keyframes.transforms import CHANGES, Rig
from tests.conftest import REPOSITORY

GRID = VoxelGrid((2, 8, 6), (-1, -16, -12), (1, 16, 12))  # cells of 1 m up, 4 m along and across


def test_a_place_is_a_level_and_a_ring_of_five_metres():
    place = places(GRID)
    centers = GRID.voxel_centers().reshape(-1, 3)
    for one, other in np.random.default_rng(0).integers(0, GRID.num_voxels, (200, 2)):
        same_level = centers[one, 2] == centers[other, 2]
        same_ring = np.hypot(*centers[one, :2]) // 5 == np.hypot(*centers[other, :2]) // 5
        assert (place[one] == place[other]) == (same_level and same_ring)


@pytest.mark.parametrize("seed", range(5))
def test_occupancy_by_place_is_the_best_of_all_thresholds_on_the_rate_of_a_place(seed):
    rng = np.random.default_rng(seed)
    likely = rng.random(places(GRID).max() + 1)[places(GRID)].reshape(GRID.shape)
    volumes = [rng.random(GRID.shape) < likely for _ in range(3)]
    place = places(GRID).reshape(GRID.shape)
    rate = np.zeros(GRID.shape)
    for number in np.unique(place):
        rate[place == number] = np.mean([volume[place == number] for volume in volumes])
    best = max(iou([rate >= threshold] * 3, volumes) for threshold in np.unique(rate))
    chosen = occupancy_by_place(volumes, GRID)
    assert iou([chosen] * 3, volumes) == pytest.approx(best)


def test_features_by_place_are_means_of_the_same_place_or_of_all():
    place = places(GRID)
    voxels = np.flatnonzero(place == place[0])[:3]
    features = np.array([[1.0, 0], [3, 0], [0, 5]])
    elsewhere = np.flatnonzero(place != place[0])[:1]
    found = features_by_place(voxels, features, np.array([voxels[1], *elsewhere]), GRID)
    assert found == pytest.approx(np.array([[4 / 3, 5 / 3]] * 2))
    apart = np.array([voxels[0], elsewhere[0]])
    assert features_by_place(apart, features[:2], apart, GRID) == pytest.approx(features[:2])


def test_iou_counts_all_keyframes_together_and_a_cosine_ignores_lengths():
    a, b = np.array([[[True, True, False]]]), np.array([[[True, False, False]]])
    assert iou([a, b], [b, b]) == pytest.approx(100 * 2 / 3)
    assert iou([a & False], [a & False]) == 0
    assert mean_cosine(np.array([2.0, 0]), np.array([[1.0, 0], [0, 1]])) == pytest.approx(0.5)


def step_image(column: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[:, column:] = 200
    return image


def test_edge_ranks_are_largest_at_the_edge():
    ranks = edge_ranks(step_image(30))
    assert sorted(ranks.reshape(-1)) == pytest.approx(np.arange(2400) / 2400)
    assert ranks[20, 29:31].min() > 0.9 > ranks[20, 40]


def test_borders_are_near_returns_with_a_far_neighbour_and_no_nearer_one():
    rng = np.random.default_rng(3)
    pixels, depth = rng.uniform(0, (60, 40), (300, 2)), rng.choice([5.0, 5.2, 9, 30], 300)
    column, row = pixels.astype(int).T
    expected = []
    for x, y, d in zip(column, row, depth, strict=True):
        around = depth[(abs(column - x) <= REACH) & (abs(row - y) <= REACH)]
        expected.append(around.max() > 1.2 * d + 0.5 and around.min() >= d / 1.2 - 0.5)
    assert borders(pixels, depth, (40, 60)).tolist() == expected
    assert 10 < sum(expected) < 290


def test_a_keyframe_whose_borders_are_edges_is_aligned_and_a_turned_camera_is_not():
    """A wall at 5 m covers the left half of the view, a wall at 20 m the right half, as the image shows them."""
    cam_from_ego = inverse_rigid(rigid((0.5, -0.5, 0.5, -0.5), (0, 0, 0)))  # looks along x; y to the left
    intrinsics = np.array([[[60.0, 0, 30], [0, 60, 20], [0, 0, 1]]])
    u, v = np.meshgrid(np.arange(0.5, 60, 1), np.arange(0.5, 40, 3))
    depth = np.where(u < 30, 5.0, 20.0)
    returns = np.stack([depth, -(u - 30) / 60 * depth, -(v - 20) / 60 * depth], axis=-1).reshape(-1, 3)
    image = step_image(30)[None]
    aligned = edge_alignment(image, intrinsics, cam_from_ego[None], returns)
    half = np.deg2rad(10) / 2
    turn = rigid((np.cos(half), 0, 0, np.sin(half)), (0, 0, 0))
    turned = edge_alignment(image, intrinsics, (cam_from_ego @ turn)[None], returns)
    assert aligned > 0.2 and turned < aligned - 0.15
    assert np.isnan(edge_alignment(image, intrinsics, cam_from_ego[None], -returns))


def test_every_change_of_the_transforms_is_what_its_name_says():
    ego_from_cam = np.stack([rigid((0.5, -0.5, 0.5, -0.5), (1, y, 2)) for y in (0, 0.5, -0.5)])
    built = inverse_rigid(ego_from_cam) @ rigid((1, 0, 0, 0), (0.3, 0, 0))  # 0.3 m of motion
    rig = Rig(built, ego_from_cam, np.arange(3))
    changed = {name: change(rig) for name, change in CHANGES.items()}
    point = np.array([10.0, 2, 1, 1])  # forward, left, up
    before = built @ point
    assert (changed["as built"].cam_from_ego == built).all()
    without = changed["the ego's motion between LiDAR and camera ignored"].cam_from_ego @ point
    assert without[:, 2] == pytest.approx(before[:, 2] - 0.3)  # along the optical axis
    assert changed["image of another camera (the next in the list)"].order.tolist() == [1, 2, 0]
    mirrored = changed["grid mirrored left and right"].cam_from_ego @ point
    assert mirrored == pytest.approx(built @ [10, -2, 1, 1])
    left, right = (
        changed[f"cameras turned to the {side} by 0.5 degrees"].cam_from_ego @ [10, 0, 0, 1]
        for side in ("left", "right")
    )
    shift = 10 * np.sin(np.deg2rad(0.5))
    straight = built @ [10, 0, 0, 1]
    assert left[:, 0] - straight[:, 0] == pytest.approx(np.full(3, shift))  # things move to the right in the image
    assert right[:, 0] - straight[:, 0] == pytest.approx(np.full(3, -shift))
    pitched = changed["rig pitched by 3 degrees"].cam_from_ego @ [10, 0, 0, 1] - straight
    assert abs(pitched[:, 1]) == pytest.approx(np.full(3, 10 * np.sin(np.deg2rad(3)))) and pitched[
        :, 0
    ] == pytest.approx(np.zeros(3))
    for name, each in changed.items():
        assert name == "as built" or (each.cam_from_ego != built).any() or (each.order != rig.order).any()


def test_the_report_says_whether_the_network_fits_and_that_two_keyframes_prove_no_iou():
    row = dict.fromkeys(
        ("shift", "train_edges", "val_edges", "agreement", "train_iou", "train_cosine", "val_iou", "val_cosine"), 0.5
    )
    results: dict[str, Any] = {
        "teacher": "t", "occupancy": {"the network": (90.0, 5.0)}, "features": {"the network": (0.97, 0.8, 0.7, 0.1)},
        "transforms": {"as built": row},
    }  # fmt: skip
    settings = Settings(Path(), "t", Path())
    assert "The network fits scene-0061" in report(settings, results)
    assert "Two keyframes say nothing about the IoU" in report(settings, results)
    results["features"]["the network"] = (0.94, 0.8, 0.7, 0.1)
    assert "The network DOES NOT FIT scene-0061" in report(settings, results)


def test_the_study_runs_in_miniature_and_continues(city, tiny_teacher, tmp_path):
    train, val = (split_scenes()[split][0] for split in ("mini_train", "mini_val"))
    settings = Settings(
        city, tiny_teacher, tmp_path, train=("mini_train", train), val=("mini_val", val), version="v1.0-mini", steps=3,
        build={
            "grid": VoxelGrid((4, 16, 20), (-4, -16, -20), (4, 16, 20)), "image_size": (48, 80), "feature_size": (56, 98),
            "log": None, "progress": False,
        },
        overrides=("network.image_size=32x48", "network.channels=8"),
    )  # fmt: skip
    results = study(settings)
    assert json.loads((tmp_path / "results.json").read_text()).keys() == results.keys()
    assert "DOES NOT FIT" in (tmp_path / "results.md").read_text()
    assert set(results["transforms"]) == set(CHANGES)
    assert results["occupancy"]["the network"][0] == pytest.approx(
        results["transforms"]["as built"]["train_iou"], abs=100
    )
    assert results["features"]["the mean of the training targets"][2] == pytest.approx(0, abs=1e-6)
    assert len(list((tmp_path / "figures").glob("*features.png"))) == 2
    before = (tmp_path / "run" / "log.jsonl").read_text()
    shutil.rmtree(tmp_path / "figures")
    again = study(settings)
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    assert again == results and (tmp_path / "figures" / "index.html").is_file()


@pytest.fixture(scope="module")
def real_pair() -> Path:
    path = REPOSITORY.parent / "shared" / "nuscenes-real-pair"
    if not path.is_dir():
        pytest.skip(f"no real nuScenes keyframes at {path}")
    return path


def test_borders_in_real_lidar_are_edges_of_the_images_only_as_built(real_pair, tmp_path):
    """On both real keyframes, whatever the network: every wrong transform worsens the alignment."""
    import occfeat_targets
    from occfeat_targets.build.planned import open_plan
    from occfeat_targets.cache.reader import CacheReader
    from occfeat_targets.pictures.page import read_returns

    for split, moves in (("train", True), ("val", False)):
        path = occfeat_targets.build_cache(
            real_pair, tmp_path, split, teacher=None, label_kinds=(), workers=0, log=None, progress=False,
            scenes=[{"train": "scene-0061", "val": "scene-0003"}[split]],
        )  # fmt: skip
        reader = CacheReader(path)
        plan = open_plan(reader.cache, real_pair)
        assert plan is not None
        cameras = plan.find(reader.cache, [0])[0].cameras
        built = reader.read("cam_from_ego", 0).astype(np.float64)
        rig = Rig(built, np.stack([camera.ego_from_cam for camera in cameras]), np.arange(6))
        returns = read_returns(reader.cache, [0], None)[0]
        found = {}
        for name, change in CHANGES.items():
            changed = change(rig)
            images, intrinsics = (
                reader.read("images", 0)[changed.order],
                reader.read("intrinsics", 0).astype(np.float64),
            )
            found[name] = edge_alignment(images, intrinsics, changed.cam_from_ego, returns)
        motion = found.pop("the ego's motion between LiDAR and camera ignored")
        aligned = found.pop("as built")
        assert aligned > 0.15 and aligned > max(found.values()) + 0.005, (split, aligned, found)
        assert motion < aligned - 0.005 if moves else motion == pytest.approx(aligned, abs=0.02)
