"""Where a model's weights are: safetensors, or a pickled file that the user has named."""

from __future__ import annotations

from pathlib import Path

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


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
