"""Ranks (torchrun) and devices, and reductions over all ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occfeat_targets.common.terminal import echo

Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """This process: its rank of `world` ranks, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *lines: str) -> None:
        """Print lines on rank 0."""
        for line in lines if self.is_main else ():
            echo(line)


@contextmanager
def processes(device: str) -> Iterator[Process]:
    """Initialise the process group under torchrun, and destroy it at the end.

    device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``. Raises ValueError if the device does not exist,
    if the launcher's variables do not match, or if another process has ended while this one waited for it.
    """
    try:
        world, rank, local_rank = ranks()
        chosen = choose_device(device, local_rank)
        if world > 1:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        yield Process(rank, world, chosen)
        if world > 1:  # destroying the group right after a collective can hang in torch 2.13's gloo
            dist.barrier()
    except (ValueError, OSError) as err:
        tell_torchrun(str(err))
        raise
    except RuntimeError as err:
        if not dist.is_initialized() or not (isinstance(err, dist.DistError) or "gloo" in str(err)):
            raise
        raise ValueError(
            f"rank {dist.get_rank()} lost the connection to another process, which has ended ({str(err).splitlines()[0]}): its own error is "
            "printed beside this one; if there is none, the system killed it, for example for lack of memory"
        ) from err
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def tell_torchrun(error: str) -> None:
    """Let torchrun's summary, which follows its own traceback, end with this error of this process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": {"message": f"error: {error}", "extraInfo": {"timestamp": int(time.time())}}}
        Path(file).write_text(json.dumps(content))


def ranks() -> tuple[int, int, int]:
    """(WORLD_SIZE, RANK, LOCAL_RANK), which torchrun sets; (1, 0, 0) without it. Raises ValueError if they do not match."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    world, rank, local_rank = (given.get(name, default) for name, default in zip(names, ("1", "0", "0"), strict=True))
    numbers = all(value.isdecimal() for value in (world, rank, local_rank))
    if not numbers or int(rank) >= int(world) or (int(world) > 1 and "RANK" not in given):
        shown = ", ".join(f"{name}={given[name]!r}" if name in given else f"{name} not set" for name in names)
        raise ValueError(
            f"{shown}: a number of processes and a rank below it are expected: start the processes with torchrun, or unset "
            f"{' and '.join(given)} to train with one"
        )
    return int(world), int(rank), int(local_rank)


def prepare_together(prepare: Callable[[], Result]) -> Result:
    """Call prepare() on every rank, and continue only if it succeeds on all. prepare() must not wait for other ranks.

    If it raises ValueError or OSError, the first rank where it does raises the error, and the other ranks exit with 1. The
    error is printed once, and no rank waits for one that has exited.
    """
    try:
        result, error = prepare(), None
    except (ValueError, OSError) as err:
        result, error = None, err
    if dist.is_initialized():
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if error is None else str(error))
        first = next((rank for rank, text in enumerate(errors) if text is not None), None)
        if first is not None:
            raise_once(error or ValueError(errors[first]), by=first)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def raise_once(error: Exception, *, by: int = 0) -> NoReturn:
    """Raise, on rank `by`, an error that all ranks know of. The others exit with 1 without printing it."""
    if dist.is_initialized() and dist.get_rank() != by:
        tell_torchrun(str(error))
        sys.exit(1)
    raise error


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Raises ValueError if the GPU does not exist or the name is not a device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ValueError(f"--device {name}: auto, cpu, cuda or cuda:N expected") from err
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(
                f"--device {name}: GPU {index} asked for, torch {torch.__version__} sees {count}: use --device cpu, or "
                "install a build of torch for this machine's GPUs and driver"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def gpu_names(process: Process) -> list[str]:
    """Name of the process's GPU, once for each rank; none on a CPU. The ranks' GPUs are taken to be equal."""
    return [torch.cuda.get_device_name(process.device)] * process.world if process.device.type == "cuda" else []


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; the tensor itself without a process group."""
    if not dist.is_initialized():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else value.device
    total = value.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(value.device)


def average_gradients(module: nn.Module) -> None:
    """Set the gradients of all parameters to their mean over all ranks, with one all-reduce.

    DistributedDataParallel averages during the backward pass, with hooks that a CUDA graph of the pass cannot contain. Ranks
    start with equal weights and so keep them.
    """
    if not dist.is_initialized():
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    means = sum_over_processes(torch.cat([g.flatten() for g in grads])) / dist.get_world_size()
    for grad, mean in zip(grads, means.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def average_statistics(module: nn.Module) -> None:
    """Set the running statistics of every BatchNorm in training mode to their mean over all ranks, with one all-reduce.

    Each rank normalises with its own batch statistics, so the running statistics differ between ranks. num_batches_tracked
    is equal on all ranks.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training]
    if not dist.is_initialized() or not norms:
        return
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    means = sum_over_processes(torch.cat(buffers)) / dist.get_world_size()
    for buffer, mean in zip(buffers, means.split([len(b) for b in buffers]), strict=True):
        buffer.copy_(mean)


def gather(values: list[Result]) -> list[Result]:
    """The lists of all ranks, concatenated."""
    if not dist.is_initialized():
        return values
    gathered: list[list[Result]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]
