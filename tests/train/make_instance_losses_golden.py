"""Write `golden/losses/simple_bev.npz`: losses and gradients of aharley/simple_bev's run_model for given outputs of a network.

    python -m tests.train.make_instance_losses_golden ../simple_bev

run_model of its train_nuscenes.py runs unchanged, from a checkout, with a model that returns the arrays below; its imports of
loggers and data sets are replaced by empty modules. Arrays of B = 3 samples of 12 x 10 cells, of which the second has no
vehicle:

seg, offset, center: outputs of the heads, the centres after the sigmoid. weights (3,): of segmentation, centres and offsets.
labels, valid, squared_distance, offset_target: targets as our caches hold them.
loss, parts (3,): the total, and its parts with their weights. grad_seg, grad_center, grad_offset, grad_weights: of the total.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden" / "losses" / "simple_bev.npz"
MODULES = ("saverloader", "fire", "nuscenesdataset", "tensorboardX", "nets.segnet", "utils.improc", "utils.misc")
NAMES = ("ce_weight", "center_weight", "offset_weight")
SHAPE = (3, 1, 12, 10)


class Outputs(nn.Module):
    """A model that returns given outputs."""

    use_radar = use_lidar = use_metaradar = False

    def __init__(self, found: dict[str, Tensor], weights: Tensor) -> None:
        super().__init__()
        self.found, self.module = found, self
        for name, weight in zip(NAMES, weights, strict=True):
            self.register_parameter(name, nn.Parameter(weight.clone()))

    def forward(self, **_: object) -> tuple[None, Tensor, Tensor, Tensor, Tensor]:
        return None, self.found["seg"], self.found["seg"], self.found["center"], self.found["offset"]


def data(targets: dict[str, Tensor]) -> list[Tensor]:
    """The 18 tensors of the reference's batch, with a time axis; only those that the losses use have contents."""
    samples = SHAPE[0]
    eye, points = torch.eye(3).expand(samples, 1, 2, 3, 3), torch.ones(samples, 1, 3, 5)
    unused = torch.zeros(samples, 1, 4)
    seg, valid, center, offset = (targets[name][:, None] for name in ("seg", "valid", "center", "offset"))
    return [
        torch.zeros(samples, 1, 2, 3, 4, 4), eye, torch.zeros(samples, 1, 2, 3), eye, points, unused, points, unused,
        torch.zeros(samples, 1, 4, 19), unused, unused, unused, seg, valid, center, offset,
        torch.ones(samples, 1, 19, 5), torch.eye(4).expand(samples, 1, 4, 4),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of aharley/simple_bev")
    sys.path.insert(0, str(parser.parse_args().checkout.resolve()))
    with mock.patch.dict(sys.modules, {name: mock.MagicMock(name=name) for name in MODULES}):
        import train_nuscenes
    rng = np.random.default_rng(0)
    labels, valid = rng.random(SHAPE) < 0.3, rng.random(SHAPE) < 0.8
    labels[1] = False
    squared = rng.integers(0, 256, SHAPE, dtype=np.uint8)
    squared[rng.random(SHAPE) < 0.3] //= 20
    shift = rng.integers(-9, 10, (3, 2, 12, 10)).astype(np.int16) * labels
    gauss = np.exp(squared / -18.0)
    arrays = {"seg": labels, "valid": valid, "center": np.where(gauss < 1e-3, 0, gauss), "offset": 2 * shift}
    outputs = {
        "seg": torch.from_numpy(rng.standard_normal(SHAPE)).float(),
        "center": torch.from_numpy(rng.standard_normal(SHAPE)).float().sigmoid(),
        "offset": torch.from_numpy(5 * rng.standard_normal((3, 2, 12, 10))).float(),
    }
    for output in outputs.values():
        output.requires_grad_()
    weights = torch.tensor([0.3, -0.2, 0.7])
    model = Outputs(outputs, weights)
    helpers = types.SimpleNamespace(voxelize_xyz=lambda *_, **__: None, voxelize_xyz_and_feats=lambda *_, **__: None)
    batch = data({name: torch.from_numpy(a).float() for name, a in arrays.items()})
    # On a CPU, its total of 0 would be a leaf with a gradient, to which nothing can be added in place.
    with mock.patch.object(train_nuscenes.utils.vox, "Vox_util", lambda *_, **__: helpers), mock.patch.object(
        torch, "tensor", lambda value, **_: torch.zeros(()) + value
    ):  # fmt: skip
        loss, parts = train_nuscenes.run_model(model, train_nuscenes.SimpleLoss(2.13), batch, "cpu")
    loss.backward()
    found = {name: value.detach().numpy() for name, value in outputs.items()}
    found |= {f"grad_{name}": value.grad.numpy() for name, value in outputs.items()}
    np.savez_compressed(
        GOLDEN,
        **found,
        weights=weights.numpy(),
        labels=labels,
        valid=valid,
        squared_distance=squared,
        offset_target=shift,
        loss=loss.detach().numpy(),
        parts=np.array([parts[f"{name}_loss"] for name in ("ce", "center", "offset")], np.float32),
        grad_weights=np.array([getattr(model, name).grad.item() for name in NAMES], np.float32),
    )
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
