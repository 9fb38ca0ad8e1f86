"""A run that is killed at any of its file-system operations, and disks that are full."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from occfeat_targets.cache.records import digest
from occfeat_train.config import Config
from occfeat_train.distributed import Process
from occfeat_train.training.best import link_best
from occfeat_train.training.checkpoint import RunInfo, find_checkpoint, save_checkpoint
from occfeat_train.training.log import RunLog
from occfeat_train.training.loop import is_validated
from occfeat_train.training.run_directory import begin_run
from occfeat_train.training.run_lock import locked_run
from tests.kills import interrupted_at, unflushed_renames
from tests.targets.command_line import tmpfs
from tests.train.runs import GRID, assert_same_run, pretrain, refuse, steps, succeed

PROCESS = Process(0, 1, torch.device("cpu"))
INFO = RunInfo(Config(), GRID, feature_dim=0, cache="", num_samples=0, initial="")
SCORES = (0.5, 0.7, 0.6, 0.4)


def score(results: Mapping[str, Any]) -> float:
    return float(results["score"])


def train(run: Path, *, overwrite: bool = False) -> None:
    """What a training of four steps writes, in the order of `loop.train`, with a checkpoint after each. The weights are a number."""
    with locked_run(run, PROCESS):
        resume = begin_run(run, INFO, overwrite=overwrite)
        start = resume.step if resume is not None else 0
        log = RunLog(run, start=start, total=4, tensorboard=False, progress=False)
        if start:
            if not is_validated(run, start, PROCESS):
                log.validation(start, {"score": SCORES[start - 1]}, {})
            link_best(run, score)
        for step in range(start, 4):
            log.step({"step": step, "loss": 0.0, "epoch": 0.0, "samples_per_s": 1.0, "data_wait": 0.0})
            weights = {"weight": torch.tensor(float(step))}
            save_checkpoint(run, step + 1, INFO, weights, {"step": step + 1})
            log.validation(step + 1, {"score": SCORES[step]}, {})
            link_best(run, score)
        log.close()


def contents(run: Path) -> dict[str, str]:
    """{file: digest} of a run, without the log, whose lines hold times."""
    there = [path for path in run.rglob("*") if path.name != "log.jsonl"]
    return {str(path.relative_to(run)): digest(path) if path.is_file() else "" for path in there}


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_is_killed_at_any_operation_continues_to_the_same_files(tmp_path, monkeypatch, overwrite):
    """Without `overwrite`, the first training; with it, a training that replaces a finished run."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only matters for a loss of power
    monkeypatch.setattr("occfeat_train.training.log.timestamp", lambda: "")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(whole)
    for number in itertools.count(1):
        if overwrite:
            shutil.copytree(whole, run, symlinks=True)
        if not interrupted_at(number, lambda: train(run, overwrite=overwrite)):
            break
        if (run / "checkpoints").is_dir() and list((run / "checkpoints").glob("step-*")):
            found = find_checkpoint(run)
            assert found.weights()["weight"] == found.step - 1 == found.trainer_state()["step"] - 1
        train(run, overwrite=overwrite)
        assert contents(run) == contents(whole)
        assert (run / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
        shutil.rmtree(run)
    assert number > 40


def test_renamed_files_and_folders_are_on_disk_at_the_end_of_a_training(tmp_path, monkeypatch):
    assert unflushed_renames(lambda: train(tmp_path / "run"), monkeypatch) == []


def test_a_disk_that_is_full_is_an_error_of_one_line_and_the_run_continues(cache, tmp_path):
    """The disk has room for fewer and fewer of: config, log, TensorBoard's file, checkpoints."""
    whole = tmp_path / "whole"
    succeed(*pretrain(cache, whole, *steps(4), "--save-every", "2"))
    with tmpfs(tmp_path / "disk", "size=64m") as disk:
        run, filler = disk / "run", disk / "filler"
        for room in (0, 4_096, 12_288, 16_384, 100_000, 1_000_000):
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
            command = [a for a in pretrain(cache, run, *steps(4), "--save-every", "2") if a != "--no-tensorboard"]
            message = refuse(*command).strip().splitlines()[-1]
            assert message.startswith(f"error: could not write {run}") and "No space left on device" in message
            assert message.endswith("run the same command again")
            filler.unlink()
        succeed(*command)
        assert_same_run(run, whole)
