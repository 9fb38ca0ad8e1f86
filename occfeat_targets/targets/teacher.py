"""The teacher: a frozen image model whose features the network learns to predict (paper 3.3), through transformers.

This is the only module of the pipeline that imports torch and transformers. It loads DINOv2, DINOv2 with registers and
DINOv3 of any size, from a hub id or a local folder. ``random:<hub id>`` is the same architecture with seeded random weights.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.spec import TeacherSpec

_RANDOM_SEED = 0
_BUDGET = (224, 400)  # student resolution of the paper; the teacher input is the largest patch multiple within it

# (width, layers, heads) of the published models, so that random: needs no hub.
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
_DINOV3 = {"vits16": (384, 12, 6), "vitb16": (768, 12, 12), "vitl16": (1024, 24, 16)}

_UNUSED = "mask_token"  # the only tensor that does not affect the features
_HEADS = re.compile(rf"(embeddings\.)?{_UNUSED}|(pooler|classifier|neck|heads?|\w+_head)\..*")  # allowed
# Settings that change features but no tensor's name or shape.
_ARCHITECTURE = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "rope_theta")


class TeacherError(ValueError):
    """A teacher that is not available. The message says what to do."""


def teacher_spec(
    name: str, *, input_size: tuple[int, int] | None = None, layer: str = "post-norm", dtype: str = "auto"
) -> TeacherSpec:
    """The spec of a teacher. Loads the weights once to compute their digest.

    input_size: (height, width), multiples of the patch size; by default the largest within 224x400 (224x392 for patch 14).
    dtype: float32, bfloat16, or auto: bfloat16 where the hardware supports it natively.
    Raises TeacherError if the model cannot be loaded or its weights are incomplete, ValueError if the size is no multiple of
    the patch size.
    """
    if Path(name).is_dir():
        name = str(Path(name).absolute())  # so that workers and `verify` find it from anywhere
    config, processor = _config(name)
    patch = int(config.patch_size)
    if input_size is None:
        input_size = (_BUDGET[0] // patch * patch, _BUDGET[1] // patch * patch)
    if dtype == "auto":
        dtype = "bfloat16" if _has_fast_bfloat16() else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise TeacherError(f"teacher dtype {dtype!r}: float32, bfloat16 or auto expected")
    statistics = {k: tuple(processor[f"image_{k}"]) for k in ("mean", "std") if f"image_{k}" in processor}
    spec = TeacherSpec(name, "", input_size, patch, int(config.hidden_size), layer, dtype, **statistics)
    return replace(spec, digest=_random_digest(config) if spec.is_random else _digest(_model(name, config)))


class Teacher:
    """A loaded, frozen teacher. Call it with images of the spec's input size."""

    def __init__(self, spec: TeacherSpec, device: str = "auto") -> None:
        """Raises TeacherError if the weights cannot be loaded or their digest is not that of the spec."""
        config, _ = _config(spec.name)
        model = _model(spec.name, config)
        digest = _random_digest(config) if spec.is_random else _digest(model)
        if digest != spec.digest:
            raise TeacherError(
                f"the weights of teacher {spec.name} have digest {digest}, the cache was started with {spec.digest}: "
                "restore those weights, or build another cache"
            )
        self.spec = spec
        self.device = torch.device(resolve_device(device))
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)  # CLS and register tokens
        self._pre_norm: torch.Tensor | None = None
        if spec.layer == "pre-norm":
            # A hook, because the meaning of hidden_states[-1] differs between releases of transformers.
            norm = self._model.layernorm if hasattr(self._model, "layernorm") else self._model.norm
            norm.register_forward_pre_hook(lambda _, inputs: setattr(self, "_pre_norm", inputs[0]))
        self._mean = torch.tensor(spec.mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std, device=self.device).view(1, 3, 1, 1) * 255

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, H, W, 3) uint8 RGB -> (n, h, w, C) float32 patch tokens, row-major.

        Raises ValueError if the model returns a NaN or an infinity.
        """
        if images.shape[1:] != (*self.spec.input_size, 3):
            raise ValueError(f"teacher input {images.shape}: (n, {self.spec.input_size}, 3) expected")
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.dtype == "bfloat16"):
            tokens = self._model(pixel_values=(pixels - self._mean) / self._std).last_hidden_state
        if self._pre_norm is not None:
            tokens, self._pre_norm = self._pre_norm, None
        features = tokens[:, self._prefix :].float().cpu().numpy()
        if not np.isfinite(features).all():
            raise ValueError(f"teacher {self.spec.name} returned a NaN or an infinity: try --teacher-dtype float32")
        h, w = self.spec.map_size
        return features.reshape(len(images), h, w, self.spec.dim)


def load_teacher(spec: TeacherSpec, device: str = "auto", num_threads: int | None = None) -> Teacher:
    """The teacher, loaded once per process. num_threads: threads of torch, None to keep their number."""
    if num_threads is not None and torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
    return _load_once(spec, device)


@functools.lru_cache(maxsize=1)
def _load_once(spec: TeacherSpec, device: str) -> Teacher:
    return Teacher(spec, device)


def resolve_device(device: str) -> str:
    """``auto`` -> cuda where there is one, else cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def flops_per_image(spec: TeacherSpec) -> float:
    """Floating-point operations of one forward pass (a multiply-add is two), for the estimate of a build's time."""
    n, c = float(np.prod(spec.map_size)) + 1, spec.dim
    return (
        int(_config(spec.name)[0].num_hidden_layers) * (24 * n * c * c + 4 * n * n * c) + 6 * n * c * spec.patch_size**2
    )


def matmul_flops(device: str, dtype: str, size: int = 2048, rounds: int = 6) -> float:
    """Floating-point operations per second of a square matrix product on this machine, the best of several."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading an element synchronises with a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def quantize(features: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(..., C) float32 -> int8 of the same shape and one float16 scale per token (...,); value = int8 * scale."""
    scale = (np.abs(features).max(axis=-1) / 127).astype(np.float16)
    # float16 may round the scale down, and the scale of a zero token is 0.
    scale = np.maximum(np.nextafter(scale, np.float16(np.inf)), np.finfo(np.float16).smallest_subnormal)
    return np.rint(features / scale[..., None].astype(np.float32)).astype(np.int8), scale


def quantization_cosine(features: NDArray[np.float32], quantized: NDArray[np.int8]) -> tuple[float, float]:
    """(mean, minimum) over tokens of the cosine between float16 features and their int8 form."""
    a = features.astype(np.float16).astype(np.float32)
    b = quantized.astype(np.float32)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(-1) / np.maximum(norm, np.finfo(np.float32).tiny)
    return float(cosine.mean()), float(cosine.min())


def _has_fast_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.lru_cache(maxsize=8)
def _config(name: str) -> tuple[Any, dict[str, Any]]:
    """(config, image processor settings) of a teacher name."""
    if name.startswith("random:"):
        return _random_config(name.removeprefix("random:")), {}
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as err:
        raise TeacherError(_unavailable(name, err)) from err
    if not all(hasattr(config, a) for a in ("patch_size", "hidden_size", "num_hidden_layers")):
        raise TeacherError(f"teacher {name} is a {config.model_type}: a DINOv2 or DINOv3 ViT expected")
    try:
        processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        processor = {}  # a folder with only weights: ImageNet statistics, which all DINOv2 models use
    return config, processor


def _unavailable(name: str, err: Exception) -> str:
    first_line = (str(err).strip() or type(err).__name__).splitlines()[0]
    if Path(name).exists():
        return (
            f"teacher {name} cannot be loaded ({first_line}): expected a folder in transformers' layout, with a config.json "
            "and complete .safetensors or .bin weights (no git-lfs pointers), as 'hf download --local-dir' makes it"
        )
    return (
        f"teacher {name} cannot be loaded ({first_line}). It is neither a local folder nor in the Hugging Face cache, and "
        f"the hub was not reached or refused: run 'hf download {name}' where there is internet and pass the folder or set "
        f"HF_HOME, or, to try the pipeline without it, pass --teacher random:facebook/dinov2-small"
    )


def _random_config(name: str) -> Any:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig

    short = name.removeprefix("facebook/")
    if short.startswith("dinov3-") and (size := short.split("-")[1]) in _DINOV3:
        width, layers, heads = _DINOV3[size]
        return DINOv3ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, num_register_tokens=4, patch_size=16,
        )  # fmt: skip
    if short.startswith("dinov2-") and (size := short.split("-")[-1]) in _DINOV2:
        width, layers, heads = _DINOV2[size]
        kind = Dinov2WithRegistersConfig if "with-registers" in short else Dinov2Config
        return kind(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=518, patch_size=14, use_swiglu_ffn=size == "giant",
        )  # fmt: skip
    known = [f"facebook/dinov2-{s}" for s in _DINOV2] + [f"facebook/dinov2-with-registers-{s}" for s in _DINOV2]
    known += [f"facebook/dinov3-{s}-pretrain-lvd1689m" for s in _DINOV3]
    raise TeacherError(f"random:{name}: unknown architecture; one of {', '.join(known)} expected")


def _model(name: str, config: Any) -> Any:
    """The model with its weights. Raises TeacherError if the file's tensors do not match the model exactly."""
    from safetensors import SafetensorError
    from transformers import AutoModel

    if name.startswith("random:"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED)
            return AutoModel.from_config(config)
    try:  # mismatched sizes are accepted here and reported below
        model, info = AutoModel.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as err:
        raise TeacherError(_unavailable(name, err)) from err
    # transformers initialises missing tensors at random, differently in every process.
    shapes = [f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    faults = {
        "missing": [key for key in info["missing_keys"] if not key.endswith(_UNUSED)],
        "unexpected": [key for key in info["unexpected_keys"] if not _HEADS.fullmatch(key)],
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
