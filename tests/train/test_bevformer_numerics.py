"""BEVFormer in numbers: real sizes, half precision, aligned widths."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks import bevformer
from occfeat_train.networks.bevformer import (
    BEVFormer,
    FeedForward,
    SamplingPoints,
)
from occfeat_train.ops.deformable import Reads
from tests.train.test_bevformer import random_model
from tests.train.test_lifting import (
    random_features,
    random_views,
    ring_of_six,
)


def without_kinks(model: BEVFormer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the model so that rounding cannot cross a discontinuity of the gradient: positions stay less than half a token
    from the centre between four tokens, and the biases keep hidden units far from zero.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("offsets.weight"):
                parameter.normal_(0, 0.002)
            elif name.endswith("offsets.bias"):
                parameter.uniform_(-0.3, 0.3)
            elif name.endswith("weights.weight"):
                parameter.normal_(0, 0.02)
            elif name.endswith("feed_forward.0.bias"):
                parameter.copy_(8 * (torch.rand_like(parameter) - 0.5).sign())

    def centred(reads: Reads) -> Reads:
        return replace(reads, anchors=reads.anchors.floor() + 0.5)

    neighbours, cameras = bevformer.neighbour_reads, BEVFormer.camera_reads
    monkeypatch.setattr(bevformer, "neighbour_reads", lambda *given: centred(neighbours(*given)))
    monkeypatch.setattr(BEVFormer, "camera_reads", lambda *given: (centred(cameras(*given)[0]), cameras(*given)[1]))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.25)])
def test_at_real_sizes_values_and_gradients_equal_float64_within_rounding(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six 28x50 maps of 128 channels, 8 levels, 48x48 cells. The bounds are about ten times the rounding error."""
    torch.manual_seed(0)
    model = BEVFormer(VoxelGrid((8, 48, 48)), 128).eval()
    without_kinks(model, monkeypatch)
    views, features = ring_of_six(), random_features(1, 6, 128, 28, 50)
    weight = torch.randn(1, 128, 48, 48)

    def run(model: BEVFormer, leaf: Tensor) -> dict[str, Tensor]:
        leaf.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and leaf.dtype != torch.float64):
            out = model(leaf, views)
        out.backward(weight.to(out.dtype))
        found = {"values": out.detach(), "features": leaf.grad, **{n: p.grad for n, p in model.named_parameters()}}
        return {name: tensor.double() for name, tensor in found.items()}  # type: ignore[union-attr]

    exact = run(copy.deepcopy(model).double(), features.double())
    for name, found in run(model, features).items():
        off = (found - exact[name]).norm() / exact[name].norm()
        assert off < bound, f"{name}: {off:.1e} off"


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model = random_model()
    views, features = random_views(5, 1, 3), random_features(1, 3, 8)
    with torch.no_grad():
        plain = model(features, views)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(features, views)
    assert (low - plain).abs().mean() < 0.05


def test_bfloat16_autocast_samples_at_the_positions_of_float32() -> None:
    """Offsets of up to 8 tokens, which bfloat16 alone would round by up to 1/32 token."""
    torch.manual_seed(0)
    places, query = SamplingPoints(64, 8, levels=8), torch.randn(100, 64)
    nn.init.normal_(places.offsets.weight, std=0.01)
    nn.init.normal_(places.weights.weight, std=0.01)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, low = places(query), places.offsets(query)
    exact = copy.deepcopy(places).double()(query.double())
    assert (found - exact).abs().max() < 1e-4
    assert (low.view(100, 4, 8, 2) - exact[..., :2]).abs().max() > 5e-3


@pytest.mark.parametrize("channels", [8, 128])
def test_an_aligned_feed_forward_network_has_the_same_values_and_gradients(channels: int) -> None:
    torch.manual_seed(0)
    network, query = FeedForward(channels).double(), torch.randn(50, channels, dtype=torch.float64)
    results = []
    for function in (network, network.aligned):
        leaves = query.clone().requires_grad_(), *network.parameters()
        out = function(leaves[0])
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(("autocast", "width"), [(True, 1032), (False, 1028)])
def test_only_half_precision_has_an_aligned_hidden_width(autocast: bool, width: int) -> None:
    widths: list[int] = []

    class Widths(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear:
                widths.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    with Widths(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        FeedForward(128)(torch.ones(5, 128))
    assert widths == [128, width]
