"""Weights of the reference networks, generated from their names, so that golden files need not contain weights.

`golden/README.md` describes the golden files.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = {"segnet": "simplebev", "bevformernet": "bevformer", "liftnet2": "lss"}  # reference name: our name


def seeded_array(name: str, shape: tuple[int, ...], kind: str) -> NDArray[np.generic]:
    """One parameter or buffer. kind: "norm" (BatchNorm, LayerNorm), "int" (counters) or "other"."""
    if kind == "int" or not shape:
        return np.zeros(shape, np.int64 if kind == "int" else np.float32)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (kind == "norm" and name.endswith("weight")):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = (2.0 / np.prod(shape[1:])) ** 0.5
    if name.startswith("bev_queries"):
        scale = 0.1
    elif len(shape) == 1:
        scale = 2.0 if name.endswith("sampling_offsets.bias") else 0.1
    elif name.endswith("sampling_offsets.weight"):
        scale = 0.05
    elif name.endswith("attention_weights.weight"):
        scale = 0.2
    return (scale * random.standard_normal(shape)).astype(np.float32)


def kind_of(model: nn.Module, name: str) -> str:
    """The kind of a model's parameter or buffer."""
    owner = model.get_submodule(name.rpartition(".")[0])
    is_norm = isinstance(owner, (nn.BatchNorm2d, nn.LayerNorm))
    return "int" if name.endswith("num_batches_tracked") else "norm" if is_norm else "other"


def seeded_state_dict(file: Path) -> dict[str, NDArray[np.generic]]:
    """The weights of a golden file by the reference's names."""
    with np.load(file) as golden:
        entries = zip(golden["names"].tolist(), golden["shapes"].tolist(), golden["kinds"].tolist(), strict=True)
        return {name: seeded_array(name, tuple(json.loads(shape)), kind) for name, shape, kind in entries}


def seeded_direction(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Normal values. The sum of a gradient times this is about as large as the gradient's norm, and likewise for its error."""
    return np.random.RandomState(zlib.crc32(f"direction of {name}".encode())).standard_normal(shape)


def seeded_images(batch: int, height: int, width: int) -> NDArray[np.float32]:
    """(batch, 6, 3, height, width) in [0, 1]."""
    values = np.random.RandomState(0).randint(0, 256, size=(batch, 6, 3, height, width))
    return values.astype(np.float32) / 255
