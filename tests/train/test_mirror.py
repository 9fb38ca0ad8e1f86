"""Mirroring maps along axes chosen per sample: plain and with the Triton kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from occfeat_train.ops import mirror as module
from occfeat_train.ops.mirror import mirror
from tests.train.interpreted import HAS_TRITON, compiled, interpreted

KERNELS = "occfeat_train.ops.mirror_triton"
FLIPS = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton for this platform")


def check(maps: Tensor, flips: Tensor) -> None:
    """Values, gradient and memory format."""
    leaf = maps.clone().requires_grad_()
    found = mirror(leaf, flips)
    weight = torch.linspace(-1, 1, maps.numel(), device=maps.device).view_as(maps).to(maps)
    found.backward(weight)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for i, (rows, columns) in enumerate(flips.tolist()):
        axes = [axis for axis, flipped in ((1, rows), (2, columns)) if flipped]
        assert torch.equal(found[i], maps[i].flip(axes))
        assert torch.equal(leaf.grad[i], weight[i].flip(axes))


@pytest.mark.parametrize("with_kernel", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 1, 1), (3, 5, 4), (40, 6, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients_are_mirrored(channels, height, width, dtype, with_kernel, monkeypatch):
    maps = torch.randn(4, channels, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    if not with_kernel:
        return check(maps, FLIPS)
    monkeypatch.setattr(module, "runs_triton", lambda device: True)
    with interpreted(KERNELS):
        check(maps, FLIPS)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_the_kernel_compiles_for_a_gpu(target, monkeypatch, tmp_path: Path):
    cells = torch.empty(2, 20, 20, 128, dtype=torch.bfloat16)
    call = lambda kernels: kernels.mirror_cells(cells, FLIPS[:2])  # noqa: E731
    assert set(compiled(KERNELS, target, call, monkeypatch, tmp_path)) == {"_mirror"}


@pytest.mark.gpu
def test_at_the_papers_sizes_a_gpu_mirrors_exactly():
    maps = torch.randn(4, 128, 200, 200, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    check(maps, FLIPS.cuda())
