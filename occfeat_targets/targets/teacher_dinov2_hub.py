"""DINOv2 from the file that torch.hub downloads: dinov2_vits14_pretrain.pth and so on, with and without registers.

The tensors get the names of the same model in transformers, so the teacher is the same as facebook/dinov2-small and has the
same digest. The code of the hub differs from transformers in one thing: without registers, it interpolates position embeddings to
(n + 0.1) / 37 instead of n / 37 of their size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from occfeat_targets.common.pickled import UnsafePickle
from occfeat_targets.common.plural import count
from occfeat_targets.common.state_dict import find_prefix, load_state_dict
from occfeat_targets.common.weights import weights_file

_ANCHOR = "patch_embed.proj.weight"
_HEAD_WIDTH = 64  # of all DINOv2 models; the number of heads is in no tensor
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_LAYER_NAMES = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls2.gamma": "layer_scale2.lambda1",
}


@dataclass(frozen=True)
class HubFile:
    """config: contents of a config.json. tensors: by their names in transformers. summary: what was read and what left out."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    summary: str


def read_hub_file(file: Path) -> HubFile:
    """Raises ValueError or OSError if the file cannot be read or is of no DINOv2 model of the hub."""
    try:
        content = load_state_dict(file)
    except UnsafePickle as err:
        raise ValueError(f"{err}; save only its state_dict") from err
    prefix = find_prefix(list(content.tensors), _ANCHOR)
    if prefix is None:
        raise ValueError(f"it has no tensor {_ANCHOR}, but {', '.join(list(content.tensors)[:3])}")
    own = {n.removeprefix(prefix): v for n, v in content.tensors.items() if n.startswith(prefix)}
    state: dict[str, torch.Tensor] = {}
    for name, value in own.items():
        state |= _renamed(name, value)
    config = _config(own)
    others = len(content.tensors) - len(own)
    left_out = [name for name in ("mask_token",) if name in own]
    left_out += [count(others, "tensor") + f" without the prefix {prefix!r}"] * (others > 0)
    summary = (
        f"a {config['model_type']} of {config['num_hidden_layers']} layers of {config['hidden_size']} channels, "
        f"{count(len(own), 'tensor')}; left out: {', '.join([*left_out, *content.beside]) or 'nothing'}"
    )
    return HubFile(config, state, summary)


def describe_file(name: str) -> str | None:
    """What was read of a teacher's file and what was left out; None for teachers that are no file."""
    return None if weights_file(name) is None else summarize(str(Path(name).absolute()))[1]


@functools.lru_cache(maxsize=8)
def summarize(name: str) -> tuple[dict[str, Any], str]:
    """(config, summary) of a file. Raises ValueError or OSError as `read_hub_file`."""
    file = weights_file(name)
    assert file is not None
    read = read_hub_file(file)
    return read.config, read.summary


def _renamed(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor by its names in transformers, which has separate queries, keys and values."""
    if name in _NAMES:
        return {_NAMES[name]: value}
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return {f"{_NAMES[module]}.{kind}": value}
    # blocks of a model that was trained in several parts are named blocks.PART.LAYER
    if match := re.fullmatch(r"blocks\.(?:\d+\.)?(\d+)\.([a-z]\w*(?:\.\w+)?)", name):
        layer, rest = f"encoder.layer.{match[1]}", match[2]
        if rest in _LAYER_NAMES:
            return {f"{layer}.{_LAYER_NAMES[rest]}": value}
    if match := re.fullmatch(r"blocks\.(?:\d+\.)?(\d+)\.([a-z][\w.]*)\.(weight|bias)", name):
        layer, rest, kind = f"encoder.layer.{match[1]}", match[2], match[3]
        if rest == "attn.qkv":
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            return {f"{layer}.attention.attention.{part}.{kind}": each.contiguous() for part, each in parts}
        if rest in _LAYER_NAMES:
            return {f"{layer}.{_LAYER_NAMES[rest]}.{kind}": value}
    raise ValueError(
        f"{name} is no tensor of DINOv2: DINO, DINOv3 and other models are read in transformers' layout only"
    )


def _config(own: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """From the shapes of the tensors."""
    try:
        width, _, patch, _ = own[_ANCHOR].shape
        side = round((own["pos_embed"].shape[1] - 1) ** 0.5)
        layers = {match[1] for name in own if (match := re.match(r"blocks\.(?:\d+\.)?(\d+)\.norm1", name))}
    except (KeyError, ValueError, IndexError) as err:
        raise ValueError(f"its tensors do not have DINOv2's shapes ({err})") from err
    if width % _HEAD_WIDTH:
        raise ValueError(f"its width is {width}: DINOv2's is a multiple of {_HEAD_WIDTH}")
    config: dict[str, Any] = {
        "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": len(layers),
        "num_attention_heads": width // _HEAD_WIDTH, "image_size": side * patch, "patch_size": patch,
        "use_swiglu_ffn": any(".mlp.w12." in name for name in own),
    }  # fmt: skip
    if "register_tokens" in own:
        config |= {"model_type": "dinov2_with_registers", "num_register_tokens": own["register_tokens"].shape[1]}
    return config
