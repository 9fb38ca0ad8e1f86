"""Backbone weights in a file of torchvision, timm, MoCo or efficientnet_pytorch."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch

from occfeat_targets.common.pickled import UnsafePickle
from occfeat_targets.common.plural import count
from occfeat_targets.common.state_dict import NoStateDict, StateDict, find_prefix, load_state_dict
from occfeat_train.networks.backbone_names import NAMINGS, Naming
from occfeat_train.networks.encoder import ImageEncoder

# The network whose weights are taken where a file holds several: MoCo's query encoder, MoCo-v3's base encoder.
_PREFERRED = ("encoder_q.", "base_encoder.")


def read_file(encoder: ImageEncoder, file: Path) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors by the names of the encoder's backbone, what was loaded from where and what was left out).

    Raises ValueError if the file cannot be read, is of none of the known projects, or is of another architecture or
    convention than the encoder.
    """
    content = _load(file)
    naming, prefix = _find(encoder.name, content, file)
    if encoder.name == "efficientnet-b0":
        _require_convention(encoder.efficientnet, naming, file)
    own = {name.removeprefix(prefix): value for name, value in content.tensors.items() if name.startswith(prefix)}
    wanted = encoder.backbone.state_dict()
    state, strange = {}, []
    for name, value in own.items():
        ours = naming.rename(name)
        if ours in wanted:
            state[ours] = value
        elif naming.inside.fullmatch(name):
            strange.append(name)
    if strange:
        raise ValueError(
            f"backbone weights {file} have {count(len(strange), 'tensor')} that a {encoder.name} has not, such as {strange[0]}: "
            "they are of another architecture"
        )
    beside = [name for name in own if naming.rename(name) is None]
    others = [f"{len(content.tensors) - len(own)} tensors without this prefix"] * (len(own) < len(content.tensors))
    left_out = [*(f"{part} ({n})" for part, n in _parts(beside).items()), *others, *content.beside]
    named = f"{naming.project}'s names" + (f" after {prefix!r}" if prefix else "")
    return state, f"{file} ({named}: {count(len(state), 'tensor')}; left out: {', '.join(left_out) or 'nothing'})"


def _load(file: Path) -> StateDict:
    try:
        return load_state_dict(file)
    except FileNotFoundError as err:
        raise ValueError(f"backbone weights {file}: there is no such file") from err
    except UnsafePickle as err:
        raise ValueError(refused(str(file), err)) from err
    except NoStateDict as err:
        raise ValueError(f"backbone weights {file} cannot be used: {err}") from err
    except (OSError, ValueError) as err:
        raise ValueError(f"backbone weights {file} cannot be read ({first_line(err)}): download them again") from err


def _find(backbone: str, content: StateDict, file: Path) -> tuple[Naming, str]:
    """The naming of a file's tensors, and what stands before the names."""
    names = list(content.tensors)
    for naming in NAMINGS[backbone]:
        try:
            prefix = find_prefix(names, naming.anchor, _PREFERRED)
        except ValueError as err:
            raise ValueError(f"backbone weights {file}: {err}") from err
        if prefix is not None:
            return naming, prefix
    known = "; ".join(f"{each.project} (such as {each.anchor})" for each in NAMINGS[backbone])
    raise ValueError(
        f"backbone weights {file} have none of the names of a {backbone} that are known: {known}. They have "
        f"{', '.join(names[:3])}, ...: if transformers saved them, pass their folder"
    )


def _require_convention(expected: str, naming: Naming, file: Path) -> None:
    """Raises ValueError unless an EfficientNet's padding and epsilon are known to be those of the network."""
    found = naming.convention or _convention_of_timm(file)
    if found is None:
        raise ValueError(
            f"backbone weights {file}: timm's tf_efficientnet_b0 and efficientnet_b0 have the same tensors, but other padding "
            "and another epsilon: let the file's name begin with that of the model, or put timm's config.json beside it"
        )
    if found != expected:
        raise ValueError(
            f"backbone weights {file} are of an EfficientNet with {found}'s padding and epsilon, the network has "
            f"{expected}'s: pass --set network.efficientnet={found}"
        )


def _convention_of_timm(file: Path) -> str | None:
    """From the name of the model in config.json beside the file, or else in the file's name."""
    try:
        model = str(json.loads((file.parent / "config.json").read_text())["architecture"])
    except (OSError, ValueError, KeyError, TypeError):
        model = file.name
    match = re.match(r"(tf_)?efficientnet_b0(?![a-z0-9])", model)
    return None if match is None else "tensorflow" if match[1] else "torch"


def _parts(names: list[str]) -> Counter[str]:
    """Number of tensors by the first part of their names; numbered parts such as features.8 are kept apart."""
    return Counter(re.match(r"[^.]+(\.\d+)?", name)[0] for name in names)  # type: ignore[index]


def refused(source: str, err: Exception) -> str:
    return (
        f"backbone weights {source} are refused ({first_line(err)}): not a checkpoint of plain tensors, and pickles "
        "with code are never executed; save only its state_dict, or download it again"
    )


def first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]
