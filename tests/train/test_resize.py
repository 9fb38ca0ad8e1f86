"""Bilinear resize as two matrix products, against torch's interpolation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from occfeat_train.ops.resize import resize, resize_by_products

SIZES = [((25, 25), (50, 50)), ((14, 25), (28, 50)), ((7, 5), (13, 10)), ((3, 4), (3, 9)), ((1, 1), (2, 3))]


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_products_equal_interpolation(before, after, dtype, tolerance):
    x = torch.randn(2, 6, *before, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    found = value_and_gradient(lambda t: resize_by_products(t, after), x)
    exact = value_and_gradient(lambda t: interpolate(t, size=after, mode="bilinear"), x.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_on_a_gpu_a_map_keeps_its_type_under_autocast():
    x = torch.randn(2, 8, 25, 25, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = resize(x, (50, 50))
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    expected = interpolate(x.float(), size=(50, 50), mode="bilinear")
    assert (out - expected).norm() <= 2**-7 * expected.norm()
