"""RADIO (C-RADIOv4), distilled from several teachers. Its position embedding is cropped and interpolated to the image's size."""

from __future__ import annotations

from typing import ClassVar

from occfeat_targets.targets.teacher import Architectures
from occfeat_targets.targets.teacher_vit import VisionTransformer


class Radio(VisionTransformer):
    """Its features are the output of the last layer: it has no final LayerNorm."""

    architectures: ClassVar[Architectures] = {
        "nvidia/C-RADIOv4-H": {"model_type": "radio", "hidden_size": 1280, "num_hidden_layers": 32}
    }
    final_norm = None

    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """None: the model takes RGB in [0, 1] and normalises it with statistics that are part of its weights."""
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    @property
    def num_prefix(self) -> int:
        return int(self.config.num_cls_tokens + self.config.num_registers)
