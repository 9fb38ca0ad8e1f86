"""A training step against the reference's, in float64: batch 2, BatchNorm statistics, flips of images and maps, no dropout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.augment import transform_intrinsics
from occfeat_train.networks.network import BEVNetwork, build_network
from occfeat_train.ops.views import Views
from occfeat_train.simple_bev.weights import convert, load_reference
from tests.train.reference_seeds import GOLDEN, NETWORKS, seeded_direction, seeded_state_dict
from tests.train.test_reference import views_of

GRID = VoxelGrid((8, 40, 40))
SIZE = (64, 112)


def file_name(name: str) -> str:
    return f"{name}-effb0_64x112_40x8x40.npz"


def arrays_of(name: str) -> dict[str, np.ndarray]:
    """Arrays of the training step, and of the evaluation file of the same network, which contains the rig."""
    found = {}
    for folder in (GOLDEN, GOLDEN / "training"):
        with np.load(folder / file_name(name)) as file:
            found |= {key: file[key] for key in file}
    return found


def training_network(name: str, compat: str = "simple-bev") -> BEVNetwork:
    """The network with the reference's weights, in float64 and training mode, without dropout."""
    network = build_network(GRID, "efficientnet-b0", lifting=NETWORKS[name], drop_connect=0.0, compat=compat)
    load_reference(network, seeded_state_dict(GOLDEN / file_name(name)))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.double().train()


def mirrored_views(arrays: dict[str, np.ndarray]) -> Views:
    """Views with mirrored images and the corresponding intrinsics, as augmentation makes them."""
    golden = {key: torch.from_numpy(arrays[key]) for key in ("pix_T_cams", "cam0_T_camXs", "seg")}
    views, mirror = views_of(golden, *SIZE), torch.from_numpy(arrays["rgb_flip"])
    images = torch.where(mirror[..., None, None, None], views.images.flip(-1), views.images)
    resized, crop = torch.tensor(SIZE).expand(2, 6, 2), torch.zeros(2, 6, 2, dtype=torch.int64)
    cam_from_cam0 = np.stack([[inverse_rigid(m) for m in sample] for sample in arrays["cam0_T_camXs"].astype(float)])
    return Views(
        images=images.double(),
        intrinsics=transform_intrinsics(views.intrinsics, SIZE, resized, crop, mirror, SIZE),
        cam_from_grid=torch.from_numpy(cam_from_cam0 @ inverse_rigid(GRID_FROM_CAMERA_AXES)),
    )


def step(network: BEVNetwork, views: Views, bev_flip: Tensor) -> dict[str, Tensor]:
    """Features, the decoder's input and output, and the images' gradient. Parameter gradients remain in the network."""
    found: dict[str, Tensor] = {}
    network.encoder.register_forward_hook(lambda _, __, out: found.update(features=out.detach()))
    network.decoder.register_forward_hook(lambda _, given, __: found.update(bev_in=given[0].detach()))
    images = views.images.clone().requires_grad_()
    out = network(replace(views, images=images), bev_flip)
    (out * torch.from_numpy(seeded_direction("raw_feat", tuple(out.shape)))).sum().backward()
    assert images.grad is not None
    return {**found, "raw_feat": out.detach(), "image_gradient": images.grad}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative error."""
    return float((found - expected).norm() / expected.norm())


def differences(name: str, network: BEVNetwork) -> dict[str, float]:
    """Relative errors to the reference: of each tensor, and the largest of all parameter gradients and running statistics."""
    arrays = arrays_of(name)
    golden = {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind in "fb"}
    found = step(network, mirrored_views(arrays), golden["bev_flip"])
    mirror, gradient = golden["rgb_flip"][..., None, None, None], found["image_gradient"]
    result = {
        "features": relative_error(found["features"][::5, ::16, ::3, ::3], golden["features"]),
        "bev_in": relative_error(found["bev_in"][:, ::8, ::5, ::5], golden["bev_in"]),
        "raw_feat": relative_error(found["raw_feat"][:, ::8, ::5, ::5], golden["raw_feat"]),
        "image_gradient": relative_error(
            torch.where(mirror, gradient.flip(-1), gradient)[..., ::8, ::8], golden["image_gradient"]
        ),
    }
    shapes = {key: value.shape for key, value in seeded_state_dict(GOLDEN / file_name(name)).items()}
    named = {
        "gradients": {key: p.grad for key, p in network.named_parameters() if p.grad is not None},
        "statistics": dict(network.named_buffers()),
    }
    for kind, tensors in named.items():
        sums, worst = golden[kind], 0.0
        least = 1e-9 * sums[:, 0].max()  # the gradient of a bias before a normalisation is rounding error only
        for key, expected in zip(arrays[f"{kind}_of"].tolist(), sums, strict=True):
            ((ours, direction),) = convert({key: seeded_direction(key, shapes[key])}, GRID).items()
            tensor = tensors[ours.removeprefix("network.")]
            sum_of = torch.stack([tensor.norm(), (tensor * direction).sum()])
            worst = max(worst, float((sum_of - expected).abs().max() / (expected[0] + least)))
        result[kind] = worst
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound"), [("segnet", 1e-5), ("bevformernet", 1e-2), ("liftnet2", 1e-5)])
def test_a_training_step_with_flips_equals_the_references(name: str, bound: float) -> None:
    """BEVFormer's sampling positions are float32. A position that rounding moves over a token's border changes gradients."""
    found = differences(name, training_network(name))
    for key, value in found.items():
        assert value < (bound if "gradient" in key else 1e-5), found


@pytest.mark.slow
def test_without_compat_a_training_step_differs_from_the_references() -> None:
    found = differences("segnet", training_network("segnet", compat="none"))
    assert found["features"] < 1e-5 and found["raw_feat"] > 0.1
