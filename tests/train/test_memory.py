"""A GPU's lack of memory: one line with the remedy instead of a traceback. Checkpoints stay intact. The GPU is made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from occfeat_train.config import Config
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training import stages
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.memory import training_remedy
from occfeat_train.training.step import Trainer
from tests.train.runs import evaluate, invoke, pretrain, records, steps, succeed, write_caches

GIB = 1 << 30


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(0.5 * GIB), 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 15 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


def out_of_memory(*given: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of ...")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_caches(tmp_path_factory.mktemp("memory"))


def error_of(arguments: list[str]) -> str:
    """The only error line of a failed command."""
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("error: "))
    return line


def test_training_out_of_memory_is_one_line_and_the_run_can_be_continued(cache, tmp_path, monkeypatch):
    command = pretrain(cache, tmp_path / "run", *steps(4), "--save-every", "2", "--set", "network.recompute=false")
    with monkeypatch.context() as patch:
        take = Trainer.take_step

        def limited(trainer: Trainer, *given: Any, **flags: Any) -> Any:
            return out_of_memory() if trainer.step == 3 else take(trainer, *given, **flags)

        patch.setattr(Trainer, "take_step", limited)
        line = error_of(command)
    assert line.startswith("error: out of memory on Tesla T4 (cpu) in training: 2.25 GiB more needed, of its 16.0 GiB")
    assert "this process holds 15.0 and 0.5 are free" in line
    assert "optim.batch=1 optim.accumulation=2" in line
    assert "network.recompute=true" in line
    assert "a smaller network.image_size than 32x48" in line
    assert find_checkpoint(tmp_path / "run").step == 2
    succeed(*command)
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("allocate", [lambda: np.zeros(1 << 55), lambda: torch.zeros(1 << 50)])
def test_too_little_memory_of_the_machine_is_one_line(cache, tmp_path, monkeypatch, allocate):
    command = pretrain(cache, tmp_path / "run", *steps(4))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", lambda *given, **flags: allocate())
        line = error_of(command)
    assert line.startswith("error: this machine has too little memory (") and "in training: start a run in" in line
    assert "tried to allocate" in line or "Unable to allocate" in line
    monkeypatch.setattr(stages, "prepare", lambda *given: allocate())
    line = error_of(command)
    assert line.startswith("error: this machine has too little memory (") and "end other programs" in line


def test_evaluation_out_of_memory_is_one_line_with_a_smaller_batch(cache, tmp_path, monkeypatch):
    succeed(*pretrain(cache, tmp_path / "run", *steps(1)))
    monkeypatch.setattr(Pretraining, "measure", out_of_memory)
    line = error_of(evaluate(tmp_path / "run", cache, "--batch", "3"))
    assert "in evaluation: 2.25 GiB more needed" in line
    assert "'occfeat-train evaluate RUN --batch N' with N below 3" in line
    assert "--device cpu" in error_of(evaluate(tmp_path / "run", cache, "--batch", "1"))


@pytest.mark.parametrize(("batch", "world", "expected"), [(16, 1, "8 optim.accumulation=2"), (12, 4, "4 optim.accumulation=3"), (4, 4, None)])  # fmt: skip
def test_the_remedy_keeps_the_samples_of_a_step_and_the_batch_a_multiple_of_the_ranks(batch, world, expected):
    config = replace(Config(), optim=replace(Config().optim, batch=batch))
    remedy = training_remedy(config, world)
    assert ("optim.batch=" in remedy) == (expected is not None)
    assert expected is None or f"optim.batch={expected} " in remedy
    assert "recompute" not in remedy  # already on
