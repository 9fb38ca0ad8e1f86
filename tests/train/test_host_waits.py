"""A step makes the host wait for the GPU nowhere: neither the network nor the losses, forward or backward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from occfeat_train.config import LIFTINGS
from occfeat_train.networks import lss
from occfeat_train.ops import deformable, instance_norm, mean_over_views
from occfeat_train.tasks import heads
from tests.train.host_waits import HostWaits
from tests.train.interpreted import not_launched
from tests.train.test_batch import make_batch
from tests.train.test_gpu_path import KERNELS
from tests.train.test_tasks import CONFIG, task_of

MASK, INDEX = torch.tensor([True, False]), torch.tensor([1, 0])


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU's functions on a CPU. Kernels are prepared but not launched, so all results are arbitrary."""
    pytest.importorskip("triton", reason="no Triton for this platform")
    for module in (instance_norm, heads, deformable, mean_over_views):
        monkeypatch.setattr(module, "runs_triton", lambda device: True)
    monkeypatch.setattr(lss, "host_waits", lambda device: True)
    for name in KERNELS:
        not_launched(name, monkeypatch)
    yield


def waits_of_a_step(name: str, lifting: str) -> list[str]:
    """Waits of the second step; the first one fills caches of constants."""
    task = task_of(network=dataclasses.replace(CONFIG.network, lifting=lifting), task=name).train()
    batch, waits = make_batch(2), HostWaits()
    for context in (contextlib.nullcontext(), waits):
        with context, torch.autocast("cpu", torch.bfloat16):
            task(batch)["loss"].backward()
    return sorted(set(waits.found))


@pytest.mark.usefixtures("gpu_path")
@pytest.mark.parametrize("lifting", LIFTINGS)
@pytest.mark.parametrize("name", ["occfeat", "vehicles"])
def test_a_step_makes_the_host_wait_nowhere(name: str, lifting: str) -> None:
    assert waits_of_a_step(name, lifting) == []


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: INDEX.sum().item(), ["_local_scalar_dense"]),
        (lambda: bool(MASK.any()), ["_local_scalar_dense"]),
        (lambda: INDEX.tolist(), ["tolist"]),
        (lambda: MASK.nonzero(), ["nonzero"]),
        (lambda: torch.where(MASK), ["nonzero"]),
        (lambda: INDEX[MASK], ["index with a mask"]),
        (lambda: INDEX.masked_select(MASK), ["masked_select"]),
        (lambda: torch.bincount(INDEX), ["bincount"]),
        (lambda: torch.unique(INDEX), ["_unique2"]),
        (lambda: INDEX.repeat_interleave(INDEX), ["repeat_interleave"]),
        (lambda: torch.tensor([1.0], device="cpu"), ["tensor"]),
        (lambda: torch.arange(3).to("cpu"), ["arange"]),
        (lambda: torch.linalg.inv(torch.eye(2, device="cpu")), ["_linalg_check_errors"]),
        (lambda: INDEX.repeat_interleave(INDEX, output_size=1), []),
        (lambda: INDEX[INDEX], []),
        (lambda: torch.where(MASK, INDEX, 0).sort(stable=True), []),
        (lambda: torch.linalg.inv_ex(torch.eye(2, device="cpu")), []),
        (lambda: torch.arange(3, device="cpu").new_zeros(2), []),
    ],
)
def test_operations_that_wait_for_a_gpu_are_found(call: Callable[[], Any], expected: list[str]) -> None:
    with HostWaits() as waits:
        call()
    assert waits.found == expected


def test_a_wait_is_reported_with_its_line_and_also_in_a_backward_pass() -> None:
    zeros = torch.zeros(2, 1)
    with HostWaits() as waits:
        mean_over_views.taps_of(zeros, zeros, MASK[:, None], zeros[:, 0], (1, 1), torch.float32)
    (wait,) = waits.found
    assert wait.startswith("ops/mean_over_views.py:")
    assert wait.endswith(" nonzero")

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    leaf = torch.ones(2, requires_grad=True)
    with HostWaits() as waits:
        Waits.apply(leaf).sum().backward()
    assert waits.found == ["_local_scalar_dense"]
