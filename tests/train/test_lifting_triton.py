"""The Triton kernels of lifting: interpreted in NumPy, compiled without a GPU, and run at full size on a GPU.

`test_lifting` runs its closed forms and comparisons with the interpreted kernels, too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops import mean_over_views
from occfeat_train.ops.mean_over_views import lift, lift_torch, lift_triton
from occfeat_train.ops.views import Views
from tests.train.interpreted import LIFTING, compiled, lift_interpreted
from tests.train.test_lifting import (
    FORWARD,
    GRID,
    PINHOLE,
    Lift,
    one_camera,
    random_features,
    random_views,
    ring_of_six,
    value_and_gradient,
    views_of,
)

pytest.importorskip("triton", reason="no Triton for this platform")
HALVES = [torch.bfloat16, torch.float16]


def assert_as_torch(function: Lift, features: Tensor, views: Views, grid: VoxelGrid) -> None:
    """Compare values and gradients with plain torch, up to the rounding of float32 or one last place of half precision."""
    place = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[features.dtype]
    found = value_and_gradient(function, features, views, grid)
    for a, b in zip(found, value_and_gradient(lift_torch, features, views, grid), strict=True):
        assert a.dtype == b.dtype and a.isfinite().all()
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5 * scale, rtol=place)


# -- interpreted ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cams=st.integers(1, 3))
def test_bilinear_weights_equal_plain_torchs_to_the_last_bit(seed: int, cams: int) -> None:
    """With one channel per token, the volume is the matrix of weights."""
    h, w = 3, 4
    features = torch.eye(cams * h * w).view(cams, h, w, -1).permute(0, 3, 1, 2)[None]
    views = random_views(seed, cams=cams)
    assert torch.equal(lift_interpreted(features, views, GRID), lift(features, views, GRID))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 40, 200]),
    size=st.sampled_from([(2, 2), (4, 6), (5, 3)]),
    dtype=st.sampled_from([torch.float32, *HALVES]),
)
def test_any_rig_equals_plain_torch(
    seed: int, batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Values and gradients, in blocks of 8 to 128 voxels that do not divide the grid's 45 voxels."""
    grid = VoxelGrid((3, 5, 3), (-2, -6, -5), (2, 7, 5))
    features = random_features(batch, 2, channels, *size, seed=seed).to(dtype)
    assert_as_torch(lift_interpreted, features, random_views(seed, batch, cams=2), grid)


def test_a_map_of_one_token_equals_plain_torch() -> None:
    features, views = random_features(2, channels=3, h=1, w=1), random_views(1, batch=2)
    assert_as_torch(lift_interpreted, features, views, GRID)


def test_a_camera_in_a_voxels_centre_and_one_without_focal_length_give_finite_results() -> None:
    up, forward, right = (float(c) for c in GRID.voxel_centers()[1, 4, 3][::-1])
    camera = FORWARD.copy()
    camera[:3, 3] = -right, up, -forward
    views = views_of([camera, FORWARD], [PINHOLE, PINHOLE * [[0], [0], [1]]])
    assert (torch.tensor([right, forward, up, 1.0]).double() @ views.cam_from_grid[0, 0].T)[:3].abs().max() == 0
    assert_as_torch(lift_interpreted, random_features(cams=2), views, GRID)


def test_a_rig_that_sees_no_voxel_gives_zeros_and_no_gradient() -> None:
    grid = VoxelGrid((2, 3, 3), (-1, -6, -3), (1, -1, 3))  # behind the camera
    volume, gradient = value_and_gradient(lift_interpreted, random_features(cams=1), one_camera(), grid)
    assert not volume.any() and not gradient.any()


def test_a_token_that_no_voxel_samples_gets_no_gradient() -> None:
    grid = VoxelGrid((1, 1, 1), (-1, 2, -1), (1, 4, 1))  # at the centre of a map of 4 x 6 tokens
    _, gradient = value_and_gradient(lift_interpreted, random_features(cams=1), one_camera(), grid)
    seen = torch.zeros(4, 6, dtype=torch.bool)
    seen[1:3, 2:4] = True
    assert torch.equal(gradient[0, 0].ne(0), seen.expand(5, 4, 6))


@pytest.mark.parametrize(
    ("runs_triton", "deterministic", "expected"),
    [(True, False, "lift_triton"), (True, True, "lift_torch"), (False, False, "lift_torch")],
)
@pytest.mark.usefixtures("unchecked")
def test_a_gpu_uses_triton_unless_algorithms_must_be_deterministic(
    runs_triton: bool, deterministic: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(mean_over_views, "runs_triton", lambda device: runs_triton)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    for name in ("lift_triton", "lift_torch"):
        monkeypatch.setattr(mean_over_views, name, lambda *arguments, name=name: called.append(name))
    lift(torch.empty(1, 1, 2, 4, 6, device="meta"), one_camera(), GRID)
    lift(torch.empty(1, 1, 2, 4, 6, device="meta", dtype=torch.float64), one_camera(), GRID)
    assert called == [expected, "lift_torch"]


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(("dtype", "target"), [(torch.bfloat16, 90), (torch.float32, 80)])
def test_the_kernels_compile_for_a_gpu_without_fused_float64_products(
    is_backward: bool, dtype: torch.dtype, target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fused product could put a voxel at the image's edge on another side than plain torch does."""
    volume = torch.empty(1, 4, 4, 2, 80, dtype=dtype)
    tokens = torch.empty(1, 6 * 24, 80, dtype=torch.float32 if is_backward else dtype)
    axes = tuple(torch.empty(n, dtype=torch.float64) for n in (2, 4, 4))
    geometry = torch.empty(1, 6, 20, dtype=torch.float64), (40, 60), (4, 6), axes
    given = (tokens, *geometry, volume, is_backward)
    (ptx,) = compiled(LIFTING, target, lambda kernels: kernels.run_kernel(*given), monkeypatch, tmp_path).values()
    assert bool(re.search(r"\b(atom|red)\.\w+", ptx)) == is_backward  # atomic additions
    assert "mul.rn.f64" in ptx and not re.search(r"fma\.rn\.f64|mul\.f64", ptx)  # instructions without .rn may be fused


@pytest.fixture
def full_size() -> tuple[Tensor, Views]:
    """On the GPU: two samples of six 28x50 maps with 128 channels, and a ring of cameras."""
    ring = ring_of_six()
    tensors = (torch.cat([t, t]).cuda() for t in (ring.images, ring.intrinsics, ring.cam_from_grid))
    return random_features(2, 6, 128, 28, 50).cuda(), Views(*tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_at_full_size_a_gpu_equals_plain_torch(full_size: tuple[Tensor, Views], dtype: torch.dtype) -> None:
    features, views = full_size
    assert_as_torch(lift_triton, features.to(dtype), views, VoxelGrid())


@pytest.mark.gpu
def test_the_host_waits_for_nothing(full_size: tuple[Tensor, Views]) -> None:
    features, views = full_size
    leaf, on_host = features.requires_grad_(), Views(views.images, views.intrinsics.cpu(), views.cam_from_grid.cpu())
    weight = torch.ones_like(lift_triton(leaf, views, VoxelGrid()))
    lift_triton(leaf, views, VoxelGrid()).backward(weight)  # compiles and copies the axes
    torch.cuda.set_sync_debug_mode("error")
    try:
        for there in (views, on_host):
            lift_triton(leaf, there, VoxelGrid()).backward(weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_deterministic_algorithms_give_the_same_bits_in_every_run(full_size: tuple[Tensor, Views]) -> None:
    features, views = full_size
    views = Views(
        views.images, views.intrinsics.cpu(), views.cam_from_grid.cpu()
    )  # avoids cuBLAS, which would need an environment variable
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (value_and_gradient(lift, features, views, VoxelGrid()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
