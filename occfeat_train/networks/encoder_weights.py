"""Initial weights of the image backbones, trained on ImageNet: from the hub, a folder, or a file."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from occfeat_targets.cache.records import unique_suffix
from occfeat_targets.common.hub import use_cache_without_hub
from occfeat_targets.common.weights import find_weights, weights_file
from occfeat_train.networks.backbone_files import first_line, read_file, refused
from occfeat_train.networks.encoder import BLOCKS, CONVENTIONS, EFFICIENTNET, RESNET, RESNET_DEPTHS, ImageEncoder

DEFAULT_WEIGHTS = {
    "efficientnet-b0": "google/efficientnet-b0",
    "resnet-50": "moco-v2",
    "resnet-101": "microsoft/resnet-101",
}
MOCO_V2_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"
MOCO_V2_MD5 = "a04e12f8"  # the first digits, as published by MoCo's authors


def load_backbone_weights(encoder: ImageEncoder, weights: str) -> str:
    """Load all parameters and running statistics of the encoder's backbone. Returns a sentence that names the source.

    weights: ``none`` keeps them random; a hub id, a local folder that transformers can read, or a pytorch_model.bin in one; a
    hub id or folder of timm; ``moco-v2`` for the official file of 800 epochs; or a file with tensors of torchvision, timm, MoCo or
    efficientnet_pytorch. The sentence then says what of it was loaded and left out.
    Raises ValueError if the weights are not available, incomplete, or of another architecture or convention.
    """
    if weights == "none":
        return "backbone: from scratch, random weights"
    if weights == "moco-v2" and encoder.name != "resnet-50":
        raise ValueError(f"backbone weights moco-v2: they are of a resnet-50, the network has {encoder.name}")
    if weights == "moco-v2":
        file: Path | None = _moco_v2_file()
    elif weights.startswith("timm/") and not Path(weights).exists():
        file = Path(_local_first(weights, _timm_file))
    else:
        file = weights_file(weights)
    if file is not None:
        state, origin = read_file(encoder, file)
    else:
        state, origin = _read_pretrained(encoder, weights)
    _fill(encoder.backbone, state, weights)
    return f"backbone: {encoder.name} with weights from {origin}"


def _fill(backbone: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy the tensors of the truncated backbone. num_batches_tracked may be missing, because it is never used."""
    wanted = {name: value for name, value in backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(
            f"backbone weights {source} lack {len(missing)} of {len(wanted)} tensors: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}: they are of another architecture, or in another layout"
        )
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"backbone weights {source}: {name} of shape {tuple(state[name].shape)}, {tuple(value.shape)} expected"
            )
        if not state[name].isfinite().all():
            raise ValueError(f"backbone weights {source}: {name} has values that are not finite: they are damaged")
    backbone.load_state_dict({name: state[name] for name in wanted}, strict=False)


def _read_pretrained(encoder: ImageEncoder, weights: str) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors by the truncated backbone's names, source) of a hub id or folder."""
    from transformers import AutoConfig, EfficientNetModel, ResNetModel

    backbone = encoder.name
    kind, expected = "efficientnet", {**EFFICIENTNET, **CONVENTIONS[encoder.efficientnet]}
    if backbone in RESNET_DEPTHS:
        kind, expected = "resnet", {**RESNET, "depths": RESNET_DEPTHS[backbone]}
    # Without trust_remote_code=False, transformers asks on the terminal whether to run a folder's or repository's code.
    source, is_pickled = find_weights(weights)
    config = _local_first(source, functools.partial(AutoConfig.from_pretrained, trust_remote_code=False))
    if config.model_type != kind:
        raise ValueError(f"backbone weights {weights} are of a {config.model_type}: a {kind} expected for {backbone}")
    for key, value in expected.items():
        found = getattr(config, key)
        if key == "depthwise_padding":
            found = [block for block in found if block < BLOCKS]
        elif isinstance(value, list):
            found = list(found)[: len(value)]
        if found != value:
            convention = f" with network.efficientnet={encoder.efficientnet}" if key in CONVENTIONS["torch"] else ""
            raise ValueError(
                f"backbone weights {weights} have {key} {found}: {value} expected for {backbone}{convention}"
            )
    model_class: Any = EfficientNetModel if kind == "efficientnet" else ResNetModel
    model, info = _local_first(
        source,
        functools.partial(
            model_class.from_pretrained,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            use_safetensors=not is_pickled,
            weights_only=True,
        ),
    )
    # transformers initialises tensors that are missing or have another shape at random.
    absent = set(info["missing_keys"]) | {name for name, _, _ in info["mismatched_keys"]}
    state = {n.removeprefix("encoder."): v for n, v in model.state_dict().items() if n not in absent}
    revision = getattr(config, "_commit_hash", None)
    return state, weights if revision is None else f"{weights} (revision {revision[:12]})"


def _local_first(weights: str, load: Callable[..., Any]) -> Any:
    """`load` from a folder or the hub's cache; if that fails, over the network."""
    if weights.startswith((".", "/", "~")) and not Path(weights).is_dir():
        raise ValueError(f"backbone weights {weights}: there is no such folder")
    try:
        return load(weights, local_files_only=True)
    except pickle.UnpicklingError as err:
        raise ValueError(refused(weights, err)) from err
    except (OSError, ValueError, SafetensorError) as err:
        if Path(weights).is_dir():
            raise ValueError(
                f"backbone weights in folder {weights} cannot be read ({first_line(err)}): expected a config.json of "
                "a model of transformers (a model's own code is never run) and whole weights (no git-lfs pointers), as 'hf download --local-dir' makes it"
            ) from err
    use_cache_without_hub()
    try:
        return load(weights)
    except pickle.UnpicklingError as err:
        raise ValueError(refused(weights, err)) from err
    except (OSError, ValueError, SafetensorError) as err:
        raise ValueError(
            f"backbone weights {weights} cannot be loaded ({first_line(err)}). They are neither a local folder nor in "
            f"the Hugging Face cache, and the hub was not reached or refused: run 'hf download {weights}' where there "
            "is internet and pass the folder or set HF_HOME, or pass 'none' to start from random weights"
        ) from err


def _timm_file(hub_id: str, local_files_only: bool = False) -> str:
    """The weights of a model of timm on the hub, with its config.json beside them."""
    from huggingface_hub import hf_hub_download

    return [
        hf_hub_download(hub_id, name, local_files_only=local_files_only)
        for name in ("config.json", "model.safetensors")
    ][-1]


def _moco_v2_file() -> Path:
    """The official checkpoint in torch.hub's folder; downloaded if it is missing.

    Each process downloads to a file of its own, so that ranks that start together do not share one.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / MOCO_V2_URL.rsplit("/", 1)[1]
    if file.exists():
        return file
    part = file.with_name(f"{file.name}.{unique_suffix()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(MOCO_V2_URL, str(part))
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "md5").hexdigest()
        if not digest.startswith(MOCO_V2_MD5):
            raise ValueError(f"{MOCO_V2_URL} arrived with MD5 {digest[:8]}, {MOCO_V2_MD5} expected: download it again")
        part.replace(file)
    except OSError as err:
        raise ValueError(
            f"MoCo-v2's weights are not at {file} and cannot be downloaded ({first_line(err)}): fetch {MOCO_V2_URL} "
            "where there is internet and put it there, or pass its path, or pass 'none' to start from random weights"
        ) from err
    finally:
        part.unlink(missing_ok=True)
    return file
