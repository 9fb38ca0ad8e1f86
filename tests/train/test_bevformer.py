"""BEVFormer: closed forms, values and gradients against the slow reference, and independence of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.bevformer import (
    BEVFormer,
    CrossAttention,
    SamplingPoints,
    neighbour_reads,
)
from occfeat_train.ops.views import Views
from occfeat_train.simple_bev.quirks import ReferenceBEVFormer
from tests.train import deformable_twin
from tests.train.test_decoder import parameters
from tests.train.test_lifting import (
    BACKWARD,
    FORWARD,
    PINHOLE,
    one_camera,
    random_features,
    random_views,
    views_of,
)

KINDS = [BEVFormer, ReferenceBEVFormer]
GRID = VoxelGrid((2, 5, 4), (-2, -8, -7), (2, 8, 7))


def cross_only(grid: VoxelGrid = GRID, channels: int = 8) -> CrossAttention:
    """A cross-attention that returns the mean of the values at its anchors."""
    module = CrossAttention(channels, grid.shape[0]).eval()
    with torch.no_grad():
        module.places.offsets.bias.zero_()
        for linear in (module.value, module.output):
            linear.weight.copy_(torch.eye(channels))
            linear.bias.zero_()
    return module


def random_model(
    channels: int = 8, grid: VoxelGrid = GRID, kind: type[BEVFormer] = BEVFormer, dtype: torch.dtype = torch.float32
) -> BEVFormer:
    """Two layers with weights so large that every parameter affects the output."""
    torch.manual_seed(0)
    model = kind(grid, channels).eval()
    del model.layers[2:]
    for name, p in model.named_parameters():
        if "places" in name:
            nn.init.normal_(p, std=1.0 if name.endswith("bias") else 0.5)
    return model.to(dtype)


# -- anchors ----------------------------------------------------------------------------------------------------------


def test_cells_read_about_themselves() -> None:
    reads = neighbour_reads(2, BEVFormer(VoxelGrid((1, 3, 4)), 4).cell_anchors(torch.device("cpu")))
    assert reads.anchors[:, 0].tolist() == [[column, row] for row in range(3) for column in range(4)] * 2
    assert reads.maps.tolist() == [0] * 12 + [1] * 12
    assert reads.queries.tolist() == list(range(24))


def test_anchors_are_the_projections_of_a_columns_voxels() -> None:
    """The camera looks forward. Cells behind it have no anchors, cells in front of it have them at u / 10 - 0.5."""
    grid = VoxelGrid((1, 8, 7), (-1, -8, -7), (1, 8, 7))
    reads, num_views = BEVFormer(grid, 4).camera_reads(one_camera(), (4, 6))
    right, forward, _ = np.moveaxis(grid.voxel_centers().astype(np.float64)[0], -1, 0)
    u = 30 * right / forward + 30
    is_seen = (forward > 0) & (u >= 0) & (u < 60)
    assert 0 < is_seen.sum() < is_seen.size / 2
    np.testing.assert_array_equal(num_views[0].view(8, 7), is_seen)
    assert reads.starts.diff().tolist() == is_seen.flatten().tolist()
    expected = np.stack([u[is_seen] / 10 - 0.5, np.full(is_seen.sum(), 1.5)], -1)
    np.testing.assert_allclose(reads.anchors[: is_seen.sum(), 0], expected, atol=1e-5)


def test_cross_attention_with_equal_weights_is_the_mean_over_levels_and_cameras() -> None:
    module = cross_only(VoxelGrid((1, 8, 7)), 4)
    views = views_of([FORWARD, FORWARD, BACKWARD], [PINHOLE] * 3)
    grid = VoxelGrid((1, 8, 7), (-1, -8, -7), (1, 8, 7))
    reads, num_views = BEVFormer(grid, 4).camera_reads(views, (4, 6))
    tokens = torch.tensor([1.0, 4.0, 100.0])[:, None, None, None].expand(3, 4, 6, 4)
    read = module(torch.zeros(56, 4), tokens, reads, num_views.flatten())[:, 0].view(8, 7)
    inner = read[5:, 2:5]  # far from the image borders, where values fade to zero
    torch.testing.assert_close(inner, torch.full_like(inner, 2.5))
    torch.testing.assert_close(read[:3, 2:5], torch.full((3, 3), 100.0))


def test_a_query_that_no_camera_sees_reads_zero() -> None:
    module = cross_only()
    reads, num_views = BEVFormer(GRID, 4).camera_reads(one_camera(), (4, 6))
    unseen = num_views[0] == 0
    assert unseen.any() and not unseen.all()
    read = module(torch.randn(20, 8), torch.ones(1, 4, 6, 8), reads, num_views.flatten())
    assert not read[unseen].any()
    assert read[~unseen].abs().min() > 0


def test_a_centre_behind_the_camera_is_not_read_even_if_its_column_is_seen() -> None:
    """The camera looks down from the middle of a column, so half of its voxels are above the camera."""
    grid = VoxelGrid((4, 1, 1), (-4, -1, -1), (4, 1, 1))
    down = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1.0]])
    views = views_of([down], [PINHOLE])
    reads, num_views = BEVFormer(grid, 4).camera_reads(views, (4, 6))
    assert num_views.tolist() == [[1]]
    assert (reads.anchors[0, :, 0] > -1).tolist() == [True, True, False, False]
    reference, _ = ReferenceBEVFormer(grid, 4).camera_reads(views, (4, 6))
    torch.testing.assert_close(
        reference.anchors[0, 2], reference.anchors[0, 1]
    )  # on the optical axis the clamp has no effect


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.sampled_from(KINDS))
def test_anchors_of_random_rigs_equal_the_slow_reference(
    seed: int, batch: int, cams: int, kind: type[BEVFormer]
) -> None:
    views = random_views(seed, batch, cams)
    reads, num_views = kind(GRID, 4).camera_reads(views, (4, 6))
    compat = kind is ReferenceBEVFormer
    centers = torch.from_numpy(GRID.voxel_centers()).double().permute(1, 2, 0, 3)
    anchors, seen = deformable_twin.project(views, centers, (4, 6), compat)
    assert torch.equal(num_views, seen.sum(1).flatten(1))
    is_read = (seen[:1].expand_as(seen) if compat else seen).flatten(2).transpose(1, 2)  # (B, H * W, V)
    assert torch.equal(reads.starts.diff(), is_read.sum(2).flatten())
    sample, cell, cam = is_read.nonzero(as_tuple=True)
    assert torch.equal(reads.maps[: len(cam)], sample * cams + cam)
    expected, found = anchors.flatten(2, 3)[sample, cam, cell], reads.anchors[: len(cam)]
    near = expected.abs() < 1e5
    torch.testing.assert_close(found[near].double(), expected[near], atol=1e-3, rtol=1e-5)
    assert (found[~near].abs() > 9e4).all()


def test_a_camera_with_degenerate_intrinsics_is_not_read() -> None:
    views = views_of([FORWARD, FORWARD], [PINHOLE, np.zeros((3, 3))])
    model = random_model()
    features = random_features(cams=2, channels=8).requires_grad_()
    model(features, views).sum().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert features.grad[:, 1].abs().max() == 0


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [1, 2, 3, 8])
def test_the_network_equals_the_slow_reference(levels: int, kind: type[BEVFormer]) -> None:
    grid = VoxelGrid((levels, 4, 3), (-2, -8, -7), (2, 8, 7))
    model = random_model(grid=grid, kind=kind, dtype=torch.float64)
    views, features = random_views(5, 2, 3), random_features(2, 3, 8).double()
    with torch.no_grad():
        exact = deformable_twin.run(model, features, views)
        torch.testing.assert_close(model(features, views), exact, atol=1e-5, rtol=1e-5)  # anchors are float32
        found = model.float()(features.float(), views)
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)


def test_gradients_equal_the_slow_reference_with_and_without_checkpointing() -> None:
    model = random_model(dtype=torch.float64)
    views, features = random_views(5, 2, 3), random_features(2, 3, 8).double()

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaf = features.clone().requires_grad_()
        model.zero_grad()
        out = function(leaf)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return [leaf.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    expected = gradients(lambda leaf: deformable_twin.run(model, leaf, views))
    calls: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (True, False):
        model.recompute = recompute
        for a, b in zip(gradients(lambda leaf: model(leaf, views)), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_equals_two_batches_of_one_except_with_compat(kind: type[BEVFormer]) -> None:
    model = random_model(kind=kind)
    views, features = random_views(2, 2, 3), random_features(2, 3, 8)
    alone = [Views(*(getattr(views, n)[b : b + 1] for n in ("images", "intrinsics", "cam_from_grid"))) for b in (0, 1)]
    with torch.no_grad():
        both = model(features, views)
        each = [model(features[b : b + 1], alone[b])[0] for b in (0, 1)]
    torch.testing.assert_close(both[0], each[0], atol=1e-5, rtol=1e-5)
    if kind is BEVFormer:
        torch.testing.assert_close(both[1], each[1], atol=1e-5, rtol=1e-5)
    else:
        assert (both[1] - each[1]).abs().max() > 0.1


def test_the_order_and_number_of_cameras_are_arbitrary() -> None:
    model = random_model()
    views, features = random_views(4, 1, 3), random_features(1, 3, 8)
    order = [2, 0, 1]
    shuffled = Views(*(getattr(views, n)[:, order] for n in ("images", "intrinsics", "cam_from_grid")))
    with torch.no_grad():
        plain = model(features, views)
        torch.testing.assert_close(model(features[:, order], shuffled), plain, atol=1e-5, rtol=1e-5)
        assert model(random_features(1, 1, 8), one_camera()).shape == (1, 8, *GRID.map_shape)


def test_a_training_step_has_all_gradients_and_a_dropout_of_0_1() -> None:
    model = random_model().train()
    views, features = random_views(5, 2, 3), random_features(2, 3, 8)
    out = model(features, views)
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.1] * 4
    with torch.no_grad():
        assert not torch.allclose(model(features, views), model(features, views))


# -- structure --------------------------------------------------------------------------------------------------------


def test_parameter_counts_equal_the_references() -> None:
    model = BEVFormer(VoxelGrid(), 128)
    assert parameters(model) == 12_474_520
    assert parameters(model.layers) == 12_474_520 - 2 * 128 * 200 * 200
    assert len(model.layers) == 6
    assert model.queries.std().item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(("levels", "points"), [(1, 8), (2, 8), (4, 8), (8, 8), (3, 3), (10, 10), (16, 16)])
def test_there_are_8_points_if_divisible_by_the_levels_else_one_per_level(levels: int, points: int) -> None:
    assert CrossAttention(8, levels).places.points == points


def test_initial_offsets_have_four_directions_and_the_highest_level_is_nearest() -> None:
    places = SamplingPoints(8, 8, levels=4)
    offsets, scores = places(torch.randn(2, 8)).split([2, 1], -1)
    assert torch.equal(offsets[0], offsets[1])
    assert torch.equal(scores, torch.zeros_like(scores))
    assert offsets[0, :, 3].tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]
    assert offsets[0, 0, :, 0].tolist() == [4, 3, 2, 1, 8, 7, 6, 5]


def test_channels_that_are_not_a_multiple_of_4_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="BEVFormer of 6 channels: its attention has 4 heads, choose a multiple"):
        BEVFormer(GRID, 6)


def test_views_of_another_shape_are_refused() -> None:
    given: dict[str, Any] = {"features": random_features(1, 2, 8), "views": one_camera()}
    with pytest.raises(ValueError, match="images of shape"):
        BEVFormer(GRID, 8)(**given)
