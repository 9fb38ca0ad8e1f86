"""CUDA graphs of a step. Without a GPU, a recording calls the pass again and fills its first result, as a graph does."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from occfeat_train.distributed import Process
from occfeat_train.tasks.base import Task
from occfeat_train.training.graph import CudaGraphs, GraphedPass, copy_padded, padded, padded_length
from occfeat_train.training.step import Trainer, TrainingError, forward_backward
from tests.train.test_batch import make_batch
from tests.train.test_tasks import CONFIG, task_of

CPU = torch.device("cpu")


class Repeated(CudaGraphs):
    """Counts recordings. A recorded function writes to the addresses of its first result, also of the gradients."""

    def __init__(self, task: Task) -> None:
        self.task, self.recordings, self.releases, self.waits = task, 0, 0, ""

    def run(self, function: Any) -> Any:
        return function(), self.waits

    def record(self, function: Any) -> Any:
        self.recordings += 1
        buffers = [b.clone() for b in self.task.buffers()]
        losses = function()
        for buffer, before in zip(self.task.buffers(), buffers, strict=True):
            buffer.copy_(before)  # recording executes nothing
        grads = [p.grad for p in self.task.parameters()]

        def replay() -> None:
            found = self.gradients_of(function, losses)
            for grad, new in zip(grads, found, strict=True):
                if grad is not None:
                    grad.copy_(new)

        return replay, losses

    def release(self) -> None:
        self.releases += 1

    def gradients_of(self, function: Any, losses: Any) -> list[Any]:
        before = [p.grad for p in self.task.parameters()]
        self.task.zero_grad(set_to_none=True)
        for name, value in function().items():
            losses[name].copy_(value)
        found = [p.grad for p in self.task.parameters()]
        for parameter, grad in zip(self.task.parameters(), before, strict=True):
            parameter.grad = grad
        return found


def batches(count: int) -> list[Any]:
    """Batches with different numbers of voxels, all of the same padded length."""
    made = []
    for i in range(count):
        batch = make_batch(2)
        arrays = {name: array[i:] if name in ("voxels", "features") else array for name, array in batch.arrays.items()}
        made.append(dataclasses.replace(batch, arrays=arrays))
    return made


def steps(task: Task, run: Any, given: list[Any], accumulation: int) -> list[tuple[float, torch.Tensor]]:
    found = []
    for i, batch in enumerate(given):
        torch.manual_seed(i)
        loss = float(run(batch)["loss"])
        grads = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])
        found.append((loss, grads.clone()))
        if i % accumulation == accumulation - 1:
            task.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def graphed(task: Task, graphs: CudaGraphs) -> tuple[GraphedPass, list[str]]:
    """A graphed pass, and the messages that it gives."""
    messages: list[str] = []
    run = partial(forward_backward, task, CONFIG, CPU)
    return GraphedPass(run, task.parameters(), task.ragged, graphs, messages.append), messages


@pytest.mark.parametrize("accumulation", [1, 2])
def test_graphs_give_the_losses_and_gradients_of_plain_passes(accumulation):
    plain, task = (task_of().train() for _ in range(2))
    task.load_state_dict(plain.state_dict())
    given = batches(8)
    expected = steps(plain, partial(forward_backward, plain, CONFIG, CPU), given, accumulation)
    graphs = Repeated(task)
    found = steps(task, graphed(task, graphs)[0], given, accumulation)
    assert graphs.recordings == 1
    for (loss, grads), (expected_loss, expected_grads) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert (grads - expected_grads).norm() < 1e-4 * expected_grads.norm()
    for name, value in task.state_dict().items():  # running statistics
        assert torch.allclose(value, plain.state_dict()[name], rtol=1e-4), name


def test_every_shape_is_called_once_before_it_is_recorded():
    task = task_of().train()
    graphs = Repeated(task)
    run, _ = graphed(task, graphs)
    small, large = make_batch(2), make_batch(3)
    recordings = []
    for batch in (small, small, small, small, large, large, small):
        run(batch)
        recordings.append(graphs.recordings)
    assert recordings == [0, 0, 0, 1, 1, 2, 2]


def test_recordings_are_released_if_a_new_shape_needs_their_memory():
    task = task_of().train()
    graphs = Repeated(task)
    run, messages = graphed(task, graphs)
    small, large = make_batch(2), make_batch(3)
    for _ in range(4):
        run(small)
    assert graphs.recordings == 1
    call, attempts = graphs.run, []

    def short_of_memory(function: Any) -> Any:
        attempts.append(graphs.releases)
        if not graphs.releases:
            task.zero_grad(set_to_none=True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(function)

    graphs.run = short_of_memory  # type: ignore[method-assign]
    task.zero_grad(set_to_none=True)
    assert float(run(large)["loss"]) > 0 and attempts == [0, 1]
    assert any(p.grad is not None for p in task.parameters())
    for batch in (small, small, large, large):  # each is called, then recorded again
        run(batch)
    assert graphs.recordings == 3 and not messages


def test_a_pass_that_exceeds_the_memory_without_recordings_raises():
    task = task_of().train()
    graphs = Repeated(task)
    run, _ = graphed(task, graphs)

    def short_of_memory(function: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs.run = short_of_memory  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        run(make_batch(2))


@pytest.mark.parametrize("fault", ["waits", "raises"])
def test_a_pass_that_cannot_be_recorded_is_called_with_one_message(fault):
    task = task_of().train()
    graphs = Repeated(task)

    def refuse(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    if fault == "waits":
        graphs.waits, reason = "heads.py:7", "the step waits for the GPU in heads.py:7"
    else:
        graphs.record, reason = refuse, "operation not permitted when stream is capturing"  # type: ignore[method-assign]
    run, messages = graphed(task, graphs)
    batch, losses = make_batch(2), []
    for _ in range(5):
        torch.manual_seed(0)
        losses.append(float(run(batch)["loss"]))
    assert graphs.recordings == 0 and len(set(losses)) == 1
    assert messages == [f"training continues without CUDA graphs, which make it faster: {reason}"]


@pytest.mark.parametrize("rows", [0, 1, 255, 257, 4_000, 65_537, 66_000])
def test_padded_lengths_are_few_and_little_longer(rows):
    length = padded_length(rows)
    assert rows <= length < rows + max(rows / 4, 256)
    assert padded_length(length) == length
    assert len({padded_length(n) for n in range(max(rows, 1), 2 * max(rows, 1))}) <= 6


def test_added_rows_mark_no_voxel():
    batch = make_batch(2)
    rows = len(batch.arrays["voxels"])
    target = padded(batch, ("voxels", "features"))
    copy_padded(batch, target)
    assert torch.equal(target.arrays["voxels"][:rows], batch.arrays["voxels"])
    assert (target.arrays["voxels"][rows:] == -1).all() and len(target.arrays["voxels"]) > rows
    assert (target.arrays["features"][rows:] == 0).all()
    assert torch.equal(target.images, batch.images)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_step_that_is_not_finite_changes_no_weight(device):
    """On a GPU the optimiser's kernel finds this out, because the host looks at the loss only after it."""
    task = task_of()
    trainer = Trainer(task, CONFIG, Process(0, 1, torch.device(device)), 10)
    batch = make_batch(2).to(torch.device(device))
    trainer.take_step(iter([batch]))
    before = [p.detach().clone() for p in task.parameters()]
    task.head.conv.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(TrainingError, match="step 1: loss"):
        trainer.take_step(iter([batch])).record()
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
