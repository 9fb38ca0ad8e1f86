"""Write `golden/training/*.npz`: a training step of the reference networks, run from a checkout of aharley/simple_bev.

    python -m tests.train.make_reference_training ../simple_bev

`pipelines/benchmarks/_reference.py` says where to get the checkout and what it changes in the reference. Here, everything
is float64, dropout and drop-connect are off, and the map size of 200 x 200 that is hard-coded in the reference's
self-attention is replaced. `golden/README.md` describes the arrays.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from tests.conftest import REPOSITORY
from tests.train.reference_seeds import GOLDEN, NETWORKS, seeded_direction, seeded_state_dict
from tests.train.test_reference import views_of

MAP = 40
# Flips of the 12 images of two samples, and of each sample's map (forward, right).
RGB_FLIP = np.array([1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0], bool)
BEV_FLIP = np.array([[1, 0], [1, 1]], bool)


def sums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """(2,) per tensor: its norm, and the sum of its products with `seeded_direction`."""
    return {
        name: torch.stack([t.norm(), (t * torch.from_numpy(seeded_direction(name, tuple(t.shape)))).sum()])
        for name, t in tensors.items()
    }


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Use float64 wherever the reference requests float32 by name."""
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(Tensor, "float", Tensor.double), mock.patch.multiple(
        torch, float=torch.float64, float32=torch.float64
    ):  # fmt: skip
        yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def flips_of(network: str) -> Iterator[np.ndarray]:
    """Make the network use RGB_FLIP and BEV_FLIP; yields the (B, 2) flips of maps.

    Bevformernet's maps are flipped along right only. By mistake, its forward flip flips the channels of its map, and then
    F_B along forward.
    """
    flips = BEV_FLIP & (network != "bevformernet", True)
    draws = iter([RGB_FLIP, flips[:, 1], flips[:, 0]])
    with mock.patch.object(np.random, "choice", lambda options, size: next(draws).astype(int)):
        yield flips
    assert next(draws, None) is None


def replaced(code: types.CodeType, old: int, new: int) -> types.CodeType:
    """The code with `old` replaced by `new` in its constants."""
    constants = tuple(
        tuple(new if x == old else x for x in c) if isinstance(c, tuple) else new if c == old else c
        for c in code.co_consts
    )
    return code.replace(co_consts=constants)


def build(checkout: Path, name: str) -> Any:
    from _reference import Reference

    grid = VoxelGrid((8, MAP, MAP))
    network = Reference(checkout, NETWORKS[name], "efficientnet-b0", grid, torch.device("cpu"), rand_flip=True)
    weights = seeded_state_dict(GOLDEN / f"{name}-effb0_64x112_40x8x40.npz")
    network.model.load_state_dict(
        {key: torch.from_numpy(np.asarray(weights[key])) for key in network.model.state_dict()}
    )
    network.double().train()
    backbone = network.model.encoder.backbone
    backbone._global_params = backbone._global_params._replace(drop_connect_rate=0.0)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "VanillaSelfAttention":
            forward = type(module).forward
            forward.__code__ = replaced(forward.__code__, 200, MAP)
    return network


def run(checkout: Path, name: str) -> dict[str, np.ndarray]:
    network = build(checkout, name)
    with np.load(GOLDEN / f"{name}-effb0_64x112_40x8x40.npz") as arrays:
        rig = {key: torch.from_numpy(arrays[key]) for key in ("pix_T_cams", "cam0_T_camXs", "seg")}
    views = views_of(rig, 64, 112)
    images = views.images.double().requires_grad_()
    found: dict[str, Tensor] = {}
    model = network.model
    model.encoder.register_forward_hook(lambda _, __, out: found.update(features=out.detach().clone()))
    model.decoder.register_forward_hook(lambda _, given, __: found.update(bev_in=given[0].detach().clone()))
    with flips_of(name) as flips:
        found["raw_feat"] = out = network(type(views)(images, views.intrinsics, views.cam_from_grid))
    weight = torch.from_numpy(seeded_direction("raw_feat", tuple(out.shape)))
    (out * weight).sum().backward()
    gradients = sums({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    statistics = sums({key: b for key, b in model.named_buffers() if b.is_floating_point() and "running" in key})
    kept = {
        "features": found["features"][::5, ::16, ::3, ::3],
        "bev_in": found["bev_in"][:, ::8, ::5, ::5],
        "raw_feat": out.detach()[:, ::8, ::5, ::5],
        "image_gradient": images.grad[..., ::8, ::8],
        "gradients": torch.stack(list(gradients.values())),
        "statistics": torch.stack(list(statistics.values())),
    }
    return {
        "rgb_flip": RGB_FLIP.reshape(2, 6),
        "bev_flip": flips,
        "gradients_of": np.array(list(gradients)),
        "statistics_of": np.array(list(statistics)),
        **{key: value.numpy() for key, value in kept.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of aharley/simple_bev")
    checkout = parser.parse_args().checkout.resolve()
    sys.path.insert(0, str(REPOSITORY / "pipelines" / "benchmarks"))  # for _reference
    (GOLDEN / "training").mkdir(exist_ok=True)
    for name in NETWORKS:
        with in_float64():
            arrays = run(checkout, name)
        file = GOLDEN / "training" / f"{name}-effb0_64x112_40x8x40.npz"
        np.savez_compressed(file, **arrays)
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
