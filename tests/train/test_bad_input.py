"""Bad input is refused before a step is trained, and unusable keyframes are left out and counted."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from occfeat_targets.cache.shards import shard_file
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.training.checkpoint import find_checkpoint
from tests.train.runs import (
    assert_same_run,
    copy_of,
    evaluate,
    finetune,
    invoke,
    mask_camera,
    pretrain,
    reader,
    records,
    refuse,
    steps,
    succeed,
    write_cache,
    write_caches,
)
from tests.train.test_batch import GRID as OTHER_GRID


def test_missing_unfinished_and_unsuitable_caches_are_refused(cache, tmp_path):
    out = tmp_path / "run"
    assert "no cache at" in refuse(*pretrain(tmp_path, out), out=out)
    assert "(splits there: train, val): build it with 'occfeat-targets build', or correct --cache and --split" in (
        refuse(*pretrain(cache, out, "--split", "test"), out=out)
    )
    write_cache(tmp_path / "partial", shards=3)
    message = refuse(*pretrain(tmp_path / "partial", out), out=out)
    assert "is not finished: 1 of 4 shards are missing" in message and "run the build again" in message
    write_cache(tmp_path / "mute", dim=0, labels=())
    message = refuse(*pretrain(tmp_path / "mute", out), out=out)
    assert (
        "no teacher features, which lambda=0.01 needs: build it with --teacher, or pretrain with --occ-only" in message
    )
    message = refuse(*finetune(tmp_path / "mute", out, "--task", "map"), out=out)
    assert "no map labels (it has: none): build it with --label-kinds map" in message
    assert not out.exists()


def test_a_validation_split_is_checked_before_training(cache, tmp_path):
    out = tmp_path / "run"
    assert "no cache at" in refuse(*pretrain(cache, out, "--validate", "test"), out=out)
    write_cache(tmp_path)
    for changed, expected in (
        ({"grid": OTHER_GRID}, "has the grid 4x12x10"),
        ({"dim": 5}, "has features of 5 channels"),
    ):
        shutil.rmtree(tmp_path / "val.zarr", ignore_errors=True)
        write_cache(tmp_path, "val", **changed)
        message = refuse(*pretrain(tmp_path, out, "--validate", "val"), out=out)
        assert expected in message and "build a cache with" in message


def test_a_run_is_not_evaluated_on_another_grid(pretrained, tmp_path):
    write_caches(tmp_path, grid=OTHER_GRID)
    message = refuse(*evaluate(pretrained, tmp_path))
    assert "has the grid 4x12x10" in message and "step-00000002 has 4x12x12" in message
    assert "build a cache with that grid" in message


def test_a_missing_gpu_and_an_unknown_device_are_refused(cache, pretrained, tmp_path):
    out = tmp_path / "run"
    message = refuse(*pretrain(cache, out, "--device", "cuda:99"), out=out)
    assert "--device cuda:99: GPU 99 asked for" in message and "use --device cpu" in message
    assert "use --device cpu" in refuse(*evaluate(pretrained, cache, "--device", "cuda:99"))
    assert "--device gpu: auto, cpu, cuda or cuda:N expected" in refuse(
        *pretrain(cache, out, "--device", "gpu"), out=out
    )


def test_scenes_that_do_not_exist_are_refused(cache, tmp_path):
    out, file = tmp_path / "run", tmp_path / "scenes"
    file.write_text("a\nx\ny\n")
    message = refuse(*finetune(cache, out, "--scenes", file), out=out)
    assert (
        "lists 3 scenes, 2 of them not among the 3 of this split that have valid keyframes (x, y): correct the list"
        in message
    )
    file.write_text("\n")
    assert "lists 0 scenes" in refuse(*finetune(cache, out, "--scenes", file), out=out)
    assert "does not exist" in refuse(*finetune(cache, out, "--scenes", tmp_path / "absent"), out=out)
    for labels in ("0", "101"):
        assert "is not in the range" in refuse(*finetune(cache, out, "--labels", labels), out=out)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--preset", "table9/occfeat"], "no preset 'table9/occfeat'; there are: table1/simplebev-enb0/occfeat, "),
        (["--preset", "small/map-10"], "is a finetuning preset: use occfeat-train finetune --preset small/map-10"),
        (["--occ-only", "--lambda", "1"], "--occ-only, --feat-only and --lambda exclude each other"),
        (["--set", "optim.speed=9"], "--set optim.speed=9: no such field; there are task, network.lifting, "),
        (["--set", "optim.lr"], "--set optim.lr: key=value expected"),
        (["--set", "optim.lr=fast"], "optim.lr='fast': a value of type float expected"),
        (["--set", "network.image_size=30x48"], "needs multiples of 16, the nearest is 32x48"),
        (["--set", "augment.num_cameras=7"], "augment.num_cameras=7: the cache has 6"),
        (["--set", "network.backbone=resnet-18"], "one of efficientnet-b0, resnet-50, resnet-101 expected"),
        (["--set", "frame=CAM_BACK_LEFT"], "frame=CAM_BACK_LEFT: this cache has grids in ego, CAM_FRONT, CAM_BACK"),
        (["--lambda", "-1"], "weights of at least 0"),
        (["--epochs", "0"], "optim.epochs=0.0: a number above 0 and at most 1,000,000,000 expected"),
        (["--epochs", "nan"], "optim.epochs=nan: a number above 0 and at most 1,000,000,000 expected"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--backbone-weights", "./absent"], "backbone weights ./absent: there is no such folder"),
        (["--backbone-weights", "absent.pth.tar"], "backbone weights absent.pth.tar: there is no such file"),
    ],
)
def test_wrong_options_are_refused_with_the_expected_value(cache, tmp_path, options, expected):
    out = tmp_path / "run"
    assert expected in refuse(*pretrain(cache, out, *options), out=out)


def test_a_name_that_is_neither_a_preset_nor_a_run_is_refused_as_both():
    said = refuse("config", "show", "runs/absent")
    assert "no preset 'runs/absent'" in said and "as a run, there is no runs/absent/config.json" in said


def test_presets_exclude_the_options_that_they_set(cache, tmp_path):
    out = tmp_path / "run"
    assert "--preset replaces --task and --labels" in refuse(
        *finetune(cache, out, "--preset", "small/map-10", "--labels", "10"), out=out
    )
    message = refuse(*finetune(cache, out, "--preset", "small/occfeat"), out=out)
    assert "is a pretraining preset: use occfeat-train pretrain --preset small/occfeat" in message


def test_weights_of_the_hub_offline_are_an_error_with_the_remedy(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "run"
    message = refuse(*pretrain(cache, out, "--backbone-weights", "default"), out=out)
    assert "backbone weights google/efficientnet-b0 cannot be loaded" in message
    assert "run 'hf download google/efficientnet-b0' where there is internet" in message
    assert "pass 'none' to start from random weights" in message


def test_a_directory_with_other_files_is_refused_and_not_changed(cache, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    message = refuse(*pretrain(cache, tmp_path, *steps(1)), out=tmp_path)
    assert "is not empty and not a run of occfeat-train: choose another --out" in message
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_an_environment_variable_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("OCCFEAT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no cache at"):
        invoke(*pretrain(tmp_path, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "features", "occupancy"])
def test_a_damaged_chunk_stops_the_run_which_continues_after_the_repair(cache, tmp_path, name):
    broken, run = copy_of(cache, tmp_path / "cache"), tmp_path / "run"
    dataset = KeyframeDataset(reader(broken), Config(allow_upsampling=True), training=True)
    keyframe = dataset.stream(6)[1]  # of step 3
    array = next(a for a in dataset.reader.cache.spec.arrays() if a.name == name)
    file = shard_file(broken / "train.zarr", array, keyframe // 2)
    whole = file.read_bytes()
    shard = range(keyframe // 2 * 2, min(keyframe // 2 * 2 + 2, 7))
    others = [k for k in shard if k != keyframe]
    assert all(dataset.stream(i)[1] not in others or i < 6 for i in range(7))
    offset, size = np.frombuffer(whole[-36:-4], "<u8").reshape(2, 2)[keyframe % 2].tolist()
    damaged = bytearray(whole)
    damaged[offset + size // 2] ^= 1
    file.write_bytes(damaged)
    command = [*pretrain(broken, run, *steps(5)), "--save-every", "1"]
    result = invoke(*command)
    assert result.exit_code == 1
    assert f"{file} is damaged at keyframe {keyframe} (sample train-token{keyframe})" in result.output
    assert "run the build again" in result.output
    assert find_checkpoint(run).step == 3 == len(records(run))
    file.write_bytes(whole)
    assert "continuing at step 3 of 5" in succeed(*command)
    succeed(*pretrain(cache, tmp_path / "expected", *steps(5), "--save-every", "1"))
    assert_same_run(run, tmp_path / "expected")


def test_skipped_keyframes_are_reported_and_not_evaluated(pretrained, tmp_path):
    def skip(arrays: dict[str, np.ndarray]) -> None:
        arrays["is_valid"][[1, 3]] = False

    write_cache(tmp_path, "val", scenes=tuple("ddeee"), change=skip)
    output = succeed(*evaluate(pretrained, tmp_path, "--out", tmp_path / "out"))
    assert "2 of 5 keyframes of" in output and "were skipped by its build and are left out" in output
    results = json.loads((tmp_path / "out" / "val.json").read_text())
    assert (results["skipped"], results["samples"]) == (2, 3)


def test_keyframes_without_a_grid_are_counted_by_evaluate_and_in_the_report(pretrained, tmp_path):
    def mask(arrays: dict[str, np.ndarray]) -> None:
        mask_camera(arrays, [1], "CAM_FRONT")
        mask_camera(arrays, [2], "CAM_BACK")

    write_cache(tmp_path, "val", scenes=tuple("ddeee"), change=mask)
    reason = "1 of 5 keyframes of val.zarr are left out: the camera of the grid, CAM_FRONT, is masked"
    output = succeed(*evaluate(pretrained, tmp_path, "--out", tmp_path / "out"))
    assert reason in output and "reference frame CAM_FRONT" in output
    results = json.loads((tmp_path / "out" / "val.json").read_text())
    names = ("samples", "skipped", "without_frame", "with_masked_cameras")
    assert [results[name] for name in names] == [4, 0, 1, 1]
    file = tmp_path / "report.html"
    succeed("report", pretrained, "--cache", tmp_path, "--out", file, "--samples", "1", "--device", "cpu")
    page = file.read_text()
    assert "evaluated on 4 of 5 keyframes of the split" in page and reason in page
    assert "Pretraining: 4 of 5 keyframes of the split" in page and "whole split" not in page


def test_a_cache_whose_every_reference_frame_is_masked_is_refused_with_the_remedy(pretrained, tmp_path):
    def mask(arrays: dict[str, np.ndarray]) -> None:
        mask_camera(arrays, list(range(5)), "CAM_FRONT")
        mask_camera(arrays, list(range(5)), "CAM_BACK")

    write_cache(tmp_path, "train", scenes=tuple("ddeee"), change=mask)
    write_cache(tmp_path, "val", scenes=tuple("ddeee"), change=mask)
    none = "none of the 5 valid keyframes can be used: the camera of the grid, {}, is masked: use --set frame=ego"
    run = tmp_path / "run"
    assert none.format("CAM_FRONT or CAM_BACK") in refuse(*pretrain(tmp_path, run, *steps(1)), out=run)
    assert none.format("CAM_FRONT") in refuse(*evaluate(pretrained, tmp_path))
    assert "reference frame ego" in succeed(
        *evaluate(pretrained, tmp_path, "--frame", "ego", "--out", tmp_path / "out")
    )
