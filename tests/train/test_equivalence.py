"""A training step is the same however its samples are split over micro-batches and processes."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from occfeat_train.config import AugmentConfig, Config, NetworkConfig, OptimConfig
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import build_task
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.loop import stream_of_batches, train
from occfeat_train.training.step import TrainingError, accumulate, forward_backward, set_training
from tests.train.runs import (
    VAL_SCENES,
    evaluate,
    interrupt_at,
    pretrain,
    reader,
    records,
    start_process,
    steps,
    stop_early,
    succeed,
    weights,
)

ALONE = Process(0, 1, torch.device("cpu"))
# BatchNorm and drop-connect depend on the other samples of a forward pass, so both are off.
CONFIG = Config(
    network=NetworkConfig(weights="none", channels=8, image_size=(32, 48), drop_connect=0.0, freeze_batchnorm=True),
    augment=AugmentConfig(num_cameras=2),
    optim=OptimConfig(batch=8),
)
SEPARATE = ["--set", "network.freeze_batchnorm=true", "--set", "network.drop_connect=0"]


def gradients(cache: Path, config: Config, world: int = 1) -> tuple[Task, dict[str, torch.Tensor]]:
    """Gradients and losses of one step, averaged over the ranks. Float64 makes the order of sums irrelevant."""
    dataset = KeyframeDataset(reader(cache), config, training=True)
    task = build_task(config, dataset.grid, 6).double()
    task.network.register_forward_pre_hook(
        lambda _, inputs: (dataclasses.replace(inputs[0], images=inputs[0].images.double()), *inputs[1:])
    )
    set_training(task, config)
    total: dict[str, torch.Tensor] = {}
    for rank in range(world):
        process = Process(rank, world, ALONE.device)
        batches = (dataset.batch(samples) for samples in stream_of_batches(dataset, config, process, 0, 1))
        losses, tokens = accumulate(partial(forward_backward, task, config, ALONE.device), batches, config, process, 0)
        assert len(tokens) == 8 // world
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss
    grads = {name: p.grad / world for name, p in task.named_parameters() if p.requires_grad}
    return task, {**grads, **total}


@pytest.mark.parametrize("task", ["occfeat", "vehicles", "map"])
@pytest.mark.parametrize(("batch", "accumulation", "world"), [(4, 2, 1), (8, 1, 2), (4, 2, 4)])
def test_a_step_does_not_depend_on_its_split_over_micro_batches_and_ranks(cache, task, batch, accumulation, world):
    config = dataclasses.replace(CONFIG, task=task)
    shared = dataclasses.replace(config, optim=OptimConfig(batch=batch, accumulation=accumulation))
    _, expected = gradients(cache, config)
    trained, found = gradients(cache, shared, world)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert all((p.grad is not None) == p.requires_grad for p in trained.parameters())


def test_batchnorm_in_training_makes_micro_batches_a_different_step(cache):
    """The test above freezes BatchNorm for this reason. The paper's accumulation of 5 batches is not a batch of 40."""
    config = dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, freeze_batchnorm=False))
    _, whole = gradients(cache, config)
    _, shared = gradients(cache, dataclasses.replace(config, optim=OptimConfig(batch=4, accumulation=2)))
    assert abs(whole["loss"] - shared["loss"]) > 1e-4


def test_a_batch_that_is_not_divisible_by_the_processes_is_refused(cache):
    dataset = KeyframeDataset(reader(cache), CONFIG, training=True)
    task = build_task(CONFIG, dataset.grid, 6)
    info = type("RunInfo", (), {"config": CONFIG})
    with pytest.raises(TrainingError, match="optim.batch=8 is no multiple of the 3 processes: change one of them"):
        train(task, info, dataset, Path("unused"), Process(0, 3, ALONE.device), None, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(cache, tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes that SIGTERM stopped, and its output."""
    out = tmp_path_factory.mktemp("pair") / "run"
    arguments = pretrain(cache, out, *SEPARATE, "--set", "optim.accumulation=2", *steps(200, batch=4))
    deadline = time.monotonic() + 300
    with start_process(arguments, processes=2) as process:
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "log.jsonl").is_file() and len((out / "log.jsonl").read_text().splitlines()) >= 3:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        output = process.communicate(timeout=120)[0]
    return out, output


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_both_processes_and_saves(pair):
    out, output = pair
    assert output.count("stopped by a signal and saved") == 1, output
    assert 3 <= find_checkpoint(out).step == len(records(out)) < 200


@pytest.mark.slow
def test_two_processes_train_like_one(pair, cache, tmp_path, monkeypatch):
    """The comparison ends at the step at which the pair was stopped. One process then continues the pair's run."""
    run, _ = pair
    step = find_checkpoint(run).step
    alone = pretrain(cache, tmp_path / "run", *SEPARATE, "--set", "optim.accumulation=2", *steps(200, batch=4))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step - 2)
        stop_early(*alone)
    assert find_checkpoint(tmp_path / "run").step == step
    for ours, theirs in zip(records(run), records(tmp_path / "run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    found, expected = weights(run), weights(tmp_path / "run")
    start = pretrain(cache, tmp_path / "start", *SEPARATE, *steps(1), "--set", "optim.lr=1e-30")
    succeed(*start)
    initial = weights(tmp_path / "start")
    moved = distance(expected, initial)
    assert distance(found, expected) < 0.02 * moved  # Adam amplifies rounding errors of the smallest gradients
    interrupt_at(monkeypatch, step)
    again = [str(run) if a == str(tmp_path / "run") else a for a in alone]
    assert f"continuing at step {step} of 200" in stop_early(*again)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5


@pytest.mark.slow
def test_two_processes_evaluate_to_the_same_numbers(cache, tmp_path):
    """One process has three of the five samples, the other two. None is dropped, padded or counted twice."""
    run = tmp_path / "run"
    succeed(*pretrain(cache, run, *steps(2)))
    command = evaluate(run, cache, "--batch", "1", "--out")
    with start_process([*command, str(tmp_path / "two")], processes=2) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    succeed(*command, tmp_path / "one")
    two, one = (json.loads((tmp_path / name / "val.json").read_text()) for name in ("two", "one"))
    assert two.pop("origin") and one.pop("origin")  # command and date differ
    assert two == one
    assert two["samples"] == len(VAL_SCENES) == 5
