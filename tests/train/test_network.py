"""The complete network. `test_reference` compares it with the reference's outputs."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import LIFTINGS, lifting_class
from occfeat_train.data.augment import transform_intrinsics
from occfeat_train.networks.decoder import BEVDecoder
from occfeat_train.networks.network import BEVNetwork, build_network, grid_mirror
from occfeat_train.networks.simplebev import SimpleBEV
from occfeat_train.ops.views import Views
from occfeat_train.simple_bev.quirks import ReferenceSimpleBEV
from tests.conftest import REPOSITORY
from tests.train.test_decoder import parameters
from tests.train.test_views import VARIANTS

# The centre is 1 m ahead and 2 m to the right.
OFF_CENTRE = VoxelGrid((2, 8, 12), (-2, -7, -10), (2, 9, 14))


def two_cameras(batch: int, grid_seed: int = 0) -> Views:
    """Random images of a camera that looks forward and one that looks right, both level and 1 m above the grid's origin."""
    torch.manual_seed(grid_seed)
    ahead = inverse_rigid(GRID_FROM_CAMERA_AXES)
    right = rigid((np.cos(np.pi / 4), 0, -np.sin(np.pi / 4), 0), (0.1, 0.2, 0.3)) @ ahead
    intrinsics = np.array([[30.3, 0, 31.7], [0, 29.1, 16.9], [0, 0, 1]])
    return Views(
        images=torch.randn(batch, 2, 3, 32, 64),
        intrinsics=torch.from_numpy(intrinsics).expand(batch, 2, 3, 3),
        cam_from_grid=torch.from_numpy(np.stack([ahead, right])).expand(batch, 2, 4, 4),
    )


@pytest.fixture
def small_network() -> BEVNetwork:
    torch.manual_seed(1)
    encoder = nn.Conv2d(3, 8, 8, stride=8)
    return BEVNetwork(encoder, SimpleBEV(OFF_CENTRE, 8), BEVDecoder(8)).eval()


class MirrorableEncoder(nn.Module):
    """(N, 3, H, W) images -> (N, channels, H / 8, W / 8). A mirrored image gives the mirrored map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 3, 8, 8) / 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(images, self.weight + self.weight.flip(-1), stride=8)


def augmented(mirror: list[list[bool]]) -> Views:
    """Two samples of `two_cameras` in float64, with intrinsics as after a resize, a crop and mirroring."""
    views, rng = two_cameras(2), np.random.default_rng(0)
    resized, crop = (torch.from_numpy(rng.integers(*between, (2, 2, 2))) for between in ((50, 70), (-9, 9)))
    is_mirrored = torch.tensor(mirror)
    images = views.images.double()
    return Views(
        torch.where(is_mirrored[..., None, None, None], images.flip(-1), images),
        transform_intrinsics(views.intrinsics, (40, 72), resized, crop, is_mirrored, (32, 64)),
        views.cam_from_grid,
    )


def mirrorable_network(lifting: str, compat: str = "none") -> BEVNetwork:
    """A float64 network whose F_B is the lifted map, with weights so large that every parameter affects it."""
    torch.manual_seed(2)
    lifted = pkgutil.resolve_name(lifting_class(lifting, compat))(OFF_CENTRE, 8)
    for name, parameter in lifted.named_parameters():
        if not name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif "places" in name:  # BEVFormer's sampling offsets
            nn.init.normal_(parameter)
    return BEVNetwork(MirrorableEncoder(lifted.feature_channels), lifted, nn.Identity()).double().eval()


@pytest.mark.parametrize(("lifting", "compat"), VARIANTS)
def test_a_mirrored_image_gives_the_same_map_with_every_lifting(lifting, compat):
    network = mirrorable_network(lifting, compat)
    with torch.no_grad():
        plain = network(augmented([[False, False], [False, False]]))
        found = network(augmented([[True, False], [True, True]]))
    assert (found - plain).norm() < 1e-9 * plain.norm()


@pytest.mark.slow
def test_a_process_with_mirrored_images_has_the_maps_and_gradients_of_one_without():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*torchrun, "-m", "tests.train.mirrored_ranks"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines() == [f"{lifting}: the same on both ranks" for lifting in LIFTINGS]


def test_gradients_of_a_mirrored_view_are_mirrored():
    network, grads = mirrorable_network("simplebev"), []
    for mirror in (False, True):
        views = augmented([[mirror, False], [False, mirror]])
        views.images.requires_grad_()
        network(views).square().sum().backward()
        grads.append(views.images.grad)
    plain, mirrored = grads
    expected = torch.where(torch.eye(2, dtype=torch.bool)[:, :, None, None, None], plain.flip(-1), plain)
    assert (mirrored - expected).norm() < 1e-9 * plain.norm()


def test_a_mirrored_grid_maps_each_cell_to_the_opposite_cell():
    flips = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    mirror = grid_mirror(OFF_CENTRE, flips).numpy()
    centers = OFF_CENTRE.voxel_centers().astype(np.float64)
    axes: list[Any] = [(), (1,), (2,), (1, 2)]
    for matrix, flipped in zip(mirror, axes, strict=True):
        moved = centers @ matrix[:3, :3].T + matrix[:3, 3]
        np.testing.assert_allclose(moved, np.flip(centers, flipped), atol=1e-6)


def test_a_flip_mirrors_the_volume_and_then_f_b_back(small_network):
    flips = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    views, small_network = two_cameras(4), small_network.double()
    views = replace(views, images=views.images.double())
    with torch.no_grad():
        found = small_network(views, flips)
        features = small_network.encoder(views.images.flatten(0, 1)).unflatten(0, (4, 2))
        volume = small_network.lifting.lift(features, views)
        assert (volume != 0).float().mean() > 0.1
        axes: list[Any] = [(), (-2,), (-1,), (-2, -1)]
        mirrored = torch.stack([v.flip(a) for v, a in zip(volume, axes, strict=True)])
        bev = small_network.decoder(small_network.lifting.compressor(mirrored))
        expected = torch.stack([b.flip(a) for b, a in zip(bev, axes, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lifting", LIFTINGS)
def test_with_every_lifting_the_decoders_input_is_mirrored_and_f_b_is_mirrored_back(lifting):
    """The mirrored map equals the map without flips, mirrored. Learned queries keep their position."""
    torch.manual_seed(1)
    network = build_network(OFF_CENTRE, "efficientnet-b0", channels=8, lifting=lifting).eval()
    network.decoder = nn.Identity()
    if lifting == "simplebev":  # mirrors its volume, so the compressor's kernel must be symmetric for this comparison
        with torch.no_grad():
            kernel = network.lifting.compressor[0].weight
            kernel.copy_((kernel + kernel.flip(2) + kernel.flip(3) + kernel.flip(2, 3)) / 4)
    views = two_cameras(4)
    flips = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    seen: list[torch.Tensor] = []
    network.decoder.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        plain, flipped = network(views), network(views, flips)
    torch.testing.assert_close(flipped, plain, atol=1e-4, rtol=1e-4)
    axes: list[Any] = [(), (-2,), (-1,), (-2, -1)]
    mirrored = torch.stack([v.flip(a) for v, a in zip(seen[0], axes, strict=True)])
    torch.testing.assert_close(seen[1], mirrored, atol=1e-4, rtol=1e-4)
    assert (seen[1][1] - plain[1]).abs().max() > 0.01


def test_flips_none_equals_flips_that_are_all_false(small_network):
    views = two_cameras(2)
    with torch.no_grad():
        plain = small_network(views)
        assert torch.equal(small_network(views, torch.zeros(2, 2, dtype=torch.bool)), plain)
        assert not torch.allclose(small_network(views, torch.ones(2, 2, dtype=torch.bool)), plain, atol=1e-2)


def test_gradients_pass_through_a_flipped_map(small_network):
    views = two_cameras(2)
    flips = torch.tensor([[True, False], [False, True]])
    small_network(views, flips).square().sum().backward()
    assert small_network.encoder.weight.grad.abs().sum() > 0


def test_samples_of_a_batch_are_independent(small_network):
    views = two_cameras(2)
    alone = Views(*(t[1:] for t in (views.images, views.intrinsics, views.cam_from_grid)))
    with torch.no_grad():
        torch.testing.assert_close(small_network(views)[1:], small_network(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lifting", LIFTINGS)
def test_a_built_network_gives_a_channels_last_map_of_the_grid(lifting):
    torch.manual_seed(0)
    network = build_network(OFF_CENTRE, "efficientnet-b0", channels=16, lifting=lifting)
    bev = network(two_cameras(1))
    assert bev.shape == (1, 16, *OFF_CENTRE.map_shape)
    assert bev.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(bev).all()


def test_options_reach_their_modules():
    network = build_network(OFF_CENTRE, "efficientnet-b0", channels=16, drop_connect=0.44, compat="simple-bev")
    assert network.encoder.backbone.blocks[10].projection.dropout.rate == pytest.approx(0.4)
    assert isinstance(network.lifting, ReferenceSimpleBEV)
    with pytest.raises(ValueError, match="lifting='splat': one of simplebev, bevformer, lss, cvt expected"):
        build_network(OFF_CENTRE, "efficientnet-b0", lifting="splat")


def test_the_compressor_has_as_many_parameters_as_the_references():
    assert parameters(SimpleBEV(VoxelGrid(), 128).compressor) == 1_179_648
