"""The training loop: log, checkpoints, stops, precision and compilation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.training import step
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.initial import restore
from occfeat_train.training.log import read_log
from occfeat_train.training.step import Trainer
from tests.train.runs import (
    finetune,
    invoke,
    pretrain,
    reader,
    records,
    steps,
    succeed,
    weights,
    write_cache,
)
from tests.train.test_batch import make_batch
from tests.train.test_tasks import CONFIG, task_of

INDUCTOR = bool(os.environ.get("OCCFEAT_INDUCTOR"))  # compilation takes minutes on a small machine


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory) -> Path:
    """Six steps of two samples with default options."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = [a for a in pretrain(cache, out, *steps(6)) if a != "--no-tensorboard"]
    succeed(*command)
    return out


def test_a_run_whose_steps_are_read_one_step_late_is_the_same(run, cache, tmp_path, monkeypatch):
    """As on a GPU."""
    start = Trainer.__init__

    def lagging(trainer: Trainer, *given: Any, **options: Any) -> None:
        start(trainer, *given, **options)
        trainer.lag = 1

    monkeypatch.setattr(Trainer, "__init__", lagging)
    succeed(*pretrain(cache, tmp_path / "late", *steps(6)))
    late, there = records(tmp_path / "late"), records(run)
    assert [(r["step"], r["epoch"], r["loss"], r["lr"]) for r in late] == [
        (r["step"], r["epoch"], r["loss"], r["lr"]) for r in there
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "late").values(), weights(run).values(), strict=True)
    )


def test_every_step_logs_one_record_with_the_documented_fields(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in lines] == list(range(6))
    for record in lines:
        assert set(record) == {
            "step", "epoch", "loss", "occupancy", "features", "grad_norm", "lr", "samples_per_s", "data_wait", "time",
        }  # fmt: skip
        assert record["loss"] == pytest.approx(record["occupancy"] + 0.01 * record["features"], rel=1e-5)
        assert record["epoch"] == pytest.approx((record["step"] + 1) * 2 / 7)
        assert record["lr"] == 1e-4
        assert record["samples_per_s"] > 0
        assert 0 <= record["data_wait"] <= 1
        assert 0 < record["grad_norm"] < math.inf


def test_tensorboard_gets_the_same_records_unless_switched_off(run, cache, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    (file,) = (run / "tensorboard").glob("events.out.tfevents.*")
    events = b"".join(RawEventFileLoader(str(file)).Load())
    for name in ("train/loss", "train/occupancy", "train/features", "train/grad_norm", "train/lr", "train/data_wait"):
        assert events.count(name.encode()) == 6, name
    succeed(*pretrain(cache, tmp_path / "run", *steps(1)))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_each_epoch_and_the_end_of_the_run_save_a_checkpoint(run):
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000004", "step-00000006"]


def test_validation_follows_every_checkpoint(cache, tmp_path):
    succeed(*pretrain(cache, tmp_path / "run", *steps(3), "--validate", "val", "--save-every", "2"))
    validations = {r["step"]: r["validation"] for r in read_log(tmp_path / "run") if "validation" in r}
    assert list(validations) == [1, 2]
    assert all(set(v) == {"samples", "occupancy_iou", "cosine"} and v["samples"] == 5 for v in validations.values())


def test_validation_does_not_change_training(cache, tmp_path):
    for name, more in (("with", ["--validate", "val", "--save-every", "1"]), ("without", [])):
        succeed(*pretrain(cache, tmp_path / name, *steps(3), *more))
    assert records(tmp_path / "with") == records(tmp_path / "without")


def test_the_learning_rate_follows_the_schedule(cache, tmp_path):
    run = tmp_path / "run"
    cycle = ["--set", "optim.schedule=onecycle", "--set", "optim.lr=3e-4", *steps(8)]
    succeed(*finetune(cache, run, *cycle))
    found = [record["lr"] for record in records(run)]
    rise = np.linspace(3e-4 / 25, 3e-4, 2)  # linear for two of nine steps, then down to 1 / 250,000 at the ninth
    fall = np.linspace(3e-4, 3e-4 / 25e4, 8)[:7]
    assert found == pytest.approx([rise[0], *fall])


def cache_with_nan(folder: Path, keyframe: int, name: str = "features") -> Path:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][keyframe] = np.nan

    write_cache(folder, change=change)
    return folder


def test_a_nan_loss_names_the_samples_and_stops_the_run_without_saving(tmp_path):
    cache, run = cache_with_nan(tmp_path / "cache", 3), tmp_path / "run"
    dataset = KeyframeDataset(reader(cache), Config(seed=1, allow_upsampling=True), training=True)
    order = [dataset.stream(i)[1] for i in range(12)]
    bad = order.index(3) // 2
    assert bad > 0, "choose a seed with at least one step before the bad one"
    result = invoke(*pretrain(cache, run, *steps(6), "--seed", "1", "--save-every", "1"))
    assert result.exit_code == 1
    tokens = ", ".join(f"train-token{keyframe}" for keyframe in order[2 * bad : 2 * bad + 2])
    assert (
        f"error: step {bad}: loss nan, gradient norm nan for samples {tokens}. Nothing was saved after it"
        in result.output
    )
    assert "occfeat-targets preview --token" in result.output
    assert find_checkpoint(run).step == bad
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    restore(find_checkpoint(run))
    assert [record["step"] for record in records(run)] == list(range(bad))


def test_an_infinite_gradient_stops_the_run(cache, tmp_path, monkeypatch):
    passes, calls = step.forward_backward, []

    def damaged(task, config, device, batch):
        losses = passes(task, config, device, batch)
        calls.append(batch)
        if len(calls) == 3:
            next(iter(task.parameters())).grad[:] = torch.inf
        return losses

    monkeypatch.setattr(step, "forward_backward", damaged)
    result = invoke(*pretrain(cache, tmp_path / "run", *steps(6), "--save-every", "1"))
    assert result.exit_code == 1
    assert "step 2: loss 0." in result.output and "gradient norm inf" in result.output
    assert find_checkpoint(tmp_path / "run").step == 2


def test_gradients_are_clipped_to_the_requested_norm(cache, tmp_path, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def clipped(parameters, limit):
        parameters = list(parameters)
        before = clip(parameters, limit)
        norms.append(
            (float(before), float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.requires_grad])))
        )
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    succeed(*pretrain(cache, tmp_path / "run", *steps(2), "--set", "optim.clip=0.1"))
    for (before, after), record in zip(norms, records(tmp_path / "run"), strict=True):
        assert before == record["grad_norm"] > 0.1  # the logged norm is the one before clipping
        assert after == pytest.approx(0.1, rel=1e-3)


def test_bfloat16_trains_close_to_float32_with_float32_weights(run, cache, tmp_path):
    succeed(*pretrain(cache, tmp_path / "run", *steps(6), "--set", "precision=bfloat16"))
    for ours, theirs in zip(records(tmp_path / "run"), records(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert ours["loss"] != theirs["loss"]
    assert {t.dtype for t in weights(tmp_path / "run").values()} == {torch.float32, torch.int64}


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
# TorchDynamo instantiates every autograd function and reads the gradient of every tensor that it traces.
# TorchInductor imports torch.jit.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_network_trains_like_an_uncompiled_one(run, cache, tmp_path, monkeypatch):
    """TorchDynamo captures the network. With OCCFEAT_INDUCTOR=1 it is also compiled, as on a GPU."""
    calls, compiler = [], torch.compile

    def compiled(function, **options):
        calls.append(function)
        return compiler(function, **({} if INDUCTOR else {"backend": "eager"}), **options)

    monkeypatch.setattr(torch, "compile", compiled)
    succeed(*pretrain(cache, tmp_path / "run", *steps(2), "--compile"))
    assert len(calls) == 2  # encoder and decoder
    for ours, theirs in zip(records(tmp_path / "run"), records(run), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert weights(tmp_path / "run").keys() == weights(run).keys()


@pytest.mark.parametrize(
    ("value", "device", "num_steps", "expected"),
    [
        ("auto", "cuda", step.COMPILED_FROM, True),
        ("auto", "cuda", step.COMPILED_FROM - 1, False),
        ("auto", "cpu", step.COMPILED_FROM, False),
        (True, "cpu", 1, True),
        (False, "cuda", step.COMPILED_FROM, False),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(value, device, num_steps, expected):
    assert step.is_compiled(Config(compile=value), torch.device(device), num_steps) is expected


def run_of(task):
    return partial(step.forward_backward, task, task.config, torch.device("cpu"))


def test_a_step_that_exceeds_the_memory_is_repeated_with_activation_checkpointing(monkeypatch, capsys):
    """An optimiser step, too, is the same as without the shortage."""
    plain, short = (task_of(network=dataclasses.replace(CONFIG.network, recompute="auto")).train() for _ in range(2))
    short.load_state_dict(plain.state_dict())
    short.network.recompute = False
    head = type(short.head).forward

    def exceed(self, *given):
        if self is short.head and not short.network.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return head(self, *given)

    monkeypatch.setattr(type(short.head), "forward", exceed)
    losses = [step.recompute_if_needed(run_of(task), task, make_batch(2)) for task in (plain, short)]
    assert losses[0]["loss"] == pytest.approx(float(losses[1]["loss"]), rel=1e-6)
    assert short.network.recompute and "continues with activation checkpointing" in capsys.readouterr().out
    for ours, other in zip(short.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_step_that_exceeds_the_memory_with_activation_checkpointing_fails(monkeypatch):
    task = task_of(network=dataclasses.replace(CONFIG.network, recompute="auto")).train()

    def exceed(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(task.head), "forward", exceed)
    with pytest.raises(torch.OutOfMemoryError):
        step.recompute_if_needed(run_of(task), task, make_batch(2))
