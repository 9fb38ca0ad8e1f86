"""The network as a whole, and against the reference's outputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from occfeat_targets.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.grid import VoxelGrid
from occfeat_train.decoder import BEVDecoder
from occfeat_train.lifting import SimpleBEV
from occfeat_train.network import BEVNetwork, build_network, grid_mirror
from occfeat_train.norms import InstanceNorm
from occfeat_train.reference_weights import convert_segnet
from occfeat_train.views import IMAGENET_MEAN, IMAGENET_STD, Views
from tests.conftest import REPOSITORY
from tests.train.test_backbones import torchvision_resnet50
from tests.train.test_decoder import parameters

# Its middle lies 1 m ahead and 2 m to the right.
OFF_CENTRE = VoxelGrid((2, 8, 12), (-2, -7, -10), (2, 9, 14))


def two_cameras(batch: int, grid_seed: int = 0) -> Views:
    """Images of noise, a camera looking ahead and one looking right, both level and 1 m above the grid's origin."""
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


def test_a_mirrored_grid_maps_each_cell_to_its_opposite():
    flips = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    mirror = grid_mirror(OFF_CENTRE, flips).numpy()
    centers = OFF_CENTRE.voxel_centers().astype(np.float64)
    axes: list[Any] = [(), (1,), (2,), (1, 2)]
    for matrix, flipped in zip(mirror, axes, strict=True):
        moved = centers @ matrix[:3, :3].T + matrix[:3, 3]
        np.testing.assert_allclose(moved, np.flip(centers, flipped), atol=1e-6)


def test_a_flip_mirrors_the_volume_and_f_b_back(small_network):
    flips = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    views = two_cameras(4)
    with torch.no_grad():
        found = small_network(views, flips)
        features = small_network.encoder(views.images.flatten(0, 1)).unflatten(0, (4, 2))
        volume = small_network.lifting.lift(features, views)
        assert (volume != 0).float().mean() > 0.1
        axes: list[Any] = [(), (-2,), (-1,), (-2, -1)]
        mirrored = torch.stack([v.flip(a) for v, a in zip(volume, axes, strict=True)])
        bev = small_network.decoder(small_network.lifting.compressor(mirrored))
        expected = torch.stack([b.flip(a) for b, a in zip(bev, axes, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_flip_is_the_same_as_flips_that_are_all_false(small_network):
    views = two_cameras(2)
    with torch.no_grad():
        plain = small_network(views)
        assert torch.equal(small_network(views, torch.zeros(2, 2, dtype=torch.bool)), plain)
        assert not torch.allclose(small_network(views, torch.ones(2, 2, dtype=torch.bool)), plain, atol=1e-2)


def test_gradients_of_a_flipped_map_come_back_to_its_cells(small_network):
    views = two_cameras(2)
    flips = torch.tensor([[True, False], [False, True]])
    small_network(views, flips).square().sum().backward()
    assert small_network.encoder.weight.grad.abs().sum() > 0


def test_samples_of_a_batch_do_not_mix(small_network):
    views = two_cameras(2)
    alone = Views(*(t[1:] for t in (views.images, views.intrinsics, views.cam_from_grid)))
    with torch.no_grad():
        torch.testing.assert_close(small_network(views)[1:], small_network(alone), atol=1e-5, rtol=1e-5)


def test_a_built_network_gives_a_channels_last_map_of_the_grid():
    torch.manual_seed(0)
    network = build_network(OFF_CENTRE, "efficientnet-b0", channels=16)
    bev = network(two_cameras(1))
    assert bev.shape == (1, 16, *OFF_CENTRE.map_shape)
    assert bev.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(bev).all()


def test_options_reach_their_modules():
    network = build_network(OFF_CENTRE, "efficientnet-b0", channels=16, drop_connect=0.44, compat="simple-bev")
    assert network.encoder.backbone.blocks[10].projection.dropout.rate == pytest.approx(0.4)
    assert network.lifting.compat == "simple-bev"
    with pytest.raises(ValueError, match="lifting 'splat': one of simplebev expected"):
        build_network(OFF_CENTRE, "efficientnet-b0", lifting="splat")


def test_the_compressor_has_the_references_parameters():
    assert parameters(SimpleBEV(VoxelGrid(), 128).compressor) == 1_179_648


# -- the reference's weights and outputs ------------------------------------------------------------------------------


def test_the_compressor_is_reordered_from_highest_first_to_lowest_first():
    grid = VoxelGrid((4, 2, 2), (0, 0, 0), (4, 2, 2))
    theirs = torch.arange(3 * 4).view(1, 12, 1, 1).float()  # input c * 4 + y, y = 0 the highest
    (ours,) = convert_segnet({"bev_compressor.0.weight": theirs}, grid).values()
    assert ours.flatten().tolist() == [c * 4 + (3 - z) for z in range(4) for c in range(3)]


def test_a_compressor_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="no multiple of the grid's 5 levels"):
        convert_segnet({"bev_compressor.0.weight": np.zeros((2, 16, 3, 3))}, VoxelGrid((5, 2, 2)))


@pytest.mark.parametrize("name", ["encoder.backbone._blocks.0._bn9.weight", "encoder.backbone.4.0.fc.bias", "other"])
def test_a_name_that_is_not_the_references_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is no name of a Segnet"):
        convert_segnet({name: np.zeros(1)}, VoxelGrid())


def test_the_references_resnet_fills_ours():
    torch.manual_seed(0)
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5"}
    reference = {}
    for name, value in torchvision_resnet50().items():
        child, rest = name.split(".", 1)
        if child in children:
            reference[f"encoder.backbone.{children[child]}.{rest}"] = value
        elif child == "layer3":
            reference[f"encoder.layer3.{rest}"] = value
    converted = convert_segnet(reference, VoxelGrid())
    backbone = build_network(OFF_CENTRE, "resnet-50", channels=4).encoder.backbone
    prefix = "network.encoder.backbone."
    backbone.load_state_dict({name.removeprefix(prefix): value for name, value in converted.items()}, strict=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    path = REPOSITORY.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.skip(f"no outputs of the reference network at {path}")
    return path


@pytest.mark.parametrize(("image_size", "map_size"), [((64, 112), 40), ((224, 400), 200)])
def test_outputs_are_the_references(golden, image_size, map_size):
    spec = importlib.util.spec_from_file_location("seeded", golden / "seeded.py")
    assert spec is not None
    assert spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    grid = VoxelGrid((8, map_size, map_size))
    head = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1, bias=False), InstanceNorm(), nn.ReLU(), nn.Conv2d(128, 1, 1))
    network = build_network(grid, "efficientnet-b0", compat="simple-bev")
    model = nn.ModuleDict({"network": network, "head": head}).eval()
    weights = seeded.seeded_state_dict(golden / "segnet-effb0.state_dict.json")
    model.load_state_dict(convert_segnet(weights, grid), strict=True)

    with np.load(golden / f"segnet-effb0_{image_size[0]}x{image_size[1]}_{map_size}x8x{map_size}_small.npz") as file:
        expected = {name: torch.from_numpy(file[name]) for name in file}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    cam_from_cam0 = np.linalg.inv(expected["cam0_T_camXs"].double().numpy())
    views = Views(
        images=(torch.from_numpy(seeded.seeded_images(*image_size)) - mean) / std,
        intrinsics=expected["pix_T_cams"][..., :3, :3].double(),
        cam_from_grid=torch.from_numpy(cam_from_cam0 @ inverse_rigid(GRID_FROM_CAMERA_AXES)),
    )
    caught: dict[str, torch.Tensor] = {}
    network.encoder.register_forward_hook(lambda _, __, out: caught.update(features=out))
    network.lifting.compressor.register_forward_hook(lambda _, given, out: caught.update(volume=given[0], bev_in=out))
    with torch.no_grad():
        bev = network(views)
        seg = head(bev)
    volume = caught["volume"].unflatten(1, (8, 128)).flip(1).transpose(1, 2).flatten(1, 2)  # c * 8 + y, y = 0 highest
    close = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(caught["features"][:, ::8, ::3, ::3], expected["feat_cams"], **close)
    torch.testing.assert_close(volume[:, ::37, ::9, ::9], expected["vol_sub"], **close)
    torch.testing.assert_close(caught["bev_in"][:, ::8, ::5, ::5], expected["bev_in"], **close)
    torch.testing.assert_close(bev[:, ::8, ::5, ::5], expected["raw_feat"], **close)
    torch.testing.assert_close(seg, expected["seg"], **close)
