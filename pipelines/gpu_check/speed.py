"""Speed and memory on the device: upper limits, the training step and its parts, other networks, and variants."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from occfeat_train.config import Config
from occfeat_train.networks.network import unmirror
from occfeat_train.ops.mirror import mirror
from occfeat_train.tasks.losses import feature_loss, occupancy_loss
from pipelines.gpu_check.inputs import Step, config_of
from pipelines.gpu_check.measure import Check, describe

PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "zarr", "numcodecs", "google-crc32c")
_CALLS = 4  # successive steps that are timed together


def env(check: Check) -> None:
    """Versions, and the rates of copies and matrix products, which limit all other measurements."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    check.record("versions", python=platform.python_version(), cores=os.cpu_count(), **versions)
    if check.is_cuda:
        card = torch.cuda.get_device_properties(check.device)
        capability = f"{card.major}.{card.minor}"
        check.record("card", name=card.name, memory_gb=round(card.total_memory / 1e9, 1), capability=capability)
    host = torch.empty(1 << (20 if check.small else 30), dtype=torch.uint8, pin_memory=check.is_cuda)
    source, target = torch.empty_like(host, device=check.device), torch.empty_like(host, device=check.device)
    check.record("copy on the device", gb_per_s=round(2 * len(host) / check.ms(lambda: target.copy_(source)) / 1e6))
    to_device = check.ms(lambda: target.copy_(host, non_blocking=True))
    check.record("copy from pinned memory", gb_per_s=round(len(host) / to_device / 1e6, 1))
    side = 256 if check.small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.randn(side, side, device=check.device, dtype=dtype)
        rate = 2 * side**3 / check.ms(lambda a=square: a @ a, rounds=4) / 1e9
        check.record(f"product, {dtype}", tflop_per_s=round(rate, 1))


def measure_step(
    check: Check, what: str, config: Config, *, batch: int | None = None, rounds: int = 4, cuda_graphs: bool = True
) -> Step:
    """Record time, samples/s and memory of a training step, which is recorded before it is timed. Returns the step."""
    check.free()
    began = time.perf_counter()
    step = Step(check, config, batch, cuda_graphs=cuda_graphs)
    step()
    check.synchronize()
    first = time.perf_counter() - began
    took, size = check.ms(step, rounds, calls=1 if check.small else _CALLS), len(step.batch)
    rate = round(1e3 * size / took, 1)
    memory = check.memory(step) | check.reserved()
    check.record(what, ms=took, samples_per_s=rate, batch=size, **memory, first_step_s=round(first, 1))
    return step


def step(check: Check) -> None:
    """The paper's step with and without CUDA graphs: time, memory, parts, dtypes and layouts, waits of the host, kernels."""
    graphed = measure_step(check, "step", config_of(check.small))
    with check.guarded("kernels"):
        kernel_table(check, graphed)
    del graphed
    whole = measure_step(check, "step without CUDA graphs", config_of(check.small), cuda_graphs=False)
    with check.guarded("layouts"):
        layouts(check, whole)
    with check.guarded("waits"):
        waits(check, whole)
    with check.guarded("parts"):
        parts(check, whole)
    with check.guarded("kernels"):
        kernel_table(check, whole, "-without-graphs")


def layouts(check: Check, whole: Step) -> None:
    """Dtype and memory format of the output of every part, and of every kind of layer."""
    found: dict[str, Counter[str]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                is_last = output.is_contiguous(memory_format=torch.channels_last)
                layout = f"{str(output.dtype)[6:]} {'channels-last' if is_last else 'channels-first'}"
                found.setdefault(name, Counter())[layout] += 1

        hooks.append(module.register_forward_hook(note))

    hooks: list[Any] = []
    for name, module in whole.task.named_modules():
        if name in ("network.encoder", "network.lifting", "network.decoder", "network"):
            watch(name, module)
        watch(type(module).__name__, module)
    try:
        whole()
    finally:
        for hook in hooks:
            hook.remove()
    for name, layout in found.items():
        check.record(f"layout of {name}", **layout)


def waits(check: Check, whole: Step) -> None:
    """Number of times that the host waits for the device in one step, by source line."""
    if not check.is_cuda:
        return check.record("waits of the host", skipped="needs a GPU")
    lines: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):  # not the warning that this mode is a prototype
            ours = [f for f in traceback.extract_stack() if "occfeat_" in f.filename]
            lines[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # restored by catch_warnings
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            whole()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
    check.record("waits of the host", count=sum(lines.values()), lines=dict(lines))


def parts(check: Check, whole: Step) -> None:
    """Each part of a step alone, forward and backward."""
    task, batch, network = whole.task, whole.batch, whole.task.network
    size = whole.config.network.image_size
    with torch.no_grad(), check.autocast(check.is_cuda):
        views = batch.views(size)
        images = views.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, views = unmirror(network.encoder(images).unflatten(0, views.images.shape[:2]), views)
        volume = network.lifting.lift(features, views)
        lifted = network.lifting.compressor(volume)
        decoded = network.decoder(lifted)
        bev = mirror(decoded, batch.bev_flip)
        occupied = batch.volume("occupancy")
        voxels, target = batch.arrays["voxels"], batch.arrays["features"]

    def losses(x: Tensor) -> Tensor:
        logits, predicted = task.head(x, voxels)
        feat, _ = feature_loss(predicted, target, voxels // task.grid.num_voxels, len(batch))
        return occupancy_loss(logits, occupied) + feat

    def both_passes(function: Callable[..., Tensor], x: Tensor | None) -> Callable[[], None]:
        inputs = () if x is None else (x.detach().requires_grad_(),)

        def run() -> None:
            with check.autocast(check.is_cuda):
                out = function(*inputs)
            if out.requires_grad:
                out.backward(torch.ones_like(out))
            task.zero_grad(set_to_none=True)
            for leaf in inputs:
                leaf.grad = None

        return run

    measured: dict[str, tuple[Callable[..., Tensor], Tensor | None]] = {
        "augmentation": (lambda: batch.views(size).images, None),
        "unpacking": (lambda: batch.volume("occupancy"), None),
        "encoder": (lambda: network.encoder(images), None),
        "lifting": (lambda x: network.lifting.lift(x, views), features),
        "compressor": (network.lifting.compressor, volume),
        "decoder": (network.decoder, lifted),
        "mirroring of F_B": (lambda x: mirror(x, batch.bev_flip), decoded),
        "head, only occupancy": (lambda x: occupancy_loss(task.head(x, None)[0], occupied), bev),
        "head and losses": (losses, bev),
    }
    for name, (function, x) in measured.items():
        with check.guarded(f"part: {name}"):
            run = both_passes(function, x)
            check.record(f"part: {name}", ms=check.ms(run), **check.memory(run))
    parameters = list(task.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    clip = torch.nn.utils.clip_grad_norm_
    check.record(
        "part: clipping and optimiser", ms=check.ms(lambda: (clip(parameters, 5.0), whole.trainer.optimizer.step()))
    )
    whole.trainer.optimizer.zero_grad(set_to_none=True)


def kernel_table(check: Check, whole: Callable[[], None], suffix: str = "") -> None:
    """The most expensive kernels of a step, to OUT/kernels-PART.txt; number of launches and busy time of the device."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.is_cuda else [])]
    with profile(activities=activities) as profiled:
        whole()
        check.synchronize()
    events = profiled.key_averages()
    order = "self_cuda_time_total" if check.is_cuda else "self_cpu_time_total"
    table = events.table(sort_by=order, row_limit=60, max_name_column_width=90)
    (check.out / f"kernels-{check.part}{suffix}.txt").write_text(table)
    launches = sum(e.count for e in events if "LaunchKernel" in e.key)
    busy = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA) / 1e3
    check.record("kernels" + suffix, launches=launches, busy_ms=round(busy, 1))


def network(**fields: Any) -> Callable[[Check], None]:
    """A part that measures the step of another network or pretext task."""

    def run(check: Check) -> None:
        chosen = {k: v for k, v in fields.items() if not (check.small and k == "image_size")}
        whole = measure_step(check, "step", config_of(check.small, **chosen), rounds=2)
        with check.guarded("kernels"):
            kernel_table(check, whole)

    return run


def variants(check: Check) -> None:
    """Modified steps against the plain step, alternating in the same process. `ratio` below 1 is a gain."""
    config = config_of(check.small)
    less_memory = replace(config, network=replace(config.network, recompute=True))
    plain = Step(check, config)

    made: dict[str, Callable[[], Step]] = {
        "no CUDA graphs": lambda: Step(check, config, cuda_graphs=False),
        "activation checkpointing": lambda: Step(check, less_memory),
        "compiled": lambda: Step(check, replace(config, compile=True)),
    }
    for name, make in made.items():
        if not check.is_cuda and "compiled" in name:
            check.record(name, skipped="needs a GPU: compilation takes minutes on a CPU")
            continue
        with check.guarded(name):
            began = time.perf_counter()
            changed = make()
            changed()
            check.synchronize()
            first = round(time.perf_counter() - began, 1)
            times = check.times({"plain": plain, name: changed}, rounds=4, calls=1 if check.small else _CALLS)
            ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
            took, plainly = (round(statistics.median(times[key]), 2) for key in (name, "plain"))
            memory = check.memory(changed).get("increase_gb"), check.memory(plain).get("increase_gb")
            check.record(name, ms=took, plain_ms=plainly, ratio=round(ratio, 3), first_step_s=first,
                         increase_gb=memory[0], plain_increase_gb=memory[1], **check.reserved())  # fmt: skip
            kernel_table(check, changed, f"-{name.replace(' ', '-')}")
            del changed


def memory(check: Check) -> None:
    """Time and memory by batch size, and the smallest memory into which a step of the paper's batch fits."""
    config = config_of(check.small)
    for batch in (1, 2) if check.small else (1, 2, 4, 8, 32):
        with check.guarded(f"batch {batch}"):
            measure_step(check, f"batch {batch}", config, batch=batch, rounds=2)
    if not check.is_cuda:
        return check.record("smallest memory", skipped="needs a GPU")
    total = torch.cuda.get_device_properties(check.device).total_memory
    for gib in (5, 6, 7, 8, 10, 12, 16):
        check.free()
        torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0), check.device)
        try:
            run = Step(check, config)
            for _ in range(3):
                run()
            return check.record("smallest memory", gib=gib)
        except torch.OutOfMemoryError as err:
            check.record(f"{gib} GiB", fits=False, reason=describe(err)[:120])
        finally:
            run = None
            torch.cuda.set_per_process_memory_fraction(1.0, check.device)
