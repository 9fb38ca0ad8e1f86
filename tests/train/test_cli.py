"""The command line: every stage end to end, every option, and refusal of bad input before a step is trained."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_targets.cache.store import shard_file
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.presets import PRESETS
from occfeat_train.training.checkpoint import find_checkpoint
from tests.train.runs import (
    QUIET,
    TINY,
    assert_same_run,
    config_of,
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
    weights,
    write_cache,
    write_caches,
)
from tests.train.test_batch import GRID as OTHER_GRID


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_caches(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def pretrained(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    output = succeed(*pretrain(cache, out, *steps(2)))
    assert "SIMULATED: all of it" in output
    assert "occfeat: simplebev efficientnet-b0" in output and "images 32x48, grid 4x12x12" in output
    assert "7 samples" in output and "2 steps of 2; adam constant lr 0.0001, on 1 x cpu" in output
    assert f"finished: {out}" in output
    return out


# -- stages -----------------------------------------------------------------------------------------------------------


def test_a_pretraining_is_evaluated(pretrained, cache):
    output = succeed(*evaluate(pretrained, cache))
    assert "SIMULATED: all of it" in output and "5 samples" in output
    results = json.loads((pretrained / "evaluation" / "val.json").read_text())
    assert set(results) == {
        "checkpoint", "step", "task", "split", "weights", "cache", "keyframes", "frames", "enlarged", "skipped", "without_frame", "with_masked_cameras", "simulated", "samples", "occupancy_iou", "cosine",
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
        "checkpoint", "step", "task", "split", "weights", "cache", "keyframes", "frames", "enlarged", "skipped", "without_frame", "with_masked_cameras", "simulated", "samples", "iou", "iou_best",
        "threshold_best", "per_class", "per_class_best", "by_distance",
    }  # fmt: skip
    assert list(results["per_class"]) == (list(MAP_CLASSES) if task == "map" else ["vehicles"])
    assert results["samples"] == 5


def test_a_finetuning_uses_the_complete_pretrained_network_and_a_new_head(cache, pretrained, tmp_path):
    succeed(*finetune(cache, tmp_path / "run", "--from", pretrained, *steps(1), "--set", "optim.lr=1e-30"))
    found, given = weights(tmp_path / "run"), weights(pretrained)
    network = [n for n in found if n.startswith("network.") and n.endswith("weight")]
    assert len(network) > 50
    for name in network:
        np.testing.assert_allclose(found[name], given[name], atol=1e-12, err_msg=name)
    assert {n for n in found if n.startswith("head.")} != {n for n in given if n.startswith("head.")}


def test_a_pretraining_from_another_uses_its_network_and_head(cache, pretrained, tmp_path):
    run = tmp_path / "run"
    output = succeed(*pretrain(cache, run, "--from", pretrained, *steps(1), "--set", "optim.lr=1e-30"))
    assert f"network and head from {pretrained / 'checkpoints' / 'step-00000002'} (occfeat, step 2)" in output
    found, given = weights(run), weights(pretrained)
    assert found.keys() == given.keys()
    for name in found:
        if name.endswith("weight"):
            np.testing.assert_allclose(found[name], given[name], atol=1e-12, err_msg=name)
    output = refuse(*pretrain(cache, tmp_path / "other", "--from", pretrained, "--occ-only"), out=tmp_path / "other")
    assert "does not fit this network: head." in output and "is not of this network" in output


@pytest.mark.parametrize(("labels", "scenes"), [("1", "a"), ("10", "a"), ("60", "ab"), ("100", "abc")])
def test_labels_choose_scenes_and_the_run_lists_them(cache, tmp_path, labels, scenes):
    output = succeed(*finetune(cache, tmp_path / "run", "--labels", labels, "--epochs", "0.1"))
    assert (tmp_path / "run" / "scenes.txt").read_text() == "".join(f"{name}\n" for name in scenes)
    assert f"labels: {len(scenes)} of 3 scenes" in output
    config = config_of(tmp_path / "run")
    assert config["labels"] == float(labels)
    assert (config["optim"]["optimizer"], config["optim"]["schedule"]) == ("adamw", "onecycle")


def test_scenes_can_be_read_from_a_file(cache, tmp_path):
    (tmp_path / "mine").write_text("c\n\nb\nc\n")
    output = succeed(*finetune(cache, tmp_path / "run", "--scenes", tmp_path / "mine", "--epochs", "0.5"))
    assert (tmp_path / "run" / "scenes.txt").read_text() == "c\nb\n"
    assert "4 samples" in output


# -- options ----------------------------------------------------------------------------------------------------------


def test_label_scenes_are_chosen_from_scenes_with_valid_keyframes(tmp_path):
    def skip(arrays):
        arrays["is_valid"][:3] = False  # all of scene a

    write_cache(tmp_path, "train", change=skip)
    output = succeed(*finetune(tmp_path, tmp_path / "run", "--labels", "1", "--epochs", "0.5"))
    listed = tmp_path / "run" / "scenes.txt"
    assert listed.read_text() == "b\n# no valid keyframe: a\n"
    assert f"labels: 1 of 2 scenes, listed in {listed}; 1 more have no valid keyframe: a" in output
    again = succeed(*finetune(tmp_path, tmp_path / "again", "--scenes", listed, "--epochs", "0.5"))
    assert "labels: 1 of 2 scenes" in again
    (tmp_path / "mine").write_text("a\nb\n")
    message = refuse(*finetune(tmp_path, tmp_path / "no", "--scenes", tmp_path / "mine"))
    assert "1 of them not among the 2 of this split that have valid keyframes (a)" in message


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


def frames_of(run: Path, cache: Path) -> list[str]:
    """The frames of an evaluation of a run."""
    succeed(*evaluate(run, cache))
    return json.loads((run / "evaluation" / "val.json").read_text())["frames"]


def test_a_finetuning_and_its_evaluation_keep_the_pretrainings_frame(cache, tmp_path):
    ego, run = tmp_path / "ego", tmp_path / "run"
    succeed(*pretrain(cache, ego, "--set", "frame=ego", *steps(1)))
    for more in ([], ["--preset", "small/map-10"]):
        output = succeed(*finetune(cache, run, "--from", ego, *more, *steps(1)))
        assert config_of(run)["frame"] == "ego"
        assert "overrides" not in output
        assert frames_of(run, cache) == ["ego"]
        shutil.rmtree(run)
    output = succeed(*finetune(cache, run, "--from", ego, "--set", "frame=cameras", *steps(1)))
    assert f"frame=cameras overrides ego, which the network of {ego / 'checkpoints'}" in output
    assert frames_of(run, cache) == ["CAM_FRONT"]
    output = succeed(*evaluate(run, cache, "--frame", "ego"))
    assert "frame=ego overrides cameras, which the network of" in output


def test_frame_auto_is_resolved_once_when_a_run_starts(cache, tmp_path):
    """Another cache does not change the frame."""
    write_caches(tmp_path, frames=("ego",))
    run = tmp_path / "run"
    succeed(*pretrain(tmp_path, run, *steps(1)))
    assert config_of(run)["frame"] == "ego"
    assert frames_of(run, cache) == ["ego"]
    succeed(*pretrain(cache, tmp_path / "next", "--from", run, *steps(1)))
    assert config_of(tmp_path / "next")["frame"] == "ego"


def test_network_settings_are_inherited_and_changes_are_reported(cache, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    short = [
        "--cache",
        cache,
        "--batch",
        "1",
        "--no-tensorboard",
        *QUIET,
        "--epochs",
        "0.15",
        "--from",
        start,
        "--out",
        run,
    ]
    succeed(*pretrain(cache, start, "--set", "network.compat=simple-bev", *steps(1)))
    for command in ("pretrain", "finetune"):
        assert "overrides" not in succeed(command, *short)
        network = config_of(run)["network"]
        assert (network["compat"], network["image_size"], network["channels"]) == ("simple-bev", [32, 48], 8)
        shutil.rmtree(run)
    output = succeed("finetune", *short, "--set", "network.compat=none", "--set", "network.image_size=16x48")
    assert "network.image_size=[16, 48] overrides [32, 48], which the network of" in output
    assert "network.compat=none overrides simple-bev, which the network of" in output


@pytest.mark.parametrize(
    "options", [["--network", "lss"], ["--backbone", "resnet-50"], ["--set", "network.channels=12"]]
)
def test_another_network_than_the_pretrained_is_refused_by_name(cache, pretrained, tmp_path, options):
    message = refuse(*finetune(cache, tmp_path / "run", "--from", pretrained, *options), out=tmp_path / "run")
    assert (
        "was trained with" in message and "its weights fit no other value: leave that option or preset out" in message
    )


def test_features_of_another_teacher_with_as_many_channels_are_reported(cache, pretrained, tmp_path):
    write_caches(tmp_path, teacher="another one")
    said = succeed(*evaluate(pretrained, tmp_path, "--out", tmp_path / "out"))
    said += succeed(*pretrain(tmp_path, tmp_path / "run", "--from", pretrained, *steps(1)))
    assert said.count("another teacher: the cache's features are {'name': 'another one', ") == 2
    assert said.count("predicts {'name': 'made up', ") == 2
    assert "another teacher" not in succeed(*evaluate(pretrained, cache, "--out", tmp_path / "out"))


def test_a_moved_teacher_is_the_same_teacher(pretrained, tmp_path):
    write_caches(tmp_path, teacher="/moved/made up")
    assert "another teacher" not in succeed(*evaluate(pretrained, tmp_path, "--out", tmp_path / "out"))


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_features_of_other_channels_are_refused_in_evaluation_and_report(pretrained, tmp_path, command):
    write_caches(tmp_path, dim=8)
    out = ["--out", tmp_path / "report.html" if command == "report" else tmp_path]
    message = refuse(command, pretrained, "--cache", tmp_path, "--split", "val", "--device", "cpu", *out)
    assert "has features of 8 channels" in message


def test_a_report_states_that_the_cache_has_another_teachers_features(pretrained, tmp_path):
    write_caches(tmp_path, teacher="another one")
    where = ["--cache", tmp_path, "--split", "val", "--device", "cpu", "--samples", "1"]
    assert "another teacher: the cache's" in succeed("report", pretrained, *where, "--out", tmp_path / "report.html")


def test_a_run_does_not_continue_on_other_keyframes_of_the_same_spec(pretrained, tmp_path):
    write_caches(tmp_path / "others", first=100)
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    message = refuse(*pretrain(tmp_path / "others", run, *steps(2)))
    assert "keyframes: the cache holds others, or has skipped others" in message


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
    assert "build it with --image-size 57x86, or allow it with --set allow_upsampling=true" in message
    resized = ["--set", "augment.resize=[1, 1.5]"]  # for 32x48
    assert "--image-size 48x72" in refuse(*pretrain(cache, out, *resized, *steps(1)), out=out)
    output = succeed(*pretrain(cache, out, *resized, *steps(1), "--set", "allow_upsampling=true"))
    assert "the cache's images of 40x60 are enlarged (allow_upsampling)" in output
    succeed(*pretrain(cache, tmp_path / "large", *large, *steps(1), "--set", "allow_upsampling=true"))
    output = succeed(*evaluate(tmp_path / "large", cache, "--out", tmp_path / "results"))
    assert "the cache's images of 40x60 are enlarged (allow_upsampling)" in output
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
    assert all(line.endswith("a cache built with --image-size 540x960") for line in needy)
    for name, size in (("table2/simplebev-enb0-448x800/occfeat", "540x960"), ("small/occfeat", "76x136")):
        assert f"# needs a cache built with --image-size {size} or more" in succeed("config", "show", name)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_missing_unfinished_and_unsuitable_caches_are_refused(cache, tmp_path):
    out = tmp_path / "run"
    assert "no cache at" in refuse(*pretrain(tmp_path, out), out=out)
    assert (
        "(found there: train.zarr, val.zarr): build it with 'occfeat-targets build', or correct --cache and --split"
        in (refuse(*pretrain(cache, out, "--split", "test"), out=out))
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
        (["--epochs", "0"], "optim.epochs=0.0: a number above 0 expected"),
        (["--epochs", "nan"], "optim.epochs=nan: a number above 0 expected"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--backbone-weights", "./absent"], "backbone weights ./absent: there is no such folder"),
        (["--backbone-weights", "absent.pth.tar"], "MoCo-v2's are of a resnet-50, the network has efficientnet-b0"),
    ],
)
def test_wrong_options_are_refused_with_the_expected_value(cache, tmp_path, options, expected):
    out = tmp_path / "run"
    assert expected in refuse(*pretrain(cache, out, *options), out=out)


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
