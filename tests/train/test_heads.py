"""The heads: parameter counts, and the fused pretraining head against a dense one that follows the paper literally."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from occfeat_train.tasks import heads, losses
from occfeat_train.tasks.heads import OccFeatHead, SegmentationHead
from tests.train import head_twin
from tests.train.head_twin import DenseHead
from tests.train.test_decoder import parameters


def head_of(channels: int, height: int, feature_dim: int, *, occupancy: bool = True, seed: int = 0) -> OccFeatHead:
    torch.manual_seed(seed)
    return OccFeatHead(channels, height, feature_dim, occupancy=occupancy).double()


def gradients(loss: Tensor, head: nn.Module, bev: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    return dict(zip(["bev", *trained], torch.autograd.grad(loss, [bev, *trained.values()]), strict=True))


def assert_same(ours: Tensor, twins: Tensor, name: str = "") -> None:
    torch.testing.assert_close(ours, twins.reshape(ours.shape), atol=1e-10, rtol=1e-10, msg=lambda m: f"{name}: {m}")


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_the_papers_head_has_395265_parameters():
    assert parameters(OccFeatHead(128, 8, 384)) == 395_265


@pytest.mark.parametrize(("n", "z", "n_y"), [(128, 8, 384), (16, 3, 5), (2, 1, 1)])
def test_parameter_counts_equal_those_of_the_papers_layers(n, z, n_y):
    shared = (n * n * 9 + n) + (n * n * z + n * z) + (n * 2 * n + 2 * n) + (2 * n * n + n)
    occupancy, features = n + 1, n * n_y + n_y
    assert parameters(OccFeatHead(n, z, n_y)) == shared + occupancy + features
    assert parameters(OccFeatHead(n, z, 0)) == shared + occupancy
    assert parameters(OccFeatHead(n, z, n_y, occupancy=False)) == shared + features


def test_channels_of_the_unsplat_layer_are_z_groups_of_n_b_channels():
    n, z, channel = 3, 4, 1
    head = OccFeatHead(n, z, 0).requires_grad_(False)
    for parameter in head.parameters():
        parameter.zero_()
    head.unsplat.bias.copy_(torch.arange(z * n))
    head.expand.weight[0, channel] = head.reduce.weight[0, 0] = head.occupancy.weight[0, 0] = 1
    logits, _ = head(torch.randn(2, n, 5, 6), None)
    expected = nn.functional.softplus(torch.tensor([level * n + channel for level in range(z)]).float())
    torch.testing.assert_close(logits, expected.view(1, z, 1, 1).expand(2, z, 5, 6))


def test_with_weights_of_zero_the_output_is_the_bias():
    head = OccFeatHead(4, 2, 3).requires_grad_(False)
    for module, bias in ((head.occupancy, -4.5), (head.features, 0.25)):
        module.weight.zero_()
        module.bias.fill_(bias)
    logits, features = head(torch.randn(1, 4, 3, 3), torch.tensor([0, 17]))
    assert (logits == -4.5).all()
    assert (features == 0.25).all()


def test_requesting_features_from_a_head_without_them_fails():
    with pytest.raises(AssertionError, match="without a feature projection"):
        OccFeatHead(2, 1, 0)(torch.randn(1, 2, 3, 3), torch.tensor([0]))


# -- the twin ---------------------------------------------------------------------------------------------------------


def assert_equals_the_twin(
    batch: int, channels: int, height: int, width: int, depth: int, n_y: int, seed: int, share: float
) -> None:
    """Compares values, the losses of eq. 1-3, and the gradients of all parameters and of the input."""
    head = head_of(channels, height, n_y, seed=seed)
    twin = DenseHead.of(head)
    bev = torch.randn(batch, channels, depth, width, dtype=torch.float64, requires_grad=True)
    volume = (batch, height, depth, width)
    occupied, is_seen = torch.rand(volume) < share, torch.rand(volume) < 0.8
    target = torch.randn(batch, n_y, height, depth, width, dtype=torch.float64)

    voxels = (occupied & is_seen).flatten().nonzero()[:, 0]
    rows = target.movedim(1, -1).reshape(-1, n_y)[voxels]
    logits, features = head(bev, voxels)
    twin_logits, twin_features = twin(bev)
    assert_same(logits, twin_logits, "logits")
    assert_same(features, twin_features.movedim(1, -1).reshape(-1, n_y)[voxels], "features")

    sample = voxels // (height * depth * width)
    ours = losses.occupancy_loss(logits, occupied), losses.feature_loss(features, rows, sample, batch)[0]
    theirs = (
        head_twin.occupancy_loss(twin_logits, occupied),
        head_twin.feature_loss(twin_features, target, occupied, is_seen),
    )
    for name, mine, other in zip(("eq. 2", "eq. 3"), ours, theirs, strict=True):
        assert_same(mine, other, name)
    # lambda is 1: with 0.01, errors in eq. 3 would be a hundred times smaller
    expected = gradients(theirs[0] + theirs[1], twin, bev)
    for name, gradient in gradients(ours[0] + ours[1], head, bev).items():
        assert_same(gradient, expected[name], name)


def test_the_head_equals_the_papers_equations_at_a_small_size():
    assert_equals_the_twin(batch=2, channels=16, height=8, width=9, depth=11, n_y=24, seed=0, share=0.1)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 6), (1, 4), (3, 7), (3, 7), (2, 5)))),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_the_head_equals_the_papers_equations_at_any_size(sizes, seed, share):
    assert_equals_the_twin(*sizes, seed=seed, share=share)


def results_at_the_papers_sizes(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Logits, features and gradients of eq. 1 of our head, the dense head, and the dense head in float64 ("exact").

    The size takes several blocks of cells. dtype: float32, or bfloat16 for autocast.
    """
    torch.manual_seed(0)
    head = OccFeatHead(128, 8, 384)
    bev, shape = torch.randn(1, 128, 40, 60), (1, 8, 40, 60)
    assert bev[0, 0].numel() * 8 * 256 > 4 * heads._CPU_BLOCK
    occupied = torch.rand(shape) < 0.02
    voxels = occupied.flatten().nonzero()[:, 0]
    target = torch.randn(len(voxels), 384)

    def computed(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        exact = dtype == torch.float64
        x = bev.to(dtype if exact else torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if isinstance(module, DenseHead):
                logits, dense = module(x)
                features = dense[0].flatten(1).T[voxels]
            else:
                logits, features = module(x, voxels)
            loss = losses.occupancy_loss(logits, occupied)
            loss = loss + losses.feature_loss(features, target, torch.zeros_like(voxels), 1)[0]
        return {"logits": logits, "features": features, **gradients(loss, module, x)}

    twin = DenseHead.of(head)
    return {
        "ours": computed(head, dtype),
        "dense": computed(twin, dtype),
        "exact": computed(DenseHead.of(head).double(), torch.float64),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_at_the_papers_sizes_the_head_is_as_accurate_as_the_dense_head(dtype):
    found = results_at_the_papers_sizes(dtype)
    epsilon = torch.finfo(dtype).eps
    for name, exact in found["exact"].items():
        if name == "conv.bias":  # InstanceNorm removes it, so ours is not trained
            continue
        ours, dense = (
            (found[key][name].detach().double().reshape(exact.shape) - exact).norm() / exact.norm()
            for key in ("ours", "dense")
        )
        assert ours < 3 * dense + 20 * epsilon, f"{name}: {ours:.1e} off, the dense head {dense:.1e}"


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_logits_computed_in_blocks_pass_gradcheck(cells, levels, wide, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    given = randn(cells, 3), randn(levels * wide, 3), randn(levels * wide), randn(wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_CPU_BLOCK", 7 * levels * wide)  # 7 cells
        assert torch.autograd.gradcheck(heads._SoftplusLogits.apply, given)


@pytest.mark.parametrize(("n_y", "occupancy"), [(0, True), (5, False)])
def test_a_head_with_one_projection_equals_the_twin_with_one_projection(n_y, occupancy):
    head = head_of(6, 3, n_y, occupancy=occupancy)
    twin = DenseHead.of(head)
    bev = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    voxels = torch.arange(2 * 3 * 4 * 5) if n_y else None
    logits, features = head(bev, voxels)
    twin_logits, twin_features = twin(bev)
    assert (logits is None, features is None) == (not occupancy, not n_y)
    ours, theirs = (logits, twin_logits) if occupancy else (features, twin_features.movedim(1, -1))
    assert_same(ours, theirs)
    weight = torch.randn_like(ours)
    expected = gradients((theirs.reshape(ours.shape) * weight).sum(), twin, bev)
    for name, gradient in gradients((ours * weight).sum(), head, bev).items():
        assert_same(gradient, expected[name], name)


def test_memory_format_does_not_change_the_output():
    head = head_of(6, 3, 5)
    bev = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    voxels = torch.tensor([0, 7, 61, 119])
    last = head(bev.contiguous(memory_format=torch.channels_last), voxels)
    for ours, other in zip(head(bev, voxels), last, strict=True):
        assert_same(ours, other)


def test_without_voxels_there_are_no_features_and_the_gradient_is_zero():
    head = head_of(4, 2, 3)
    _, features = head(torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.empty(0, dtype=torch.int64))
    assert features.shape == (0, 3)
    features.sum().backward()
    assert not head.features.weight.grad.any()
    assert not head.conv.weight.grad.any()


# -- segmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "classes"), [(128, 1), (8, 5)])
def test_a_segmentation_head_gives_one_logit_per_class_and_cell(channels, classes):
    head = SegmentationHead(channels, classes)
    assert head(torch.randn(2, channels, 6, 7)).shape == (2, classes, 6, 7)
    assert parameters(head) == channels * channels * 9 + channels * classes + classes


def test_the_vehicles_head_has_as_many_parameters_as_the_reference():
    assert parameters(SegmentationHead(128, 1)) == 147_585


def test_a_segmentation_head_is_convolution_norm_relu_convolution():
    torch.manual_seed(0)
    head = SegmentationHead(4, 2)
    bev = torch.randn(2, 4, 6, 7)
    hidden = nn.functional.instance_norm(nn.functional.conv2d(bev, head[0].weight, padding=1))
    expected = (
        torch.einsum("kc,bchw->bkhw", head[3].weight[..., 0, 0], hidden.clamp(min=0)) + head[3].bias[:, None, None]
    )
    torch.testing.assert_close(head(bev), expected, atol=1e-5, rtol=1e-5)
