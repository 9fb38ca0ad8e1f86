"""A new data set is a class and a row in SOURCES; cameras of any number, size and orientation, some of them masked."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import occfeat_train
from occfeat_targets import voxelize
from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.store import open_cache
from occfeat_targets.sources.source import SOURCES
from occfeat_targets.targets.images import load_image_reference
from occfeat_train.cli import main as train
from occfeat_train.config import Config, NetworkConfig
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.training.stages import RunOptions, prepare_evaluation
from tests.targets.command_line import Result, contents, run
from tests.targets.toy_source import SECONDS, SIZES, ego_from_lidar, returns, write_toy

WHERE = ("--split", "all", "--cache")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(SOURCES, "toy", "tests.targets.toy_source:ToySource")
    return write_toy(tmp_path / "toy")


def build(toy: Path, cache: Path, teacher: str, *more: str, check: bool = True) -> Result:
    return run(
        "build", "--source", "toy", "--dataroot", toy, *WHERE, cache, "--teacher", teacher, "--frames", "both",
        "--grid", "4x16x16", "--range", "-1", "3", "-8", "8", "-8", "8", "--image-size", "48x80", "--feature-size", "56x98",
        "--shard-size", "2", "--teacher-dtype", "float32", "--workers", "0", *more, check=check,
    )  # fmt: skip


def test_a_toy_source_is_built_verified_drawn_and_trained_on(toy, tiny_teacher, tmp_path):
    cache = tmp_path / "cache"
    built = build(toy, cache, tiny_teacher)
    assert "all of 1: 4 keyframes of 2 scenes" in built.stdout
    assert "no map labels: the toy has no maps" in built.stdout
    assert "finished: 2 of 2 shards" in run("status", *WHERE, cache).stdout
    information = run("info", *WHERE, cache).stdout
    assert "all of toy 1 at" in information
    assert "images 48x80 of 3 cameras" in information
    verified = run("verify", *WHERE, cache, "--samples", "2")
    assert "toy has no independent reader" in verified.stdout
    assert verified.stdout.count(" 0 voxels wrong") == 2
    run("preview", *WHERE, cache, "--out", tmp_path / "preview", "--points", "--samples", "1", "--frame", "tall")
    reader = CacheReader(cache / "all.zarr")
    assert reader.cache.spec.cameras == tuple(SIZES) and reader.cache.spec.frames == ("ego", *SIZES)
    assert reader.read("occupancy", 0).any(axis=1).all()
    assert "4 keyframes read" in invoke(train, "check", *WHERE, cache)
    pretrain(cache, tmp_path / "run")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 2


def pretrain(cache: Path, run: Path, *more: str) -> str:
    tiny = ["network.channels=8", "network.image_size=32x48", "optim.lr=1e-4"]
    arguments = ["pretrain", *WHERE, cache, "--out", run, "--backbone-weights", "none", "--batch", "2", *more]
    arguments += [part for change in tiny for part in ("--set", change)]
    return invoke(train, *arguments, "--epochs", "1", "--device", "cpu", "--no-tensorboard", "--no-progress")


def invoke(command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_an_unknown_source_is_refused_with_those_there_are(tmp_path):
    refused = run("build", "--source", "kitti", "--split", "train", "--cache", tmp_path, check=False)
    assert refused.returncode == 1
    assert "--source kitti: one of nuscenes expected" in refused.stderr


AREAS = {"front": (0, 0, 48, 80), "tall": (0, 26, 48, 53), "wide": (14, 0, 34, 80)}  # in 48x80


def test_a_portrait_camera_beside_landscape_ones_is_scaled_to_fit_and_the_rest_is_black(toy, tmp_path):
    build(toy, tmp_path, "none")
    reader = CacheReader(tmp_path / "all.zarr")
    assert reader.read("image_area", 1).tolist() == [list(AREAS[name]) for name in SIZES]
    assert reader.read("camera_valid", 1).all()
    for camera, (name, (height, width)) in enumerate(SIZES.items()):
        top, left, bottom, right = AREAS[name]
        image = reader.read("images", 1)[camera].astype(int)
        (expected,) = load_image_reference(toy / name / "1.jpg", [(bottom - top, right - left)])
        assert np.abs(image[top:bottom, left:right] - expected).max() <= 3
        assert image.sum() == image[top:bottom, left:right].sum()
        # The source's corners are the area's corners.
        source = np.array([[80.0, 0, width / 2], [0, 80, height / 2], [0, 0, 1]])
        rays = np.linalg.inv(source) @ [[0, width], [0, height], [1, 1]]
        corners = reader.read("intrinsics", 1)[camera] @ rays
        np.testing.assert_allclose(corners, [[left, right], [top, bottom], [1, 1]], atol=1e-4)


def test_features_cover_the_same_part_of_the_teachers_input(toy, tiny_teacher, tmp_path, monkeypatch):
    seen = []
    call = "occfeat_targets.targets.teacher.LoadedTeacher.__call__"
    monkeypatch.setattr(call, lambda self, images: seen.append(images) or np.ones((len(images), 4, 7, 32), np.float32))
    build(toy, tmp_path, tiny_teacher)
    for image, (top, left, bottom, right) in zip(seen[0], AREAS.values(), strict=True):
        used = [round(n * scale) for n, scale in zip((top, left, bottom, right), (56 / 48, 98 / 80) * 2, strict=True)]
        filled = image.any(axis=-1)
        rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
        assert [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1] == used


def test_an_image_that_would_be_enlarged_is_refused(toy, tmp_path):
    build(toy, tmp_path / "a", "none", "--image-size", "96x160")  # the front's own size; others are scaled down to fit
    refused = build(toy, tmp_path / "b", "none", "--image-size", "98x162", check=False)
    assert refused.returncode == 1
    assert "162x98 was requested, and images are never enlarged" in " ".join(refused.stdout.split())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_unusable_cameras_are_masked_on_the_record_and_built_once_they_are_repaired(toy, tiny_teacher, tmp_path, dtype):
    options = ("--feature-dtype", dtype)
    build(toy, tmp_path / "good", tiny_teacher, *options)
    expected = contents(tmp_path / "good", "all")
    spare = Path(shutil.copytree(toy, tmp_path / "spare"))
    (toy / "tall" / "1.jpg").unlink()
    whole = (toy / "wide" / "2.jpg").read_bytes()
    (toy / "wide" / "2.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (toy / "front" / "3.jpg").unlink()  # also its sweep
    cache, masking = tmp_path / "cache", (*options, "--on-error", "mask-camera")
    refused = build(toy, cache, tiny_teacher, *options, check=False)
    assert refused.returncode == 1
    assert "--on-error mask-camera" in refused.stderr

    built = build(toy, cache, tiny_teacher, *masking, check=False)
    assert built.returncode == 3
    assert "1 of 4 keyframes, in 1 of 2 scenes (scene0: 1 of 2) are built with masked cameras" in built.stdout
    assert "masked 2 cameras of 2 keyframes" in built.stdout
    found = contents(cache, "all")
    assert found["is_valid"].tolist() == [True, True, True, False]
    assert found["camera_valid"].tolist() == [[True] * 3, [True, False, True], [True, True, False], [False] * 3]
    for keyframe, camera in ((1, 1), (2, 2)):
        for name in ("images", "features", "intrinsics", "cam_from_ego", "image_area"):
            assert not found[name][keyframe, camera].any(), name
            others = [c for c in range(3) if c != camera]
            assert (found[name][keyframe, others] == expected[name][keyframe, others]).all(), name
        frames = [f for f in range(4) if f != 1 + camera]
        for name in ("occupancy", "grid_from_ego"):
            assert not found[name][keyframe, 1 + camera].any(), name
            assert (found[name][keyframe, frames] == expected[name][keyframe, frames]).all(), name

    status = run("status", *WHERE, cache, check=False)
    assert status.returncode == 3
    assert f"masked: tall of sample toy1: {toy / 'tall' / '1.jpg'} is missing" in status.stdout
    assert "masked: wide of sample toy2: image" in status.stdout and "is truncated or damaged" in status.stdout
    assert "skipped: sample toy3 of scene1" in status.stdout
    assert "1 keyframe skipped, 2 keyframes with masked cameras" in run("info", *WHERE, cache).stdout
    verified = run("verify", *WHERE, cache, "--samples", "3")
    assert "2 cameras are masked" in verified.stdout
    assert verified.stdout.count("1 masked cameras; calibration within") == 2
    for frame in ("ego", "tall"):  # keyframe 1 has no grid in the frame of its masked camera
        run("preview", *WHERE, cache, "--out", tmp_path / "preview", "--keyframes", "1,2", "--frame", frame)

    shutil.copytree(spare, toy, dirs_exist_ok=True)
    repaired = build(toy, cache, tiny_teacher, *masking, "--retry-skipped")
    assert "to build here: 2 shards, 3 keyframes" in repaired.stdout
    run("status", *WHERE, cache)
    for name, values in contents(cache, "all").items():
        assert (values == expected[name]).all(), name


def test_a_keyframe_without_any_usable_camera_is_skipped(toy, tmp_path):
    for name in SIZES:
        (toy / name / "0.jpg").write_bytes(b"no JPEG")
    built = build(toy, tmp_path, "none", "--on-error", "mask-camera", check=False)
    assert built.returncode == 3
    assert "skipped: sample toy0 of scene0: none of its 3 cameras can be used; the first: image" in built.stdout
    assert CacheReader(tmp_path / "all.zarr").is_valid.tolist() == [False, True, True, True]


def test_training_reads_nothing_of_a_masked_camera(toy, tiny_teacher, tmp_path):
    """With the running statistics of BatchNorm, a masked camera's pixels change nothing, and another's do."""
    cache, run_path = tmp_path / "cache", tmp_path / "run"
    (toy / "wide" / "1.jpg").unlink()
    (toy / "tall" / "2.jpg").unlink()
    assert build(toy, cache, tiny_teacher, "--on-error", "mask-camera", check=False).returncode == 3
    assert "2 cameras of other keyframes are masked" in invoke(train, "check", *WHERE, cache)
    assert "2 cameras of the keyframes used are masked" in pretrain(cache, run_path)
    _, dataset, task = prepare_evaluation(run_path, RunOptions(cache, "all", tmp_path), "front")
    batch = dataset.batch([(0, 1), (0, 2)])
    assert batch.cam_from_grid.flatten(2).any(-1).tolist() == [[True, True, False], [True, False, True]]
    loss = task.eval()(batch)["loss"]
    for camera, is_masked in ((2, True), (0, False)):
        images = batch.images.clone()
        images[0, camera] = 255 - images[0, camera]
        changed = task(dataclasses.replace(batch, images=images))["loss"]
        assert bool(changed == loss) == is_masked
    refused = CliRunner().invoke(
        train,
        [str(a) for a in ("evaluate", run_path, *WHERE, cache, "--frame", "wide", "--device", "cpu", "--no-progress")],
    )
    assert "1 keyframes are left out: the camera of their grid, wide, is masked" in refused.output


def test_a_sample_never_lies_in_the_frame_of_a_masked_camera(toy, tiny_teacher, tmp_path):
    (toy / "wide" / "1.jpg").unlink()
    build(toy, tmp_path, tiny_teacher, "--on-error", "mask-camera", check=False)
    reader = CacheReader(tmp_path / "all.zarr")
    config = Config(network=NetworkConfig(image_size=(32, 48)), frame="cameras")
    dataset = KeyframeDataset(reader, config, training=True)
    grids = reader.read("grid_from_ego", 1)
    masked = dataset.batch([(epoch, 1) for epoch in range(40)])
    assert dataset.frames == tuple(SIZES)
    expected = [reader.read("cam_from_ego", 1)[0] @ inverse_rigid(grids[1 + c].astype(np.float64)) for c in (0, 1)]
    used = [int(np.argmin([np.abs(found[0].numpy() - e).max() for e in expected])) for found in masked.cam_from_grid]
    assert set(used) == {0, 1}
    for found, frame in zip(masked.cam_from_grid, used, strict=True):
        np.testing.assert_allclose(found[0], expected[frame], atol=1e-6)


def test_a_cache_of_another_format_is_refused_by_both_tools_with_the_command_that_rebuilds_it(
    toy, tiny_teacher, tmp_path
):
    cache = tmp_path / "some where"
    options = (
        "--sweeps",
        "2",
        "--points",
        "--feature-dtype",
        "int8",
        "--teacher-layer",
        "pre-norm",
        "--scenes",
        "scene1",
    )
    build(toy, cache, tiny_teacher, *options)
    expected = contents(cache, "all")
    file = cache / "all.zarr" / "zarr.json"
    metadata = json.loads(file.read_text())
    spec = metadata["attributes"]["occfeat"]["spec"]
    for change, reason in (({"wings": 2}, "other options (wings)"), ({"format_version": 1}, "format version 1")):
        spec |= change
        file.write_text(json.dumps(metadata))
        messages = [run("info", *WHERE, cache, check=False).stderr]
        messages.append(CliRunner().invoke(train, ["check", *WHERE, str(cache)]).output)
        for message in messages:
            assert f"which reads format version 2: it has {reason}. Use the release" in message
            command = shlex.split(message.splitlines()[-1])
            assert command[:2] == ["occfeat-targets", "build"]
    shutil.rmtree(cache)
    run(*command[1:], "--workers", "0")
    for name, values in contents(cache, "all").items():
        assert (values == expected[name]).all(), name
    assert run("info", *WHERE, cache).stdout.count("scenes left out") == 1


def test_the_command_for_a_cache_of_the_first_format_names_all_its_options(tmp_path):
    teacher = {
        "name": "facebook/dinov2-small",
        "revision": "abc",
        "input_size": [224, 392],
        "layer": "post-norm",
        "dtype": "float32",
    }
    grid = {"shape": [8, 200, 200], "lower": [-5, -50, -50], "upper": [5, 50, 50]}
    spec = {
        "grid": grid, "frames": ["CAM_FRONT", "CAM_BACK"], "image_size": [540, 960], "teacher": teacher, "feature_dtype": "float16",
        "num_sweeps": 1, "labels": [], "dividers": "road+lane", "compat": "simple-bev", "format_version": 1,
    }  # fmt: skip
    origin = {"split": "train", "version": "v1.0-trainval", "dataroot": "/data/nuscenes"}
    attributes = {"occfeat": {"spec": spec, "keyframes_per_shard": 16, "provenance": origin}}
    zarr.create_group(tmp_path / "train.zarr", attributes=attributes)
    with pytest.raises(CacheError) as refused:
        open_cache(tmp_path / "train.zarr")
    assert str(refused.value).splitlines()[-1] == (
        f"occfeat-targets build --dataroot /data/nuscenes --cache {tmp_path} --split train --version v1.0-trainval "
        "--frames cameras --sweeps 1 --image-size 540x960 --feature-dtype float16 --dividers road+lane --compat simple-bev "
        "--shard-size 16 --teacher facebook/dinov2-small --teacher-layer post-norm --teacher-dtype float32 "
        "--feature-size 224x392 --no-labels"
    )


def test_cached_points_are_those_of_all_sweeps_and_fill_any_other_grid_as_the_sweeps_do(toy, tmp_path):
    build(toy, tmp_path / "points", "none", "--sweeps", "2", "--points", "--frames", "cameras")
    assert "LiDAR points of each keyframe, at most 2000" in run("info", *WHERE, tmp_path / "points").stdout
    reader = CacheReader(tmp_path / "points" / "all.zarr")
    points = reader.points(3)
    each = len(returns()) - 3
    assert points.xyz.shape == (2 * each, 3) and points.sweep.tolist() == [0] * each + [1] * each
    np.testing.assert_array_equal(points.intensity, np.tile(returns()[:-3, 3], 2))
    np.testing.assert_allclose(points.origins, [ego_from_lidar(i)[:3, 3] for i in (0, 1)], atol=1e-6)
    np.testing.assert_array_equal(points.times, np.float32(SECONDS))
    distances = np.linalg.norm((points.xyz - points.origins[points.sweep])[:, :2], axis=1)
    np.testing.assert_allclose(distances, 6.03, atol=1e-5)

    other = ("--grid", "5x30x20", "--range", "-1", "3", "-9", "9", "-7", "7", "--sweeps", "2")
    build(toy, tmp_path / "other", "none", *other)
    grids = CacheReader(tmp_path / "other" / "all.zarr")
    grid = grids.cache.spec.grid
    for packed, grid_from_ego in zip(grids.read("occupancy", 3), grids.read("grid_from_ego", 3), strict=True):
        np.testing.assert_array_equal(
            voxelize(points.xyz, grid, grid_from_points=grid_from_ego), grid.unpack_volume(packed)
        )

    verified = run("verify", *WHERE, tmp_path / "points", "--samples", "2").stdout
    assert verified.count(f"{2 * each} LiDAR points within") == 2
    shutil.rmtree(toy)
    run("preview", *WHERE, tmp_path / "points", "--out", tmp_path / "preview", "--points", "--samples", "1")
    dataset = occfeat_train.open_cache(tmp_path / "points" / "all.zarr")
    np.testing.assert_array_equal(dataset.points(3).xyz, points.xyz)
    with pytest.raises(CacheError, match="has no array 'points'"):
        grids.points(0)


def test_more_returns_than_a_source_says_there_can_be_are_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.targets.toy_source.ToySource.max_returns", 100)
    refused = build(toy, tmp_path, "none", "--points", check=False)
    assert refused.returncode == 1
    assert "LiDAR returns, and the cache has room for 100: correct max_returns of the source" in refused.stdout
