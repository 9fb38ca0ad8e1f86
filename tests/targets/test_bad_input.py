"""Damaged input causes errors that name the sample, the file and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources.keyframe import DatasetError
from occfeat_targets.sources.nuscenes import read_split
from occfeat_targets.verify.slow_nuscenes import read_keyframes
from tests.targets.command_line import assert_same_bytes, build_arguments, contents, run, table, write_table


def keyframe_record(city: Path, channel: str) -> dict:
    """The third keyframe's sample_data record of a channel."""
    token = sample_tokens(city)[2]
    calibration = {c["token"]: c["sensor_token"] for c in table(city, "calibrated_sensor")}
    sensors = {s["token"]: s["channel"] for s in table(city, "sensor")}
    return next(
        record
        for record in table(city, "sample_data")
        if record["sample_token"] == token
        and record["is_key_frame"]
        and sensors[calibration[record["calibrated_sensor_token"]]] == channel
    )


def sample_tokens(city: Path) -> list[str]:
    """Sample tokens of mini_train in the cache's order."""
    split = read_split(city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False)
    return [keyframe.token for keyframe in split.keyframes]


def cut_file(fraction: float, channel: str):
    def damage(city: Path) -> str:
        record = keyframe_record(city, channel)
        file = city / record["filename"]
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * fraction) // 20 * 20 + (7 if channel != "LIDAR_TOP" else 0)])
        return record["filename"]

    return damage


def cut_inside_a_return(city: Path) -> str:
    record = keyframe_record(city, "LIDAR_TOP")
    file = city / record["filename"]
    file.write_bytes(file.read_bytes()[:-7])
    return record["filename"]


def remove_image(city: Path) -> str:
    record = keyframe_record(city, "CAM_BACK")
    (city / record["filename"]).unlink()
    return record["filename"]


def link_image_to_itself(city: Path) -> str:
    file = city / remove_image(city)
    file.symlink_to(file)
    return file.name


def remove_camera_record(city: Path) -> str:
    token = keyframe_record(city, "CAM_BACK")["token"]
    write_table(city, "sample_data", [r for r in table(city, "sample_data") if r["token"] != token])
    return "CAM_BACK"


def nan_pose(city: Path) -> str:
    record = keyframe_record(city, "CAM_FRONT")
    poses = table(city, "ego_pose")
    for pose in poses:
        if pose["token"] == record["ego_pose_token"]:
            pose["translation"][1] = float("nan")
    write_table(city, "ego_pose", poses)
    return record["filename"]


def change_image_record(change):
    def damage(city: Path) -> str:
        record, data = keyframe_record(city, "CAM_FRONT"), table(city, "sample_data")
        for other in data:
            if other["token"] == record["token"]:
                change(other)
        write_table(city, "sample_data", data)
        return f"sample_data.json, token {record['token']}"

    return damage


def change_calibration(change):
    """Gives an image its own record in calibrated_sensor.json, changed."""

    def damage(city: Path) -> str:
        record = keyframe_record(city, "CAM_FRONT")
        calibrations, data = table(city, "calibrated_sensor"), table(city, "sample_data")
        (shared,) = (c for c in calibrations if c["token"] == record["calibrated_sensor_token"])
        own = {**shared, "token": "own"}
        change(own)
        write_table(city, "calibrated_sensor", [*calibrations, own])
        for other in data:
            if other["token"] == record["token"]:
                other["calibrated_sensor_token"] = "own"
        write_table(city, "sample_data", data)
        return f"calibrated_sensor.json, token own, of {record['filename']}"

    return damage


BAD_INPUT = {
    "truncated sweep": (cut_inside_a_return, "past a whole return"),
    "half a sweep": (cut_file(0.5, "LIDAR_TOP"), "ends early"),
    "empty sweep": (cut_file(0.0, "LIDAR_TOP"), "is empty"),
    "half a JPEG": (cut_file(0.5, "CAM_FRONT"), "truncated or damaged"),
    "missing image": (remove_image, "is missing"),
    "link to itself": (link_image_to_itself, "is missing"),
    "missing camera": (remove_camera_record, "no keyframe record"),
    "NaN pose": (nan_pose, "not three finite numbers"),
}
BAD_CALIBRATION = {
    "zero rotation": (change_calibration(lambda c: c.update(rotation=[0, 0, 0, 0])), "[0, 0, 0, 0] is no quaternion"),
    "no translation": (change_calibration(lambda c: c.pop("translation")), "has no key 'translation'"),
    "no intrinsics": (change_calibration(lambda c: c.pop("camera_intrinsic")), "has no key 'camera_intrinsic'"),
    "no width": (change_image_record(lambda r: r.pop("width")), "has no key 'width'; re-extract the tables"),
    "no height value": (
        change_image_record(lambda r: r.update(height=None)),
        "are (None, 320): expected whole numbers",
    ),
}
OF_CAM_BACK = ("missing image", "link to itself", "missing camera")


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_an_error_with_its_name_and_can_be_skipped_and_recorded(name, broken_city, tiny_teacher, tmp_path):
    damage, reason = BAD_INPUT[name]
    token = sample_tokens(broken_city)[2]
    file = damage(broken_city)
    cache = tmp_path / "cache"
    arguments = build_arguments(broken_city, cache, tiny_teacher, "--workers", "0")
    failed = run(*arguments, check=False)
    message = failed.stdout + failed.stderr
    assert failed.returncode == 1
    assert "Traceback" not in message
    for part in (token, file, reason):
        assert part in message
    if name in (*OF_CAM_BACK, "NaN pose"):  # found when planning, before a cache exists
        assert not cache.exists()
    else:
        assert open_cache(cache / "mini_train.zarr").finished_shards().keys() == {0}
        assert "failed: shard 1" in run("status", "--cache", cache, "--split", "mini_train", check=False).stdout
    skipped = run(*arguments, "--on-error", "skip", check=False)
    assert skipped.returncode == 3
    assert token in skipped.stdout
    reader = CacheReader(cache / "mini_train.zarr")
    assert reader.is_valid.tolist() == [True, True, False] + [True] * 7
    assert not any(values.any() for values in reader.read_all(["images", "features", "occupancy"], 2).values())
    status = run("status", "--cache", cache, "--split", "mini_train", check=False)
    assert status.returncode == 3
    assert reason in status.stdout


@pytest.mark.parametrize("name", [*OF_CAM_BACK, "NaN pose", "zero rotation", "no width"])
def test_a_camera_that_nuscenes_lacks_is_masked_and_the_other_five_are_built(name, broken_city, tmp_path, expected):
    damage, reason = {**BAD_INPUT, **BAD_CALIBRATION}[name]
    damage(broken_city)
    camera = CAMERAS.index("CAM_BACK" if name in OF_CAM_BACK else "CAM_FRONT")
    arguments = build_arguments(broken_city, tmp_path, "none", "--workers", "0", "--frames", "both")
    assert run(*arguments, "--on-error", "mask-camera", check=False).returncode == 3
    found = contents(tmp_path)
    assert found["is_valid"].all() and np.argwhere(~found["camera_valid"]).tolist() == [[2, camera]]
    for array, axis in (
        ("images", camera),
        ("cam_from_ego", camera),
        ("occupancy", 1 + camera),
        ("labels/map", 1 + camera),
    ):
        good = expected[array].copy()
        good[2, axis] = 0
        np.testing.assert_array_equal(found[array], good, array)
    assert reason in run("status", "--cache", tmp_path, "--split", "mini_train", check=False).stdout
    seed = next(seed for seed in range(100) if np.random.default_rng(seed).permutation(10)[0] == 2)  # verify the third
    verify = ["verify", "--cache", tmp_path, "--split", "mini_train", "--samples", "1", "--seed", seed]
    verified = run(*verify).stdout
    assert verified.count("1 masked camera;") == 1
    assert "is sound; 0 keyframes skipped, 1 keyframe with masked cameras" in verified


@pytest.mark.parametrize("name", BAD_CALIBRATION)
def test_a_calibration_that_cannot_be_used_is_the_problem_of_its_view_in_both_readers(name, broken_city):
    damage, reason = BAD_CALIBRATION[name]
    where = damage(broken_city)
    split = read_split(broken_city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False)
    slow = read_keyframes(broken_city, "v1.0-mini", [k.token for k in split.keyframes], CAMERAS, 1)
    for keyframes in (split.keyframes, [slow[k.token] for k in split.keyframes]):
        broken = [
            (i, CAMERAS[c]) for i, k in enumerate(keyframes) for c in range(6) if k.cameras[c].problem is not None
        ]
        assert broken == [(2, "CAM_FRONT")]
    problem = split.keyframes[2].cameras[CAMERAS.index("CAM_FRONT")].problem
    assert where in problem and reason in problem


def test_a_record_that_is_absent_is_an_error_that_asks_for_the_tables_again(broken_city):
    pose = keyframe_record(broken_city, "CAM_FRONT")["ego_pose_token"]
    write_table(broken_city, "ego_pose", [p for p in table(broken_city, "ego_pose") if p["token"] != pose])
    options = {"version": None, "cameras": CAMERAS, "num_sweeps": 1, "with_boxes": False}
    view = read_split(broken_city, "mini_train", **options).keyframes[2].cameras[CAMERAS.index("CAM_FRONT")]
    assert f"ego_pose.json, token {pose}" in view.problem and "no such record; re-extract the tables" in view.problem
    calibrations = table(broken_city, "calibrated_sensor")
    write_table(broken_city, "calibrated_sensor", calibrations[1:])
    with pytest.raises(DatasetError, match=r"calibrated_sensor.json, token \w+: no such record; re-extract the tables"):
        read_split(broken_city, "mini_train", **options)


def test_a_repaired_file_is_built_with_retry_skipped(broken_city, city, tiny_teacher, tmp_path):
    file = remove_image(broken_city)
    cache = tmp_path / "cache"
    arguments = build_arguments(broken_city, cache, tiny_teacher, "--workers", "0")
    assert run(*arguments, "--on-error", "skip", check=False).returncode == 3
    shutil.copy(city / file, broken_city / file)
    run(*arguments, "--retry-skipped")
    assert CacheReader(cache / "mini_train.zarr").is_valid.all()
    run("status", "--cache", cache, "--split", "mini_train")


def test_retrying_skipped_keyframes_keeps_all_valid_ones(broken_city, city, tiny_teacher, tmp_path):
    """Valid keyframes stay unchanged even if their files are missing by then, whether the retry fails or not."""
    repaired = remove_image(broken_city)
    cache = tmp_path / "cache"
    arguments = build_arguments(broken_city, cache, tiny_teacher, "--workers", "0", "--shard-size", "5")
    arguments += ["--feature-dtype", "int8"]
    run(*arguments, "--on-error", "skip", check=False)
    before = contents(cache)
    record = open_cache(cache / "mini_train.zarr").finished_shards()[0]
    for file in (broken_city / "samples" / "LIDAR_TOP").iterdir():
        file.unlink()  # of every keyframe
    for mode in ("fail", "skip"):
        run(*arguments, "--retry-skipped", "--on-error", mode, check=False)
        assert_same_bytes(cache, before)
    for folder in ("LIDAR_TOP", "CAM_BACK"):
        shutil.copytree(city / "samples" / folder, broken_city / "samples" / folder, dirs_exist_ok=True)
    needed = broken_city / keyframe_record(broken_city, "CAM_FRONT")["filename"]
    for file in set((broken_city / "samples" / "CAM_FRONT").iterdir()) - {needed}:
        file.unlink()
    assert (broken_city / repaired).exists()
    output = run(*arguments, "--retry-skipped").stdout
    assert "to build here: 1 shard, 1 keyframe" in output
    after = contents(cache)
    assert after["is_valid"].all()
    others = np.arange(10) != 2
    for name, values in after.items():
        assert (values[others] == before[name][others]).all(), name
    again = open_cache(cache / "mini_train.zarr").finished_shards()[0]
    assert again["skipped"] == {}
    assert again["cosine"][1] <= record["cosine"][1]
    assert again["cosine"][0] == pytest.approx(record["cosine"][0], abs=1e-3)
    assert run("verify", "--cache", cache, "--split", "mini_train", "--samples", "0").returncode == 0


def test_a_dataroot_without_the_version_says_what_it_has(city, tiny_teacher, tmp_path):
    result = run(*build_arguments(city, tmp_path, tiny_teacher, "--version", "v1.0-trainval"), check=False)
    assert result.returncode == 1
    assert "holds no v1.0-trainval (found: v1.0-mini)" in result.stderr
    result = run(*build_arguments(tmp_path / "nothing", tmp_path, tiny_teacher), check=False)
    assert "no directory" in result.stderr
    assert "NUSCENES_ROOT" in result.stderr


def test_a_build_with_other_options_into_a_cache_is_refused_and_changes_nothing(city, tiny_teacher, serial, expected):
    result = run(*build_arguments(city, serial, tiny_teacher, "--sweeps", "3", "--frames", "both"), check=False)
    assert result.returncode == 1
    assert "num_sweeps: 1 != 3" in result.stderr
    assert_same_bytes(serial, expected)


def test_control_characters_of_names_do_not_reach_the_terminal(broken_city, tmp_path):
    """ESC ] 0 ; sets a terminal's title; U+202E reverses what follows."""
    record, data = keyframe_record(broken_city, "CAM_BACK"), table(broken_city, "sample_data")
    for other in data:
        if other["token"] == record["token"]:
            other["filename"] = "samples/\x1b]0;title\x07\u202e.jpg"
    write_table(broken_city, "sample_data", data)
    result = run(*build_arguments(broken_city, tmp_path, "none", "--on-error", "skip", "--workers", "0"), check=False)
    assert r"samples/\x1b]0;title\x07\u202e.jpg is missing" in result.stdout
    status = run("status", "--cache", tmp_path, "--split", "mini_train", check=False)
    failed = run("status", "--cache", tmp_path / "\x1b[2J", "--split", "mini_train", check=False)
    assert r"\x1b[2J/mini_train.zarr: build it" in failed.stderr
    for text in (result.stdout, result.stderr, status.stdout, failed.stdout, failed.stderr):
        assert text.replace("\n", "").replace("\t", "").isprintable()
