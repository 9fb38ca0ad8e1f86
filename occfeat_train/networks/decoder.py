"""BEV decoder: a UNet with ResNet-18 blocks from the lifted map to F_B (paper 3.1; Simple-BEV's `raw_feat`)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional

from occfeat_train.ops.instance_norm import InstanceNorm
from occfeat_train.ops.resize import resize


class BEVDecoder(nn.Module):
    """Lifted map -> F_B of the same shape, without activation after the last addition.

    Three levels with strides 2, 4, 8 and widths channels/2, channels, 2*channels. Each is resized to the level above and
    added to it. H and W are arbitrary; odd sides are rounded up when halved.
    Raises ValueError if channels is odd.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"decoder of {channels} channels: its first level has half of them, choose an even number")
        narrow, wide = channels // 2, channels * 2
        self.stem = nn.Sequential(
            nn.Conv2d(channels, narrow, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)
        )
        self.layer1 = nn.Sequential(BasicBlock(narrow, narrow), BasicBlock(narrow, narrow))
        self.layer2 = nn.Sequential(BasicBlock(narrow, channels, stride=2), BasicBlock(channels, channels))
        self.layer3 = nn.Sequential(BasicBlock(channels, wide, stride=2), BasicBlock(wide, wide))
        self.up3 = UpAdd(wide, channels)
        self.up2 = UpAdd(channels, narrow)
        self.up1 = UpAdd(narrow, channels)

    def forward(self, x: Float[torch.Tensor, "B C H W"]) -> Float[torch.Tensor, "B C H W"]:
        level1 = self.layer1(self.stem(x))
        level2 = self.layer2(level1)
        level3 = self.layer3(level2)
        up: torch.Tensor = self.up3(level3, level2)
        up = self.up2(up, level1)
        return self.up1(up, x)


class BasicBlock(nn.Module):
    """ResNet's basic block of two 3x3 convolutions: (N, inside, H, W) -> (N, outside, H/stride, W/stride).

    The last gamma is initialised to zero, so that a new block equals its shortcut.
    """

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                ShortcutConv(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside)
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class ShortcutConv(nn.Conv2d):
    """A 1x1 convolution with a stride and without bias. With few channels on a CPU, the input is subsampled first.

    The function is the same. torch 2.13's backward pass (oneDNN) of the strided convolution writes past its buffer if a
    pixel's channels do not fill a vector register of 16 floats, and the process usually crashes. To reproduce:

        conv = torch.nn.Conv2d(4, 8, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(2, 4, 100, 100).to(memory_format=torch.channels_last).requires_grad_()
        y = conv(x)
        y.sum().backward()
        print("no segmentation fault")
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and self.in_channels < 16:
            rows, columns = self.stride
            return functional.conv2d(x[..., ::rows, ::columns], self.weight)
        return super().forward(x)


class UpAdd(nn.Module):
    """(N, inside, h, w) and a skip (N, outside, H, W) -> skip + InstanceNorm(1x1 convolution, bilinearly resized).

    The reference convolves after the resize. The function is the same, because a 1x1 convolution mixes only channels and
    the resize mixes only positions. Before the resize there are a quarter as many positions.
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 1, bias=False)
        self.norm = InstanceNorm()

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return skip + self.norm(resize(self.conv(x), (skip.shape[2], skip.shape[3])))
