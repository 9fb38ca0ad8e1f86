"""Splatting: closed forms, values and gradients against the outer product, and invariances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks import lss
from occfeat_train.networks.lss import LSS, depth_bins
from occfeat_train.ops.views import Views
from occfeat_train.simple_bev.quirks import ReferenceLSS
from tests.train.splat_twin import splat_dense
from tests.train.test_lifting import FORWARD, PINHOLE, one_camera, random_features, random_views, views_of

GRID = VoxelGrid((3, 8, 7), (-2, -8, -7), (2, 8, 7))
DEPTHS = 4  # 2, 4, 6 and 8 m: half of 8 cells, and int(0.9 * hypot(8, 7)) is 9
FIELDS = ("images", "intrinsics", "cam_from_grid")


def random_input(batch: int = 1, cams: int = 3, channels: int = 5, h: int = 4, w: int = 6, seed: int = 0) -> Tensor:
    return 2 * random_features(batch, cams, DEPTHS + channels, h, w, seed)


def dense(features: Tensor, views: Views) -> Tensor:
    return splat_dense(features[:, :, :DEPTHS], features[:, :, DEPTHS:], depth_bins(GRID), views, GRID)


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_depths_on_the_references_grid_equal_the_references() -> None:
    depths = depth_bins(VoxelGrid())
    assert len(depths) == 100
    np.testing.assert_allclose(depths, 2 + np.arange(100) * 61 / 99)  # to int(0.9 * 50 * sqrt(2)) = 63 m


def test_depths_of_a_grid_follow_from_its_farthest_corner_and_longer_side() -> None:
    assert depth_bins(GRID)[[0, -1]].tolist() == [2, 9]
    assert len(depth_bins(GRID)) == DEPTHS
    assert depth_bins(VoxelGrid((1, 1, 1), (0, 0, 0), (1, 1, 1))).tolist() == [2, 3]


def test_a_token_with_one_certain_depth_is_splatted_into_the_cell_that_it_sees() -> None:
    """The camera looks forward from the origin. Its optical axis is the common corner of four tokens."""
    grid = VoxelGrid((1, 20, 20), (-5, -10, -10), (5, 10, 10))
    lss = LSS(grid, 2)
    depths, (h, w) = depth_bins(grid), (4, 6)
    features = torch.zeros(1, 1, lss.feature_channels, h, w)
    k, row, column = 3, 1, 4
    features[0, 0, : lss.num_depths, row, column] = -1e4
    features[0, 0, k, row, column] = 0
    features[0, 0, lss.num_depths :, row, column] = torch.tensor([7.0, -3.0])
    lifted = lss(features, one_camera())
    forward, right = depths[k].item(), ((column + 0.5) * 10 - 30) / 30 * depths[k].item()
    cell = (int(forward + 10), int(right + 10))
    points = lss.find_points(one_camera(), 0, (h, w))
    in_cell = points.starts.diff().view(20, 20)[cell].item()
    assert lifted.abs().sum((0, 1)).nonzero().tolist() == [list(cell)]
    torch.testing.assert_close(lifted[0, :, *cell], torch.tensor([7.0, -3.0]) / in_cell)


def test_shares_of_the_points_sum_to_1_per_voxel_and_in_the_reference_to_at_most_1_per_cell() -> None:
    views = random_views(3, 1, 3)
    points = LSS(GRID, 1).find_points(views, 0, (4, 6))
    total, counts = points.shares.sum().item(), points.starts.diff()
    assert len(points.places) == points.starts[-1] > 20
    assert total == pytest.approx(round(total))  # the number of voxels with points
    assert total > (counts > 0).sum()  # some cells have several such voxels
    reference = ReferenceLSS(GRID, 1).find_points(views, 0, (4, 6))
    assert reference.shares.sum() < (reference.starts.diff() > 0).sum() + 1e-9


def test_a_camera_that_sees_no_voxel_gives_zeros() -> None:
    away = FORWARD.copy()
    away[2, 3] = 100  # the grid lies 100 m in front of the camera
    lifted = LSS(GRID, 5)(random_input(cams=1), views_of([away], [PINHOLE]))
    assert lifted.shape == (1, 5, 8, 7)
    assert not lifted.any()


# -- against the outer product ----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 2), st.integers(1, 4))
def test_values_equal_the_outer_product_splatted_point_by_point(seed: int, batch: int, cams: int) -> None:
    views, features = random_views(seed, batch, cams), random_input(batch, cams, h=2, w=3, seed=seed)
    exact = dense(features.double(), views)
    lss = LSS(GRID, 5)
    torch.testing.assert_close(lss(features.double(), views), exact)
    torch.testing.assert_close(lss(features, views).double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_outer_products() -> None:
    views, features = random_views(1, 2, 3), random_input(2).double()
    grads = []
    for function in (dense, LSS(GRID, 5)):
        leaf = features.clone().requires_grad_()
        out = function(leaf, views)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        grads.append(leaf.grad)
    assert grads[0] is not None
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("lifting", [LSS, ReferenceLSS])
def test_lss_passes_gradcheck(lifting: type[LSS]) -> None:
    views, features = random_views(1, 1, 2), random_input(1, 2, 2, 2, 3).double().requires_grad_()
    lss = lifting(GRID, 2)
    assert torch.autograd.gradcheck(lambda given: lss(given, views), (features,))


@pytest.mark.parametrize("lifting", [LSS, ReferenceLSS])
def test_a_gpus_lists_with_unused_points_give_the_same_values_and_gradients(
    lifting: type[LSS], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU keeps all points, because the host would wait for the number of those in the grid."""
    views, features = random_views(1, 2, 3), random_input(2)
    found = []
    for waits in (False, True):
        monkeypatch.setattr(lss, "host_waits", lambda device, waits=waits: waits)
        leaf, model = features.clone().requires_grad_(), lifting(GRID, 5)
        out = model(leaf, views)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        points = model.find_points(views, 0, (4, 6))
        found.append((out, leaf.grad, points))
        assert points.bags[-1] == len(points.places)
        assert (len(points.places) == points.starts[-1]) == (not waits)
        assert points.bags[len(points.starts) - 1 :].diff().le(64).all()
    for ours, theirs in zip(found[1][:2], found[0][:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    used = found[0][2]
    assert torch.equal(found[1][2].places[: len(used.places)], used.places)
    assert torch.equal(found[1][2].shares[: len(used.places)], used.shares)
    assert not found[1][2].shares[len(used.places) :].any()


# -- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifting", [LSS, ReferenceLSS])
def test_a_batch_of_two_equals_two_batches_of_one(lifting: type[LSS]) -> None:
    views, features = random_views(2, 2, 3), random_input(2)
    lss = lifting(GRID, 5)
    both = lss(features, views)
    for b in range(2):
        alone = Views(*(getattr(views, name)[b : b + 1] for name in FIELDS))
        assert torch.equal(both[b : b + 1], lss(features[b : b + 1], alone))


def test_the_order_of_cameras_does_not_matter() -> None:
    views, features = random_views(4, 1, 3), random_input()
    order = [2, 0, 1]
    shuffled = Views(*(getattr(views, name)[:, order] for name in FIELDS))
    lss = LSS(GRID, 5)
    torch.testing.assert_close(lss(features[:, order], shuffled), lss(features, views))


def test_a_mirrored_image_with_negative_fx_gives_the_same_result() -> None:
    views, features = random_views(4, 1, 3), random_input()
    mirrored = views.intrinsics.clone()
    mirrored[..., 0, :] = views.intrinsics[..., 0, :] * -1
    mirrored[..., 0, 2] += 60
    lss = LSS(GRID, 5)
    torch.testing.assert_close(lss(features.flip(-1), replace(views, intrinsics=mirrored)), lss(features, views))


def test_a_camera_with_degenerate_intrinsics_contributes_nothing() -> None:
    views = views_of([FORWARD, FORWARD], [PINHOLE, np.zeros((3, 3))])
    features = random_input(cams=2).requires_grad_()
    lifted = LSS(GRID, 5)(features, views)
    torch.testing.assert_close(lifted, LSS(GRID, 5)(features[:, :1], one_camera()))
    lifted.sum().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_bfloat16_features_are_summed_in_float32() -> None:
    views, features = random_views(4, 1, 3), random_input()
    lifted = LSS(GRID, 5)(features.bfloat16(), views)
    assert lifted.dtype == torch.bfloat16
    exact = LSS(GRID, 5)(features.bfloat16().float(), views)
    torch.testing.assert_close(lifted.float(), exact, atol=1e-2, rtol=1e-2)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="features of 5 channels: 4 depths and 5 expected"):
        LSS(GRID, 5)(random_features(1, 1, 5), one_camera())
    with pytest.raises(ValueError, match="images of shape"):
        LSS(GRID, 5)(random_input(cams=2), one_camera())
