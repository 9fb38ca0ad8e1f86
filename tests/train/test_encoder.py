"""The image encoders: structure in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from occfeat_train.networks.encoder import BACKBONES, DropConnect, ImageEncoder
from occfeat_train.networks.encoder_weights import DEFAULT_WEIGHTS
from tests.train.test_decoder import parameters


@pytest.fixture(scope="module")
def efficientnet() -> ImageEncoder:
    """Shared by tests that do not change it."""
    torch.manual_seed(0)
    return ImageEncoder("efficientnet-b0", 16).eval()


@pytest.fixture
def resnet() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder("resnet-50", 4).eval()


# -- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_features_have_stride_8_and_stay_channels_last(name):
    torch.manual_seed(0)
    encoder = ImageEncoder(name, 8).to(memory_format=torch.channels_last).eval()
    images = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    features = encoder(images)
    assert features.shape == (2, 8, 4, 6)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    encoder = ImageEncoder(name, 8, drop_connect=0.0).train()
    encoder(torch.randn(2, 3, 48, 64)).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in encoder.parameters())


@pytest.mark.parametrize("name", ["efficientnet-b0", "resnet-50"])
def test_checkpointing_changes_no_value_gradient_statistic_or_random_number(name):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))

    def trained(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        encoder = ImageEncoder(name, 8, drop_connect=0.5).train()
        encoder.backbone.recompute = recompute
        features = encoder(images)
        after = torch.rand(1)
        features.square().sum().backward()
        assert all(m.momentum > 0 for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
        return [features, after, torch.rand(1), *(p.grad for p in encoder.parameters()), *encoder.buffers()]

    for mine, plain in zip(trained(True), trained(False), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("name", ["efficientnet-b0", "resnet-50"])
def test_checkpointing_saves_memory_in_training_and_is_off_without_gradients(name):
    def kept(recompute: bool) -> int:
        """Bytes saved for the backward pass, including weights."""
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        encoder = ImageEncoder(name, 8).train()
        encoder.backbone.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive.append(encoder(torch.randn(2, 3, 128, 192)))
        return sum(found.values())

    assert kept(True) < 0.8 * kept(False)
    encoder = ImageEncoder(name, 8).train()
    calls: list[int] = []
    encoder.backbone.register_forward_hook(lambda *_: calls.append(1))
    stem = encoder.backbone.embeddings if name == "efficientnet-b0" else encoder.backbone.embedder
    stem.register_forward_pre_hook(lambda *_: calls.append(2))
    with torch.no_grad():
        encoder(torch.randn(1, 3, 32, 32))
    assert calls == [2, 1]
    encoder(torch.randn(1, 3, 32, 32)).sum().backward()
    assert calls == [2, 1, 2, 1, 2]


def test_parameter_counts_equal_the_references():
    efficientnet, resnet = ImageEncoder("efficientnet-b0"), ImageEncoder("resnet-50")
    assert parameters(efficientnet) == 1_190_880
    assert parameters(efficientnet.backbone) == 851_808
    assert parameters(resnet) == 18_046_144
    assert parameters(ImageEncoder("resnet-101")) == 37_038_272


def test_extra_channels_are_the_first_outputs_of_the_last_convolution(efficientnet):
    torch.manual_seed(0)
    wide = ImageEncoder("efficientnet-b0", 16, extra_channels=5).eval()
    assert parameters(wide) == parameters(efficientnet) + 5 * (16 + 1)
    state = {name: value for name, value in wide.state_dict().items() if not name.startswith("fuse.6")}
    state |= {f"fuse.6.{name}": value[5:] for name, value in wide.fuse[6].state_dict().items()}
    narrow = ImageEncoder("efficientnet-b0", 16).eval()
    narrow.load_state_dict(state)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(wide(images)[:, 5:], narrow(images))


def test_the_skip_is_concatenated_before_the_upsampled_deep_map(efficientnet):
    images = torch.randn(1, 3, 32, 32)
    skip, deep = efficientnet.backbone(images)
    assert (skip.shape, deep.shape) == ((1, 40, 4, 4), (1, 112, 2, 2))
    doubled = functional.interpolate(deep, size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(efficientnet(images), efficientnet.fuse(torch.cat([skip, doubled], 1)))


@pytest.mark.parametrize(("size", "nearest"), [((225, 400), "224x400"), ((8, 396), "16x400"), ((17, 90), "16x96")])
def test_a_size_that_is_not_a_multiple_of_16_is_refused_with_the_nearest(efficientnet, size, nearest):
    with pytest.raises(ValueError, match=f"images of {size[0]}x{size[1]} pixels: .* nearest are {nearest}"):
        efficientnet(torch.zeros(1, 3, *size))


def test_an_unknown_backbone_is_refused():
    with pytest.raises(
        ValueError, match="backbone 'resnet-18': one of efficientnet-b0, resnet-50, resnet-101 expected"
    ):
        ImageEncoder("resnet-18")


def test_every_backbone_has_default_weights():
    assert tuple(DEFAULT_WEIGHTS) == BACKBONES


def test_efficientnet_has_tensorflows_padding(efficientnet):
    def same(kernel: int) -> tuple[int, int, int, int]:
        before = (kernel - 2) // 2  # an even side needs kernel - stride pixels in total
        return before, kernel - 2 - before, before, kernel - 2 - before

    backbone = efficientnet.backbone
    assert tuple(backbone.embeddings.padding.padding) == same(3) == (0, 1, 0, 1)
    strided = [block.depthwise_conv for block in backbone.blocks if block.depthwise_conv.stride == 2]
    assert [tuple(layer.depthwise_conv_pad.padding) for layer in strided] == [same(3), same(5), same(3)]


def test_the_first_window_starts_at_the_first_pixel(efficientnet):
    stem = efficientnet.backbone.embeddings
    images = torch.randn(1, 3, 16, 16)
    found = stem.convolution(stem.padding(images))[:, :, 0, 0]
    torch.testing.assert_close(found, torch.einsum("ocij,ncij->no", stem.convolution.weight, images[:, :, :3, :3]))


def test_squeezes_have_a_quarter_of_the_blocks_input_channels(efficientnet):
    squeezed = [block.squeeze_excite.reduce.out_channels for block in efficientnet.backbone.blocks]
    assert squeezed == [max(1, inside // 4) for inside in (32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112)]


def test_batchnorm_has_momentum_0_01_and_epsilon_0_001():
    torch.manual_seed(0)
    encoder = ImageEncoder("efficientnet-b0", 8).train()
    stem = encoder.backbone.embeddings
    images = torch.randn(2, 3, 32, 32)
    mean = stem.convolution(stem.padding(images)).mean((0, 2, 3))
    encoder(images)
    torch.testing.assert_close(stem.batchnorm.running_mean, 0.01 * mean)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1 + 2 + 10 * 3
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}


def test_random_depthwise_weights_preserve_the_scale(efficientnet):
    weight = efficientnet.backbone.blocks[4].depthwise_conv.depthwise_conv.weight
    assert weight.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.05)
    norms = [m for m in efficientnet.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)


# -- drop-connect -----------------------------------------------------------------------------------------------------


def drop_connected(rate: float, x: torch.Tensor, *, training: bool = True) -> torch.Tensor:
    module = DropConnect(rate).train(training)
    module.factors = module.draw(x)
    return module(x)


def test_drop_connect_drops_whole_images():
    torch.manual_seed(0)
    dropped = drop_connected(0.25, torch.ones(400, 3, 2, 2)).flatten(1)
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 12))
    assert dropped[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.75])


def test_drop_connect_is_unbiased():
    torch.manual_seed(0)
    mean = drop_connected(0.25, torch.ones(40_000, 1, 1, 1)).mean()
    deviation = (0.25 / 0.75 / 40_000) ** 0.5
    assert abs(float(mean) - 1) < 4 * deviation


def test_drop_connect_is_off_in_evaluation_and_at_rate_0():
    x = torch.randn(50, 2, 2, 2)
    assert drop_connected(0.5, x, training=False) is x
    assert drop_connected(0.0, x) is x


def test_only_blocks_with_a_shortcut_drop_images(monkeypatch):
    """The others draw no random numbers either, so that a run's random numbers are those of earlier releases."""
    draws, draw = [], DropConnect.draw
    monkeypatch.setattr(DropConnect, "draw", lambda self, x: draws.append(self.rate) or draw(self, x))
    ImageEncoder("efficientnet-b0", 8, drop_connect=0.3).train()(torch.randn(2, 3, 32, 32))
    assert draws == pytest.approx([0.3 * block / 11 for block in (2, 4, 6, 7, 9, 10)])


def test_drop_rates_increase_by_an_eleventh_per_block():
    blocks = ImageEncoder("efficientnet-b0", 8, drop_connect=0.3).backbone.blocks
    assert [b.projection.dropout.rate for b in blocks] == pytest.approx([0.3 * i / 11 for i in range(11)])
    assert [i for i, b in enumerate(blocks) if b.projection.apply_dropout] == [2, 4, 6, 7, 9, 10]
