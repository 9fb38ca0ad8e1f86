"""Which camera sees a point: masked cameras, and images that show the scene only in an area, in every lifting and sampler."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_train.config import LIFTINGS, REFERENCE_LIFTINGS, lifting_class
from occfeat_train.networks.network import unmirror
from occfeat_train.ops.mean_over_views import lift, sample_voxel_features, sample_voxel_features_numpy
from occfeat_train.ops.views import Cameras, Views
from tests.train.lifting_twin import lift_dense
from tests.train.test_lifting import BACKENDS, GRID, SIZE, WAYS, Lift, assert_equal_to_twin, random_views

CHANNELS, TOKENS = 4, (4, 6)
VARIANTS = [*((name, "none") for name in LIFTINGS), *((name, "simple-bev") for name in REFERENCE_LIFTINGS)]
WHOLE = (0.0, 0.0, float(SIZE[0]), float(SIZE[1]))
Sampler = Callable[..., tuple[Tensor, Tensor]]
CENTERS = torch.from_numpy(GRID.voxel_centers()).flatten(0, 2)


def sample_numba(
    features: Tensor,
    cameras: Tensor,
    pinholes: Tensor,
    size: tuple[int, int],
    centers: Tensor,
    area: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    maps, cams, intrinsics, points = (t.numpy() for t in (features, cameras, pinholes, centers))
    rectangles = None if area is None else area.numpy()
    found = sample_voxel_features_numpy(maps, None, cams, intrinsics, size, points, area=rectangles, dtype="float32")
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


SAMPLERS = [pytest.param(sample_numba, id="numba"), pytest.param(sample_voxel_features, id="torch")]


def with_areas(views: Views, seed: int) -> Views:
    """Views with random areas whose sides are at least one token (10 pixels)."""
    rng = np.random.default_rng(seed)
    shape = views.intrinsics.shape[:2]
    top, left = rng.uniform(0, SIZE[0] - 10, shape), rng.uniform(0, SIZE[1] - 10, shape)
    bottom, right = rng.uniform(top + 10, SIZE[0]), rng.uniform(left + 10, SIZE[1])
    return replace(views, area=torch.from_numpy(np.stack([top, left, bottom, right], -1)))


def lifting_of(name: str, compat: str = "none") -> torch.nn.Module:
    """A lifting with random weights, including BEVFormer's sampling offsets."""
    torch.manual_seed(0)
    lifting = pkgutil.resolve_name(lifting_class(name, compat))(GRID, CHANNELS).eval()
    for parameter in lifting.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lifting


def value_and_gradient(lifting: torch.nn.Module, features: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    leaf = features.clone().requires_grad_()
    out = lifting(leaf, views)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def features_for(lifting: torch.nn.Module, batch: int, cams: int) -> Tensor:
    return torch.randn(batch, cams, int(lifting.feature_channels), *TOKENS, generator=torch.Generator().manual_seed(1))


# -- masked cameras ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "compat"), VARIANTS)
def test_the_features_of_a_masked_camera_have_no_effect(name: str, compat: str) -> None:
    """Camera 1 is masked in both samples."""
    lifting, views, kept = lifting_of(name, compat), random_views(3, batch=2), [0, 2, 3]
    features = features_for(lifting, 2, 4)
    features[:, 1] *= 1e3
    others = replace(
        views, images=views.images[:, kept], intrinsics=views.intrinsics[:, kept], cam_from_grid=views.cam_from_grid[:, kept]
    )  # fmt: skip
    views.cam_from_grid[:, 1] = 0
    value, gradient = value_and_gradient(lifting, features, views)
    expected, expected_gradient = value_and_gradient(lifting, features[:, kept], others)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient[:, kept], expected_gradient, atol=1e-5, rtol=1e-5)
    assert not gradient[:, 1].any()
    assert expected_gradient.abs().sum() > 0


@pytest.mark.parametrize("name", LIFTINGS)
def test_with_all_cameras_masked_values_are_finite_and_no_token_has_a_gradient(name: str) -> None:
    lifting, views = lifting_of(name), random_views(3)
    views.cam_from_grid[:] = 0
    value, gradient = value_and_gradient(lifting, features_for(lifting, 1, 4), views)
    assert value.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_masked_camera_is_not_a_view_of_a_target(sampler: Sampler) -> None:
    views, maps, kept = random_views(3), torch.randn(4, *TOKENS, 5), [0, 2, 3]
    cameras, pinholes = views.cam_from_grid[0], views.intrinsics[0]
    expected = sampler(maps[kept], cameras[kept], pinholes[kept], SIZE, CENTERS)
    cameras[1] = 0
    found = sampler(maps, cameras, pinholes, SIZE, CENTERS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- areas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIFTINGS)
def test_an_area_of_the_whole_image_does_not_change_a_bit(name: str) -> None:
    lifting, views = lifting_of(name), random_views(5, batch=2)
    features = features_for(lifting, 2, 4)
    whole = replace(views, area=torch.tensor(WHOLE, dtype=torch.float64).expand(2, 4, 4))
    expected, found = (value_and_gradient(lifting, features, v) for v in (views, whole))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LIFTINGS)
def test_a_camera_with_an_empty_area_has_no_effect(name: str) -> None:
    lifting, views, kept = lifting_of(name), random_views(5, batch=2), [0, 2, 3]
    features = features_for(lifting, 2, 4)
    area = torch.tensor(WHOLE, dtype=torch.float64).repeat(2, 4, 1)
    area[:, 1, 2:] = 0
    others = Views(*(t[:, kept] for t in (views.images, views.intrinsics, views.cam_from_grid)))
    value, gradient = value_and_gradient(lifting, features, replace(views, area=area))
    torch.testing.assert_close(value, lifting(features[:, kept], others).detach(), atol=1e-5, rtol=1e-5)
    assert not gradient[:, 1].any()


@pytest.mark.parametrize("name", ["simplebev", "lss", "cvt"])
def test_a_lifting_reads_no_token_outside_the_area(name: str) -> None:
    """The area is the left half of each image: 3 of 6 tokens."""
    lifting, views = lifting_of(name), random_views(6, batch=2)
    area = torch.tensor([0, 0, SIZE[0], SIZE[1] / 2], dtype=torch.float64).expand(2, 4, 4)
    _, gradient = value_and_gradient(lifting, features_for(lifting, 2, 4), replace(views, area=area))
    assert gradient[..., :3].any() and not gradient[..., 3:].any()


@pytest.mark.parametrize("function", BACKENDS)
def test_lifting_with_areas_equals_the_slow_reference(function: Lift) -> None:
    features = torch.randn(2, 4, 5, *TOKENS, generator=torch.Generator().manual_seed(0))
    assert_equal_to_twin(function, features, with_areas(random_views(7, batch=2), 0), GRID)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(WAYS))
def test_lifting_with_random_areas_equals_the_slow_reference(seed: int, function: Lift) -> None:
    features = torch.randn(1, 3, 5, *TOKENS, generator=torch.Generator().manual_seed(seed % 2**31))
    assert_equal_to_twin(function, features, with_areas(random_views(seed, cams=3), seed), GRID)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_targets_at_every_voxel_equal_the_lifting_and_its_slow_reference(sampler: Sampler) -> None:
    """With areas. The slow reference is float64."""
    views, features = with_areas(random_views(8), 1), torch.randn(1, 4, 5, *TOKENS)
    assert views.area is not None
    cameras = views.cam_from_grid[0], views.intrinsics[0], SIZE
    sampled, num_views = sampler(features[0].permute(0, 2, 3, 1), *cameras, CENTERS, views.area[0])
    volume = sampled.view(1, *GRID.shape, 5).permute(0, 1, 4, 2, 3).flatten(1, 2)
    torch.testing.assert_close(volume, lift(features, views, GRID), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(volume.double(), lift_dense(features.double(), views, GRID), atol=1e-5, rtol=0)
    assert 0 < num_views.count_nonzero() < len(num_views)
    assert torch.equal(num_views > 0, sampled.any(1))


def test_gradients_of_sampled_features_equal_the_slow_reference() -> None:
    views, features = with_areas(random_views(9), 2), torch.randn(1, 4, 5, *TOKENS, dtype=torch.float64)
    assert views.area is not None
    leaf, exact = features.clone().requires_grad_(), features.clone().requires_grad_()
    cameras = views.cam_from_grid[0], views.intrinsics[0], SIZE
    sampled, _ = sample_voxel_features(leaf[0].permute(0, 2, 3, 1), *cameras, CENTERS, views.area[0])
    weight = torch.randn(sampled.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled.backward(weight)
    lift_dense(exact, views, GRID).backward(weight.view(*GRID.shape, 5).permute(0, 3, 1, 2).flatten(0, 1)[None])
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad, exact.grad, atol=1e-6, rtol=0)


def test_samples_are_clamped_to_the_token_centres_of_the_area() -> None:
    area = torch.tensor([WHOLE, (10, 20, 40, 50), (0, 0, 3, 60), (0, 57, 40, 60)], dtype=torch.float64)
    found = Cameras(torch.zeros(4, 3, 4), area, SIZE).token_area(TOKENS)
    expected = [[0, 0, 3, 5], [1, 2, 3, 4], [0, 0, 0, 5]]
    assert found[:3].tolist() == expected
    assert found[3].tolist() == [0, 5, 3, 5]  # at 5.7, clamped to the last token's centre at 5


def test_the_area_of_a_mirrored_image_is_mirrored_back() -> None:
    views = with_areas(random_views(10, cams=2), 3)
    views.intrinsics[0, 0, 0, 0], views.intrinsics[0, 1, 0, 0] = -30, 30
    assert views.area is not None
    _, plain = unmirror(torch.randn(1, 2, 3, *TOKENS), views)
    assert plain.area is not None
    top, left, bottom, right = views.area[0, 0].tolist()
    assert plain.area[0, 0].tolist() == [top, SIZE[1] - right, bottom, SIZE[1] - left]
    assert torch.equal(plain.area[0, 1], views.area[0, 1])
