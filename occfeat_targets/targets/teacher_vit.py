"""What the families of vision transformers in the library transformers share: weights, digest, and tokens."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from occfeat_targets.common.weights import find_weights, weights_file
from occfeat_targets.targets.teacher import Architectures, TeacherError, unavailable
from occfeat_targets.targets.teacher_dinov2_hub import read_hub_file

_RANDOM_SEED = 0
_UNUSED = "mask_token"  # the only tensor that does not affect the features
# Tensors beside the image model that a checkpoint may have.
_BESIDE = re.compile(
    rf"(embeddings\.)?{_UNUSED}|(pooler|classifier|neck|heads?|\w+_head|text_model)\..*|logit_(scale|bias)"
)
# Settings that change features but no tensor's name or shape.
_ARCHITECTURE = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "rope_theta")


class VisionTransformer:
    """A `Teacher` of transformers. A family overrides what differs.

    final_norm: the attribute of the model that is its final LayerNorm, None without one. default_mean, default_std: for
    models without an image processor's settings.
    """

    architectures: ClassVar[Architectures] = {}
    final_norm: ClassVar[str | None] = "layernorm"
    default_mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    default_std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    def __init__(self, name: str, config: Mapping[str, Any], layer: str) -> None:
        if layer == "pre-norm" and self.final_norm is None:
            raise TeacherError(
                f"teacher {name} has no final LayerNorm, so there are no features before it: pass --teacher-layer post-norm"
            )
        self.name, self.layer = name, layer
        self.config = self.image_config(config)
        if not isinstance(self.config.patch_size, int):
            raise TeacherError(
                f"teacher {name} has patches of {self.config.patch_size}: expected square ones, an integer"
            )
        self.patch, self.dim = self.config.patch_size, int(self.config.hidden_size)
        self.mean, self.std = self.statistics()

    def image_config(self, config: Mapping[str, Any]) -> Any:
        """transformers' configuration of the image model."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))

    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """(mean, std) of RGB in [0, 1], from the image processor's settings where there are some."""
        from transformers.image_processing_base import ImageProcessingMixin

        settings: dict[str, Any] = {}
        if not self.is_random and weights_file(self.name) is None:
            with contextlib.suppress(OSError):  # a folder with only weights
                settings = ImageProcessingMixin.get_image_processor_dict(find_weights(self.name)[0])[0]
        mean: Any = tuple(settings.get("image_mean", self.default_mean))
        std: Any = tuple(settings.get("image_std", self.default_std))
        return mean, std

    @property
    def num_prefix(self) -> int:
        """Number of tokens before those of patches: CLS and registers."""
        return 1 + int(getattr(self.config, "num_register_tokens", 0) or 0)

    def all_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, num_prefix + h * w, C)."""
        tokens: torch.Tensor = self.model(pixel_values=images).last_hidden_state
        return tokens

    @property
    def is_random(self) -> bool:
        return self.name.startswith("random:")

    @property
    def digest(self) -> str:
        return _random_digest(self.config) if self.is_random else self._loaded[1]

    @property
    def model(self) -> Any:
        """The frozen model, in evaluation mode."""
        return self._loaded[0]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, str]:
        """(model, digest of its weights)."""
        model = _random_model(self.config) if self.is_random else _load_model(self.name, self.config)
        digest = "" if self.is_random else _digest(model)
        if self.layer == "pre-norm":  # what would go into the final norm is then the output
            assert self.final_norm is not None
            setattr(model, self.final_norm, torch.nn.Identity())
        return model.eval().requires_grad_(False), digest

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def dense_tokens(self, images: torch.Tensor) -> torch.Tensor:
        h, w = images.shape[2] // self.patch, images.shape[3] // self.patch
        return self.all_tokens(images)[:, self.num_prefix :].unflatten(1, (h, w))

    def flops(self, map_size: tuple[int, int]) -> float:
        """The linear layers of attention (8 n c^2) and of the MLP (16 n c^2 at four times the width), and attention itself."""
        patches, c = float(map_size[0] * map_size[1]), self.dim
        n = patches + self.num_prefix
        mlp = 4 * getattr(self.config, "intermediate_size", 4 * c) / c
        return (
            int(self.config.num_hidden_layers) * ((8 + mlp) * n * c * c + 4 * n * n * c)
            + 6 * patches * c * self.patch**2
        )


def _random_model(config: Any) -> Any:
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return AutoModel.from_config(config, trust_remote_code=False)


def _load_model(name: str, config: Any) -> Any:
    """The model with its weights. Raises TeacherError if the file's tensors do not match the model exactly."""
    from safetensors import SafetensorError
    from transformers import MODEL_MAPPING, AutoModel, logging

    file, verbosity = weights_file(name), logging.get_verbosity()
    options: dict[str, Any] = {
        "config": config, "dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True
    }  # fmt: skip
    logging.set_verbosity_error()  # without transformers' report: the faults are reported below
    try:  # mismatched sizes are accepted here; a folder's or repository's own code is never run
        if file is not None:
            model_class: Any = MODEL_MAPPING[type(config)]
            model, info = model_class.from_pretrained(None, state_dict=read_hub_file(file).tensors, **options)
        else:
            source, is_pickled = find_weights(name)
            model, info = AutoModel.from_pretrained(
                source, trust_remote_code=False, use_safetensors=not is_pickled, weights_only=True, **options
            )
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as err:
        raise TeacherError(unavailable(name, err)) from err
    finally:
        logging.set_verbosity(verbosity)
    # transformers initialises missing tensors at random, differently in every process.
    shapes = [f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    faults = {
        "missing": [key for key in info["missing_keys"] if not key.endswith(_UNUSED)],
        "unexpected": [key for key in info["unexpected_keys"] if not _BESIDE.fullmatch(key)],
        "of another shape": shapes,
    }
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in faults.items() if keys)
        raise TeacherError(
            f"the weights of teacher {name} do not match the {config.model_type} of its config.json ({text}): "
            "pass a folder in transformers' layout (from 'hf download' or save_pretrained), with its own config.json"
        )
    return model


def _few(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _digest(model: Any) -> str:
    """Sixteen hex digits over everything that determines features: names, types, shapes and bytes of tensors, architecture.

    It is computed from the loaded tensors, so that file format, additional heads and location do not matter.
    """
    digest = hashlib.sha256(repr([getattr(model.config, key, None) for key in _ARCHITECTURE]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(_UNUSED):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _random_digest(config: Any) -> str:
    """The same for seeded random weights, from their recipe, because their last bits differ between processors."""
    recipe = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    return hashlib.sha256(f"seed {_RANDOM_SEED} {sorted(recipe.items())}".encode()).hexdigest()[:16]
