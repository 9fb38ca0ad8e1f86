"""The Triton kernels against the plain functions at full size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from occfeat_train.networks.bevformer import HEADS, neighbour_reads
from occfeat_train.ops.deformable import deformable_torch, deformable_triton
from occfeat_train.ops.devices import runs_triton
from occfeat_train.ops.instance_norm import _InstanceNorm, _TritonInstanceNorm
from occfeat_train.ops.mean_over_views import lift_torch, lift_triton
from occfeat_train.tasks.heads import _SoftplusLogits, _TritonSoftplusLogits
from pipelines.gpu_check.inputs import grid_of, random_views
from pipelines.gpu_check.measure import Check, distance


def kernels(check: Check) -> None:
    """The Triton kernels against the plain functions: forward and backward times, and errors relative to plain float32."""
    batch, channels, side = (2, 32, 12) if check.small else (16, 128, 200)
    grid, hidden = grid_of(check.small), 2 * channels
    size = (32, 64) if check.small else (224, 400)
    levels, tokens = grid.shape[0], (batch, 6, channels, size[0] // 8, size[1] // 8)
    views = random_views(batch, size, check.device)
    cells = torch.arange(side, device=check.device)
    reads = neighbour_reads(batch, torch.cartesian_prod(cells, cells).flip(1).float())

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=check.device)).bfloat16()

    def head() -> list[Tensor]:
        rows = levels * hidden
        return [normal(batch * side * side, channels), normal(rows, channels, scale=0.1), normal(rows), normal(hidden)]

    last = torch.channels_last
    cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
        "head": (_TritonSoftplusLogits.apply, _SoftplusLogits.apply, head),
        "norm": (
            _TritonInstanceNorm.apply,
            _InstanceNorm.apply,
            lambda: [normal(batch, channels, side, side).to(memory_format=last)],
        ),
        "lifting": (
            lambda x: lift_triton(x, views, grid),
            lambda x: lift_torch(x, views, grid),
            lambda: [normal(*tokens).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)],
        ),
        "deformable": (
            lambda *x: deformable_triton(*x, reads),
            lambda *x: deformable_torch(*x, reads),
            lambda: [
                normal(batch, side, side, HEADS, channels // HEADS),
                3 * torch.randn(batch * side * side, HEADS, 8, 3, device=check.device),
            ],
        ),
    }
    for name, (triton, plain, make) in cases.items():
        with check.guarded(name):
            compare_kernel(check, name, triton, plain, make())


def compare_kernel(
    check: Check, name: str, triton: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Compare both functions with the plain function in float32 on the same inputs."""

    def leaves(dtype: torch.dtype | None) -> list[Tensor]:
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in inputs]

    given = leaves(torch.float32)
    exact = plain(*given)
    weight = torch.randn_like(exact)
    expected = [exact.detach(), *torch.autograd.grad(exact, given, weight)]
    del exact
    for which, function in (("Triton", triton), ("plain", plain)):
        if which == "Triton" and not runs_triton(check.device):
            check.record(f"{name}, {which}", skipped="needs a GPU")
            continue
        given = leaves(None)
        out = function(*given)
        grad = weight.to(out.dtype)
        found = [out, *torch.autograd.grad(out, given, grad, retain_graph=True)]
        off = [distance(f, e) for f, e in zip(found, expected, strict=True)]
        del found
        with torch.no_grad():
            forward = check.ms(lambda f=function, g=given: f(*g), rounds=5)
        again = check.ms(lambda o=out, g=given, w=grad: torch.autograd.grad(o, g, w, retain_graph=True), rounds=5)
        values: dict[str, Any] = {"forward_ms": forward, "backward_ms": again, "distances": off}
        check.record(f"{name}, {which}", **values, **({"ok": max(off) < 0.05} if which == "Triton" else {}))
