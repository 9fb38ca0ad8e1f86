import json
import shutil

import numpy as np
import pytest

from occfeat_targets.cache.geometry import project, transform
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources.keyframe import DatasetError, Split
from occfeat_targets.sources.nuscenes import NuScenes, find_dataroot, read_map, read_split
from occfeat_targets.verify.slow_nuscenes import read_keyframes


def split_of(root, split="mini_train", num_sweeps=1, version=None, with_boxes=True):
    return read_split(root, split, version=version, cameras=CAMERAS, num_sweeps=num_sweeps, with_boxes=with_boxes)


@pytest.fixture(scope="module")
def devkit(real_sample):
    nuscenes = pytest.importorskip("nuscenes.nuscenes", reason="nuscenes-devkit is not installed")
    return nuscenes.NuScenes("v1.0-mini", str(real_sample), verbose=False)


def test_the_real_keyframe_is_found_and_missing_scenes_are_counted(real_sample):
    split = split_of(real_sample)
    assert [k.token for k in split.keyframes] == ["ca9a282c9e77460f8360f564131a8af5"]
    assert len(split.missing_scenes) == 7
    assert split.has_annotations
    assert not split.is_synthetic
    assert split_of(real_sample, "train", version="v1.0-mini").keyframes[0].scene == "scene-0061"


def test_transforms_agree_with_plain_tables_and_pyquaternion(real_sample, city):
    for root, sweeps in ((real_sample, 1), (city, 3)):
        split = split_of(root, num_sweeps=sweeps)
        slow = read_keyframes(root, "v1.0-mini", [k.token for k in split.keyframes], CAMERAS, sweeps)
        for keyframe in split.keyframes:
            other = slow[keyframe.token]
            for view, reference in zip(keyframe.cameras, other.cameras, strict=True):
                np.testing.assert_allclose(view.cam_from_ego, reference.cam_from_ego, atol=1e-6)
                np.testing.assert_allclose(view.ego_from_cam, reference.ego_from_cam, atol=1e-6)
                np.testing.assert_array_equal(view.intrinsics, reference.intrinsics)
                assert (view.path, view.source_size) == (reference.path, reference.source_size)
            for sweep, reference in zip(keyframe.sweeps, other.sweeps, strict=True):
                assert sweep.path == reference.path
                np.testing.assert_allclose(sweep.ego_from_sensor, reference.ego_from_sensor, atol=1e-6)
            np.testing.assert_allclose(keyframe.vehicle_corners, other.vehicle_corners, atol=1e-6)
            np.testing.assert_array_equal(keyframe.visibility, other.visibility)


@pytest.mark.parametrize("camera", range(6))
def test_the_devkits_projection_agrees_within_a_twentieth_of_a_pixel(real_sample, devkit, camera):
    keyframe = split_of(real_sample).keyframes[0]
    sample = devkit.get("sample", keyframe.token)
    lidar, image = sample["data"]["LIDAR_TOP"], sample["data"][CAMERAS[camera]]
    expected, _, picture = devkit.explorer.map_pointcloud_to_image(lidar, image, min_dist=1.0)
    picture.close()
    points = np.fromfile(keyframe.sweeps[0].path, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    view = keyframe.cameras[camera]
    pixels, depth, is_valid = project(
        view.intrinsics, transform(view.cam_from_ego @ keyframe.sweeps[0].ego_from_sensor, points), view.source_size
    )
    # the devkit excludes a margin of one pixel and points nearer than one metre
    keep = is_valid & (depth > 1.0) & (pixels > 1).all(1) & (pixels < np.array([1599, 899])).all(1)
    assert expected.shape[1] > 1000
    assert keep.sum() == expected.shape[1]
    assert np.abs(pixels[keep] - expected[:2].T).max() < 0.05  # the devkit rotates in float32


def test_vehicle_corners_equal_the_devkits(real_sample, devkit):
    keyframe = split_of(real_sample).keyframes[0]
    sample = devkit.get("sample", keyframe.token)
    boxes = [devkit.get_box(token) for token in sample["anns"]]
    expected = np.array([box.corners().T for box in boxes if "vehicle" in box.name])
    np.testing.assert_allclose(transform(keyframe.global_from_ego, keyframe.vehicle_corners), expected, atol=1e-6)


def test_keyframes_are_sorted_by_the_splits_scenes_and_then_by_time(city):
    split = split_of(city)
    scenes = [k.scene for k in split.keyframes]
    assert scenes == sorted(scenes)
    assert [k.timestamp_us for k in split.keyframes] == sorted(k.timestamp_us for k in split.keyframes)
    assert len(split_of(city, "mini_val").keyframes) == 5
    assert split.is_synthetic


def test_the_order_of_the_scenes_table_is_kept_beside_the_splits(changed, city):
    root = changed("scene", lambda records: records.reverse())
    table = [record["name"] for record in json.loads((root / "v1.0-mini" / "scene.json").read_text())]
    split, usual = split_of(root), split_of(city)
    assert [k.token for k in split.keyframes] == [k.token for k in usual.keyframes]
    there = {keyframe.scene for keyframe in split.keyframes}
    assert list(split.table_order) == [name for name in table if name in there] == list(usual.table_order)[::-1]
    assert len(there) == 2


def test_a_scenes_first_keyframe_has_only_its_own_sweep(city):
    counts = [len(k.sweeps) for k in split_of(city, num_sweeps=4).keyframes]
    assert counts[0] == 1
    assert counts[2] == 4


def test_boxes_are_not_read_for_a_build_without_vehicle_labels(city):
    assert all(len(k.vehicle_corners) == 0 for k in split_of(city, with_boxes=False).keyframes)


@pytest.mark.parametrize(("inner", "version"), [("", None), ("mini", None), ("mini", "mini"), ("", "v1.0-mini")])
def test_both_directory_layouts_are_found(city, tmp_path, inner, version):
    root = city
    if inner:
        root = tmp_path / "root"
        root.mkdir()
        (root / inner).symlink_to(city)
    assert find_dataroot(root, "mini_train", version) == (root / inner if inner else root, "v1.0-mini")


def test_a_missing_split_scene_or_table_is_named(city, tmp_path):
    with pytest.raises(DatasetError, match="no split 'trian'"):
        split_of(city, "trian")
    with pytest.raises(DatasetError, match="has none of the 150 scenes of split 'test'"):
        split_of(city, "test", version="v1.0-mini")
    copy = tmp_path / "copy"
    shutil.copytree(city / "v1.0-mini", copy / "v1.0-mini")
    (copy / "v1.0-mini" / "log.json").unlink()
    with pytest.raises(DatasetError, match=r"do not load: .*log\.json"):
        split_of(copy)


def test_a_split_of_the_data_sets_own_splits_json_is_found(changed):
    def rename(records):
        for number, record in enumerate(records):
            record["name"] = f"town-{number}"

    root = changed("scene", rename)
    file = root / "v1.0-mini" / "splits.json"
    file.write_text('{"mine": ["town-1", "town-0", "town-1", "town-9"], "mini_train": ["town-0"]}')
    found = split_of(root, "mine")
    assert list(dict.fromkeys(k.scene for k in found.keyframes)) == ["town-1", "town-0"]
    assert found.missing_scenes == ("town-9",)
    with pytest.raises(
        DatasetError, match="has none of the 8 scenes of split 'mini_train' .*or list a split of your own in"
    ):
        split_of(root)  # an official name keeps its meaning
    for text in ("[]", '{"mine": "town-1"}', '{"mine"'):
        file.write_text(text)
        with pytest.raises(DatasetError, match=r"splits.json.*: restore or delete it"):
            split_of(root, "mine")


def test_the_only_missing_map_expansion_of_four_is_named(tmp_path):
    towns = ("boston-seaport", "singapore-hollandvillage", "singapore-onenorth", "singapore-queenstown")
    folder = tmp_path / "maps" / "expansion"
    folder.mkdir(parents=True)
    for town in towns[:3]:
        (folder / f"{town}.json").touch()
    split = Split("train", "v1.0-trainval", tmp_path, (), (), towns, has_annotations=True, is_synthetic=False)
    assert NuScenes().why_no_maps(split) == (
        f"no map expansion {folder / 'singapore-queenstown.json'} (map labels need all 4, and the others are there): "
        f"unpack nuScenes-map-expansion-v1.3.zip into {tmp_path / 'maps'}"
    )
    (folder / "singapore-queenstown.json").touch()
    assert NuScenes().why_no_maps(split) is None


def test_a_missing_or_outdated_map_is_named(city, tmp_path):
    with pytest.raises(DatasetError, match=r"nuScenes-map-expansion-v1\.3\.zip"):
        read_map(tmp_path, "singapore-onenorth", "road")
    location = split_of(city).locations[0]
    copy = tmp_path / "maps" / "expansion"
    shutil.copytree(city / "maps" / "expansion", copy)
    tables = json.loads((copy / f"{location}.json").read_text())
    (copy / f"{location}.json").write_text(json.dumps({**tables, "version": "1.2"}))
    with pytest.raises(DatasetError, match="outdated map version"):
        read_map(tmp_path, location, "road")
