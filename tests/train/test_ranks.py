"""State on which all processes must agree, tested with two processes under torchrun."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest

from occfeat_train.training.log import read_log
from tests.train.runs import (
    assert_same_run,
    config_of,
    evaluate,
    finetune,
    pretrain,
    start_process,
    steps,
    succeed,
)

# BatchNorm is in training mode and its statistics change much in a few steps, because each rank sees other samples.
STEPS = [*steps(3), "--validate", "val"]


def run_pair(arguments: list[str], expected: int = 0) -> str:
    """Run occfeat-train under torchrun with two processes; returns its output."""
    with start_process(arguments, processes=2) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == expected, output
    return output


@pytest.fixture(scope="module")
def pair(cache, tmp_path_factory) -> Path:
    """A run of two processes, validated and saved after each step."""
    out = tmp_path_factory.mktemp("pair") / "run"
    run_pair(pretrain(cache, out, *STEPS, "--save-every", "1"))
    return out


@pytest.mark.slow
def test_two_processes_validate_the_network_that_they_save(cache, pair, tmp_path):
    succeed(*evaluate(pair, cache, "--out", tmp_path))
    saved = json.loads((tmp_path / "val.json").read_text())
    validated = next(r["validation"] for r in read_log(pair) if r["step"] == 2 and "validation" in r)
    assert validated["samples"] == saved["samples"]
    assert validated["cosine"] == pytest.approx(saved["cosine"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bytes_however_often_they_save(cache, pair, tmp_path):
    """Neither a checkpoint nor a validation may change BatchNorm's statistics."""
    copy = Path(shutil.copytree(pair, tmp_path / "resumed"))
    shutil.rmtree(copy / "checkpoints" / "step-00000003")
    output = run_pair(pretrain(cache, copy, *STEPS))
    assert "continuing at step 2 of 3" in output
    assert_same_run(copy, pair)
    whole = tmp_path / "whole"
    run_pair(pretrain(cache, whole, *steps(3)))
    assert_same_run(whole, pair)


@pytest.mark.slow
def test_two_processes_finetune_in_the_frame_of_the_pretraining(cache, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    succeed(*pretrain(cache, pretrained, *steps(1), "--set", "frame=ego"))
    output = run_pair(finetune(cache, run, "--from", pretrained, *steps(1)))
    assert "overrides" not in output
    assert config_of(run)["frame"] == "ego"


@pytest.mark.slow
def test_two_processes_refuse_to_enlarge_images_with_one_error(cache, tmp_path):
    """No process waits for the other, and no step is trained."""
    run = tmp_path / "run"
    output = run_pair(pretrain(cache, run, *steps(1), "--set", "network.image_size=48x80"), expected=1)
    assert output.split("Traceback")[0].count("error: ") == 1, output
    assert "images of 40x60, network.image_size=48x80 needs up to 57x96" in output
    assert not (run / "log.jsonl").exists()


def last_block(output: str) -> str:
    """The end of torchrun's summary: the process that failed first, with its error."""
    return output.split("Root Cause (first observed failure):")[1]


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_output_of_torchrun(cache, tmp_path):
    output = run_pair(pretrain(cache, tmp_path / "run", *steps(1), "--validate", "absent"), expected=1)
    error = f"error: no cache at {cache / 'absent.zarr'}"
    assert output.split("Traceback")[0].count(error) == 1
    assert error in last_block(output)
    assert "[rank" not in output


@pytest.mark.slow
def test_an_error_of_all_processes_is_printed_once(cache, tmp_path):
    output = run_pair(pretrain(cache, tmp_path / "run", *steps(20), "--set", "optim.lr=1e9"), expected=1)
    assert output.split("Traceback")[0].count("error: step ") == 1
    assert "error: step " in last_block(output)
    assert "[rank" not in output


@pytest.mark.slow
def test_a_process_whose_partner_was_killed_says_so_in_one_line(cache, tmp_path):
    run = tmp_path / "run"
    with start_process(pretrain(cache, run, *steps(5000)), processes=2) as launcher:
        while not (run / "log.jsonl").is_file() or not read_log(run):
            assert launcher.poll() is None
            time.sleep(0.1)
        (partner,) = (p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1")
        partner.kill()
        output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 1
    assert "error: rank 0 lost the connection to another process, which has ended (" in output
    assert "[rank" not in output
