"""The synthetic city as a data set, read with the unmodified devkit."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.geometry import rotation_matrix
from occfeat_targets.sources.splits import split_scenes
from occfeat_targets.synth import write_city
from occfeat_targets.synth.filming import Film
from occfeat_targets.synth.rig import NUM_COLUMNS, NUM_RINGS, RING_ELEVATIONS
from occfeat_targets.synth.scene_names import choose_names

SMALL = {"image_size": (48, 80), "sweeps_per_keyframe": 2, "progress": False}


@pytest.fixture(scope="module")
def devkit(city):
    nuscenes = pytest.importorskip("nuscenes.nuscenes", reason="nuscenes-devkit is not installed")
    return nuscenes.NuScenes("v1.0-mini", str(city), verbose=False)


def records(devkit, channel):
    return [r for r in devkit.sample_data if r["channel"] == channel]


def read_sweep(devkit, record):
    points = np.fromfile(Path(devkit.dataroot) / record["filename"], np.float32).reshape(-1, 5)
    is_return = (points[:, :3] != 0).any(1)
    return points, is_return


def yaw_of(record):
    r = rotation_matrix(record["rotation"])
    return np.arctan2(r[1, 0], r[0, 0])


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return [(str(p.relative_to(root)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_splits_equal_the_devkits():
    splits = pytest.importorskip("nuscenes.utils.splits", reason="nuscenes-devkit is not installed")
    assert split_scenes() == splits.create_splits_scenes()


def test_the_version_is_trainval_if_mini_has_too_few_scenes():
    assert choose_names(None, 8, 2)[0] == "v1.0-mini"
    assert choose_names(None, 9, 0)[0] == "v1.0-trainval"
    assert choose_names(None, 1, 3)[0] == "v1.0-trainval"
    with pytest.raises(ValueError, match="8 training and 2 validation"):
        choose_names("v1.0-mini", 9, 0)
    with pytest.raises(ValueError, match="none of v1.0-mini, v1.0-trainval"):
        choose_names("v1.0", 1, 0)


def test_training_and_validation_scenes_have_different_locations(devkit):
    where = {s["name"]: devkit.get("log", s["log_token"])["location"] for s in devkit.scene}
    train, val = split_scenes()["mini_train"], split_scenes()["mini_val"]
    assert {where[n] for n in where if n in train} == {"singapore-onenorth"}
    assert {where[n] for n in where if n in val} == {"singapore-hollandvillage"}


def test_the_data_says_that_it_is_synthetic(devkit, city):
    assert {log["vehicle"] for log in devkit.log} == {"occfeat-synthetic-city"}
    assert all(s["description"].startswith("synthetic city") for s in devkit.scene)
    assert (city / "README.txt").read_text().startswith("This is a synthetic city")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    for name, seed, workers in (("a", 5, 1), ("b", 5, 3), ("c", 6, 2)):
        write_city(tmp_path / name, scenes=1, keyframes=2, seed=seed, workers=workers, **SMALL)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    assert [path for path, _ in a] != [path for path, _ in c] or a != c
    assert not {d for p, d in a if p.endswith(("jpg", "bin"))} & {d for p, d in c if p.endswith(("jpg", "bin"))}


def test_a_folder_with_files_is_refused_and_an_empty_one_accepted(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        write_city(tmp_path, scenes=1, keyframes=1, **SMALL)
    (tmp_path / "empty").mkdir()
    write_city(tmp_path / "empty", scenes=1, keyframes=1, **SMALL)
    assert (tmp_path / "empty" / "v1.0-mini" / "sample.json").exists()


def test_a_city_that_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(Film, "_annotate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_city(tmp_path / "city", scenes=1, keyframes=1, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scenes": 0}, "at least one scene"),
        ({"keyframes": 0}, "keyframes is 0"),
        ({"sweeps_per_keyframe": 11}, "must be 1..10"),
        ({"image_size": (8, 80)}, "at least 16"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_city(tmp_path / "city", **{**SMALL, **arguments})


def test_camera_timestamps_follow_the_lidars_rotation(devkit):
    order = [
        "CAM_FRONT_LEFT",
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_RIGHT",
        "CAM_BACK",
        "CAM_BACK_LEFT",
        "LIDAR_TOP",
    ]
    for sample in devkit.sample:
        stamps = [devkit.get("sample_data", sample["data"][channel])["timestamp"] for channel in order]
        assert stamps == sorted(stamps)
        assert len(set(stamps)) == 7
        assert stamps[-1] == sample["timestamp"]
        assert stamps[-1] - stamps[0] < 50_000


def test_every_record_has_the_ego_pose_of_its_timestamp(devkit):
    for record in devkit.sample_data:
        assert devkit.get("ego_pose", record["ego_pose_token"])["timestamp"] == record["timestamp"]
    poses = np.array([devkit.get("ego_pose", r["ego_pose_token"])["translation"] for r in records(devkit, "CAM_FRONT")])
    assert np.linalg.norm(np.diff(poses, axis=0), axis=1).max() > 1.0
    assert (poses[:, :2] > 0).all()


def test_lidar_records_chain_through_key_and_other_sweeps_at_20_hz(devkit):
    for scene in devkit.scene:
        first = devkit.get("sample", scene["first_sample_token"])["data"]["LIDAR_TOP"]
        chain = [devkit.get("sample_data", first)]
        while chain[-1]["next"]:
            chain.append(devkit.get("sample_data", chain[-1]["next"]))
            assert chain[-1]["prev"] == chain[-2]["token"]
        assert [r["is_key_frame"] for r in chain] == [True] + [False, False, True] * 4
        gaps = {b["timestamp"] - a["timestamp"] for a, b in itertools.pairwise(chain)}
        assert gaps == {50_000, 400_000}
        for record in chain:
            folder = "samples" if record["is_key_frame"] else "sweeps"
            assert record["filename"].startswith(f"{folder}/LIDAR_TOP/")
            assert devkit.get("sample", record["sample_token"])["timestamp"] >= record["timestamp"]


def test_the_ego_turns_in_one_scene_and_not_in_another(devkit):
    turned = []
    for scene in devkit.scene:
        samples = [s for s in devkit.sample if s["scene_token"] == scene["token"]]
        yaw = [
            yaw_of(devkit.get("ego_pose", devkit.get("sample_data", s["data"]["LIDAR_TOP"])["ego_pose_token"]))
            for s in samples
        ]
        turned.append(abs(np.degrees(np.unwrap(yaw)[-1] - yaw[0])))
    assert max(turned) > 30
    assert min(turned) < 20


def test_a_sweep_has_nuscenes_layout(devkit):
    for record in records(devkit, "LIDAR_TOP"):
        points, is_return = read_sweep(devkit, record)
        assert points.shape == (NUM_COLUMNS * NUM_RINGS, 5)
        np.testing.assert_array_equal(points[:, 4], np.arange(len(points)) % NUM_RINGS)
        assert 0.6 < is_return.mean() < 0.99
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 255
        assert (points[:, 3] % 1 == 0).all()
        x, y, z = points[is_return, :3].T
        elevation = np.degrees(np.arctan2(z, np.hypot(x, y)))
        ring = points[is_return, 4].astype(int)
        np.testing.assert_allclose(elevation, np.degrees(RING_ELEVATIONS)[ring], atol=1e-3)
        # Clockwise from the left side: a column's azimuth falls by a constant step.
        column = np.arange(len(points))[is_return] // NUM_RINGS
        turn = (180 - np.degrees(np.arctan2(y, x)) - column * 360 / NUM_COLUMNS) % 360
        assert np.minimum(turn, 360 - turn).max() < 1e-3


def test_the_lidar_sees_its_own_car_and_nothing_inside_it(devkit):
    points, is_return = read_sweep(devkit, records(devkit, "LIDAR_TOP")[0])
    near = is_return & (np.abs(points[:, :2]) < 2.2).all(1)
    assert 2000 < near.sum() < 8000
    assert np.linalg.norm(points[near, :3], axis=1).min() > 0.15


def test_lidar_point_counts_are_those_inside_the_boxes(devkit):
    from nuscenes.utils.geometry_utils import points_in_box

    off = []
    for sample in devkit.sample:
        record = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        points, is_return = read_sweep(devkit, record)
        _, boxes, _ = devkit.get_sample_data(record["token"])
        for box in boxes:
            claimed = devkit.get("sample_annotation", box.token)["num_lidar_pts"]
            counted = points_in_box(box, points[is_return, :3].T).sum()
            assert claimed >= 1
            off.append(abs(claimed - counted) > max(2, 0.06 * claimed))
    assert len(off) > 300
    assert np.mean(off) < 0.01


def test_moving_boxes_move_along_their_heading_and_parked_ones_stay(devkit):
    speeds = {"vehicle.moving": [], "vehicle.parked": []}
    for annotation in devkit.sample_annotation:
        attributes = [devkit.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        velocity = devkit.box_velocity(annotation["token"])[:2]
        if not attributes or attributes[0] not in speeds or np.isnan(velocity).any():
            continue
        speed = np.linalg.norm(velocity)
        speeds[attributes[0]].append(speed)
        if speed > 2:
            yaw = yaw_of(annotation)
            assert velocity @ [np.cos(yaw), np.sin(yaw)] > 0.85 * speed
    assert np.max(speeds["vehicle.parked"]) == 0
    assert len(speeds["vehicle.moving"]) > 10
    assert np.median(speeds["vehicle.moving"]) > 3
    assert np.max(speeds["vehicle.moving"]) < 12.1


def test_annotations_have_realistic_categories_sizes_and_visibilities(devkit):
    names = {a["category_name"] for a in devkit.sample_annotation}
    assert {"vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.bicycle", "human.pedestrian.adult"} <= names
    assert {a["visibility_token"] for a in devkit.sample_annotation} == {"1", "2", "3", "4"}
    for annotation in devkit.sample_annotation:
        width, length, height = annotation["size"]
        if annotation["category_name"] == "vehicle.car":
            assert 1.6 < width < 2.1 < length < 5.1
            assert 1.3 < height < 2.0
            assert annotation["translation"][2] < 1.2


def test_instances_chain_their_annotations(devkit):
    for instance in devkit.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            last, count = token, count + 1
            token = devkit.get("sample_annotation", token)["next"]
        assert last == instance["last_annotation_token"]
        assert count == instance["nbr_annotations"]


def test_images_have_the_requested_size_and_are_not_uniform(devkit, city):
    from PIL import Image

    for sample in devkit.sample[:2]:
        for channel, token in sample["data"].items():
            if channel != "LIDAR_TOP":
                record = devkit.get("sample_data", token)
                image = np.asarray(Image.open(city / record["filename"]))
                assert image.shape == (192, 320, 3)
                assert (record["height"], record["width"]) == (192, 320)
                assert image.std() > 15
