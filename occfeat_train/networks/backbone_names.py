"""Names of a backbone's tensors in the files of torchvision, timm, efficientnet_pytorch and MoCo.

The same names do not always mean the same function. EfficientNets that were trained in TensorFlow pad for even sides on the
right and below only and have BatchNorms of epsilon 1e-3; those that were trained in PyTorch pad evenly and have 1e-5. Their
tensors have the same names and shapes. ResNets with the stride in the first 1x1 convolution (Caffe's) cannot be told from
torchvision's either; they are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_STAGES = (1, 2, 2, 3, 3)  # blocks of EfficientNet-B0's stages, as far as the encoder has them
_EFFICIENTNET_PYTORCH = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_se_reduce": "squeeze_excite.reduce",
    "_se_expand": "squeeze_excite.expand",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_TIMM = {  # of blocks with an expansion
    "conv_pw": "expansion.expand_conv",
    "bn1": "expansion.expand_bn",
    "conv_dw": "depthwise_conv.depthwise_conv",
    "bn2": "depthwise_conv.depthwise_norm",
    "se.conv_reduce": "squeeze_excite.reduce",
    "se.conv_expand": "squeeze_excite.expand",
    "conv_pwl": "projection.project_conv",
    "bn3": "projection.project_bn",
}
_TIMM_FIRST = {  # of blocks without
    "conv_dw": "depthwise_conv.depthwise_conv",
    "bn1": "depthwise_conv.depthwise_norm",
    "se.conv_reduce": "squeeze_excite.reduce",
    "se.conv_expand": "squeeze_excite.expand",
    "conv_pw": "projection.project_conv",
    "bn2": "projection.project_bn",
}
_TORCHVISION = {  # (part, module in it), the parts of a block without an expansion counted from 1
    "0.0": "expansion.expand_conv",
    "0.1": "expansion.expand_bn",
    "1.0": "depthwise_conv.depthwise_conv",
    "1.1": "depthwise_conv.depthwise_norm",
    "2.fc1": "squeeze_excite.reduce",
    "2.fc2": "squeeze_excite.expand",
    "3.0": "projection.project_conv",
    "3.1": "projection.project_bn",
}


@dataclass(frozen=True)
class Naming:
    """The names of one project.

    anchor: a name that all of its files have. rename: name -> name in our truncated backbone, None for other tensors.
    inside: matches the names of the part that our backbones have; other tensors are left out. convention: of
    EfficientNet's padding and epsilon, "tensorflow" or "torch"; None if the names do not say.
    """

    project: str
    anchor: str
    rename: Callable[[str], str | None]
    inside: re.Pattern[str]
    convention: str | None = None


def resnet_name(name: str) -> str | None:
    """Name of torchvision's tensor in our `ResNet`; None for tensors that are left out (layer4, fc)."""
    match = re.fullmatch(r"(?:layer([123])\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(\w+)", name)
    if match is None:
        return None
    layer, index, kind, number, tensor = match.groups()
    # downsample.0 is a convolution, downsample.1 its norm
    part = "convolution" if kind == "conv" or (kind == "downsample." and number == "0") else "normalization"
    if layer is None:
        return f"embedder.embedder.{part}.{tensor}"
    place = "shortcut" if kind == "downsample." else f"layer.{int(number) - 1}"
    return f"stages.{int(layer) - 1}.layers.{index}.{place}.{part}.{tensor}"


def efficientnet_pytorch_name(name: str) -> str | None:
    """Name of the tensor of lukemelas/EfficientNet-PyTorch in our `EfficientNetB0`; None for others."""
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
        part = _EFFICIENTNET_PYTORCH.get(match[2])
        is_ours = part is not None and int(match[1]) < sum(_STAGES)
        return f"blocks.{match[1]}.{part}.{match[3]}" if is_ours else None
    return _stem(name, {"_conv_stem": "convolution", "_bn0": "batchnorm"})


def timm_efficientnet_name(name: str) -> str | None:
    """Name of timm's tensor in our `EfficientNetB0`; None for others."""
    if match := re.fullmatch(r"blocks\.(\d)\.(\d+)\.([\w.]+)\.(\w+)", name):
        part = (_TIMM_FIRST if match[1] == "0" else _TIMM).get(match[3])
        return _in_block(int(match[1]), int(match[2]), part, match[4])
    return _stem(name, {"conv_stem": "convolution", "bn1": "batchnorm"})


def torchvision_efficientnet_name(name: str) -> str | None:
    """Name of torchvision's tensor in our `EfficientNetB0`; None for others."""
    if match := re.fullmatch(r"features\.([1-9])\.(\d+)\.block\.(\d)\.(\w+)\.(\w+)", name):
        stage = int(match[1]) - 1
        part = _TORCHVISION.get(f"{int(match[3]) + (stage == 0)}.{match[4]}")
        return _in_block(stage, int(match[2]), part, match[5])
    return _stem(name, {"features.0.0": "convolution", "features.0.1": "batchnorm"})


def _stem(name: str, parts: dict[str, str]) -> str | None:
    module, _, tensor = name.rpartition(".")
    return f"embeddings.{parts[module]}.{tensor}" if module in parts else None


def _in_block(stage: int, index: int, part: str | None, tensor: str) -> str | None:
    if part is None or stage >= len(_STAGES) or index >= _STAGES[stage]:
        return None
    return f"blocks.{sum(_STAGES[:stage]) + index}.{part}.{tensor}"


_EFFICIENTNETS = (
    Naming(
        "torchvision", "features.1.0.block.0.0.weight", torchvision_efficientnet_name,
        re.compile(r"features\.[0-5]\..*"), "torch",
    ),
    Naming("timm", "blocks.0.0.conv_dw.weight", timm_efficientnet_name, re.compile(r"(conv_stem|bn1|blocks\.[0-4])\..*")),
    Naming(
        "efficientnet_pytorch", "_blocks.0._depthwise_conv.weight", efficientnet_pytorch_name,
        re.compile(r"(_conv_stem|_bn0|_blocks\.(\d|10))\..*"), "tensorflow",
    ),
)  # fmt: skip
_RESNETS = (
    Naming(
        "torchvision, timm and MoCo", "layer1.0.conv1.weight", resnet_name, re.compile(r"(conv1|bn1|layer[123])\..*")
    ),
)
NAMINGS = {"efficientnet-b0": _EFFICIENTNETS, "resnet-50": _RESNETS, "resnet-101": _RESNETS}
