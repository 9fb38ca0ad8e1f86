"""Devices of the teacher: which ones this machine has, their names, free memory and speed."""

from __future__ import annotations

import re
import time

import torch


def find_devices(name: str) -> tuple[str, ...]:
    """Devices that `name` stands for on this machine: ("cpu",), or GPUs such as ("cuda:0", "cuda:1").

    name: ``cpu``; ``cuda``, all GPUs that torch sees; ``cuda:1``, this GPU; ``auto``, all GPUs, or the CPU if there are none.
    Raises ValueError if there is no such GPU, or if the name is none of these.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return ("cpu",)
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device {name}: auto, cpu, cuda or cuda:N expected")
    if count == 0:
        raise ValueError(
            f"--device {name}: torch {torch.__version__} sees no GPU: use --device cpu, or install a build of torch for this "
            "machine's GPUs and driver"
        )
    chosen = range(count) if match[1] is None else [int(match[1])]
    if chosen[-1] >= count:
        raise ValueError(
            f"--device {name}: GPU {chosen[-1]} asked for, torch sees {count}, from cuda:0: use --device cuda for all of them, "
            "and check CUDA_VISIBLE_DEVICES, which limits and renumbers them"
        )
    return tuple(f"cuda:{index}" for index in chosen)


def gpu_names() -> list[str]:
    """Names of the GPUs that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def free_memory(device: str) -> int:
    """Free bytes of a GPU. Raises ValueError if the GPU cannot be used."""
    try:
        return torch.cuda.mem_get_info(device)[0]
    except RuntimeError as err:  # no memory for a CUDA context, or another process has the GPU for itself
        raise ValueError(
            f"{device} cannot be used ({str(err).splitlines()[0]}): end other programs on it, or choose another --device"
        ) from err


def matmul_flops(dtype: str, size: int = 2048, rounds: int = 6) -> float:
    """Floating-point operations per second of a square matrix product on this machine's CPU, the best of several."""
    a = torch.randn(size, size).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
