"""Tensors of a file of weights, as people have them: a state_dict alone or in a checkpoint, pickled or as safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from occfeat_targets.common.pickled import load_pickled

# Entries of a checkpoint that may be its state_dict: of most trainers, of simple_bev, of timm and others, of DINO.
_ENTRIES = ("state_dict", "model_state_dict", "model", "teacher")


class NoStateDict(ValueError):
    """A file that can be read but holds no state_dict. The message names what it holds."""


@dataclass(frozen=True)
class StateDict:
    """tensors: by their names in the file. beside: other entries of the file, such as the state of an optimiser."""

    tensors: Mapping[str, torch.Tensor]
    beside: tuple[str, ...] = ()


def load_state_dict(file: Path) -> StateDict:
    """The tensors of a file, on the CPU. Code in it is never run.

    Raises UnsafePickle, NoStateDict, ValueError if the file is damaged, and OSError.
    """
    if file.suffix == ".safetensors":
        try:
            return StateDict(load_file(file))
        except SafetensorError as err:
            raise ValueError("it is no safetensors file, or damaged") from err
    content = load_pickled(file)
    entry = next((e for e in _ENTRIES if isinstance(content, dict) and isinstance(content.get(e), Mapping)), None)
    state = content if entry is None else content[entry]
    if not isinstance(state, Mapping) or not state or not all(torch.is_tensor(value) for value in state.values()):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise NoStateDict(
            f"it holds no state_dict, alone or as one of {', '.join(map(repr, _ENTRIES))} (it has {found or 'nothing'}): save it alone from what the file has"
        )
    beside = () if entry is None else tuple(str(key) for key in content if key != entry)
    return StateDict({str(key): value for key, value in state.items()}, beside)


def find_prefix(names: Sequence[str], anchor: str, preferred: tuple[str, ...] = ()) -> str | None:
    """What stands before a network's names in a state_dict, such as "module." of DataParallel; None if it is not in there.

    anchor: a name that the network has. preferred: endings of the prefix to take if the anchor is found several times. Raises
    ValueError if it is found several times and no ending decides.
    """
    found = [n.removesuffix(anchor) for n in names if n.endswith(anchor)]
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    chosen = [prefix for prefix in found if prefix.endswith(preferred)] if preferred and len(found) > 1 else found
    if len(chosen) > 1 or (found and not chosen):
        raise ValueError(
            f"it holds several networks, named {', '.join(map(repr, found))}: save the state_dict of one of them alone"
        )
    return chosen[0] if chosen else None
