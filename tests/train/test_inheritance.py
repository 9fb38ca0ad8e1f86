"""What a run takes from the run that it starts from, and what must fit: network, frame, teacher, keyframes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import (
    QUIET,
    config_of,
    evaluate,
    finetune,
    pretrain,
    refuse,
    steps,
    succeed,
    weights,
    write_caches,
)


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
        " holds a simplebev efficientnet-b0 with 8 channels (task occfeat), whose weights fit no other value than "
        in message
        and "leave that option or preset out" in message
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
