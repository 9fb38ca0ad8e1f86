"""Precision by GPU: bfloat16 only where the GPU computes it, and float32 without TF32. The GPUs here are made up."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from occfeat_train.config import Config
from occfeat_train.distributed import Process
from occfeat_train.training import precision, stages
from occfeat_train.training.stages import RunOptions, run_training
from tests.train.runs import TINY, write_cache

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NOTE = "precision: float32, because this GPU (Tesla V100, sm_70) has no bfloat16"


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts its emulation of bfloat16 as support."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.fixture
def tf32() -> Iterator[None]:
    """The state of a new process, restored afterwards."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_is_bfloat16_on_a_gpu_that_computes_it_and_float32_on_others(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    assert precision.resolve_precision("auto", GPU) == expected
    assert len(precision.note_on_precision("auto", GPU)) == (expected == "float32")
    assert precision.resolve_precision("float32", GPU) == "float32"
    assert precision.note_on_precision("float32", GPU) == []


def test_a_cpu_uses_float32_unless_bfloat16_is_asked_for():
    assert precision.resolve_precision("auto", CPU) == "float32"
    precision.require_precision("bfloat16", CPU)
    with precision.autocast(CPU, "bfloat16"):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
    with precision.autocast(CPU, "auto"):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32


def run_on(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    """The command's work before the first step."""
    monkeypatch.setattr(stages, "train", lambda *given: True)
    write_cache(tmp_path)
    config = replace(Config().override(a for a in TINY if "=" in a), **changes)  # type: ignore[arg-type]
    config = config.override(["network.weights=none"])
    run_training(config, RunOptions(tmp_path, "train", tmp_path / "run"), Process(0, 1, device))


@pytest.mark.usefixtures("v100", "tf32")
def test_a_training_on_a_gpu_without_bfloat16_says_once_that_it_uses_float32(tmp_path, monkeypatch, capsys):
    run_on(GPU, tmp_path, monkeypatch)
    assert capsys.readouterr().out.splitlines().count(NOTE) == 1
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.usefixtures("v100")
def test_asking_for_bfloat16_on_a_gpu_without_it_is_refused_before_a_run_is_created(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"this GPU \(Tesla V100, sm_70\) has no bfloat16.*leave precision=auto"):
        run_on(GPU, tmp_path, monkeypatch, precision="bfloat16")
    assert not (tmp_path / "run").exists()
    assert precision.note_on_precision("bfloat16", GPU) == [NOTE]  # evaluation of a run trained elsewhere uses float32


@pytest.mark.usefixtures("tf32")
def test_float32_on_a_gpu_excludes_tf32_and_bfloat16_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for asked, device in (("auto", GPU), ("bfloat16", GPU), ("float32", CPU)):
        precision.forbid_tf32(asked, device)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch 2.9 warns about the older switches
        precision.forbid_tf32("float32", GPU)
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
