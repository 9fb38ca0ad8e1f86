"""The teacher: a frozen image model whose dense features the network learns to predict (paper 3.3).

`Teacher` is what every family of models has, and TEACHERS is their table. This module finds a teacher, makes its spec, and runs
it. A teacher is named by a hub id or a local folder, whose config.json says the family, by a file of DINOv2's torch hub, or by
``random:<hub id>`` for seeded random weights of a published architecture.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.spec import TeacherSpec
from occfeat_targets.common.hub import use_cache_without_hub
from occfeat_targets.common.weights import find_weights, weights_file
from occfeat_targets.targets.teacher_devices import find_devices
from occfeat_targets.targets.teacher_dinov2_hub import summarize

logger = logging.getLogger(__name__)

# {model_type of config.json: class}. Resolved when used, so that only the needed families are imported.
TEACHERS = {
    "dinov2": "occfeat_targets.targets.teacher_dino:Dinov2",
    "dinov2_with_registers": "occfeat_targets.targets.teacher_dino:Dinov2WithRegisters",
    "dinov3_vit": "occfeat_targets.targets.teacher_dino:Dinov3",
    "radio": "occfeat_targets.targets.teacher_radio:Radio",
    "siglip": "occfeat_targets.targets.teacher_siglip:Siglip",  # includes the SigLIP 2 models of a fixed image size
    "siglip_vision_model": "occfeat_targets.targets.teacher_siglip:Siglip",
    "siglip2": "occfeat_targets.targets.teacher_siglip:Siglip2NaFlex",
    "siglip2_vision_model": "occfeat_targets.targets.teacher_siglip:Siglip2NaFlex",
}

Architectures = Mapping[str, Mapping[str, Any]]  # {hub id: contents of its config.json}

_CONTEXT_BYTES = 0.7e9  # GPU memory of a process's CUDA context and libraries; at most 0.65e9 measured on an H200
_BYTES_PER_TOKEN_AND_CHANNEL = 80  # of all tensors that exist at a time; 54 to 69 with DINOv2, counted on a CPU
# transformers' lazy imports fail in threads, and the seed of random weights belongs to the process.
_LOADING = threading.Lock()
_BUDGET = (224, 400)  # student resolution of the paper; the teacher input is the largest patch multiple within it


class TeacherError(ValueError):
    """A teacher that is not available. The message says what to do."""


class Teacher(Protocol):
    """A frozen image model, on the CPU until `to` is called. Weights may be loaded as late as `digest` or `to`.

    architectures: of published models, for ``random:<hub id>``; may be empty.
    name: hub id, folder, or ``random:<hub id>``. patch: patch size [px]. dim: channels C of a token.
    mean, std: normalisation of RGB in [0, 1] that `dense_tokens` expects.
    """

    architectures: ClassVar[Architectures]
    name: str
    patch: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self, name: str, config: Mapping[str, Any], layer: str) -> None:
        """config: contents of config.json. layer: as in TeacherSpec. Raises TeacherError if the family does not support it."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits over everything that determines the features. Raises TeacherError if weights are missing."""
        ...

    def flops(self, map_size: tuple[int, int]) -> float:
        """Floating-point operations of one image of (h, w) tokens; a multiply-add is two."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""

    def dense_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) float32 normalised images, multiples of the patch size -> (n, h, w, C) patch tokens, row-major.

        It runs under torch.autocast, and keeps no state, so that threads may share a teacher.
        """
        ...


def open_teacher(name: str, layer: str = "post-norm") -> Teacher:
    """The teacher of this name, without its weights. Raises TeacherError if its configuration or family is not available."""
    config = _config(name)
    family = config.get("model_type")
    if family not in TEACHERS:
        seen = "has no model_type in a config.json" if family is None else f"is a model of type {family!r}"
        raise TeacherError(f"teacher {name} {seen}: one of {', '.join(TEACHERS)} expected in its config.json")
    teacher: Teacher = resolve_name(TEACHERS[family])(name, config, layer)
    return teacher


@functools.lru_cache(maxsize=8)
def _config(name: str) -> Mapping[str, Any]:
    """Contents of config.json."""
    if name.startswith("random:"):
        published = {k: v for row in TEACHERS.values() for k, v in resolve_name(row).architectures.items()}
        if name.removeprefix("random:") not in published:
            raise TeacherError(f"{name}: unknown architecture; one of {', '.join(published)} expected")
        found: Mapping[str, Any] = published[name.removeprefix("random:")]
        return found
    from transformers import PreTrainedConfig

    if weights_file(name) is not None:
        try:
            return summarize(name)[0]
        except (OSError, ValueError) as err:
            raise TeacherError(unavailable(name, err)) from err
    if not Path(name).exists():
        use_cache_without_hub()
    source, _ = find_weights(name)
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as err:
        raise TeacherError(unavailable(name, err)) from err
    return config


def unavailable(name: str, err: Exception) -> str:
    """Message of the TeacherError for a hub id or folder that does not load."""
    first_line = (str(err).strip() or type(err).__name__).splitlines()[0]
    if Path(name).is_file() or weights_file(name):
        return (
            f"teacher {name} cannot be loaded ({first_line}): expected DINOv2's file of torch.hub, such as "
            "dinov2_vits14_pretrain.pth, or a folder in transformers' layout"
        )
    if Path(name).exists():
        return (
            f"teacher {name} cannot be loaded ({first_line}): expected a folder in transformers' layout, with a config.json "
            "and complete .safetensors weights (no git-lfs pointers), as 'hf download --local-dir' makes it"
        )
    return (
        f"teacher {name} cannot be loaded ({first_line}). It is neither a local folder nor in the Hugging Face cache, and "
        f"the hub was not reached or refused: run 'hf download {name}' where there is internet and pass the folder or set "
        f"HF_HOME, or, to try the pipeline without it, pass --teacher random:facebook/dinov2-small"
    )


def teacher_spec(
    name: str, *, input_size: tuple[int, int] | None = None, layer: str = "post-norm", dtype: str = "auto"
) -> TeacherSpec:
    """The spec of a teacher. Loads the weights once to compute their digest.

    input_size: (height, width), multiples of the patch size; by default the largest within 224x400 (224x392 for patch 14).
    dtype: float32, bfloat16, or auto: bfloat16 where the hardware supports it natively.
    Raises TeacherError if the model cannot be loaded or its weights are incomplete, ValueError if the size is no multiple of
    the patch size.
    """
    if Path(name).exists():
        name = str(Path(name).absolute())  # so that workers and `verify` find it from anywhere
    teacher = open_teacher(name, layer)
    if input_size is None:
        input_size = (_BUDGET[0] // teacher.patch * teacher.patch, _BUDGET[1] // teacher.patch * teacher.patch)
    if dtype == "auto":
        dtype = native_dtype()
    if dtype not in ("float32", "bfloat16"):
        raise TeacherError(f"teacher dtype {dtype!r}: float32, bfloat16 or auto expected")
    spec = TeacherSpec(name, "", input_size, teacher.patch, teacher.dim, layer, dtype, teacher.mean, teacher.std)
    return replace(spec, digest=teacher.digest)


class LoadedTeacher:
    """A teacher with its weights on a device. Call it with images of the spec's input size."""

    def __init__(self, spec: TeacherSpec, device: str = "auto") -> None:
        """device: as in `find_devices`, which gives the first one.

        Raises TeacherError if the weights cannot be loaded, if their digest is not that of the spec, or if the device's memory
        is too small for them, and ValueError if there is no such device.
        """
        self.teacher = open_teacher(spec.name, spec.layer)
        if self.teacher.digest != spec.digest:
            raise TeacherError(
                f"the weights of teacher {spec.name} have digest {self.teacher.digest}, the cache was started with "
                f"{spec.digest}: restore those weights, or build another cache"
            )
        self.spec = spec
        self.device = torch.device(find_devices(device)[0])
        try:
            self.teacher.to(self.device)
        except RuntimeError as err:
            if not _is_out_of_memory(err):
                raise
            raise TeacherError(_too_large(spec, self.device, "its weights")) from err
        self._mean = torch.tensor(spec.mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std, device=self.device).view(1, 3, 1, 1) * 255
        self._most_images: int | None = None  # that the device's memory holds at a time, None if not known

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, H, W, 3) uint8 RGB -> (n, h, w, C) float32 patch tokens, row-major.

        If a GPU runs out of memory, this batch and all later ones are computed in parts.
        Raises ValueError if the model returns a NaN or an infinity, and TeacherError if the memory is too small for one image.
        """
        if images.shape[1:] != (*self.spec.input_size, 3):
            raise ValueError(f"teacher input {images.shape}: (n, {self.spec.input_size}, 3) expected")
        while True:
            size = min(len(images), self._most_images or len(images))
            try:
                parts = [self._tokens(images[i : i + size]) for i in range(0, len(images), size)]
                break
            except RuntimeError as err:
                if not _is_out_of_memory(err):
                    raise
                if size == 1:
                    raise TeacherError(_too_large(self.spec, self.device, "one image")) from err
            # Only here are the tensors of the failed call freed: the exception refers to them.
            torch.cuda.empty_cache()
            self._most_images = size // 2
            logger.warning("%s is out of memory for %d images: teacher batches are halved", self.device, size)
        features = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not np.isfinite(features).all():
            raise ValueError(f"teacher {self.spec.name} returned a NaN or an infinity: try --teacher-dtype float32")
        return features

    @torch.inference_mode()
    def _tokens(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.dtype == "bfloat16"):
            tokens = self.teacher.dense_tokens((pixels - self._mean) / self._std)
        expected = (len(images), *self.spec.map_size, self.spec.dim)
        assert tokens.shape == expected, f"{type(self.teacher)}: tokens {tuple(tokens.shape)}, not {expected}"
        features: NDArray[np.float32] = tokens.float().cpu().numpy()
        return features


def _is_out_of_memory(err: RuntimeError) -> bool:
    """Of the host, of the GPU's allocator, of a new CUDA context, or of cuBLAS."""
    return any(text in str(err) for text in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


def _too_large(spec: TeacherSpec, device: torch.device, what: str) -> str:
    return (
        f"{device} is out of memory with {what} of teacher {spec.name}: use fewer --workers, end other programs on this "
        "device, or choose a smaller --teacher or another --device"
    )


def load_teacher(spec: TeacherSpec, device: str = "auto", num_threads: int | None = None) -> LoadedTeacher:
    """The teacher, loaded once per process, whose threads share it. num_threads: threads of torch, None to keep their number."""
    with _LOADING:
        if num_threads is not None and torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        return _load_once(spec, device)


@functools.lru_cache(maxsize=1)
def _load_once(spec: TeacherSpec, device: str) -> LoadedTeacher:
    return LoadedTeacher(spec, device)


def flops_per_image(spec: TeacherSpec) -> float:
    """Floating-point operations of one forward pass, for the estimates of a build's time and memory."""
    return open_teacher(spec.name, spec.layer).flops(spec.map_size)


def gpu_bytes(spec: TeacherSpec, images: int) -> float:
    """Estimated GPU memory of a process that runs the teacher in batches of so many images [bytes]. Rather too high."""
    tokens = spec.map_size[0] * spec.map_size[1]
    # Each weight is used in one multiply-add per token; attention adds a little.
    weights = flops_per_image(spec) / (2 * tokens)
    return _CONTEXT_BYTES + 4 * weights + images * tokens * spec.dim * _BYTES_PER_TOKEN_AND_CHANNEL


def seconds_per_image(spec: TeacherSpec, device: str, images: int, rounds: int = 3) -> float:
    """Measured time of the teacher [s] per image, in batches of so many images; the best of several batches."""
    teacher = LoadedTeacher(spec, device)
    batch = np.zeros((images, *spec.input_size, 3), np.uint8)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        teacher(batch)
        best = min(best, time.perf_counter() - start)
    teacher.teacher.to(torch.device("cpu"))  # gives the memory of a GPU to the worker processes
    torch.cuda.empty_cache()
    return best / images


def native_dtype(device: str = "auto") -> str:
    """bfloat16 if the device (as in `find_devices`) supports it natively, else float32."""
    if find_devices(device)[0].startswith("cuda"):
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if is_native else "float32"
