"""The Triton kernels of InstanceNorm: values and gradients against float64, and compilation for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from occfeat_train.ops.instance_norm import _InstanceNorm, _TritonInstanceNorm
from tests.train.interpreted import compiled, interpreted

pytest.importorskip("triton", reason="no Triton for this platform")
KERNELS = "occfeat_train.ops.instance_norm_triton"


def value_and_gradient(function: type, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The in-place activation changes no value. Networks also overwrite the output in place."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = nn.functional.hardtanh_(function.apply(leaf), -1e6, 1e6)
    out.backward(grad.to(out))
    return [out.detach(), leaf.grad]


def assert_near_exact(found: list[Tensor], x: Tensor, grad: Tensor, epsilon: float) -> None:
    """Bounds from rounding the inputs: a map and its gradient are multiplied by 1 / standard deviation."""
    exact = value_and_gradient(_InstanceNorm, x.double(), grad.double())
    scale = x.double().var((2, 3), unbiased=False, keepdim=True).add(1e-5).rsqrt()
    bound = 8 * epsilon * (1 + scale * x.double().abs().amax((2, 3), keepdim=True))
    assert ((found[0].double() - exact[0]).abs() <= bound).all()
    bound = 8 * bound * scale * grad.double().abs().amax((2, 3), keepdim=True)
    assert ((found[1].double() - exact[1]).abs() <= bound).all()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 20, 9, 11))),
    tile=st.sampled_from([1, 64, 8192]),
    is_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_interpreted_values_and_gradients_equal_float64(
    shape: tuple[int, int, int, int], tile: int, is_last: bool, seed: int
) -> None:
    """Tiles do not divide the sizes, both memory formats occur, and the mean is ten standard deviations."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 10
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    x = x.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    with interpreted(KERNELS) as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_TILE", tile)
        found = value_and_gradient(_TritonInstanceNorm, x, grad)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_near_exact(found, x, grad, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("target", [80, 90])
def test_the_kernels_compile_for_a_gpu(target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, statistic = torch.empty(2, 999, 48, dtype=torch.bfloat16), torch.empty(2, 48)

    def launch(kernels: object) -> None:
        kernels.normalize(x, 1e-5, x)  # type: ignore[attr-defined]
        kernels.normalize_backward(x, x, statistic, statistic, x)  # type: ignore[attr-defined]

    found = compiled(KERNELS, target, launch, monkeypatch, tmp_path)
    assert set(found) == {"_statistics", "_normalize", "_products", "_gradient"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_equals_float64_at_full_size(dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    x, grad = (torch.randn(2, 128, 200, 200, generator=generator, device="cuda") for _ in range(2))
    x, grad = ((t + shift).to(dtype).contiguous(memory_format=torch.channels_last) for t, shift in ((x, 3), (grad, 0)))
    found = value_and_gradient(_TritonInstanceNorm, x, grad)
    assert all(t.dtype == dtype and t.is_contiguous(memory_format=torch.channels_last) for t in found)
    assert_near_exact(found, x, grad, torch.finfo(dtype).eps)
