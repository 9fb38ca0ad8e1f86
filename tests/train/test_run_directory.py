"""What a command does with a run that is there already: extends it, deletes it if asked, or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from occfeat_train.training.checkpoint import checkpoint_folders, find_checkpoint
from occfeat_train.training.log import read_log
from tests.train.runs import (
    assert_same_run,
    config_of,
    finetune,
    interrupt_at,
    pretrain,
    refuse,
    steps,
    stop_early,
    succeed,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_finished_run_is_extended_as_if_it_had_always_been_longer(cache, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    succeed(*pretrain(cache, short, *steps(3)))
    assert find_checkpoint(short).is_finished
    output = succeed(*pretrain(cache, short, *steps(5)))
    assert "continuing at step 3 of 5" in output
    succeed(*pretrain(cache, long, *steps(5)))
    assert_same_run(short, long)
    assert find_checkpoint(short).is_finished and config_of(short) == config_of(long)


def test_a_run_is_neither_shortened_nor_extended_with_other_changes(cache, pretrained):
    before = contents(pretrained)
    for options in (steps(1), [*steps(5), "--set", "optim.lr=3e-4"]):
        message = refuse(*pretrain(cache, pretrained, *options))
        assert f"{pretrained} holds another run (" in message and "optim.epochs" in message
        assert "choose another --out, or pass --overwrite" in message
    assert contents(pretrained) == before


def test_a_run_with_a_schedule_over_its_whole_length_is_not_extended(cache, tmp_path):
    run = tmp_path / "run"
    succeed(*finetune(cache, run, *steps(1)))
    message = refuse(*finetune(cache, run, *steps(2)))
    assert message.count("\n") == message.count("error: ") + message.count("SIMULATED") == 2
    assert "of the schedule onecycle, whose learning rate depends on their number: it cannot be extended" in message
    assert f"start another run from its weights with --from {run}" in message


def test_overwrite_deletes_the_run_and_starts_again(cache, tmp_path):
    run = tmp_path / "run"
    succeed(*pretrain(cache, run, *steps(3), "--seed", "1", "--save-every", "1"))
    (run / "notes.txt").write_text("mine")
    (run / "evaluation").mkdir()
    output = succeed(*pretrain(cache, run, *steps(1), "--overwrite"))
    assert "continuing" not in output
    assert config_of(run)["seed"] == 0 and len(read_log(run)) == 1
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-00000001"]
    assert (run / "notes.txt").read_text() == "mine" and not (run / "evaluation").exists()


def test_a_stopped_run_that_overwrote_another_is_continued_without_overwrite(cache, tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = pretrain(cache, run, *steps(5))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        output = stop_early(*command, "--overwrite")
    assert f"run the same command again without --overwrite to continue {run}" in output
    step = find_checkpoint(run).step
    assert f"continuing at step {step} of 5" in succeed(*command)


def test_overwrite_takes_a_run_whose_config_is_damaged_and_a_new_directory(cache, tmp_path):
    run = tmp_path / "run"
    succeed(*pretrain(cache, run, *steps(1), "--overwrite"))
    (run / "config.json").write_text("{")
    succeed(*pretrain(cache, run, *steps(1), "--overwrite"))


@pytest.mark.parametrize("name", ["config.json", "letter.txt", "checkpoints/notes"])
def test_overwrite_deletes_nothing_that_is_no_run(cache, tmp_path, name):
    out = tmp_path / "other"
    file = out / name
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"config": "of another program"}))
    message = refuse(*pretrain(cache, out, *steps(1), "--overwrite"), out=out)
    assert f"error: {out} is not a run of occfeat-train, so --overwrite deletes nothing" in message
    assert contents(out) == {name: file.read_bytes()}


def test_what_a_killed_training_left_is_removed_and_unfinished_files_of_others_are_not(cache, tmp_path):
    run = tmp_path / "run"
    left = [
        ".config.json.node-7.partial",
        "checkpoints/.step-00000003.partial/model.safetensors",
        "checkpoints/.best.partial",
    ]
    others = [".movie.mkv.partial", "data/.step-00000003.partial", "checkpoints/.other.partial"]
    for name in (*left[:2], *others):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (run / left[2]).symlink_to(".step-00000003.partial")
    assert "is not empty and not a run" in refuse(*pretrain(cache, run, *steps(1)), out=run)
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*") if not p.is_dir()) == sorted(others)


def test_overwrite_does_not_delete_the_weights_that_it_starts_from(cache, pretrained, tmp_path):
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    before = contents(run)
    for start in (run, next((run / "checkpoints").iterdir())):
        message = refuse(*pretrain(cache, run, *steps(1), "--from", start, "--overwrite"))
        assert f"--overwrite would delete {run}, which --from starts from" in message
    assert contents(run) == before
