"""DINOv2, DINOv2 with registers, and DINOv3 ViTs. They interpolate position embeddings to the image's size by themselves."""

from __future__ import annotations

from typing import ClassVar

from occfeat_targets.targets.teacher import Architectures
from occfeat_targets.targets.teacher_vit import VisionTransformer

# (width, layers, heads)
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
_DINOV3 = {"vits16": (384, 12, 6), "vitb16": (768, 12, 12), "vitl16": (1024, 24, 16)}


def _dinov2(model_type: str, size: str) -> dict[str, object]:
    width, layers, heads = _DINOV2[size]
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "image_size": 518, "patch_size": 14, "use_swiglu_ffn": size == "giant",
    }  # fmt: skip


def _dinov3(size: str) -> dict[str, object]:
    width, layers, heads = _DINOV3[size]
    return {
        "model_type": "dinov3_vit", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "num_register_tokens": 4, "patch_size": 16,
    }  # fmt: skip


class Dinov2(VisionTransformer):
    architectures: ClassVar[Architectures] = {f"facebook/dinov2-{size}": _dinov2("dinov2", size) for size in _DINOV2}


class Dinov2WithRegisters(VisionTransformer):
    architectures: ClassVar[Architectures] = {
        f"facebook/dinov2-with-registers-{size}": _dinov2("dinov2_with_registers", size) for size in _DINOV2
    }


class Dinov3(VisionTransformer):
    architectures: ClassVar[Architectures] = {
        f"facebook/dinov3-{size}-pretrain-lvd1689m": _dinov3(size) for size in _DINOV3
    }
    final_norm = "norm"
