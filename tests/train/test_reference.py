"""Comparison with the reference: converted weights, and outputs for the same weights, images and rig."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.network import build_network
from occfeat_train.ops.instance_norm import InstanceNorm
from occfeat_train.ops.views import IMAGENET_MEAN, IMAGENET_STD, Views
from occfeat_train.simple_bev.weights import convert, load_reference
from occfeat_train.tasks.heads import SegmentationHead
from tests.conftest import REPOSITORY
from tests.train.reference_seeds import GOLDEN, NETWORKS, seeded_images, seeded_state_dict
from tests.train.test_moco_weights import torchvision_resnet50

OFF_CENTRE = VoxelGrid((2, 8, 12), (-2, -7, -10), (2, 9, 14))
ENCODERS = {"effb0": "efficientnet-b0", "res50": "resnet-50", "res101": "resnet-101"}


def views_of(golden: dict[str, torch.Tensor], height: int, width: int) -> Views:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = torch.from_numpy(seeded_images(len(golden["seg"]), height, width))
    cam_from_cam0 = np.linalg.inv(golden["cam0_T_camXs"].double().numpy())
    return Views(
        images=(images - mean) / std,
        intrinsics=golden["pix_T_cams"][..., :3, :3].double(),
        cam_from_grid=torch.from_numpy(cam_from_cam0 @ inverse_rigid(GRID_FROM_CAMERA_AXES)),
    )


def outputs(file: Path, compat: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(outputs of our network, outputs of the reference), with the same subsampling."""
    name, image, cells = file.stem.split("_")
    network_name, encoder = name.split("-")
    height, width = (int(n) for n in image.split("x"))
    forward, up, right = (int(n) for n in cells.split("x"))
    grid = VoxelGrid((up, forward, right))
    network = build_network(grid, ENCODERS[encoder], lifting=NETWORKS[network_name], compat=compat)
    model = nn.ModuleDict({"network": network, "head": SegmentationHead(128, 1)}).eval()
    model.load_state_dict(convert(seeded_state_dict(file), grid), strict=True)
    with np.load(file) as arrays:
        golden = {k: torch.from_numpy(arrays[k]) for k in arrays if arrays[k].dtype.kind == "f"}
    found: dict[str, torch.Tensor] = {}
    network.encoder.register_forward_hook(lambda _, __, out: found.update(features=out[::5, ::16, ::3, ::3]))
    network.decoder.register_forward_hook(lambda _, given, out: found.update(bev_in=given[0], raw_feat=out))
    with torch.no_grad():
        seg = model["head"](network(views_of(golden, height, width)))
    step, every = (5, 1) if forward == 40 else (9, 2)
    found |= {name: found[name][:, ::8, ::step, ::step] for name in ("bev_in", "raw_feat")}
    return {**found, "seg": seg[:, :, ::every, ::every]}, golden


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.npz")), ids=lambda file: file.stem)
def test_outputs_equal_the_references_within_1e_4(file):
    found, golden = outputs(file, "simple-bev")
    for name, value in found.items():
        scale = golden[name].abs().max().item()
        assert scale > 0.01
        torch.testing.assert_close(
            value, golden[name], atol=1e-4 * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_loads_the_references_weights_without_its_heads(name):
    file = GOLDEN / f"{name}-effb0_64x112_40x8x40.npz"
    grid = VoxelGrid((8, 40, 40))
    network = build_network(grid, "efficientnet-b0", lifting=NETWORKS[name])
    load_reference(network, seeded_state_dict(file))
    expected = convert(seeded_state_dict(file), grid)
    for key, value in network.state_dict().items():
        assert torch.equal(value, expected[f"network.{key}"]), key
    other = build_network(grid, "efficientnet-b0", lifting="lss" if name == "segnet" else "simplebev")
    with pytest.raises(RuntimeError, match="(Missing|Unexpected) key"):
        load_reference(other, seeded_state_dict(file))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_compat_outputs_differ_from_the_references(name):
    found, golden = outputs(GOLDEN / f"{name}-effb0_64x112_40x8x40.npz", "none")
    torch.testing.assert_close(found["features"], golden["features"], atol=1e-4, rtol=0)
    assert (found["seg"] - golden["seg"]).abs().max() > 0.1


def test_every_network_is_compared_with_every_encoder():
    names = {tuple(file.stem.split("_")[0].split("-")) for file in GOLDEN.glob("*.npz")}
    assert names == {(network, encoder) for network in NETWORKS for encoder in ENCODERS}
    assert all(file.stat().st_size < 150_000 for file in GOLDEN.rglob("*.npz"))


# -- names ------------------------------------------------------------------------------------------------------------


def test_sampling_points_of_the_cross_attention_are_reordered_to_lowest_first():
    grid = VoxelGrid((4, 2, 2), (0, 0, 0), (4, 2, 2))
    prefix = "cross_attn_layers.0.deformable_attention."
    theirs = {  # 4 heads of 8 points, 2 per level
        f"{prefix}attention_weights.bias": torch.arange(32),
        f"{prefix}sampling_offsets.weight": torch.arange(64).view(64, 1),
    }
    weights, offsets = convert(theirs, grid).values()
    assert weights[8:16].tolist() == [11, 10, 9, 8, 15, 14, 13, 12]
    assert offsets[:8, 0].tolist() == [6, 7, 4, 5, 2, 3, 0, 1]
    with pytest.raises(ValueError, match="its points are no multiple of the grid's 5 levels"):
        convert(theirs, VoxelGrid((5, 2, 2)))


def test_sampling_points_of_the_self_attention_are_not_reordered():
    theirs = {"self_attn_layers.1.deformable_attention.sampling_offsets.bias": torch.arange(64)}
    assert next(iter(convert(theirs, VoxelGrid((4, 2, 2))).values())).tolist() == list(range(64))


def test_the_compressor_is_reordered_to_lowest_first():
    grid = VoxelGrid((4, 2, 2), (0, 0, 0), (4, 2, 2))
    theirs = torch.arange(3 * 4).view(1, 12, 1, 1).float()  # input channel c * 4 + y; y = 0 is the highest level
    (ours,) = convert({"bev_compressor.0.weight": theirs}, grid).values()
    assert ours.flatten().tolist() == [c * 4 + (3 - z) for z in range(4) for c in range(3)]


def test_a_compressor_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="no multiple of the grid's 5 levels"):
        convert({"bev_compressor.0.weight": np.zeros((2, 16, 3, 3))}, VoxelGrid((5, 2, 2)))


@pytest.mark.parametrize(
    "name",
    [
        "encoder.backbone._blocks.0._bn9.weight",
        "encoder.backbone.4.0.fc.bias",
        "other",
        "cross_attn_layers.0.deformable_attention.output_proj.weight",
        "self_attn_layers.0.bias",
    ],
)
def test_a_name_that_the_reference_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is no name of a Segnet, Bevformernet or Liftnet"):
        convert({name: np.zeros(1)}, VoxelGrid())


def test_the_references_resnet_gives_all_weights_of_ours():
    torch.manual_seed(0)
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5"}
    reference = {}
    for name, value in torchvision_resnet50().items():
        child, rest = name.split(".", 1)
        if child in children:
            reference[f"encoder.backbone.{children[child]}.{rest}"] = value
        elif child == "layer3":
            reference[f"encoder.layer3.{rest}"] = value
    converted = convert(reference, VoxelGrid())
    backbone = build_network(OFF_CENTRE, "resnet-50", channels=4).encoder.backbone
    prefix = "network.encoder.backbone."
    backbone.load_state_dict({name.removeprefix(prefix): value for name, value in converted.items()}, strict=True)


# -- golden files outside the repository ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    path = REPOSITORY.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.skip(f"no outputs of the reference network at {path}")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("image_size", "map_size"), [((64, 112), 40), ((224, 400), 200)])
def test_the_lifted_volume_equals_the_references(shared_golden, image_size, map_size):
    spec = importlib.util.spec_from_file_location("seeded", shared_golden / "seeded.py")
    assert spec is not None
    assert spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    grid = VoxelGrid((8, map_size, map_size))
    head = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1, bias=False), InstanceNorm(), nn.ReLU(), nn.Conv2d(128, 1, 1))
    network = build_network(grid, "efficientnet-b0", compat="simple-bev")
    model = nn.ModuleDict({"network": network, "head": head}).eval()
    weights = seeded.seeded_state_dict(shared_golden / "segnet-effb0.state_dict.json")
    model.load_state_dict(convert(weights, grid), strict=True)

    with np.load(
        shared_golden / f"segnet-effb0_{image_size[0]}x{image_size[1]}_{map_size}x8x{map_size}_small.npz"
    ) as file:
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
    volume = (
        caught["volume"].unflatten(1, (8, 128)).flip(1).transpose(1, 2).flatten(1, 2)
    )  # c * 8 + y; y = 0 is the highest
    close = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(caught["features"][:, ::8, ::3, ::3], expected["feat_cams"], **close)
    torch.testing.assert_close(volume[:, ::37, ::9, ::9], expected["vol_sub"], **close)
    torch.testing.assert_close(caught["bev_in"][:, ::8, ::5, ::5], expected["bev_in"], **close)
    torch.testing.assert_close(bev[:, ::8, ::5, ::5], expected["raw_feat"], **close)
    torch.testing.assert_close(seg, expected["seg"], **close)
