"""Types and memory formats of a bfloat16 step, by autocast on a CPU: no layer works on float32 or channels-first maps.

On a GPU, such a layer takes twice the memory and time, and so do the layers after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from occfeat_train.config import LIFTINGS
from tests.train.test_batch import make_batch
from tests.train.test_tasks import CONFIG, task_of

# The padding of the images, which may be float32; and BEVFormer's layers, which work on rows of tokens.
NO_MAPS = ("network.encoder.backbone.embeddings.padding", "network.lifting.layers.")

# Functions of maps that autocast computes in float32 on a GPU, but not on a CPU.
FLOAT32_ON_A_GPU = {
    functional.interpolate, functional.group_norm, functional.layer_norm, functional.softplus, torch.cumsum, torch.rsqrt,
    torch.exp, torch.softmax,
}  # fmt: skip


class Float32Maps(TorchFunctionMode):
    """Lists the calls of FLOAT32_ON_A_GPU that get a bfloat16 map while autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_cast = func in FLOAT32_ON_A_GPU and torch.is_autocast_enabled("cpu")
        if is_cast and args[0].dim() == 4 and args[0].dtype == torch.bfloat16:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def maps_of_a_step(task: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
    """{module: output} of the modules that return a map (N, C, H, W), and the maps' gradients."""
    maps: dict[str, Tensor] = {}
    grads: list[Tensor] = []

    def keep(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.dim() == 4 and not name.startswith(NO_MAPS):
            maps[name] = out.detach()
            if out.requires_grad:
                out.register_hook(lambda grad: grads.append(grad))

    for name, module in task.named_modules():
        module.register_forward_hook(lambda module, given, out, name=name: keep(name, out))
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(make_batch(2))["loss"]
    loss.backward()
    return maps, grads


@pytest.mark.parametrize("lifting", LIFTINGS)
@pytest.mark.parametrize("name", ["occfeat", "vehicles"])
def test_every_map_of_a_bfloat16_step_is_bfloat16_and_channels_last(name: str, lifting: str) -> None:
    network = dataclasses.replace(CONFIG.network, lifting=lifting, recompute=False)
    maps, grads = maps_of_a_step(task_of(network=network, task=name).train())
    assert {"network.encoder", "network.lifting", "network.decoder", "network"} <= maps.keys()
    assert len(maps) > 100
    for found, out in maps.items():
        assert out.dtype == torch.bfloat16, found
        assert out.is_contiguous(memory_format=torch.channels_last), found
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


@pytest.mark.parametrize("lifting", LIFTINGS)
def test_no_map_is_given_to_a_function_that_a_gpu_computes_in_float32(lifting: str) -> None:
    network = dataclasses.replace(CONFIG.network, lifting=lifting, recompute=False)
    with Float32Maps() as calls:
        maps_of_a_step(task_of(network=network).train())
    assert calls.found == []
