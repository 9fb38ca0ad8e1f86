"""A run that was killed or stopped and resumed ends in the same bytes as an undisturbed run.

OCCFEAT_KILLS sets the number of kills.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from occfeat_train.training import checkpoint
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.log import read_log
from tests.train.runs import (
    KILLS,
    assert_same_run,
    finetune,
    interrupt_at,
    invoke,
    pretrain,
    records,
    refuse,
    start_process,
    steps,
    stop_early,
    succeed,
    write_cache,
)

# Drop-connect, augmentation, accumulation and a schedule: all of their states must resume correctly.
VARIED = [
    "--set", "optim.accumulation=2", "--batch", "1", "--set", "optim.schedule=onecycle", "--set", "optim.optimizer=adamw",
    "--save-every", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Path:
    """An undisturbed run of ten steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(*pretrain(cache, out, *VARIED, *steps(10)))
    return out


def last_step(run: Path) -> int:
    """The last step in the log; -1 if there is none."""
    lines = [*((run / "log.jsonl").read_bytes().split(b"\n")[:-1] if (run / "log.jsonl").is_file() else [])]
    return json.loads(lines[-1])["step"] if lines else -1


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_in_the_same_bytes(cache, tmp_path):
    number = 4 + 6 * KILLS
    whole, out = tmp_path / "whole", tmp_path / "killed"
    succeed(*pretrain(cache, whole, *VARIED, *steps(number)))
    arguments = pretrain(cache, out, *VARIED, *steps(number))
    random = np.random.default_rng(0)
    for _ in range(KILLS):
        start = max((int(p.name[5:]) for p in (out / "checkpoints").glob("step-*")), default=0)
        target = int(random.integers(start, min(start + 6, number - 1)))
        old = (out / "log.jsonl").stat().st_ino if (out / "log.jsonl").is_file() else None
        with start_process(arguments) as process:
            while process.poll() is None:
                is_new = (out / "log.jsonl").is_file() and (out / "log.jsonl").stat().st_ino != old
                if is_new and last_step(out) >= target:
                    time.sleep(random.uniform(0, 0.1))
                    process.kill()
                    break
                time.sleep(0.002)
            output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
    assert find_checkpoint(out).step < number
    assert "lock was left by process " in succeed(*arguments)
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_saves_after_the_current_step_and_the_same_command_continues(
    cache, whole, tmp_path, monkeypatch, number, step
):
    before = signal.getsignal(number)
    arguments = pretrain(cache, tmp_path / "run", *VARIED, *steps(10))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, number)
        assert "stopped by a signal and saved: run the same command again" in stop_early(*arguments)
    assert signal.getsignal(number) == before
    assert find_checkpoint(tmp_path / "run").step == step + 2 == len(records(tmp_path / "run"))
    output = succeed(*arguments)
    assert f"continuing at step {step + 2} of 10" in output
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_in_the_last_step_finishes_the_run(cache, whole, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 8)
    assert "finished: " in succeed(*pretrain(cache, tmp_path / "run", *VARIED, *steps(10)))
    assert_same_run(tmp_path / "run", whole)


def test_a_finetuning_resumes_to_the_same_bytes(cache, whole, tmp_path, monkeypatch):
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    commands = [finetune(cache, out, "--from", whole, "--task", "map", *VARIED, *steps(6)) for out in runs]
    succeed(*commands[0])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        stop_early(*commands[1])
    succeed(*commands[1])
    assert_same_run(runs[1], runs[0])


def test_a_finished_run_started_again_only_reports_that_it_is_finished(cache, whole):
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.name in ("model.safetensors", "config.json")}  # fmt: skip
    logged = (whole / "log.jsonl").read_text()
    output = succeed(*pretrain(cache, whole, *VARIED, *steps(10)))
    assert "finished already, at step 10" in output
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files} == files
    assert (whole / "log.jsonl").read_text() == logged


def test_a_half_written_line_of_the_log_is_dropped(cache, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        stop_early(*pretrain(cache, out, *VARIED, *steps(10)))
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({**read_log(out)[-1], "step": 6}) + '\n{"step": 7, "lo')
    assert [record["step"] for record in read_log(out)] == list(range(7))
    succeed(*pretrain(cache, out, *VARIED, *steps(10)))
    assert_same_run(out, whole)


def test_damaged_lines_of_the_log_are_kept_on_resuming_and_cost_no_other_line(cache, tmp_path, monkeypatch):
    """Also one whose step is not known to lie before the checkpoint, and one that is JSON but no record."""
    out = tmp_path / "run"
    command = pretrain(cache, out, *steps(7), "--save-every", "4")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        stop_early(*command)
    lines = (out / "log.jsonl").read_bytes().splitlines()
    shutil.rmtree(out / "checkpoints" / "step-00000006")  # it continues at step 4
    broken = [lines[0], lines[1][:9] + b"\xff\n\n" + lines[1][10:], lines[2].replace(b"data_wait", b"data-wait")]
    (out / "log.jsonl").write_bytes(b"\n".join([*broken, b"{" + lines[3], *lines[4:]]) + b"\n")
    assert [record["step"] for record in read_log(out)] == [0, 4, 5]
    assert f"{out / 'log.jsonl'} has 5 damaged lines (2, 3, 4, 5, 6), kept unchanged" in succeed(*command)
    assert (out / "log.jsonl").read_bytes().startswith(b"\n".join([*broken, b"{" + lines[3]]) + b"\n")
    assert [record["step"] for record in read_log(out)] == [0, 4, 5, 6]


def test_a_checkpoint_that_was_not_validated_is_validated_on_resuming(cache, tmp_path, monkeypatch):
    """A signal skips the validation, and a kill may interrupt it. The missing record is written when the run continues."""
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    commands = [pretrain(cache, out, "--validate", "val", "--save-every", "2", *steps(4)) for out in runs]
    succeed(*commands[0])
    for step, run in ((0, stop_early), (2, succeed)):  # stops at the checkpoints after 2 and 4 steps
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            run(*commands[1])
    succeed(*commands[1])
    validations = [[(r["step"], r["validation"]) for r in read_log(run) if "validation" in r] for run in runs]
    assert validations[0] == validations[1]
    assert [step for step, _ in validations[0]] == [1, 3]


# -- another run ------------------------------------------------------------------------------------------------------


def test_a_run_of_another_config_is_refused_naming_every_difference(cache, whole):
    message = refuse(*pretrain(cache, whole, *VARIED, *steps(10), "--seed", "7", "--set", "loss.feat=0.5"))
    assert "holds another run (loss.feat: 0.01 != 0.5; seed: 0 != 7 [there != here])" in message
    assert "choose another --out" in message


def test_a_run_on_other_targets_or_another_number_of_samples_is_refused(cache, whole, tmp_path):
    write_cache(tmp_path / "other", dim=5)
    message = refuse(*pretrain(tmp_path / "other", whole, *VARIED, *steps(10)))
    assert "cache fingerprint: " in message
    write_cache(tmp_path / "longer", scenes=tuple("aaabbccc"))
    message = refuse(*pretrain(tmp_path / "longer", whole, *VARIED, *steps(10)))
    assert "training samples: 7 != 8" in message


def test_a_finetuning_from_other_weights_or_with_other_scenes_is_refused(cache, whole, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "scenes").write_text("a\n")
    start = finetune(cache, out, "--scenes", tmp_path / "scenes", *steps(1))
    succeed(*start)
    message = refuse(*start, "--from", whole)
    assert "initial weights: backbone weights: none != " in message
    (tmp_path / "scenes").write_text("b\n")
    assert "list of label scenes: " in refuse(*start)


def test_a_finetuning_continues_after_the_run_that_it_started_from_was_moved(cache, whole, tmp_path):
    start, moved, out = tmp_path / "pretrained", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(whole, start)
    succeed(*finetune(cache, out, "--from", start, *steps(1)))
    start.rename(moved)
    assert "finished already" in succeed(*finetune(cache, out, "--from", moved, *steps(1)))
    succeed(*pretrain(cache, start, *VARIED, *steps(2)))  # another run of the old name
    message = refuse(*finetune(cache, out, "--from", start, *steps(1)))
    assert "initial weights: " in message


def test_a_run_that_failed_before_its_first_checkpoint_gives_way_to_another(cache, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_finite", fail)
        result = invoke(*finetune(cache, out, *steps(1)))
    assert result.exit_code == 1 and "no space" in result.output
    assert len(records(out)) == 1 and (out / "scenes.txt").exists() and not list((out / "checkpoints").glob("step-*"))
    succeed(*pretrain(cache, out, *steps(2), "--seed", "7"))
    assert find_checkpoint(out).info.config.seed == 7 and len(records(out)) == 2
    assert not (out / "scenes.txt").exists()


def test_the_folder_of_a_model_is_not_taken_for_a_run_without_a_checkpoint(cache, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    assert "config.json can't be used" in refuse(*pretrain(cache, tmp_path, *steps(1)), out=tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "dinov2"}'


def fail(*arguments: object) -> None:
    raise OSError("no space")


def test_a_failed_start_leaves_an_output_folder_that_another_config_may_use(cache, tmp_path):
    """Missing weights fail after the folder was created and before the first step."""
    out = tmp_path / "run"
    assert "no such folder" in refuse(*pretrain(cache, out, *steps(1), "--backbone-weights", "./absent"), out=out)
    assert "finished" in succeed(*pretrain(cache, out, *steps(1)))
