import json
import shutil

import numpy as np
import pytest

from occfeat_targets.cache.geometry import project, transform
from occfeat_targets.cache.spec import CAMERAS, TargetSpec
from occfeat_targets.sources.keyframe import DatasetError, Split
from occfeat_targets.sources.nuscenes import NuScenes, find_dataroot, read_map, read_split
from occfeat_targets.verify.slow_nuscenes import read_keyframes, read_slow_source


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


@pytest.fixture
def changed(city, tmp_path):
    """Function that changes the list of records of a table of a copy; it returns the copy's dataroot."""

    def change(table: str, function):
        shutil.copytree(city, tmp_path, ignore=shutil.ignore_patterns("samples", "sweeps"), dirs_exist_ok=True)
        file = tmp_path / "v1.0-mini" / f"{table}.json"
        records = json.loads(file.read_text())
        function(records)
        file.write_text(json.dumps(records))
        return tmp_path

    return change


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


@pytest.fixture
def without_key(changed):
    """Function that removes a key from every record of a table of a copy; it returns the copy's dataroot."""

    def remove(table: str, key: str):
        return changed(table, lambda records: [record.pop(key, None) for record in records])

    return remove


@pytest.mark.parametrize(
    ("table", "key"),
    [("scene", "first_sample_token"), ("log", "location"), ("sample", "timestamp"), ("sample", "next")],
)
def test_a_key_that_a_split_needs_is_named_with_its_record(without_key, table, key):
    with pytest.raises(DatasetError, match=rf"{table}\.json, token \w+: the record has no key '{key}'; re-extract the"):
        split_of(without_key(table, key))


@pytest.mark.parametrize(
    ("table", "key", "value", "fault"),
    [
        ("sample", "timestamp", None, "timestamp is None: a number of microseconds expected"),
        ("sample", "timestamp", 10**30, f"timestamp is {10**30}: a number of microseconds expected"),
        ("sample", "next", {}, "next is {}: text expected"),
        ("scene", "name", 5, "name is 5: text expected"),
        ("scene", "first_sample_token", [], r"first_sample_token is \[\]: text expected"),
        ("log", "location", None, "location is None: text expected"),
        ("category", "name", None, "name is None: text expected"),
        ("instance", "category_token", [1], r"category_token is \[1\]: text expected"),
        ("sample_data", "calibrated_sensor_token", [1], "unhashable type: 'list', text expected"),
        ("sample", "token", [1], "unhashable type: 'list', text expected"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_record(changed, table, key, value, fault):
    root = changed(table, lambda records: [record.update({key: value}) for record in records])
    with pytest.raises(DatasetError, match=rf"{table}\.json, token .*: {fault}; re-extract the tables"):
        split_of(root)


def test_a_chain_of_samples_that_ends_early_is_refused(changed):
    root = changed("sample", lambda records: [record.update(next="") for record in records])
    with pytest.raises(
        DatasetError, match=r"scene\.json, token .*: its samples end after 1, and not with its last_sample"
    ):
        split_of(root)


def test_two_scenes_of_one_name_are_refused(changed):
    root = changed("scene", lambda records: [record.update(name="scene-0061") for record in records])
    with pytest.raises(DatasetError, match=r"token .*: the name scene-0061 is also that of scene\.json, token "):
        split_of(root)


@pytest.mark.parametrize(("key", "value"), [("filename", 7), ("timestamp", "7"), ("ego_pose_token", 7), ("prev", 7)])
def test_a_value_of_another_type_that_a_keyframe_needs_is_its_problem(changed, key, value):
    root = changed("sample_data", lambda records: [record.update({key: value}) for record in records])
    for keyframe in split_of(root, num_sweeps=2).keyframes:
        assert keyframe.problem.startswith("sample_data.json, token ") and f"{key} is {value!r}: " in keyframe.problem


@pytest.mark.parametrize(
    ("table", "key"), [("sample_data", "filename"), ("sample_data", "prev"), ("sample_annotation", "size")]
)
def test_a_key_that_a_keyframe_needs_is_the_problem_of_the_keyframe(without_key, table, key):
    for keyframe in split_of(without_key(table, key), num_sweeps=2).keyframes:
        assert keyframe.problem.startswith(f"{table}.json, token ")
        assert f"the record has no key {key!r}; re-extract the tables" in keyframe.problem


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("calibrated_sensor", "sensor_token"), ("instance", "category_token"), ("sample", "next"), ("sample_annotation", "sample_token"),
        ("sample_annotation", "instance_token"), ("sample_data", "sample_token"), ("sample_data", "calibrated_sensor_token"),
        ("scene", "log_token"), ("scene", "first_sample_token"),
    ],
)  # fmt: skip
def test_a_token_that_no_record_has_is_one_line_that_names_it(changed, table, key):
    def dangle(records):
        next(record for record in records if record[key])[key] = "f" * 32

    with pytest.raises(DatasetError, match=f"(json, token '?|KeyError: '){'f' * 32}.*re-extract the tables") as raised:
        split_of(changed(table, dangle))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [1, 3])
def test_samples_that_lead_round_in_a_circle_are_an_error_with_a_token(changed, length):
    def circle(records):
        records[length - 1]["next"] = records[0]["token"]

    with pytest.raises(
        DatasetError, match=r"sample.json, token \w+: 'next' leads back to this record; re-extract the tables"
    ):
        split_of(changed("sample", circle))


def test_a_sweep_that_is_its_own_predecessor_is_the_problem_of_keyframes_that_need_it(city, changed):
    lidar = split_of(city).keyframes[2].sweeps[0].path.name

    def circle(records):
        record = next(record for record in records if record["filename"].endswith(lidar))
        record["prev"] = record["token"]

    root = changed("sample_data", circle)
    assert not [k for k in split_of(root).keyframes if k.problem is not None]
    (problem,) = [k.problem for k in split_of(root, num_sweeps=2).keyframes if k.problem is not None]
    assert "'prev' leads back to this record" in problem


def test_an_earlier_sweep_that_is_absent_matters_only_to_keyframes_that_need_it(city, changed):
    lidar = next(k for k in split_of(city, num_sweeps=2).keyframes if len(k.sweeps) == 2).sweeps[0].path.name

    def dangle(records):
        next(record for record in records if record["filename"].endswith(lidar))["prev"] = "f" * 32

    root = changed("sample_data", dangle)
    assert not [k.problem for k in split_of(root).keyframes if k.problem is not None]
    (problem,) = [k.problem for k in split_of(root, num_sweeps=2).keyframes if k.problem is not None]
    assert problem == f"sample_data.json, token {'f' * 32}: no such record; re-extract the tables"


@pytest.mark.parametrize("token", ["f" * 32, "0", "5", "v60-80"])
def test_a_visibility_that_is_none_of_the_four_is_the_problem_of_its_keyframe(changed, token):
    split = split_of(changed("sample_annotation", lambda records: [r.update(visibility_token=token) for r in records]))
    problems = [k.problem for k in split.keyframes if k.problem is not None]
    expected = f"visibility_token is '{token}': 1 to 4 expected; re-extract the tables"
    assert problems and all(p.startswith("sample_annotation.json, token ") and p.endswith(expected) for p in problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", [0, 0, 0]), ("size", [-1, 2, 1]), ("size", None), ("size", [1, 1]), ("size", [1, float("nan"), 1]), ("translation", None),
     ("translation", [0.0, float("nan"), 0.0]), ("rotation", [0, 0, 0, 0])],
)  # fmt: skip
def test_a_box_that_is_none_is_the_problem_of_its_keyframe(changed, key, value):
    split = split_of(changed("sample_annotation", lambda records: [r.update({key: value}) for r in records]))
    problems = [k.problem for k in split.keyframes if k.problem is not None]
    assert problems and all(p.startswith("sample_annotation.json, token ") and f"{key} {value}" in p for p in problems)


def test_a_box_without_visibility_counts_as_visible_in_both_readers(without_key):
    root = without_key("sample_annotation", "visibility_token")
    split = split_of(root)
    slow = read_keyframes(root, "v1.0-mini", [k.token for k in split.keyframes], CAMERAS, 1)
    assert sum(len(k.visibility) for k in split.keyframes) > 0
    for keyframe in split.keyframes:
        assert (keyframe.visibility == 4).all() and (slow[keyframe.token].visibility == 4).all()


def test_a_log_without_a_vehicle_is_not_synthetic(without_key):
    assert not split_of(without_key("log", "vehicle")).is_synthetic


@pytest.mark.parametrize(
    ("table", "content", "found"),
    [
        ("sample_data", b'[\n{"token": "a1", "prev', r"sample_data\.json \(23 bytes\) is no complete JSON file"),
        ("sample_annotation", b"", r"sample_annotation\.json \(0 bytes\) is no complete JSON file"),
        ("sample", b"<html>403</html>", r"sample\.json \(16 bytes\) is no complete JSON file"),
        ("ego_pose", b"[]", r"ego_pose\.json has no records"),
        ("scene", b'{"token": "a1"}', r"scene\.json is no list of records"),
        ("calibrated_sensor", None, r"calibrated_sensor\.json cannot be read \(No such file"),
    ],
)
def test_a_table_that_is_cut_empty_or_missing_is_named(city, tmp_path, table, content, found):
    shutil.copytree(city / "v1.0-mini", tmp_path / "v1.0-mini")
    file = tmp_path / "v1.0-mini" / f"{table}.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"the tables of .* do not load: {found}.*: re-extract the tables"):
        split_of(tmp_path)


def test_tables_and_pictures_that_no_target_needs_may_be_missing_or_half_installed(city, tmp_path):
    """nuScenes-lidarseg without its labels, and basemaps that were not unpacked, stop the devkit."""
    shutil.copytree(city / "v1.0-mini", tmp_path / "v1.0-mini")
    for table in ("attribute", "visibility", "map"):
        (tmp_path / "v1.0-mini" / f"{table}.json").unlink()
    (tmp_path / "v1.0-mini" / "lidarseg.json").write_text('[{"token": "a"}]')
    assert [k.token for k in split_of(tmp_path).keyframes] == [k.token for k in split_of(city).keyframes]
    for table in ("sample_annotation", "instance", "category"):
        (tmp_path / "v1.0-mini" / f"{table}.json").write_text("[]" if table == "sample_annotation" else "cut")
    assert len(split_of(tmp_path, with_boxes=False).keyframes) == 10


def test_the_independent_reader_names_a_table_that_is_cut(city, tmp_path):
    tokens = [k.token for k in split_of(city).keyframes]
    shutil.copytree(city / "v1.0-mini", tmp_path / "v1.0-mini")
    file = tmp_path / "v1.0-mini" / "ego_pose.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"ego_pose\.json is no complete JSON file .*: re-extract the tables"):
        read_slow_source(tmp_path, "v1.0-mini", tokens, TargetSpec())


def test_the_independent_reader_names_a_key_that_the_tables_lack(city, without_key):
    tokens, spec = [k.token for k in split_of(city).keyframes], TargetSpec(num_sweeps=2)
    with pytest.raises(ValueError, match="have no 'prev': pass the --dataroot"):
        read_slow_source(without_key("sample_data", "prev"), "v1.0-mini", tokens, spec)


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
