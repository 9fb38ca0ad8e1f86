"""Write `golden/dinov2_hub.npz`: tokens of small models of facebookresearch/dinov2, run from a checkout.

    python -m tests.targets.make_dinov2_golden ../dinov2

The models have the settings of the hub's dinov2_vits14 (mlp), dinov2_vitg14 (swiglu) and dinov2_vits14_reg (registers), but two
layers of 128 channels and position embeddings of 5 x 5. `reference_seeds` generates the weights from the arrays MODEL/names,
shapes and kinds. MODEL/tokens are those of an image of 5 x 5 patches, MODEL/wide of one of 4 x 7 patches, for which
interpolate_offset is 0: the hub's 0.1 without registers moves the position embeddings by a little, transformers does not.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.train.reference_seeds import kind_of, seeded_array

FILE = Path(__file__).parent / "golden" / "dinov2_hub.npz"
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"ffn_layer": "mlp"},
    "swiglu": {"ffn_layer": "swiglufused"},
    "registers": {"ffn_layer": "mlp", "num_register_tokens": 4, "interpolate_antialias": True},
}
SIZES = {"tokens": (70, 70), "wide": (56, 98)}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def image(size: tuple[int, int]) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (1, *size, 3), dtype=np.uint8)


def run(checkout: Path, options: dict[str, Any]) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(checkout))
    layers = importlib.import_module("dinov2.layers")
    models = importlib.import_module("dinov2.models.vision_transformer")
    model = models.DinoVisionTransformer(
        img_size=70, patch_size=14, embed_dim=128, depth=2, num_heads=2, mlp_ratio=4, init_values=1.0, block_chunks=0,
        block_fn=functools.partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention), interpolate_offset=0.0,
        **options,
    )  # fmt: skip
    shapes = {name: (tuple(t.shape), kind_of(model, name)) for name, t in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(seeded_array(name, *shapes[name])) for name in shapes})
    found = {}
    for name, size in SIZES.items():
        pixels = (torch.from_numpy(image(size)).float() / 255 - MEAN) / STD
        with torch.no_grad():
            tokens = model.eval().forward_features(pixels.permute(0, 3, 1, 2))["x_norm_patchtokens"]
        found[name] = tokens.unflatten(1, (size[0] // 14, size[1] // 14)).numpy()
    return {
        "names": np.array(list(shapes)),
        "shapes": np.array([json.dumps(shape) for shape, _ in shapes.values()]),
        "kinds": np.array([kind for _, kind in shapes.values()]),
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of facebookresearch/dinov2")
    checkout = parser.parse_args().checkout.resolve()
    FILE.parent.mkdir(exist_ok=True)
    arrays = {f"{model}/{name}": a for model, options in MODELS.items() for name, a in run(checkout, options).items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
