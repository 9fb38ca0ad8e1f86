"""Correctness of the device: whole networks against the host, and the GPU tests of the project."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from occfeat_train.config import Config
from occfeat_train.distributed import Process
from occfeat_train.training.step import Trainer
from pipelines.gpu_check.inputs import DoubleBatch, config_of, random_batch, task_on
from pipelines.gpu_check.measure import Check, distance

ROOT = Path(__file__).parents[2]
NETWORKS: dict[str, dict[str, Any]] = {
    "simplebev": {},
    "simplebev/resnet-50": {"backbone": "resnet-50"},
    "bevformer": {"lifting": "bevformer"},
    "lss": {"lifting": "lss"},
    "cvt": {"lifting": "cvt"},
    "img-also": {"task": "img-also"},
}
# The error of the device's float32 result may be this many times the error of the host's float32 result. The floor is for
# results that the host computes almost exactly by chance.
_FACTOR, _FLOOR = 10, 1e-3


def correct(check: Check) -> None:
    """Loss and gradient of small networks on the device and on the host in float32, both compared with float64.

    Also bfloat16 on the device, for information, and the augmented input and the occupancy of a batch.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    host = torch.device("cpu")
    try:
        for name, network in list(NETWORKS.items())[: 1 if check.small else None]:  # a dry run shows that the code runs
            with check.guarded(name):
                size = (32, 64) if check.small else (64, 112)
                config = config_of(True, drop_connect=0.0, image_size=size, **network)
                exact = loss_and_gradient(config, host, torch.float64)
                on_host = loss_and_gradient(config, host, torch.float32)
                on_device = loss_and_gradient(config, check.device, torch.float32)
                rounded = loss_and_gradient(config, check.device, torch.bfloat16)
                for part, *found in zip(("loss", "gradient"), on_device, on_host, rounded, exact, strict=True):
                    device32, host32, device16 = (distance(value, found[-1]) for value in found[:-1])
                    check.record(
                        f"{name}: {part}",
                        device_float32=device32,
                        host_float32=host32,
                        device_against_host=distance(found[0], found[1]),
                        device_bfloat16=device16,
                        ok=device32 <= max(_FACTOR * host32, _FLOOR),
                    )
        with check.guarded("batch"):
            batch_on_device(check)
    finally:
        torch.backends.cudnn.allow_tf32 = True


def loss_and_gradient(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of two samples and the gradient of all parameters, flat. bfloat16 means autocast of float32 weights."""
    task, batch = task_on(config, True, device), random_batch(config, 2, True)
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # random numbers differ between host and device
    if dtype == torch.float64:
        task.double()
        batch = DoubleBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)})
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = task(batch.to(device))["loss"]
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])


def graphs(check: Check) -> None:
    """Losses of a training with CUDA graphs and without, and steps that cannot be recorded. Batches have two shapes."""
    for name, recompute in (("occfeat", False), ("occfeat", True), ("img-also", False)):
        config = config_of(True, name, recompute=recompute)
        given = [
            replace(random_batch(config, 2, True), tokens=("a", "b")).to(check.device)
            for _ in range(12 if check.is_cuda else 2)
        ]
        for i, batch in enumerate(given):
            repeats = 1 + 7 * (i % 2)  # of all voxels or returns, so that there are two padded lengths
            ragged = {name: torch.cat([batch.arrays[name]] * repeats) for name in config.task_class.ragged}
            if "sample" in ragged:  # ascending
                order = ragged["sample"].argsort(stable=True)
                ragged = {name: array[order] for name, array in ragged.items()}
            given[i] = replace(batch, arrays={**batch.arrays, **ragged})
        graphed, plain, again = (
            [trainer.take_step(iter([batch])).record()["loss"] for batch in given]
            for trainer in (
                Trainer(task_on(config, True, check.device), config, Process(0, 1, check.device), 100, cuda_graphs=use)
                for use in (True, False, False)
            )
        )
        off, noise = (max(abs(a / b - 1) for a, b in zip(found, plain, strict=True)) for found in (graphed, again))
        check.record(f"{len(given)} steps of {name}, recompute={recompute}", largest_relative_difference=off, of_two_plain_runs=noise,
                     ok=off < max(5 * noise, 1e-3))  # fmt: skip
    if not check.is_cuda:
        return check.record("a step that waits", skipped="needs a GPU")
    for what, fault in (("waits", wait), ("cannot be recorded", refuse_recording)):
        task, messages = task_on(config, True, check.device), []
        task.network.decoder.register_forward_hook(fault)
        with mock.patch.object(Process, "print", lambda self, *lines, into=messages: into.extend(lines)):
            trainer = Trainer(task, config, Process(0, 1, check.device), 100)
            losses = [trainer.take_step(iter([batch])).record()["loss"] for batch in given]
        check.record(f"a step that {what}", messages=messages, losses=losses[-2:], ok=len(messages) == 1)


def wait(*_: Any) -> None:
    torch.zeros(1, device="cuda").item()


def refuse_recording(*_: Any) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("this cannot be recorded")


def batch_on_device(check: Check) -> None:
    """The augmented input and the occupancy of a batch."""
    config = config_of(True)
    here = random_batch(config, 2, True)
    there = here.to(check.device)
    size = config.network.image_size
    for name in ("images", "intrinsics", "cam_from_grid"):
        off = distance(getattr(there.views(size), name), getattr(here.views(size), name))
        check.record(f"batch: {name}", distance=off, ok=off <= 1e-5)
    same = torch.equal(there.volume("occupancy").cpu(), here.volume("occupancy"))
    check.record("batch: occupancy", ok=same)


def run_pytest(check: Check) -> None:
    """The tests that need a GPU. Warnings are not errors here: this machine may have newer libraries than the project pins."""
    tests = ["tests/train/test_losses.py"] if check.small else ["tests/train"]
    chosen = [] if check.small else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    with (check.out / "pytest.txt").open("w") as file:
        done = subprocess.run([*command, *tests, *chosen], cwd=ROOT, stdout=file, stderr=file)
    lines = (check.out / "pytest.txt").read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    check.record("pytest", ok=done.returncode == 0, last=lines[-1:], failed=failed[:20])
