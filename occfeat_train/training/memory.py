"""A lack of memory as an error of one line, with what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from occfeat_targets.common.memory import describe_shortage
from occfeat_train.config import Config

_GIB = 1 << 30


class MemoryShortage(ValueError):
    """The GPU or the host has too little memory."""


@contextmanager
def explains_memory(device: torch.device, doing: str, remedy: str) -> Iterator[None]:
    """Turn a lack of memory into MemoryShortage: what was needed, what a GPU has, and `remedy`."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        found = re.search(r"Tried to allocate ([\d.]+ \w+)", str(err))
        needed = "more" if found is None else f"{found[1]} more"
        free, total = (n / _GIB for n in torch.cuda.mem_get_info(device))
        held = torch.cuda.memory_reserved(device) / _GIB
        raise MemoryShortage(
            f"out of memory on {torch.cuda.get_device_name(device)} ({device}) {doing}: {needed} needed, of its "
            f"{total:.1f} GiB this process holds {held:.1f} and {free:.1f} are free: {remedy}"
        ) from err
    except (MemoryError, RuntimeError) as err:
        shortage = describe_shortage(err)
        if shortage is None:
            raise
        raise MemoryShortage(f"{shortage} {doing}: {remedy}") from err


def training_remedy(config: Config, world: int) -> str:
    """What to change so that a step needs less memory. world: number of ranks."""
    optim, network = config.optim, config.network
    changes = []
    local = optim.batch // world
    factor = next((n for n in range(2, local + 1) if local % n == 0), None)
    if factor is not None:
        changes.append(
            f"optim.batch={optim.batch // factor} optim.accumulation={optim.accumulation * factor} "
            "(as many samples per step in smaller batches)"
        )
    if network.recompute is False:
        changes.append("network.recompute=true")
    changes.append("a smaller network.image_size than {}x{}".format(*network.image_size))
    return f"start a run in another --out with --set {', or '.join(changes)}. Saved checkpoints are intact"


def evaluation_remedy(batch: int) -> str:
    """batch: samples per forward pass."""
    fewer = f"'occfeat-train evaluate RUN --batch N' with N below {batch}" if batch > 1 else "--device cpu"
    return (
        f"evaluate with {fewer}; a report uses its results, and a training needs no --validate. Saved checkpoints are "
        "intact"
    )
