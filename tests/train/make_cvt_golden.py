"""Write `golden/cvt/stages.npz`: two attention stages of Cross-View Transformers, run from a checkout of bradyz/cross_view_transformers.

    python -m tests.train.make_cvt_golden ../cross_view_transformers

The checkout needs einops and torchvision, which this package does not. Everything is float64 and in training mode.
`golden/README.md` describes the arrays.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from occfeat_targets.cache.geometry import rigid
from tests.train.make_reference_training import sums
from tests.train.reference_seeds import GOLDEN, kind_of, seeded_array, seeded_direction

CHANNELS, IMAGE, COARSE, FEATURES = 12, (32, 48), (4, 5), ((4, 6), (2, 3))  # of both stages
BATCH, CAMS = 2, 3


class Maps(nn.Module):
    """In place of the backbone: the features of both stages."""

    output_shapes = [(1, CHANNELS, *size) for size in FEATURES]  # noqa: RUF012

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps

    maps: list[Tensor]


def build(module: Any) -> Any:
    """The reference's Encoder with the settings of its config/model/cvt.yaml, but for the sizes and a backbone of fixed maps."""
    cross_view = {
        "heads": 4, "dim_head": 32, "qkv_bias": True, "skip": True, "no_image_features": False,
        "image_height": IMAGE[0], "image_width": IMAGE[1],
    }  # fmt: skip
    height, width = (8 * n for n in COARSE)
    embedding = {
        "sigma": 1.0, "bev_height": height, "bev_width": width, "h_meters": 100.0, "w_meters": 100.0, "offset": 0.0,
        "decoder_blocks": [128, 128, 64],
    }  # fmt: skip
    return module.Encoder(Maps(), cross_view, embedding, dim=CHANNELS, middle=[2, 2])


def calibration() -> tuple[Tensor, Tensor]:
    """(BATCH, CAMS, 3, 3) intrinsics and (BATCH, CAMS, 4, 4) extrinsics, camera from ego."""
    random = np.random.RandomState(0)
    turns = random.standard_normal((BATCH, CAMS, 4))
    turns /= np.linalg.norm(turns, axis=-1, keepdims=True)
    poses = [[rigid(tuple(q), tuple(random.uniform(-2, 2, 3))) for q in sample] for sample in turns]
    intrinsics = np.tile(np.array([[30.0, 0, 23], [0, 31, 17], [0, 0, 1]]), (BATCH, CAMS, 1, 1))
    intrinsics[..., :2, :] *= random.uniform(0.8, 1.2, (BATCH, CAMS, 2, 1))
    return torch.from_numpy(intrinsics), torch.from_numpy(np.array(poses))


def run(module: Any) -> dict[str, np.ndarray]:
    model = build(module)
    shapes = {name: (tuple(t.shape), kind_of(model, name)) for name, t in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(seeded_array(name, *shapes[name])) for name in shapes})
    model.double().train()
    model.backbone.maps = maps = [
        torch.from_numpy(seeded_direction(f"features {i}", (BATCH * CAMS, CHANNELS, *size))).requires_grad_()
        for i, size in enumerate(FEATURES)
    ]
    intrinsics, extrinsics = calibration()
    found: dict[str, Tensor] = {"intrinsics": intrinsics, "cam_from_ego": extrinsics}
    inverse = extrinsics.inverse()
    found["centers"] = inverse[..., 3]
    found["cells"] = model.bev_embedding.grid[:2].flatten(1).mT
    for i, stage in enumerate(model.cross_views):
        plane = stage.image_plane.flatten(-2)
        found[f"pixels_{i}"] = (inverse @ nn.functional.pad(intrinsics.inverse() @ plane, (0, 0, 0, 1), value=1)).mT

        def keep_projected(_: Any, __: Any, out: Tensor, i: int = i) -> None:
            found[f"directions_{i}"] = -out.unflatten(0, (BATCH, CAMS))

        def keep(_: Any, given: Any, options: Any, out: Tensor, i: int = i) -> None:
            query, key, _ = given
            found[f"positions_{i}"] = query - options["skip"][:, None]
            found[f"directions_{i}"] = key + found[f"directions_{i}"]
            found[f"attended_{i}"] = out

        stage.feature_proj.register_forward_hook(keep_projected)
        stage.cross_attend.register_forward_hook(keep, with_kwargs=True)
    out = model({"image": torch.zeros(BATCH, CAMS, 3, *IMAGE), "intrinsics": intrinsics, "extrinsics": extrinsics})
    (out * torch.from_numpy(seeded_direction("out", tuple(out.shape)))).sum().backward()
    gradients = sums({name: p.grad for name, p in model.named_parameters()})
    statistics = sums({name: b for name, b in model.named_buffers() if "running" in name})
    found |= {"out": out, **{f"gradient_{i}": x.grad for i, x in enumerate(maps) if x.grad is not None}}
    return {
        "names": np.array(list(shapes)),
        "shapes": np.array([json.dumps(shape) for shape, _ in shapes.values()]),
        "kinds": np.array([kind for _, kind in shapes.values()]),
        "gradients_of": np.array(list(gradients)),
        "gradients": torch.stack(list(gradients.values())).numpy(),
        "statistics_of": np.array(list(statistics)),
        "statistics": torch.stack(list(statistics.values())).numpy(),
        **{name: value.detach().numpy() for name, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of bradyz/cross_view_transformers")
    sys.path.insert(0, str(parser.parse_args().checkout.resolve()))
    arrays = run(importlib.import_module("cross_view_transformer.model.encoder"))
    file = GOLDEN / "cvt" / "stages.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **arrays)
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
