"""RUN/checkpoints/best: the checkpoint with the best validation is kept beside the newest two, and can be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from occfeat_train.tasks.base import Task
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.tasks.segmentation import Segmentation
from occfeat_train.training.checkpoint import checkpoint_folders, find_checkpoint
from occfeat_train.training.log import read_log
from tests.train.runs import evaluate, finetune, interrupt_at, pretrain, steps, stop_early, succeed


def names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(run)]


@pytest.fixture
def scores(monkeypatch):
    """Scores of the validations in order, instead of the real ones. None: no score."""
    values: list[float | None] = []
    results = Pretraining.metric

    def metric(self):
        found = results(self)
        value = values.pop(0) if values else None
        found.results = lambda: {"occupancy_iou": value, "cosine": None}
        return found

    monkeypatch.setattr(Pretraining, "metric", metric)
    return values


def test_the_best_checkpoint_is_kept_beside_the_newest_two(cache, tmp_path, scores):
    run, best = tmp_path / "run", tmp_path / "run" / "checkpoints" / "best"
    scores += [1.0, 3.0, 2.0, 3.0, 0.0]
    command = pretrain(cache, run, "--validate", "val", "--save-every", "1", *steps(5))
    assert "the newest two are kept, and the best on val" in succeed(*command)
    assert names(run) == ["step-00000002", "step-00000004", "step-00000005"]
    assert best.readlink() == Path("step-00000002")
    assert find_checkpoint(best).step == 2 and find_checkpoint(run).step == 5


def test_a_continued_run_knows_its_best_checkpoint(cache, tmp_path, scores, monkeypatch):
    run = tmp_path / "run"
    command = pretrain(cache, run, "--validate", "val", "--save-every", "1", *steps(6))
    scores += [5.0, 1.0]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        stop_early(*command)
    scores[:] = [4.0, 3.0, 2.0, 2.0]  # the first is that of step 3, which was saved but not validated
    succeed(*command)
    assert [r["validation"]["occupancy_iou"] for r in read_log(run) if "validation" in r] == [
        5.0,
        1.0,
        4.0,
        3.0,
        2.0,
        2.0,
    ]
    assert names(run) == ["step-00000001", "step-00000005", "step-00000006"]
    assert find_checkpoint(run / "checkpoints" / "best").step == 1


def test_a_copy_of_a_run_that_followed_the_link_keeps_its_best_checkpoint(cache, tmp_path, scores):
    run = tmp_path / "run"
    scores += [9.0, 1.0, 2.0]
    succeed(*pretrain(cache, run, "--validate", "val", "--save-every", "1", *steps(3)))
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert not (copy / "checkpoints" / "best").is_symlink()
    assert find_checkpoint(copy / "checkpoints" / "best").step == 1
    scores += [1.0, 1.0]
    succeed(*pretrain(cache, copy, "--validate", "val", "--save-every", "1", *steps(5)))
    assert (copy / "checkpoints" / "best").readlink() == Path("step-00000001")
    assert names(copy) == ["step-00000001", "step-00000004", "step-00000005"]


def test_without_validation_or_without_a_score_there_is_no_best(cache, tmp_path, scores):
    scores += [None] * 3
    for options in ([], ["--validate", "val"]):
        run = tmp_path / str(len(options))
        succeed(*pretrain(cache, run, *options, "--save-every", "1", *steps(3)))
        assert not (run / "checkpoints" / "best").exists()
        assert names(run) == ["step-00000002", "step-00000003"]


def test_the_best_checkpoint_is_evaluated_and_started_from_by_its_name(cache, tmp_path, scores):
    run = tmp_path / "run"
    scores += [9.0, 1.0]
    succeed(*pretrain(cache, run, "--validate", "val", "--save-every", "1", *steps(2)))
    best = run / "checkpoints" / "best"
    succeed(*evaluate(best, cache))
    assert json.loads((run / "evaluation" / "best" / "val.json").read_text())["step"] == 1
    output = succeed(*finetune(cache, tmp_path / "fine", "--from", best, *steps(1)))
    assert f"network from {run}/checkpoints/step-00000001 (occfeat, step 1 of 2, unfinished)" in output


def test_a_score_is_higher_for_a_better_network():
    assert Segmentation.score({"iou": 7.0}) == 7.0
    assert Pretraining.score({"occupancy_iou": 7.0, "cosine": 0.5}) == 7.0
    assert Pretraining.score({"occupancy_iou": None, "cosine": 0.5}) == 0.5
    assert Task.score({"loss": 2.0}) == -2.0
