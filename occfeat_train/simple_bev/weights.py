"""Mapping of the reference's weights (Segnet, Bevformernet and Liftnet of aharley/simple_bev) to our names.

The reference has two Liftnets: liftnet2.py is our LSS; liftnet.py is not supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.backbone_names import efficientnet_pytorch_name, resnet_name
from occfeat_train.networks.network import BEVNetwork

# torchvision's children of a ResNet in the reference's Sequential
_RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2"}
_REST = {
    "encoder.upsampling_layer.conv.": "network.encoder.fuse.",
    "encoder.depth_layer.": "network.encoder.fuse.6.",
    "bev_compressor.": "network.lifting.compressor.",
    "decoder.first_conv.": "network.decoder.stem.0.",
    "decoder.bn1.": "network.decoder.stem.1.",
    "decoder.up3_skip.upsample_layer.1.": "network.decoder.up3.conv.",
    "decoder.up2_skip.upsample_layer.1.": "network.decoder.up2.conv.",
    "decoder.up1_skip.upsample_layer.1.": "network.decoder.up1.conv.",
    "decoder.segmentation_head.": "head.",
}
# Heads and learned loss weights, for loss.heads=simple-bev.
_HEADS = {
    "decoder.segmentation_head.": "head.segmentation.",
    "decoder.instance_center_head.": "head.center.",
    "decoder.instance_offset_head.": "head.offset.",
}
_LOG_VARIANCES = ("ce_weight", "center_weight", "offset_weight")
_ATTENTION = {
    "deformable_attention.sampling_offsets": "places.offsets",
    "deformable_attention.attention_weights": "places.weights",
    "deformable_attention.value_proj": "value",
    "deformable_attention.output_proj": "inner",
    "output_proj": "output",
}
# A head that the reference does not train; and without `heads` the other heads and the learned loss weights.
_UNTRAINED = re.compile(r"decoder\.feat_head\..*")
_LEFT_OUT = re.compile(r"decoder\.(feat|instance_offset|instance_center)_head\..*")


def convert(state_dict: Mapping[str, Any], grid: VoxelGrid, *, heads: bool = False) -> dict[str, torch.Tensor]:
    """The reference's tensors or arrays as tensors with our names.

    Names are ``network.`` + those of `BEVNetwork` and ``head.`` + those of a segmentation head, or with `heads` those of
    `InstanceHeads`; backbones are EfficientNet-B0, ResNet-50 and -101. grid: grid of the network. The input channels of the compressor are reordered: the
    reference counts levels from the highest down, innermost (c * Z + y); ours count from the lowest up, outermost
    (z * C + c). The sampling points of BEVFormer's cross-attention are reordered in the same way.
    Raises ValueError on a name that is not the reference's, or a tensor that does not fit the grid.
    """
    converted = {}
    if heads and all(name in state_dict for name in _LOG_VARIANCES):
        converted["head.log_variance"] = torch.stack([torch.as_tensor(state_dict[name]) for name in _LOG_VARIANCES])
    for name, array in state_dict.items():
        if (_UNTRAINED if heads else _LEFT_OUT).fullmatch(name) or name in _LOG_VARIANCES:
            continue
        value = torch.as_tensor(array)
        if name == "bev_compressor.0.weight":
            value = _reorder_compressor(value, grid)
        elif re.fullmatch(r"cross_attn_layers\.\d+\.deformable_attention\.(sampling_off|attention_w).*", name):
            value = _reorder_places(name, value, grid)
        converted[_our_name(name, _REST | _HEADS if heads else _REST)] = value
    return converted


def _reorder_compressor(weight: torch.Tensor, grid: VoxelGrid) -> torch.Tensor:
    """(outside, C * Z, 3, 3) with y = 0 the highest -> (outside, Z * C, 3, 3) with z = 0 the lowest."""
    levels = grid.shape[0]
    if weight.shape[1] % levels:
        raise ValueError(
            f"bev_compressor.0.weight of shape {tuple(weight.shape)}: its inputs are no multiple of the grid's "
            f"{levels} levels; pass the grid it was trained on"
        )
    return weight.unflatten(1, (-1, levels)).flip(2).transpose(1, 2).flatten(1, 2).contiguous()


def _reorder_places(name: str, value: torch.Tensor, grid: VoxelGrid) -> torch.Tensor:
    """(heads * points [* 2], ...), points from the highest level to the lowest -> from the lowest to the highest."""
    heads, last = 4, 2 if "offsets" in name else 1
    levels = grid.shape[0]
    if value.shape[0] % (heads * levels * last):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)}: its points are no multiple of the grid's {levels} levels; "
            "pass the grid it was trained on"
        )
    return value.reshape(heads, -1, levels, last, *value.shape[1:]).flip(2).reshape(value.shape).contiguous()


def _our_name(name: str, rest: Mapping[str, str]) -> str:
    if match := re.fullmatch(r"encoder\.backbone\.(_.+)", name):
        if (ours := efficientnet_pytorch_name(match[1])) is not None:
            return f"network.encoder.backbone.{ours}"
    elif match := re.fullmatch(r"encoder\.(?:backbone\.([0145])|(layer3))\.(.+)", name):
        child = match[2] or _RESNET_CHILDREN[match[1]]
        if (ours := resnet_name(f"{child}.{match[3]}")) is not None:
            return f"network.encoder.backbone.{ours}"
    elif match := re.fullmatch(r"decoder\.(layer[123])\.(.+)", name):
        return f"network.decoder.{match[1]}.{match[2].replace('downsample.', 'shortcut.')}"
    elif match := re.fullmatch(r"(self|cross)_attn_layers\.(\d+)\.(.+)\.(\w+)", name):
        if (part := _ATTENTION.get(match[3])) is not None and (match[1] == "self" or part != "inner"):
            return f"network.lifting.layers.{match[2]}.{match[1]}_attention.{part}.{match[4]}"
    elif match := re.fullmatch(r"(norm[123]|ffn)_layers\.(\d+)\.(.+)", name):
        return f"network.lifting.layers.{match[2]}.{match[1].replace('ffn', 'feed_forward')}.{match[3]}"
    elif name in ("bev_queries", "bev_queries_pos"):
        return f"network.lifting.{'positions' if name.endswith('pos') else 'queries'}"
    for theirs, ours in rest.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ValueError(f"{name} is no name of a Segnet, Bevformernet or Liftnet with EfficientNet-B0 or a ResNet")


def load_reference(network: BEVNetwork, state_dict: Mapping[str, Any]) -> None:
    """Load the weights of the reference's Segnet, Bevformernet or Liftnet (liftnet2.py) into a network, without heads.

    Build the network with compat="simple-bev" to compute the same function as the reference.
    Raises ValueError or RuntimeError on weights of another network or grid.
    """
    weights = convert(state_dict, network.lifting.grid)
    prefix = "network."
    network.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
