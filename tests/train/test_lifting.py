"""Lifting: closed forms, values and gradients against the slow reference, and invariances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_targets.cache.geometry import rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.simplebev import SimpleBEV
from occfeat_train.ops.mean_over_views import lift, lift_torch
from occfeat_train.ops.views import Views
from occfeat_train.simple_bev.quirks import ReferenceSimpleBEV
from tests.train.interpreted import HAS_TRITON, lift_interpreted
from tests.train.lifting_twin import lift_dense

WAYS = [lift_torch, *([lift_interpreted] if HAS_TRITON else [])]
BACKENDS = [pytest.param(way, id=name) for way, name in zip(WAYS, ("torch", "triton"), strict=False)]
SIZE = (40, 60)  # height, width [px]; maps are 4 x 6 tokens of 10 x 10 px
GRID = VoxelGrid((3, 8, 7), (-2, -8, -7), (2, 8, 7))
FORWARD = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # at the origin
BACKWARD = FORWARD * np.array([[-1], [1], [-1], [1]])
PINHOLE = np.array([[30, 0, 30], [0, 30, 20], [0, 0, 1.0]])

Lift = Callable[..., Tensor]


def lift_reference(features: Tensor, views: Views, grid: VoxelGrid) -> Tensor:
    """`lift` with the defects of the reference repository."""
    return ReferenceSimpleBEV(grid, features.shape[2]).lift(features, views)


WITH_REFERENCE = [*BACKENDS, pytest.param(lift_reference, id="reference")]


def twin_of(function: Lift) -> Lift:
    return partial(lift_dense, compat="simple-bev") if function is lift_reference else lift_dense


def views_of(cameras: list[np.ndarray], pinholes: list[np.ndarray], size: tuple[int, int] = SIZE) -> Views:
    """Views of one sample."""
    intrinsics, cam_from_grid = (torch.from_numpy(np.stack(m)).double()[None] for m in (pinholes, cameras))
    return Views(torch.zeros(1, len(cameras), 3, *size), intrinsics, cam_from_grid)


def one_camera() -> Views:
    return views_of([FORWARD], [PINHOLE])


def random_views(seed: int, batch: int = 1, cams: int = 4) -> Views:
    rng = np.random.default_rng(seed)

    def sample() -> Views:
        cameras = [rigid(rng.normal(size=4), rng.normal(size=3)) for _ in range(cams)]
        return views_of(cameras, [PINHOLE + np.diag([*rng.uniform(-25, 25, 2), 0]) for _ in range(cams)])

    return stack([sample() for _ in range(batch)])


def stack(samples: list[Views]) -> Views:
    return Views(
        *(torch.cat([getattr(s, name) for s in samples]) for name in ("images", "intrinsics", "cam_from_grid"))
    )


def ring_of_six() -> Views:
    """One sample at 224x400 with a ring of six cameras and about nuScenes' intrinsics."""
    cameras = []
    for yaw in np.arange(6) * np.pi / 3:
        turn = np.array([[np.cos(yaw), np.sin(yaw), 0, 0], [-np.sin(yaw), np.cos(yaw), 0, 0], [0, 0, 1, 1.5]])
        cameras.append(FORWARD @ np.vstack([turn, [0, 0, 0, 1]]))
    return views_of(cameras, [np.array([[316, 0, 204], [0, 316, 122], [0, 0, 1.0]])] * 6, (224, 400))


def random_features(batch: int = 1, cams: int = 4, channels: int = 5, h: int = 4, w: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, cams, channels, h, w, generator=torch.Generator().manual_seed(seed))


def by_voxel(volume: Tensor, grid: VoxelGrid = GRID) -> Tensor:
    """(1, Z * C, H, W) -> (Z, H, W, C)."""
    return volume[0].unflatten(0, (grid.shape[0], -1)).permute(0, 2, 3, 1)


def pixels(grid: VoxelGrid = GRID) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, v and is_seen of every voxel for FORWARD and PINHOLE."""
    right, forward, up = np.moveaxis(grid.voxel_centers().astype(np.float64), -1, 0)
    u, v = 30 * right / forward + 30, -30 * up / forward + 20
    return u, v, (forward > 0) & (u >= 0) & (u < SIZE[1]) & (v >= 0) & (v < SIZE[0])


def value_and_gradient(function: Lift, features: Tensor, views: Views, grid: VoxelGrid) -> list[Tensor]:
    leaf = features.clone().requires_grad_()
    volume = function(leaf, views, grid)
    weight = torch.randn(volume.shape, generator=torch.Generator().manual_seed(1)).to(volume)
    (volume * weight).sum().backward()
    assert leaf.grad is not None
    return [volume.detach(), leaf.grad]


def assert_equal_to_twin(function: Lift, features: Tensor, views: Views, grid: VoxelGrid) -> None:
    exact = value_and_gradient(twin_of(function), features.double(), views, grid)
    for a, b in zip(value_and_gradient(function, features, views, grid), exact, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, atol=1e-5 * scale, rtol=0)


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", BACKENDS)
def test_a_constant_map_gives_the_constant_at_seen_voxels_and_zero_elsewhere(function: Lift) -> None:
    volume = by_voxel(function(torch.full((1, 1, 2, 4, 6), 3.0), one_camera(), GRID))
    _, _, is_seen = pixels()
    assert 0 < is_seen.sum() < is_seen.size / 2
    np.testing.assert_allclose(volume, 3.0 * np.stack([is_seen] * 2, -1), rtol=1e-6)


@pytest.mark.parametrize("function", BACKENDS)
def test_a_ramp_gives_the_projected_coordinate_up_to_the_outermost_centres(function: Lift) -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    volume = by_voxel(function(torch.stack([columns, rows])[None, None], one_camera(), GRID)).numpy()
    u, v, is_seen = pixels()
    np.testing.assert_allclose(volume[is_seen][:, 0], np.clip(u[is_seen] / 10 - 0.5, 0, 5), atol=1e-5)
    np.testing.assert_allclose(volume[is_seen][:, 1], np.clip(v[is_seen] / 10 - 0.5, 0, 3), atol=1e-5)


@pytest.mark.parametrize("function", BACKENDS)
def test_views_are_averaged(function: Lift) -> None:
    features = torch.tensor([1.0, 4.0, 100.0])[None, :, None, None, None].expand(1, 3, 1, 4, 6)
    volume = by_voxel(function(features, views_of([FORWARD, FORWARD, BACKWARD], [PINHOLE] * 3), GRID))[..., 0]
    _, _, is_seen = pixels()
    np.testing.assert_allclose(volume[is_seen], 2.5, rtol=1e-6)
    behind = volume[:, :4].unique()
    torch.testing.assert_close(behind[[0, -1]], torch.tensor([0.0, 100.0]), rtol=1e-6, atol=0)
    assert ((behind == 0) | (behind > 99.9)).all()


@pytest.mark.parametrize("function", BACKENDS)
def test_the_image_is_half_open(function: Lift) -> None:
    """Voxels project exactly to u = 30 + 10 i. Pixel 0 is inside, pixel W is not."""
    grid = VoxelGrid((1, 1, 9), (-1, 2, -4.5), (1, 4, 4.5))
    volume = by_voxel(function(torch.ones(1, 1, 1, 4, 6), one_camera(), grid), grid)
    assert volume.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("function", BACKENDS)
def test_a_grid_that_no_camera_sees_gives_zeros_and_no_gradient(function: Lift) -> None:
    features = random_features(cams=1).requires_grad_()
    volume = function(features, one_camera(), VoxelGrid((2, 3, 4), (-2, -8, -7), (2, -1, 7)))
    volume.sum().backward()
    assert features.grad is not None
    assert not volume.any() and not features.grad.any()


def test_channels_are_levels_then_features_and_channels_last_in_memory() -> None:
    grid = VoxelGrid((4, 2, 2), (-2, 4, -1), (2, 8, 1))
    rows = torch.arange(4.0)[:, None].expand(4, 6)
    volume = lift(torch.stack([rows, rows + 100])[None, None], one_camera(), grid)
    assert volume.shape == (1, 8, 2, 2)
    assert volume.is_contiguous(memory_format=torch.channels_last)
    by_height = volume[0, :, 0, 0].view(4, 2)
    assert (by_height.diff(dim=0)[:, 0] < 0).all(), "the lowest voxel projects to the last row of the image"
    torch.testing.assert_close(by_height[:, 1], by_height[:, 0] + 100)


# -- the slow reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", WITH_REFERENCE)
def test_values_and_gradients_equal_the_slow_reference(function: Lift) -> None:
    assert_equal_to_twin(function, random_features(2), random_views(0, batch=2), GRID)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 19), st.integers(1, 9))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cams=st.integers(1, 6),
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    shape=shapes,
    function=st.sampled_from([*WAYS, lift_reference]),
)
def test_any_rig_on_any_grid_equals_the_slow_reference(
    seed: int,
    cams: int,
    channels: int,
    size: tuple[int, int],
    shape: tuple[int, int, int],
    function: Lift,
) -> None:
    grid = VoxelGrid(shape, (-2.1, -9.3, -8.7), (2.3, 8.9, 9.1))
    features = random_features(cams=cams, channels=channels, h=size[0], w=size[1], seed=seed)
    assert_equal_to_twin(function, features, random_views(seed, cams=cams), grid)


odd = st.sampled_from([0.0, 1e-12, -1e-12, 1e12, -1e12, 30.0, -30.0, 1e300])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    focal=st.tuples(odd, odd),
    center=st.tuples(odd, odd),
    seed=st.integers(0, 9),
    function=st.sampled_from([way for way in WAYS if way is not lift_torch]),
)
def test_with_degenerate_intrinsics_values_are_finite_and_all_paths_agree(
    focal: tuple[float, float], center: tuple[float, float], seed: int, function: Lift
) -> None:
    views = random_views(seed, cams=2)
    pinhole = np.array([[focal[0], 0, center[0] + 0.25], [0, focal[1], center[1] + 0.25], [0, 0, 1]])
    views.intrinsics[0, 0] = torch.from_numpy(pinhole)
    found = value_and_gradient(function, random_features(cams=2), views, GRID)
    expected = value_and_gradient(lift_torch, random_features(cams=2), views, GRID)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("function", [lift, lift_reference])
def test_lifting_passes_gradcheck(function: Lift) -> None:
    grid = VoxelGrid((2, 3, 3), (-1, 0, -3), (1, 6, 3))
    features = random_features(cams=2, channels=2, h=2, w=3).double().requires_grad_()
    views = views_of([FORWARD, FORWARD], [PINHOLE, PINHOLE * [[0.7], [1.2], [1]]])
    assert torch.autograd.gradcheck(lambda f: function(f, views, grid), features)


# -- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", BACKENDS)
def test_a_mirrored_image_with_its_mirrored_map_gives_the_same_volume(function: Lift) -> None:
    features, views = random_features(), random_views(3)
    mirror = torch.tensor([[-1.0, 0, SIZE[1]], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    mirrored = replace(views, intrinsics=mirror @ views.intrinsics)
    expected = function(features, views, GRID)
    torch.testing.assert_close(function(features.flip(-1), mirrored, GRID), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("function", BACKENDS)
def test_a_batch_equals_its_samples_one_by_one(function: Lift) -> None:
    samples, features = [random_views(seed) for seed in (4, 5, 6)], random_features(3)
    together = value_and_gradient(function, features, stack(samples), GRID)
    weights = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(1))
    for b, views in enumerate(samples):
        leaf = features[b : b + 1].clone().requires_grad_()
        alone = function(leaf, views, GRID)
        alone.backward(weights[b : b + 1])
        assert leaf.grad is not None
        assert torch.equal(alone[0], together[0][b])
        assert torch.equal(leaf.grad[0], together[1][b])


# -- the module -------------------------------------------------------------------------------------------------------


def test_the_module_lifts_and_compresses_to_its_channels() -> None:
    torch.manual_seed(0)
    module, features, views = SimpleBEV(GRID, 5), random_features(2, seed=2), random_views(11, batch=2)
    assert torch.equal(module.lift(features, views), lift(features, views, GRID))
    leaf = features.requires_grad_()
    out = module(leaf, views)
    assert out.shape == (2, 5, 8, 7)
    out.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"compressor.0.weight": (5, 15, 3, 3)}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": torch.ones(2, 3, 4, 6)},
            r"features of shape \(2, 3, 4, 6\), torch.float32: expected float \(B, V",
        ),
        ({"features": torch.ones(1, 3, 2, 4, 6)}, r"images of shape \(1, 2, 3, 40, 60\) beside .*: expected \(1, 3,"),
        ({"intrinsics": torch.ones(1, 2, 4, 4)}, r"intrinsics of shape \(1, 2, 4, 4\) .*: expected \(1, 2, 3, 3\)"),
        ({"cam_from_grid": torch.ones(2, 4, 4)}, r"cam_from_grid of shape \(2, 4, 4\) .*: expected \(1, 2, 4, 4\)"),
        ({"area": torch.ones(2, 4)}, r"area of shape \(2, 4\) .*: expected \(1, 2, 4\)"),
    ],
)
def test_wrong_arguments_are_refused(function: Lift, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"features": torch.ones(1, 2, 2, 4, 6), **change}
    features = arguments.pop("features")
    with pytest.raises(ValueError, match=message):
        function(features, replace(random_views(0, cams=2), **arguments), GRID)
