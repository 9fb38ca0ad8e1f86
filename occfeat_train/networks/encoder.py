"""Image encoders: a pretrained backbone truncated at stride 16, fused to one map at stride 8 (paper 4.1).

The backbones consist of transformers' modules and compute the same function as Simple-BEV's: EfficientNet-B0 up to block
10, ResNet-50 and -101 (v1.5) up to the third stage. `encoder_weights` loads their initial weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import nn

from occfeat_train.config import Backbone
from occfeat_train.ops.checkpointing import recomputed
from occfeat_train.ops.instance_norm import InstanceNorm
from occfeat_train.ops.resize import resize

BACKBONES: tuple[str, ...] = get_args(Backbone)
_STRIDE = 16
# The first five stages of EfficientNet-B0 are blocks 0 to 10; the first three of a ResNet are layer1 to layer3.
EFFICIENTNET: dict[str, Any] = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "in_channels": [32, 16, 24, 40, 80],
    "out_channels": [16, 24, 40, 80, 112],
    "kernel_sizes": [3, 3, 5, 3, 5],
    "strides": [1, 2, 2, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3],
    "expand_ratios": [1, 6, 6, 6, 6],
}
BLOCKS = sum(EFFICIENTNET["num_block_repeats"])
# EfficientNets trained in TensorFlow pad, for even sides, one pixel more on the right and below; those of torchvision, and of
# timm without "tf_", pad evenly. depthwise_padding lists the blocks that pad evenly.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "tensorflow": {"depthwise_padding": [], "batch_norm_eps": 1e-3},
    "torch": {"depthwise_padding": list(range(BLOCKS)), "batch_norm_eps": 1e-5},
}
RESNET: dict[str, Any] = {
    "layer_type": "bottleneck",
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024],
    "downsample_in_bottleneck": False,  # v1.5: the 3x3 convolution has the stride
}
_LARGE_BLOCKS = 4  # of EfficientNet, up to the first of stride 8: with the stem, two thirds of its saved activations
RESNET_DEPTHS = {"resnet-50": [3, 4, 6], "resnet-101": [3, 4, 23]}


class ImageEncoder(nn.Module):
    """ImageNet-normalised images -> features of C = extra_channels + channels, an eighth as high and wide.

    backbone: one of BACKBONES, with random weights until `encoder_weights.load_backbone_weights`.
    extra_channels: additional output channels of the last convolution for the lifting.
    drop_connect: EfficientNet's stochastic depth; the rate grows linearly with depth up to this value at block 11 (absent).
    efficientnet: one of CONVENTIONS, EfficientNet's padding and BatchNorm epsilon.
    backbone.recompute: activation checkpointing of the first blocks, which have the largest maps.
    Raises ValueError on an unknown backbone, and in `forward` if height or width is no multiple of 16.
    """

    def __init__(
        self,
        backbone: str,
        channels: int = 128,
        drop_connect: float = 0.2,
        extra_channels: int = 0,
        efficientnet: str = "tensorflow",
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r}: one of {', '.join(BACKBONES)} expected")
        self.name, self.efficientnet = backbone, efficientnet
        self.backbone = (
            EfficientNetB0(drop_connect, efficientnet)
            if backbone == "efficientnet-b0"
            else ResNet(RESNET_DEPTHS[backbone])
        )
        skip, deep = self.backbone.widths
        width = channels if backbone == "efficientnet-b0" else 4 * channels
        self.fuse = nn.Sequential(
            nn.Conv2d(skip + deep, width, 3, padding=1, bias=False), InstanceNorm(), nn.ReLU(True),
            nn.Conv2d(width, width, 3, padding=1, bias=False), InstanceNorm(), nn.ReLU(True),
            nn.Conv2d(width, extra_channels + channels, 1),
        )  # fmt: skip

    def forward(self, images: Float[torch.Tensor, "N 3 height width"]) -> Float[torch.Tensor, "N C h w"]:
        height, width = images.shape[-2:]
        if height % _STRIDE or width % _STRIDE:
            nearest = [max(_STRIDE, round(side / _STRIDE) * _STRIDE) for side in (height, width)]
            raise ValueError(
                f"images of {height}x{width} pixels: the encoder needs multiples of {_STRIDE}, "
                f"the nearest are {nearest[0]}x{nearest[1]}"
            )
        skip, deep = self.backbone(images)
        return self.fuse(torch.cat([skip, resize(deep, (skip.shape[2], skip.shape[3]))], 1))


class EfficientNetB0(nn.Module):
    """(N, 3, H, W) -> (N, 40, H/8, W/8) and (N, 112, H/16, W/16), outputs of blocks 4 and 10; later blocks are left out."""

    widths = (40, 112)

    def __init__(self, drop_connect: float, convention: str) -> None:
        super().__init__()
        self.recompute = True  # set by BEVNetwork
        from transformers import EfficientNetConfig
        from transformers.models.efficientnet.modeling_efficientnet import EfficientNetEmbeddings, EfficientNetEncoder

        config = EfficientNetConfig(**EFFICIENTNET, **CONVENTIONS[convention])
        self.embeddings = EfficientNetEmbeddings(config)
        if convention == "torch":
            self.embeddings.padding = nn.ZeroPad2d(1)  # of the stem, for which transformers has no setting
        self.blocks = EfficientNetEncoder(config).blocks
        block: Any
        for index, block in enumerate(self.blocks):
            # transformers uses elementwise dropout here; EfficientNet drops the whole residual of an image.
            block.projection.dropout = DropConnect(drop_connect * index / len(self.blocks))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01  # transformers passes TensorFlow's 0.99, but torch defines 1 - momentum
        _initialise(self)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = skip = recomputed(self.embeddings, images) if self.recompute else self.embeddings(images)
        block: Any
        for index, block in enumerate(self.blocks):
            # Drawn here, so that the recomputation needs no state of the random numbers, which a CUDA graph cannot save.
            factors = block.projection.dropout.draw(x) if block.projection.apply_dropout else None
            dropped = partial(_drop_and_call, block, factors)
            large = self.recompute and index < _LARGE_BLOCKS
            x = recomputed(block, x, call=dropped) if large else dropped(x)
            skip = x if index == 4 else skip
        return skip, x


def _drop_and_call(block: Any, factors: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    block.projection.dropout.factors = factors
    out: torch.Tensor = block(x)
    return out


class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, 512, H/8, W/8) and (N, 1024, H/16, W/16), outputs of layer2 and layer3; layer4 is left out."""

    widths = (512, 1024)

    def __init__(self, depths: list[int]) -> None:
        super().__init__()
        self.recompute = True  # set by BEVNetwork
        from transformers import ResNetConfig
        from transformers.models.resnet.modeling_resnet import ResNetEmbeddings, ResNetEncoder

        config = ResNetConfig(**RESNET, depths=depths)
        self.embedder = ResNetEmbeddings(config)
        self.stages = ResNetEncoder(config).stages
        _initialise(self)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        large = recomputed if self.recompute else nn.Module.__call__
        x = large(self.embedder, images)
        blocks: Any = self.stages[0].layers
        for block in blocks:
            x = large(block, x)
        skip = self.stages[1](x)
        return skip, self.stages[2](skip)


class DropConnect(nn.Module):
    """Stochastic depth: in training, each image's (C, H, W) is set to zero with probability `rate`, else divided by 1 - rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors: torch.Tensor | None = None

    def draw(self, x: torch.Tensor) -> torch.Tensor | None:
        """A factor for each of the N images of x, (N, 1, 1, 1); None if nothing is dropped. Set `factors` to it before a call."""
        if not self.training or self.rate == 0:
            return None
        return x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factors is None else x * self.factors

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def _initialise(backbone: nn.Module) -> None:
    """He initialisation by fan-out; the fan-out of a depthwise convolution is its kernel size."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
