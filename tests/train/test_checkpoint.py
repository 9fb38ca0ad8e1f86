"""Checkpoints: files that other tools can open, and refusal of damaged, mismatched or malicious files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from occfeat_train.config import Config
from occfeat_train.training import checkpoint
from occfeat_train.training.checkpoint import find_checkpoint, save_checkpoint
from occfeat_train.training.initial import restore
from occfeat_train.training.saving import CheckpointError
from tests.conftest import Marker
from tests.train.runs import (
    GRID,
    assert_same,
    copy_of,
    evaluate,
    finetune,
    pretrain,
    refuse,
    steps,
    succeed,
    update_digests,
    write_cache,
    write_caches,
)
from tests.train.test_batch import GRID as OTHER_GRID


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Path:
    """A pretraining of four steps with a checkpoint after each step."""
    out = tmp_path_factory.mktemp("trained") / "run"
    succeed(*pretrain(cache, out, "--save-every", "1", *steps(4)))
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may damage."""
    return copy_of(trained, tmp_path / "run")


def test_a_checkpoint_that_a_training_replaces_while_it_is_opened_is_found_again(run, monkeypatch):
    folders, listed = checkpoint.checkpoint_folders, []

    def list_and_replace(run: Path) -> list[Path]:
        found = folders(run)
        if not listed:
            (run / "checkpoints" / "step-00000004").rename(run / "checkpoints" / ".step-00000004.deleted")
        listed.append(found)
        return found

    monkeypatch.setattr(checkpoint, "checkpoint_folders", list_and_replace)
    assert find_checkpoint(run).step == 3


def test_safetensors_alone_opens_the_complete_weights(trained):
    file = find_checkpoint(trained).path / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        opened = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    restored = restore(find_checkpoint(trained)).state_dict()
    assert_same({name: opened[name] for name in sorted(opened)}, {name: restored[name] for name in sorted(restored)})
    assert any(name.startswith("network.encoder.") for name in opened)


def test_the_two_newest_checkpoints_are_kept_with_their_config(trained, cache):
    assert sorted(os.listdir(trained / "checkpoints")) == ["step-00000003", "step-00000004"]
    found = find_checkpoint(trained)
    assert found.step == 4 and found.path == find_checkpoint(trained / "checkpoints" / "step-00000004").path
    info = json.loads((found.path / "config.json").read_text())
    assert info == json.loads((trained / "config.json").read_text())
    assert Config.from_dict(info["config"]) == found.info.config
    assert found.info.grid == GRID
    assert (found.info.num_samples, found.info.feature_dim) == (7, 6)
    assert found.info.simulated == ("all of it",)


def test_an_older_checkpoint_can_be_evaluated_by_its_path(trained, cache):
    output = succeed(*evaluate(trained / "checkpoints" / "step-00000003", cache, "--out", trained.parent / "older"))
    assert "step-00000003: occfeat" in output


@pytest.mark.parametrize("channels", [4, 16])
def test_another_number_of_channels_is_refused_with_both_numbers(cache, trained, tmp_path, channels):
    out = tmp_path / "run"
    message = refuse(
        *finetune(cache, out, "--from", trained, *steps(1), "--set", f"network.channels={channels}"), out=out
    )
    assert f"network.channels={channels}: " in message and "efficientnet-b0 with 8 channels" in message


def test_another_backbone_is_refused_with_both_names(cache, trained, tmp_path):
    out = tmp_path / "run"
    message = refuse(
        *finetune(cache, out, "--from", trained, *steps(1), "--set", "network.backbone=resnet-50"), out=out
    )
    assert "network.backbone=resnet-50: " in message and "holds a simplebev efficientnet-b0 with" in message


def test_another_grid_is_refused_with_both_grids(trained, tmp_path):
    write_caches(tmp_path / "other", grid=OTHER_GRID)
    out = tmp_path / "run"
    message = refuse(*finetune(tmp_path / "other", out, "--from", trained, *steps(1)), out=out)
    assert "was trained on the grid 4x12x12" in message and "this cache has 4x12x10" in message


def test_a_trainer_state_with_code_in_it_is_refused_and_the_code_does_not_run(cache, run, tmp_path):
    marker = tmp_path / "marker"
    for save in (lambda o, f: f.write_bytes(pickle.dumps(o)), lambda o, f: torch.save(o, f)):
        save({"optimizer": Marker(marker)}, find_checkpoint(run).path / "trainer.pt")
        for expected in ("trainer.pt is damaged", "no trainer state that can be loaded safely"):
            with pytest.raises(CheckpointError, match=f"{expected}.*step-00000003 is intact; pass that one, or delete"):
                find_checkpoint(run).trainer_state()
            assert expected in refuse(*pretrain(cache, run, "--save-every", "1", *steps(4)))
            update_digests(find_checkpoint(run).path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_initial_weights_with_code_in_them_are_refused_and_the_code_does_not_run(cache, run, tmp_path, name):
    marker, out = tmp_path / "marker", tmp_path / "out"
    if name == "model.pth":
        source = tmp_path / name
        torch.save({"state_dict": Marker(marker)}, source)
        expected = "is a file: a run or checkpoint directory of occfeat-train is expected"
    else:
        source = run
        (find_checkpoint(run).path / name).write_bytes(pickle.dumps(Marker(marker)))
        assert "model.safetensors is damaged, its SHA-256 is not" in refuse(*evaluate(source, cache))
        update_digests(find_checkpoint(run).path)
        expected = "model.safetensors is damaged"
    assert expected in refuse(*finetune(cache, out, "--from", source, *steps(1)), out=out)
    assert expected in refuse(*evaluate(source, cache))
    assert not marker.exists()


def flip_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= 1
    file.write_bytes(data)


def read_all(run: Path) -> tuple[object, ...]:
    """Everything that resuming reads from a checkpoint."""
    found = find_checkpoint(run)
    return found.step, found.info, restore(found).state_dict(), found.trainer_state()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "checkpoint.json"])
def test_a_flipped_bit_in_any_file_is_found(run, name):
    """Without the check, ten of ten such flips in the weights silently changed the results."""
    file = find_checkpoint(run).path / name
    good = file.read_bytes()
    read_all(run)
    for position in [0, len(good) - 1, *np.random.default_rng(0).integers(0, len(good), 10)]:
        flip_bit(file, int(position))
        with pytest.raises(CheckpointError, match=f"{name} is (missing or )?damaged.*step-00000003 is intact"):
            read_all(run)
        file.write_bytes(good)
    read_all(run)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "checkpoint.json"])
def test_a_missing_file_is_named_and_an_older_checkpoint_is_not_used_automatically(cache, run, name):
    (find_checkpoint(run).path / name).unlink()
    newest, older = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 3))
    message = refuse(*pretrain(cache, run, "--save-every", "1", *steps(4)))
    assert f"{newest / name} is missing" in message
    assert f"{older} is intact; pass that one, or delete {newest} to continue from it" in message
    if name != "trainer.pt":  # evaluation does not read it
        assert f"{newest / name} is missing" in refuse(*evaluate(run, cache))
        assert f"{newest / name} is missing" in refuse(*finetune(cache, run.parent / "out", "--from", run, *steps(1)))


def test_an_older_checkpoint_that_is_damaged_too_is_not_recommended(run):
    for step in (3, 4):
        flip_bit(run / "checkpoints" / f"step-0000000{step}" / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="no older checkpoint of its run is intact"):
        find_checkpoint(run).weights()


def test_a_renamed_checkpoint_keeps_its_step(run):
    folder = find_checkpoint(run).path
    assert find_checkpoint(folder.rename(run / "best")).step == 4
    (run / "best").rename(folder.with_name("step-00000009"))
    with pytest.raises(CheckpointError, match="step-00000009 holds step 4: rename it to step-00000004"):
        find_checkpoint(run)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(cache, run):
    found = find_checkpoint(run)
    weights, state = found.weights(), found.trainer_state()
    names = [name for name in weights if name.endswith("running_var")][:4]
    for name, value in zip(names, (float("nan"), float("inf"), float("-inf"), float("nan")), strict=True):
        weights[name].view(-1)[-1] = value
    shown = f"{', '.join(names[:3])} and 1 more of "
    with pytest.raises(CheckpointError, match="the weights after step 5 are not saved: " + shown + ".* are not finite"):
        save_checkpoint(run, 5, found.info, weights, state)
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000003", "step-00000004"]
    save_file(weights, found.path / "model.safetensors")
    update_digests(found.path)
    assert shown in refuse(*evaluate(run, cache))
    assert shown in refuse(*pretrain(cache, run, "--save-every", "1", *steps(4)))
    assert shown in refuse(*finetune(cache, run.parent / "out", "--from", run, *steps(1)), out=run.parent / "out")


def test_truncated_weights_are_refused_and_training_continues_once_their_checkpoint_is_deleted(cache, run, trained):
    file = find_checkpoint(run).path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is damaged" in refuse(*evaluate(run, cache))
    assert "step-00000003 is intact" in refuse(*pretrain(cache, run, "--save-every", "1", *steps(4)))
    shutil.rmtree(file.parent)
    assert "continuing at step 3 of 4" in succeed(*pretrain(cache, run, "--save-every", "1", *steps(4)))
    assert_same(find_checkpoint(run).weights(), find_checkpoint(trained).weights())


def test_a_damaged_config_is_refused(cache, run):
    folder = find_checkpoint(run).path
    (folder / "config.json").write_text('{"config": {}')
    assert "config.json is damaged" in refuse(*evaluate(run, cache))
    update_digests(folder)
    assert "can't be used" in refuse(*evaluate(run, cache))
    (run / "config.json").write_text("[]")
    message = refuse(*pretrain(cache, run, "--save-every", "1", *steps(4)))
    assert "can't be used" in message and "choose another --out" in message


def test_a_config_of_another_release_is_refused(run, cache):
    file = find_checkpoint(run).path / "config.json"
    info = json.loads(file.read_text())
    info["config"]["network"]["wings"] = 2
    file.write_text(json.dumps(info))
    update_digests(file.parent)
    message = refuse(*evaluate(run, cache))
    assert "unknown fields network.wings" in message and "another release" in message


def test_a_directory_that_is_not_a_run_is_refused(cache, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        assert f"no checkpoint in {path}: " in refuse(*evaluate(path, cache))
        assert f"no checkpoint in {path}: " in refuse(*finetune(cache, tmp_path / "out", "--from", path))
    assert "; only runs with --validate have best" in refuse(*evaluate(tmp_path / "checkpoints" / "best", cache))


def test_a_pretraining_is_not_evaluated_on_features_with_other_channels(trained, tmp_path):
    write_cache(tmp_path, "val", dim=5)
    message = refuse(*evaluate(trained, tmp_path))
    assert "has features of 5 channels (made up)" in message and "step-00000004 has 6: build" in message
