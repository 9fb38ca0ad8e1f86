"""Every stage of the command line end to end, with each of its options."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_train.presets import PRESETS
from tests.train.runs import (
    QUIET,
    TINY,
    assert_same_run,
    config_of,
    evaluate,
    finetune,
    pretrain,
    reader,
    records,
    refuse,
    steps,
    succeed,
    write_cache,
    write_caches,
)


def test_a_pretraining_is_evaluated(pretrained, cache):
    output = succeed(*evaluate(pretrained, cache))
    assert "SIMULATED: all of it" in output and "5 samples" in output
    results = json.loads((pretrained / "evaluation" / "val.json").read_text())
    assert set(results) == {
        "checkpoint", "step", "task", "split", "weights", "cache", "corruption", "keyframes", "frames", "enlarged", "skipped", "without_frame", "without_targets", "with_masked_cameras", "simulated", "origin", "samples", "occupancy_iou", "cosine",
    }  # fmt: skip
    assert (results["step"], results["task"], results["split"], results["samples"]) == (2, "occfeat", "val", 5)
    assert results["cache"] == reader(cache, "val").cache.spec.fingerprint
    assert results["simulated"] == ["SIMULATED: all of it"]
    assert 0 < results["occupancy_iou"] < 100 and -1 < results["cosine"] < 1


@pytest.mark.parametrize("task", ["vehicles", "map"])
@pytest.mark.parametrize("is_pretrained", [True, False])
def test_a_finetuning_starts_from_the_given_weights_and_is_evaluated(cache, pretrained, tmp_path, task, is_pretrained):
    run = tmp_path / "run"
    start = ["--from", pretrained] if is_pretrained else []
    output = succeed(*finetune(cache, run, *start, "--task", task, *steps(2)))
    assert f"{task}: simplebev" in output
    if is_pretrained:
        assert f"network from {pretrained / 'checkpoints' / 'step-00000002'} (occfeat, step 2)" in output
    else:
        assert "backbone: from scratch, random weights" in output
    succeed(*evaluate(run, cache))
    results = json.loads((run / "evaluation" / "val.json").read_text())
    assert set(results) == {
        "checkpoint", "step", "task", "split", "weights", "cache", "corruption", "keyframes", "frames", "enlarged", "skipped", "without_frame", "without_targets", "with_masked_cameras", "simulated", "origin", "samples", "iou", "iou_best",
        "threshold_best", "per_class", "per_class_best", "by_distance",
    }  # fmt: skip
    assert list(results["per_class"]) == (list(MAP_CLASSES) if task == "map" else ["vehicles"])
    assert results["samples"] == 5


@pytest.mark.parametrize(("labels", "scenes"), [("1", "c"), ("10", "c"), ("67", "bc"), ("100", "abc")])
def test_labels_choose_scenes_and_the_run_lists_them(cache, tmp_path, labels, scenes):
    output = succeed(*finetune(cache, tmp_path / "run", "--labels", labels, "--epochs", "0.1"))
    assert (tmp_path / "run" / "scenes.txt").read_text() == "".join(f"{name}\n" for name in scenes)
    how = "" if labels == "100" else " (last of each block, split order)"
    assert f"labels: {len(scenes)} of 3 scenes{how}, listed" in output
    config = config_of(tmp_path / "run")
    assert config["labels"] == float(labels)
    assert (config["optim"]["optimizer"], config["optim"]["schedule"]) == ("adamw", "onecycle")


def test_scenes_can_be_read_from_a_file(cache, tmp_path):
    (tmp_path / "mine").write_text("c\n\nb\nc\n")
    output = succeed(*finetune(cache, tmp_path / "run", "--scenes", tmp_path / "mine", "--epochs", "0.5"))
    assert (tmp_path / "run" / "scenes.txt").read_text() == "c\nb\n"
    assert "4 samples" in output


def test_label_scenes_are_chosen_from_scenes_with_valid_keyframes(tmp_path):
    def skip(arrays):
        arrays["is_valid"][5:] = False  # all of scene c

    write_cache(tmp_path, "train", change=skip)
    output = succeed(*finetune(tmp_path, tmp_path / "run", "--labels", "1", "--epochs", "0.5"))
    listed = tmp_path / "run" / "scenes.txt"
    assert listed.read_text() == "b\n# no valid keyframe: c\n"
    assert f"labels: 1 of 2 scenes (last of each block, split order), listed in {listed}; 1 more scene" in output
    assert "1 more scene without a valid keyframe: c" in output
    again = succeed(*finetune(tmp_path, tmp_path / "again", "--scenes", listed, "--epochs", "0.5"))
    assert "labels: 1 of 2 scenes (from a list)" in again
    (tmp_path / "mine").write_text("c\nb\n")
    message = refuse(*finetune(tmp_path, tmp_path / "no", "--scenes", tmp_path / "mine"))
    assert "1 of them not among the 2 of this split that have valid keyframes (c)" in message


def test_the_default_splits_are_train_for_training_and_val_for_evaluation(cache, pretrained, tmp_path):
    assert f"of {cache / 'val.zarr'}" in succeed(*evaluate(pretrained, cache, "--out", tmp_path))
    output = succeed(*evaluate(pretrained, cache, "--split", "train", "--out", tmp_path))
    assert f"7 samples of {cache / 'train.zarr'}" in output
    assert {file.name for file in tmp_path.iterdir()} == {"train.json", "val.json"}
    assert "5 samples" in succeed(*pretrain(cache, tmp_path / "run", "--split", "val", *steps(1)))


def test_the_default_run_directory_is_named_after_the_options(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCCFEAT_CACHE", str(cache))
    short = [*TINY, "--batch", "2", "--epochs", "0.1", "--no-tensorboard", "--no-progress", "--device", "cpu"]
    succeed("pretrain", *short, "--preset", "small/occfeat", "--lambda", "0.1")
    succeed("finetune", *short, "--task", "map", "--labels", "10")
    assert sorted(os.listdir("runs")) == ["map-10-scratch", "small-occfeat-lambda-0.1"]


def test_each_arm_of_a_comparison_has_its_own_default_run_directory(cache, pretrained, tmp_path, monkeypatch):
    """The paper's None, OccFeat and OccFeat-100, and a checkpoint of OccFeat-100."""
    monkeypatch.chdir(tmp_path)
    long = Path(shutil.copytree(pretrained, "occfeat-100ep"))
    short = [*TINY, "--cache", cache, "--batch", "1", "--epochs", "0.2", "--no-tensorboard", *QUIET, "--labels", "1"]
    for start in ([], ["--from", pretrained], ["--from", long], ["--from", long / "checkpoints" / "step-00000002"]):
        succeed("finetune", *short, *start)
    (tmp_path / "mine").write_text("b\n")
    succeed("finetune", *short, "--scenes", "mine")
    arms = ["from-occfeat-100ep", "from-occfeat-100ep-step-00000002", "from-run", "mine-scratch", "scratch"]
    assert sorted(os.listdir("runs")) == [f"vehicles-1-{arm}" for arm in arms]


def test_set_overrides_the_shortcut_options(cache, tmp_path):
    run = tmp_path / "run"
    more = ["--batch", "3", "--seed", "5", "--epochs", "0.5", "--set", "optim.batch=1", "--set", "augment.crop=0.1"]
    succeed(*pretrain(cache, run, *more))
    config = config_of(run)
    assert (config["optim"]["batch"], config["seed"], config["optim"]["epochs"]) == (1, 5, 0.5)
    assert (config["augment"]["crop"], config["network"]["weights"]) == (0.1, "none")


def test_equal_seeds_give_equal_runs_and_different_seeds_different_ones(cache, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        succeed(*pretrain(cache, tmp_path / name, "--seed", seed, *steps(2)))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "loss", "logged"),
    [
        ([], {"occ": 1, "feat": 0.01}, {"occupancy", "features"}),
        (["--occ-only"], {"occ": 1, "feat": 0}, {"occupancy"}),
        (["--feat-only"], {"occ": 0, "feat": 1}, {"features"}),
        (["--lambda", "0.5"], {"occ": 1, "feat": 0.5}, {"occupancy", "features"}),
        (["--lambda", "0"], {"occ": 1, "feat": 0}, {"occupancy"}),
        (["--preset", "table4/lambda-0.1"], {"occ": 1, "feat": 0.1}, {"occupancy", "features"}),
    ],
)
def test_losses_can_be_weighted_or_switched_off(cache, tmp_path, options, loss, logged):
    succeed(*pretrain(cache, tmp_path / "run", *options, *steps(1)))
    found = config_of(tmp_path / "run")["loss"]
    assert {name: found[name] for name in loss} == loss
    assert set(records(tmp_path / "run")[0]) & {"occupancy", "features"} == logged
    output = succeed(*evaluate(tmp_path / "run", cache))
    results = json.loads((tmp_path / "run" / "evaluation" / "val.json").read_text())
    assert (results["occupancy_iou"] is not None, results["cosine"] is not None) == ("occupancy" in logged, "features" in logged)  # fmt: skip
    assert "5 samples" in output


def test_finetuning_presets_set_task_and_labels(cache, tmp_path):
    succeed(*finetune(cache, tmp_path / "run", "--preset", "small/map-10", "--epochs", "0.5"))
    config = config_of(tmp_path / "run")
    assert (config["task"], config["labels"], config["optim"]["schedule"]) == ("map", 10, "onecycle")


def test_the_reference_frame_can_be_chosen(cache, pretrained, tmp_path):
    """The default is the front camera's frame if the cache has it."""
    results = []
    for frame in ([], ["--frame", "CAM_FRONT"], ["--frame", "ego"]):
        succeed(*evaluate(pretrained, cache, "--out", tmp_path, *frame))
        results.append(json.loads((tmp_path / "val.json").read_text())["occupancy_iou"])
    assert results[0] == results[1] != results[2]
    message = refuse(*evaluate(pretrained, cache, "--frame", "CAM_FRONT_LEFT"))
    assert "frame=CAM_FRONT_LEFT: this cache has grids in ego, CAM_FRONT, CAM_BACK: choose one of them" in message
    succeed(*pretrain(cache, tmp_path / "run", "--set", "frame=ego", *steps(1)))
    assert config_of(tmp_path / "run")["frame"] == "ego"


def test_skipped_keyframes_are_reported_and_not_trained_on(tmp_path):
    def skip_two(arrays: dict[str, np.ndarray]) -> None:
        arrays["is_valid"][:2] = False

    write_cache(tmp_path, change=skip_two)
    output = succeed(*pretrain(tmp_path, tmp_path / "run", *steps(1)))
    assert "2 of 7 keyframes of" in output and "were skipped by its build and are left out" in output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["keyframes"] == 5


def test_images_are_enlarged_only_if_allowed_and_this_is_reported(cache, tmp_path):
    out = tmp_path / "run"
    large = ["--set", "network.image_size=48x64"]
    message = refuse(*pretrain(cache, out, *large, *steps(1)), out=out)
    assert "has images of 40x60, network.image_size=48x64 needs up to 57x76, and enlarged" in message
    assert "build it with --image-size 57x86, or allow it with --allow-upsampling" in message
    resized = ["--set", "augment.resize=[1, 1.5]"]  # for 32x48
    assert "--image-size 48x72" in refuse(*pretrain(cache, out, *resized, *steps(1)), out=out)
    output = succeed(*pretrain(cache, out, *resized, *steps(1), "--allow-upsampling"))
    assert "the cache's images of 40x60 are enlarged to up to 48x72 (--allow-upsampling)" in output
    succeed(*pretrain(cache, tmp_path / "large", *large, *steps(1), "--set", "allow_upsampling=true"))  # the same
    output = succeed(*evaluate(tmp_path / "large", cache, "--out", tmp_path / "results"))
    assert "the cache's images of 40x60 are enlarged to up to 48x64 (--allow-upsampling)" in output
    assert json.loads((tmp_path / "results" / "val.json").read_text())["enlarged"]


def test_an_evaluation_needs_images_of_the_networks_size_only(cache, pretrained, tmp_path):
    write_caches(tmp_path / "plain", image_size=(32, 48))
    succeed(*evaluate(pretrained, tmp_path / "plain", "--out", tmp_path / "out"))
    write_caches(tmp_path / "less", image_size=(32, 47))
    message = refuse(*evaluate(pretrained, tmp_path / "less", "--out", tmp_path / "out"))
    assert "has images of 32x47, network.image_size=32x48 needs up to 32x48, and enlarged" in message


def test_evaluation_batch_and_workers_do_not_change_the_result(cache, pretrained, tmp_path):
    results = []
    for more in (["--batch", "1", "--loader-threads", "1"], ["--batch", "5", "--loader-threads", "3"]):
        succeed(*evaluate(pretrained, cache, "--out", tmp_path, *more))
        results.append(json.loads((tmp_path / "val.json").read_text()))
    assert results[0]["occupancy_iou"] == results[1]["occupancy_iou"]
    assert results[0]["cosine"] == pytest.approx(results[1]["cosine"], rel=1e-4)
    for workers in ("1", "3"):
        succeed(*pretrain(cache, tmp_path / workers, "--loader-threads", workers, *steps(3)))
    assert_same_run(tmp_path / "1", tmp_path / "3")


def test_save_every_sets_the_interval_of_checkpoints(cache, tmp_path):
    succeed(*pretrain(cache, tmp_path / "run", "--save-every", "2", *steps(5)))
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000004", "step-00000005"]


def test_progress_is_shown_unless_switched_off(cache, tmp_path):
    command = [a for a in pretrain(cache, tmp_path / "run", *steps(1)) if a != "--no-progress"]
    output = succeed(*command)
    assert "1/1" in output and "samples/s, waiting for data" in output
    assert "waiting for data" not in succeed(*pretrain(cache, tmp_path / "quiet", *steps(1)))
    assert "sample/s" in succeed(*[a for a in evaluate(tmp_path / "run", cache) if a != "--no-progress"])


def test_presets_that_need_a_larger_cache_than_the_default_are_marked():
    lines = succeed("config", "list").splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    needy = [line for line in lines if "--image-size" in line]
    assert [line.split()[0] for line in needy] == [name for name in PRESETS if "448x800" in name]
    assert all(line.split("  a cache built with ")[1].startswith("--image-size 540x960") for line in needy)
    for name, size in (("table2/simplebev-enb0-448x800/occfeat", "540x960"), ("small/occfeat", "76x136")):
        assert f"# needs a cache built with --image-size {size} or more" in succeed("config", "show", name)
