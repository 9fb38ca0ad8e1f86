"""The Triton kernels of the occupancy head: values and gradients against plain torch, and compilation for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_train.tasks import heads
from tests.train.interpreted import compiled, interpreted

pytest.importorskip("triton", reason="no Triton for this platform")
KERNELS = "occfeat_train.ops.head_triton"


def inputs(cells: int, channels: int, levels: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Random cells, weight, bias, to_logit, and a gradient of the logits."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = randn(levels * hidden, channels) / channels**0.5
    return [randn(cells, channels), weight, randn(levels * hidden), randn(hidden), randn(cells, levels).float()]


def values_and_gradients(function: type, given: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in given[:4]]
    logits = function.apply(*leaves)
    logits.backward(given[4].to(logits))
    return [logits.detach(), *(leaf.grad for leaf in leaves)]


def assert_near_exact(found: list[Tensor], given: list[Tensor], tolerance: float) -> None:
    """tolerance: relative to each result's norm. The exact results are plain torch's in float64 on the same inputs."""
    exact = values_and_gradients(heads._SoftplusLogits, [t.cpu().double() for t in given])
    for name, ours, other in zip(("logits", "cells", "weight", "bias", "to_logit"), found, exact, strict=True):
        difference = (ours.cpu().double() - other).norm() / other.norm().clamp(min=1e-6)
        assert difference < tolerance, f"{name}: {difference:.1e} off"


@settings(max_examples=12, deadline=None)
@given(
    cells=st.sampled_from([1, 63, 64, 200]),
    channels=st.sampled_from([2, 16, 24]),
    levels=st.integers(1, 3),
    hidden=st.sampled_from([1, 32, 64, 70]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_interpreted_values_and_gradients_equal_plain_torch(
    cells: int, channels: int, levels: int, hidden: int, dtype: torch.dtype, seed: int
) -> None:
    """Some sizes are not multiples of a tile. float16 rounds the factors of each product to 2^-11."""
    given = inputs(cells, channels, levels, hidden, dtype, seed)
    with interpreted(KERNELS) as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CELLS", 64)
        found = values_and_gradients(heads._TritonSoftplusLogits, given)
    assert_near_exact(found, given, 1e-5 if dtype == torch.float32 else 4e-3)


def test_large_hidden_values_neither_overflow_nor_vanish() -> None:
    given = inputs(64, 16, 1, 32, torch.float32)
    given[0][0] *= 1e4
    given[0][1] *= -1e4
    with interpreted(KERNELS):
        found = values_and_gradients(heads._TritonSoftplusLogits, given)
    assert all(t.isfinite().all() for t in found)
    assert_near_exact(found, given, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_the_kernels_compile_for_a_gpu_and_use_its_matrix_units(
    target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = inputs(1000, 128, 8, 256, torch.bfloat16)

    def launch(kernels: object) -> None:
        kernels.forward(*given[:4])  # type: ignore[attr-defined]
        kernels.backward(given[4], *given[:4])  # type: ignore[attr-defined]

    found = compiled(KERNELS, target, launch, monkeypatch, tmp_path)
    assert set(found) == {"_forward", "_backward_cells", "_backward_weights"}
    for ptx in found.values():
        assert "wgmma" in ptx or "mma.sync" in ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_the_papers_sizes_a_gpu_equals_plain_torch(dtype: torch.dtype) -> None:
    given = [t.cuda() for t in inputs(20_011, 128, 8, 256, dtype)]
    found = values_and_gradients(heads._TritonSoftplusLogits, given)
    assert_near_exact(found, given, 8 * torch.finfo(dtype).eps)
    again = values_and_gradients(heads._TritonSoftplusLogits, given)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
