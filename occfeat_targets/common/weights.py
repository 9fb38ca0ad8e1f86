"""Where a model's weights are: safetensors, or a pickled file that the user has named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ENDINGS = (".pth", ".pth.tar", ".pt", ".ckpt", ".bin", ".safetensors")


def find_weights(name: str) -> tuple[str, bool]:
    """(hub id or folder, whether its weights are pickled) of a hub id, of a folder, or of FOLDER/pytorch_model.bin.

    Pickles are read without running the code in them, but only where that file is named. Raises ValueError if a folder has no
    other weights.
    """
    path = Path(name)
    if path.name in _PICKLED and path.is_file():
        return str(path.parent), True
    pickled = [path / file for file in _PICKLED if (path / file).is_file()]
    if pickled and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"the model in {name} has only pickled weights, which are not read unasked, because a pickle can hold code: save them as "
            f"model.safetensors with transformers' save_pretrained, or pass {pickled[0]} itself"
        )
    return name, False


def _read_config(folder: Path) -> dict[str, Any]:
    """Contents of the folder's config.json; empty if there is none that is valid."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def weights_file(name: str) -> Path | None:
    """The file of weights that `name` means: itself, or model.safetensors in a folder of timm. None for what transformers reads.

    transformers reads hub ids, folders with a config.json that has a model_type, and FOLDER/pytorch_model.bin of such a folder.
    """
    path = Path(name)
    if path.is_dir():
        weights = path / "model.safetensors"
        return weights if weights.is_file() and "architecture" in _read_config(path) else None
    if path.name in _PICKLED and "model_type" in _read_config(path.parent):
        return None
    return path if path.is_file() or name.endswith(_ENDINGS) else None
