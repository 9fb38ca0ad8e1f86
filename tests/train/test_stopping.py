"""A training that was stopped early says so: by its exit code, as a start of another run, and in a report."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from occfeat_train.training import stages
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.log import RunLog
from tests.train.runs import (
    evaluate,
    finetune,
    interrupt_at,
    invoke,
    pretrain,
    refuse,
    steps,
    stop_early,
    succeed,
)


@pytest.fixture(scope="module")
def stopped(cache, tmp_path_factory) -> Path:
    """A pretraining stopped by a signal after 3 of 60 steps, with a checkpoint of step 2 beside it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 1, signal.SIGUSR1)
        stop_early(*pretrain(cache, out, *steps(60), "--save-every", "2"))
    return out


def test_an_unfinished_run_is_refused_as_a_start_unless_it_is_allowed(cache, stopped, tmp_path):
    for stage in (finetune, pretrain):
        out = tmp_path / stage.__name__
        message = refuse(*stage(cache, out, "--from", stopped, *steps(1)), out=out)
        assert f"error: {stopped} has not finished, it is at step 3 of 60: run its command again, or pass" in message
        assert "--allow-unfinished" in message and message.count("error") == 1
        output = succeed(*stage(cache, out, "--from", stopped, "--allow-unfinished", *steps(1)))
        assert "step-00000003 (occfeat, step 3 of 60, unfinished)" in output


def test_a_checkpoint_that_is_named_may_be_of_any_step(cache, stopped, tmp_path):
    older = stopped / "checkpoints" / "step-00000002"
    output = succeed(*finetune(cache, tmp_path / "run", "--from", older, *steps(1)))
    assert f"network from {older} (occfeat, step 2 of 60, unfinished)" in output


def test_an_unfinished_run_is_marked_by_evaluate_and_in_the_report(cache, stopped, pretrained, tmp_path):
    output = succeed(*evaluate(stopped, cache, "--out", tmp_path))
    assert "occfeat, step 3 of 60, unfinished, 5 samples" in output
    child, file = tmp_path / "child", tmp_path / "report.html"
    succeed(*finetune(cache, child, "--from", stopped, "--allow-unfinished", *steps(1)))
    runs = [stopped, pretrained, child]
    succeed("report", *runs, "--cache", cache, "--out", file, "--samples", "1", "--device", "cpu")
    page = file.read_text()
    name = os.path.relpath(stopped)  # because the other run has the same name
    assert page.count(f"{name} <b>(step 3 of 60, unfinished)</b>") > 2
    assert page.count("unfinished)</b>") == page.count(f"{name} <b>(step 3 of 60, unfinished)</b>")
    assert "pretrained: run, step 3 of 60, unfinished" in page


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_has_the_exit_code_of_a_training_to_continue(
    cache, tmp_path, monkeypatch, number
):
    """Otherwise the job would not be requeued."""
    before, out = signal.getsignal(number), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "prepare", lambda *given: os.kill(os.getpid(), number))
        result = invoke(*pretrain(cache, out, *steps(2)))
    assert result.exit_code == 3
    assert f"run the same command again to continue {out}" in result.output
    assert signal.getsignal(number) == before
    succeed(*pretrain(cache, out, *steps(2)))


def test_a_second_ctrl_c_stops_at_once_and_says_how_to_continue(cache, tmp_path, monkeypatch, capfd):
    log, out = RunLog.step, tmp_path / "run"

    def logged(self: RunLog, record: dict[str, Any]) -> None:
        log(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    command = pretrain(cache, out, *steps(10), "--save-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", logged)
        result = invoke(*command)
    assert result.exit_code == 130
    assert f"nothing saved after the newest checkpoint: run the same command again to continue {out}" in result.output
    assert "stopping after the current step; press Ctrl-C again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    assert find_checkpoint(out).step == 2
    assert "continuing at step 2 of 10" in succeed(*command)
