"""The BEV decoder and InstanceNorm."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from occfeat_train.networks.decoder import BasicBlock, BEVDecoder, ShortcutConv, UpAdd
from occfeat_train.ops.instance_norm import InstanceNorm


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_instance_norm_of_a_ramp_has_mean_0_and_variance_1():
    ramp = torch.arange(12.0).reshape(1, 1, 3, 4) * torch.tensor([1.0, -5.0]).view(1, 2, 1, 1) + 3
    normed = InstanceNorm()(ramp)
    torch.testing.assert_close(normed.mean((2, 3)), torch.zeros(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(normed.var((2, 3), correction=0), torch.ones(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_instance_norm_equals_torchs_in_value_and_gradient_and_keeps_the_memory_format(batch, layout):
    torch.manual_seed(0)
    x = (torch.randn(batch, 5, 60, 70) * 3 + 30).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(batch, 5, 60, 70).contiguous(memory_format=layout)
    twin = x.detach().double().contiguous().requires_grad_()
    ours, theirs = InstanceNorm()(x), nn.InstanceNorm2d(5)(twin)
    ours.backward(weight)
    theirs.backward(weight.double().contiguous())  # torch 2.13 gives a wrong result for channels-last
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad.double(), twin.grad, atol=1e-5, rtol=0)
    assert ours.is_contiguous(memory_format=layout)
    assert x.grad.is_contiguous(memory_format=layout)


def test_instance_norm_passes_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(InstanceNorm(), x)


def test_the_output_of_instance_norm_may_be_overwritten():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: InstanceNorm()(x).mul_(2).tanh_(), x)


def test_instance_norm_of_bfloat16_is_rounded_once():
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 20, 20) + 8).bfloat16()
    exact = InstanceNorm()(x.float())
    assert torch.equal(InstanceNorm()(x), exact.bfloat16())


def test_instance_norm_is_the_same_in_training_and_evaluation():
    x = torch.randn(2, 3, 4, 4)
    norm = InstanceNorm()
    assert torch.equal(norm.train()(x), norm.eval()(x))
    assert not norm.state_dict()


def test_a_new_block_computes_its_shortcut_only():
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(BasicBlock(4, 4)(x), x.relu())
    block = BasicBlock(4, 8, stride=2)
    assert torch.equal(block(x), block.shortcut(x).relu())


def test_a_block_is_two_convolutions_and_a_shortcut():
    torch.manual_seed(0)
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.ones_(block.bn2.weight)
    x = torch.randn(2, 4, 6, 6)
    scale = (1 + 1e-5) ** -0.5  # a new BatchNorm's scale in evaluation
    inner = functional.conv2d(x, block.conv1.weight * scale, stride=2, padding=1).relu()
    inner = functional.conv2d(inner, block.conv2.weight * scale, padding=1)
    shortcut = functional.conv2d(x, block.shortcut[0].weight * scale, stride=2)
    torch.testing.assert_close(block(x), (inner + shortcut).relu(), atol=1e-5, rtol=1e-5)


def test_convolution_before_the_resize_equals_convolution_after_it():
    torch.manual_seed(0)
    up = UpAdd(6, 4)
    x, skip = torch.randn(2, 6, 5, 7), torch.randn(2, 4, 10, 14)
    doubled = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x, skip), skip + up.norm(up.conv(doubled)), atol=1e-5, rtol=0)


def test_parameter_counts_equal_the_references():
    decoder = BEVDecoder()
    batch_norm = 2 * 64
    assert parameters(decoder.stem) == 401_408 + batch_norm
    assert parameters(decoder.layer1, decoder.layer2, decoder.layer3) == 2_773_248
    assert parameters(decoder.up1, decoder.up2, decoder.up3) == 49_152


@pytest.mark.parametrize("size", [(16, 24), (25, 37), (9, 8), (1, 3)])
def test_the_output_has_the_size_of_the_input(size):
    decoder = BEVDecoder(8).eval()
    assert decoder(torch.randn(2, 8, *size)).shape == (2, 8, *size)


def test_the_levels_have_strides_2_4_8_and_half_once_and_twice_the_channels_of_the_input():
    decoder = BEVDecoder(8)
    level1 = decoder.layer1(decoder.stem(torch.randn(2, 8, 16, 24)))
    level2 = decoder.layer2(level1)
    assert level1.shape == (2, 4, 8, 12)
    assert level2.shape == (2, 8, 4, 6)
    assert decoder.layer3(level2).shape == (2, 16, 2, 3)


def test_adding_the_input_is_the_last_operation():
    decoder = BEVDecoder(8).eval()
    nn.init.zeros_(decoder.up1.conv.weight)
    x = torch.randn(1, 8, 16, 16)
    assert torch.equal(decoder(x), x)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="decoder of 7 channels: .* choose an even number"):
        BEVDecoder(7)


def test_channels_last_stays_channels_last():
    decoder = BEVDecoder(8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    assert decoder(x).is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    decoder = BEVDecoder(8).train()
    for module in decoder.modules():
        if isinstance(module, BasicBlock):
            nn.init.ones_(module.bn2.weight)
    decoder(torch.randn(2, 8, 25, 37)).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in decoder.parameters())


@pytest.mark.slow
def test_a_decoder_of_few_channels_trains_at_200x200():
    """Runs in a separate process, because a fault would end the process."""
    code = """
import torch
from occfeat_train.networks.decoder import BEVDecoder
for channels in (6, 12, 16, 24, 30):
    decoder = BEVDecoder(channels).to(memory_format=torch.channels_last)
    x = torch.randn(1, channels, 200, 200).to(memory_format=torch.channels_last).requires_grad_()
    decoder(x).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"


@pytest.mark.parametrize("inside", [3, 12, 16])
@pytest.mark.parametrize("side", [20, 21])
def test_a_shortcuts_convolution_equals_the_strided_convolution_for_all_channels(inside, side):
    torch.manual_seed(0)
    conv = ShortcutConv(inside, 2 * inside, 1, stride=2, bias=False).double()
    x = torch.randn(2, inside, side, side, dtype=torch.float64, requires_grad=True)
    ours, theirs = conv(x), functional.conv2d(x, conv.weight, stride=2)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for found, expected in zip(
        *(torch.autograd.grad(y, (x, conv.weight), weight) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(found, expected)
