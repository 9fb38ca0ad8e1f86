"""Write `golden/backbones/*.npz`: maps of torchvision's and timm's backbones, run from their packages.

    python -m tests.train.make_backbone_golden

It needs torchvision and timm, which this package does not. `golden/README.md` describes the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.train.reference_seeds import GOLDEN, kind_of, seeded_array, seeded_images

Build = Callable[[], tuple[Any, nn.Module, nn.Module]]  # a model, and the modules with our two outputs


def torchvision_efficientnet() -> tuple[Any, nn.Module, nn.Module]:
    from torchvision.models import efficientnet_b0

    model = efficientnet_b0()
    return model, model.features[3], model.features[5]


def torchvision_resnet() -> tuple[Any, nn.Module, nn.Module]:
    from torchvision.models import resnet50

    model = resnet50()
    return model, model.layer2, model.layer3


def timm_model(name: str) -> Build:
    def build() -> tuple[Any, nn.Module, nn.Module]:
        import timm

        model: Any = timm.create_model(name)
        return (model, model.layer2, model.layer3) if "resnet" in name else (model, model.blocks[2], model.blocks[4])

    return build


MODELS: dict[str, Build] = {
    "torchvision-efficientnet_b0": torchvision_efficientnet,
    "torchvision-resnet50": torchvision_resnet,
    "timm-efficientnet_b0": timm_model("efficientnet_b0"),
    "timm-tf_efficientnet_b0": timm_model("tf_efficientnet_b0"),
    "timm-resnet101": timm_model("resnet101"),
}


def images() -> Tensor:
    return torch.from_numpy(seeded_images(1, 48, 64)[0, :2]) * 4 - 2


def run(build: Build) -> dict[str, np.ndarray]:
    model, skip, deep = build()
    shapes = {name: (tuple(t.shape), kind_of(model, name)) for name, t in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(np.asarray(seeded_array(name, *shapes[name]))) for name in shapes})
    found: dict[str, Tensor] = {}
    skip.register_forward_hook(lambda _, __, out: found.update(skip=out))
    deep.register_forward_hook(lambda _, __, out: found.update(deep=out))
    with torch.no_grad():
        model.eval()(images())
    return {
        "names": np.array(list(shapes)),
        "shapes": np.array([json.dumps(shape) for shape, _ in shapes.values()]),
        "kinds": np.array([kind for _, kind in shapes.values()]),
        **{name: value[:, ::8].numpy() for name, value in found.items()},
    }


def main() -> None:
    (GOLDEN / "backbones").mkdir(exist_ok=True)
    for name, build in MODELS.items():
        file = GOLDEN / "backbones" / f"{name}.npz"
        np.savez_compressed(file, **run(build))
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
