"""Lifting in numbers: threads, memory formats, half precision, autocast, compiled functions, GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.simplebev import SimpleBEV
from occfeat_train.ops.mean_over_views import lift, lift_torch
from occfeat_train.ops.views import Views
from tests.train.interpreted import lift_interpreted
from tests.train.test_lifting import (
    BACKENDS,
    GRID,
    Lift,
    lift_reference,
    one_camera,
    random_features,
    random_views,
    ring_of_six,
    value_and_gradient,
)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "place"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_at_full_size_values_and_gradients_equal_float64_within_rounding(dtype: torch.dtype, place: float) -> None:
    """Six 28x50 maps of 128 channels to 8x200x200. place: half a last digit, or what float32 sums are off by."""
    features, views = random_features(1, 6, 128, 28, 50).to(dtype), ring_of_six()
    shape = (1, 8 * 128, 200, 200)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)

    def run(function: Lift, leaf: Tensor) -> tuple[Tensor, Tensor]:
        leaf.requires_grad_()
        volume = function(leaf, views, VoxelGrid())
        volume.backward(weight.to(volume.dtype))
        assert leaf.grad is not None
        return volume.detach(), leaf.grad

    exact = run(lift_torch, features.double())
    for a, b in zip(run(lift, features.clone()), exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=2e-6 * b.abs().max().item(), rtol=place)


def test_the_number_of_threads_does_not_change_a_bit(three_threads: None) -> None:
    views, features, grid = random_views(7, batch=2), random_features(2, channels=32), VoxelGrid((4, 37, 23))
    threaded = [value_and_gradient(lift, features, views, grid) for _ in range(3)]
    torch.set_num_threads(1)
    serial = value_and_gradient(lift, features, views, grid)
    for found in threaded:
        assert all(torch.equal(a, b) for a, b in zip(found, serial, strict=True))
    plain = value_and_gradient(lift_torch, features, views, grid)
    assert all(
        torch.equal(a, b) for a, b in zip(plain, value_and_gradient(lift_torch, features, views, grid), strict=True)
    )


def test_a_gradient_in_any_memory_format_is_accepted() -> None:
    views, features = random_views(8), random_features()
    grads = []
    for order in (torch.channels_last, torch.contiguous_format):
        leaf = features.clone().requires_grad_()
        volume = lift(leaf, views, GRID)
        weight = torch.randn(volume.shape, generator=torch.Generator().manual_seed(2))
        volume.backward(weight.contiguous(memory_format=order))
        grads.append(leaf.grad)
    expanded = features.clone().requires_grad_()
    lift(expanded, views, GRID).sum().backward()
    assert torch.equal(grads[0], grads[1])
    assert expanded.grad is not None and expanded.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", BACKENDS)
def test_half_precision_rounds_the_float32_result_once(function: Lift, dtype: torch.dtype) -> None:
    features, views = random_features().to(dtype), random_views(9)
    leaf, exact = features.clone().requires_grad_(), features.float().requires_grad_()
    volume, expected = function(leaf, views, GRID), function(exact, views, GRID)
    assert volume.dtype == dtype
    cuts_off = function is lift_interpreted and dtype == torch.bfloat16  # Triton's interpreter truncates, a GPU rounds
    torch.testing.assert_close(volume, expected.to(dtype), rtol=2**-7 if cuts_off else 0, atol=0)
    weight = torch.randn(volume.shape).to(dtype)
    volume.backward(weight)
    expected.backward(weight.float())
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), rtol=0, atol=0)


def test_bfloat16_preserves_infinities_and_nan_and_overflows_to_infinity() -> None:
    values = [torch.inf, -torch.inf, torch.nan, 3.4e38, -1.0, 1e-40, 1.00390625, 1.01171875]
    tokens = torch.tensor(values)[None, None, :, None, None].expand(1, 1, 8, 4, 6)
    grid = VoxelGrid((1, 1, 1), (-1, 2, -1), (1, 4, 1))
    volume = lift(tokens.bfloat16(), one_camera(), grid)
    expected = tokens.bfloat16()[0, 0, :, 0, 0]
    torch.testing.assert_close(volume.flatten(), expected, rtol=0, atol=0, equal_nan=True)


def test_without_feature_gradients_nothing_is_saved_and_geometry_has_no_gradient() -> None:
    views, features = random_views(10), random_features()
    assert not lift(features, views, GRID).requires_grad
    views.intrinsics.requires_grad_()
    assert not lift(features, views, GRID).requires_grad


def test_autocast_keeps_the_encoders_bfloat16() -> None:
    features, views = random_features().bfloat16().requires_grad_(), random_views(12)
    module = SimpleBEV(GRID, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.lift(features, views).dtype == torch.bfloat16
        assert lift_torch(features, views, GRID).dtype == torch.bfloat16
        out = module(features, views)
    out.float().sum().backward()
    assert features.grad is not None and features.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised by torch.compile
@pytest.mark.parametrize("function", BACKENDS)
def test_lifting_works_in_a_compiled_function(function: Lift) -> None:
    views = random_views(11)

    def step(features: Tensor, views: Views, grid: VoxelGrid) -> Tensor:
        return function(features * 2, views, grid) + 1

    expected = value_and_gradient(step, random_features(), views, GRID)
    found = value_and_gradient(torch.compile(step, backend="eager"), random_features(), views, GRID)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [lift, lift_reference])
def test_a_gpu_equals_the_cpu(function: Lift) -> None:
    features, views = random_features(2), random_views(13, batch=2)
    on_gpu = Views(views.images.cuda(), views.intrinsics.cuda(), views.cam_from_grid.cuda())
    leaf, copy = features.clone().requires_grad_(), features.cuda().requires_grad_()
    expected, found = function(leaf, views, GRID), function(copy, on_gpu, GRID)
    weight = torch.randn(expected.shape)
    expected.backward(weight)
    found.backward(weight.cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)
    assert leaf.grad is not None and copy.grad is not None
    torch.testing.assert_close(copy.grad.cpu(), leaf.grad, atol=1e-4, rtol=1e-5)
