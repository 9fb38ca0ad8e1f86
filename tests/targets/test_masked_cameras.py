"""Unusable cameras are masked in the cache, recorded, and not used in training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.cli import main as train
from occfeat_train.config import Config, NetworkConfig
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.training.stages import RunOptions, prepare_evaluation
from tests.targets.command_line import contents, run
from tests.targets.toy_source import SIZES, WHERE, build, invoke, pretrain


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_unusable_cameras_are_masked_and_recorded_and_built_after_the_repair(toy, tiny_teacher, tmp_path, dtype):
    options = ("--feature-dtype", dtype)
    build(toy, tmp_path / "good", tiny_teacher, *options)
    expected = contents(tmp_path / "good", "all")
    spare = Path(shutil.copytree(toy, tmp_path / "spare"))
    (toy / "tall" / "1.jpg").unlink()
    whole = (toy / "wide" / "2.jpg").read_bytes()
    (toy / "wide" / "2.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (toy / "front" / "3.jpg").unlink()  # this is also its sweep
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
    verified = run("verify", *WHERE, cache, "--samples", "9")
    assert "2 masked cameras:" in verified.stdout
    assert "recomputing 3 of 3 valid keyframes" in verified.stdout
    assert "is sound; 1 keyframe skipped, 2 keyframes with masked cameras" in verified.stdout
    assert verified.stdout.count("1 masked camera; calibration within") == 2
    for frame in ("ego", "tall"):  # keyframe 1 has no grid in the frame of its masked camera
        run("preview", *WHERE, cache, "--out", tmp_path / "preview", "--keyframes", "1,2", "--frame", frame)

    shutil.copytree(spare, toy, dirs_exist_ok=True)
    repaired = build(toy, cache, tiny_teacher, *masking, "--retry-skipped")
    assert "to build here: 2 shards, 3 keyframes" in repaired.stdout
    run("status", *WHERE, cache)
    for name, values in contents(cache, "all").items():
        assert (values == expected[name]).all(), name


def test_verify_says_that_no_keyframe_is_valid(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.targets.toy_source.returns", lambda: np.full((1, 4), 99, np.float32))
    assert build(toy, tmp_path, "none", "--on-error", "skip", check=False).returncode == 3
    verified = run("verify", *WHERE, tmp_path).stdout
    assert "no keyframe is valid: none is recomputed" in verified and "recomputing" not in verified
    assert "is sound; 4 keyframes skipped, 0 keyframes with masked cameras" in verified


def test_a_failed_build_names_both_ways_to_go_on(toy, tmp_path):
    (toy / "tall" / "1.jpg").write_bytes(b"no JPEG")
    failed = build(toy, tmp_path, "none", check=False)
    assert failed.returncode == 1
    assert "Fix the cause, or pass --on-error mask-camera or skip, and run the same command again" in failed.stdout


def test_a_keyframe_without_any_usable_camera_is_skipped(toy, tmp_path):
    for name in SIZES:
        (toy / name / "0.jpg").write_bytes(b"no JPEG")
    built = build(toy, tmp_path, "none", "--on-error", "mask-camera", check=False)
    assert built.returncode == 3
    assert "skipped: sample toy0 of scene0: none of its 3 cameras can be used; the first: image" in built.stdout
    assert CacheReader(tmp_path / "all.zarr").is_valid.tolist() == [False, True, True, True]


def test_training_does_not_use_a_masked_camera(toy, tiny_teacher, tmp_path):
    """BatchNorm uses running statistics here, so the loss does not depend on a masked camera's pixels."""
    cache, run_path = tmp_path / "cache", tmp_path / "run"
    (toy / "wide" / "1.jpg").unlink()
    (toy / "tall" / "2.jpg").unlink()
    assert build(toy, cache, tiny_teacher, "--on-error", "mask-camera", check=False).returncode == 3
    assert "2 masked cameras in other keyframes" in invoke(train, "check", *WHERE, cache)
    assert "2 masked cameras in the keyframes used" in pretrain(cache, run_path)
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
    assert "1 of 4 keyframes of all.zarr are left out: the camera of the grid, wide, is masked" in refused.output


def test_a_masked_camera_is_never_the_reference_frame(toy, tiny_teacher, tmp_path):
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
