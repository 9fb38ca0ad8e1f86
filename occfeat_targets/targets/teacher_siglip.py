"""SigLIP and SigLIP 2: the image model alone, from checkpoints of the image model or of both towers.

SigLIP 2 models of a fixed image size have SigLIP's architecture and model_type. NaFlex models take a sequence of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from occfeat_targets.targets.teacher import Architectures
from occfeat_targets.targets.teacher_vit import VisionTransformer

# (width, layers, heads, width of the MLP)
_BASE, _LARGE, _SO400M = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)


def _architecture(model_type: str, size: tuple[int, int, int, int], **more: int) -> dict[str, object]:
    width, layers, heads, mlp = size
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": mlp, **more,
    }  # fmt: skip


class Siglip(VisionTransformer):
    """Trained at one image size; its position embedding is interpolated bicubically to others."""

    architectures: ClassVar[Architectures] = {
        "google/siglip2-base-patch16-224": _architecture("siglip_vision_model", _BASE, image_size=224, patch_size=16),
        "google/siglip2-large-patch16-256": _architecture("siglip_vision_model", _LARGE, image_size=256, patch_size=16),
        "google/siglip2-so400m-patch14-224": _architecture(
            "siglip_vision_model", _SO400M, image_size=224, patch_size=14
        ),
    }
    final_norm = "post_layernorm"
    default_mean = default_std = (0.5, 0.5, 0.5)

    def image_config(self, config: Mapping[str, Any]) -> Any:
        image_config = super().image_config(config)
        image_config = getattr(image_config, "vision_config", image_config)
        image_config.vision_use_head = False  # the pooling head reads the tokens and changes none
        return image_config

    @property
    def num_prefix(self) -> int:
        return 0  # no CLS token

    def all_tokens(self, images: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
        return tokens


class Siglip2NaFlex(Siglip):
    """Takes patches of any aspect ratio and interpolates its position embedding to their arrangement."""

    architectures: ClassVar[Architectures] = {
        f"google/siglip2-{name}-patch16-naflex": _architecture(
            "siglip2_vision_model", size, num_patches=256, patch_size=16
        )
        for name, size in (("base", _BASE), ("so400m", _SO400M))
    }

    def all_tokens(self, images: torch.Tensor) -> torch.Tensor:
        p, (n, channels, height, width) = self.patch, images.shape
        h, w = height // p, width // p
        patches = images.reshape(n, channels, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # a patch is (row, column, channel)
        tokens: torch.Tensor = self.model(
            pixel_values=patches.reshape(n, h * w, p * p * channels),
            pixel_attention_mask=torch.ones(n, h * w, dtype=torch.int32, device=images.device),
            spatial_shapes=torch.tensor([[h, w]] * n),
        ).last_hidden_state
        return tokens
