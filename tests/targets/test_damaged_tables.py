"""nuScenes tables with absent, damaged or meaningless records: what is named, and what only costs a keyframe or camera."""

import shutil

import pytest

from occfeat_targets.cache.spec import CAMERAS, TargetSpec
from occfeat_targets.sources.keyframe import DatasetError
from occfeat_targets.verify.slow_nuscenes import read_keyframes, read_slow_source
from tests.targets.test_nuscenes import split_of


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
