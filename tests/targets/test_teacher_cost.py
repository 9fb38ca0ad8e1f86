"""Memory and time of the teacher: estimates, and batches that do not fit. Nothing here needs a GPU."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from occfeat_targets.cache.spec import TeacherSpec
from occfeat_targets.targets import teacher as teacher_module
from occfeat_targets.targets.teacher import LoadedTeacher, TeacherError, gpu_bytes, open_teacher, teacher_spec
from occfeat_targets.targets.teacher_dino import Dinov2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storage = out.untyped_storage() if isinstance(out, torch.Tensor) else None
        if storage is not None and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["small", "giant"])
def test_the_estimated_memory_bounds_that_of_a_forward_pass(monkeypatch, size, dtype):
    """Of one layer, which takes as much memory as many: the layers follow one another."""
    architecture = {**Dinov2.architectures[f"facebook/dinov2-{size}"], "num_hidden_layers": 1}
    monkeypatch.setitem(Dinov2.architectures, f"one-layer-{size}", architecture)
    teacher = LoadedTeacher(teacher_spec(f"random:one-layer-{size}", input_size=(112, 196), dtype=dtype), "cpu")
    images = np.zeros((4, 112, 196, 3), np.uint8)
    with LiveBytes() as live:
        teacher(images)
    estimated = gpu_bytes(teacher.spec, 4) - gpu_bytes(teacher.spec, 0)
    assert 0.4 * estimated < live.peak < estimated


@pytest.mark.parametrize(("name", "millions"), [("small", 22.06), ("base", 86.58), ("large", 304.4), ("giant", 1136.5)])
def test_the_estimated_memory_of_the_weights_is_a_little_too_high(name, millions):
    weights = gpu_bytes(teacher_spec(f"random:facebook/dinov2-{name}"), 0) - teacher_module._CONTEXT_BYTES
    assert 1 <= weights / (4e6 * millions) < 1.2


@pytest.mark.parametrize("size", ["small", "base", "large", "giant"])
def test_the_operations_of_a_teacher_are_those_that_torch_counts(monkeypatch, size):
    """Of two layers of each width; the giant's MLP is a SwiGLU. Norms and activations do not count."""
    architecture = {**Dinov2.architectures[f"facebook/dinov2-{size}"], "num_hidden_layers": 2}
    monkeypatch.setitem(Dinov2.architectures, f"two-layers-{size}", architecture)
    teacher = open_teacher(f"random:two-layers-{size}")
    teacher.model.set_attn_implementation("eager")  # whose products torch counts on a CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        teacher.dense_tokens(torch.zeros(1, 3, 56, 84))
    assert teacher.flops((4, 6)) == pytest.approx(counter.get_total_flops(), rel=0.01)


def tiny(tiny_teacher: str) -> tuple[TeacherSpec, np.ndarray]:
    spec = teacher_spec(tiny_teacher, input_size=(28, 42), dtype="float32")
    return spec, np.random.default_rng(0).integers(0, 256, (12, 28, 42, 3), dtype=np.uint8)


def limit_images(teacher: LoadedTeacher, most: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let the teacher run out of memory beyond `most` images. Returns the list of batch sizes it was called with."""
    dense_tokens, sizes = teacher.teacher.dense_tokens, []

    def limited(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return dense_tokens(images)

    patch.setattr(teacher.teacher, "dense_tokens", limited)
    return sizes


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_stays_so(tiny_teacher, monkeypatch, caplog):
    spec, images = tiny(tiny_teacher)
    teacher = LoadedTeacher(spec, "cpu")
    expected = teacher(images)
    sizes = limit_images(teacher, 4, monkeypatch)
    np.testing.assert_allclose(teacher(images), expected, atol=1e-5)
    assert sizes == [12, 6, 3, 3, 3, 3]
    np.testing.assert_allclose(teacher(images[:5]), expected[:5], atol=1e-5)
    assert sizes[6:] == [3, 2]
    assert "cpu is out of memory for 12 images: teacher batches are halved" in caplog.text


def test_a_teacher_that_does_not_fit_is_an_error_with_the_remedy(tiny_teacher, monkeypatch):
    spec, images = tiny(tiny_teacher)
    teacher = LoadedTeacher(spec, "cpu")
    limit_images(teacher, 0, monkeypatch)
    remedy = "use fewer --workers, end other programs on this device"
    with pytest.raises(TeacherError, match=f"cpu is out of memory with one image of teacher .*: {remedy}"):
        teacher(images)

    def refuse(self, device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Dinov2, "to", refuse)
    with pytest.raises(TeacherError, match=f"cpu is out of memory with its weights of teacher .*: {remedy}"):
        LoadedTeacher(spec, "cpu")


def test_other_errors_of_a_teacher_are_not_taken_for_missing_memory(tiny_teacher, monkeypatch):
    spec, images = tiny(tiny_teacher)
    teacher = LoadedTeacher(spec, "cpu")

    def fail(images):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(teacher.teacher, "dense_tokens", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        teacher(images)


def test_the_time_of_a_teacher_is_measured_in_batches(tiny_teacher):
    spec, _ = tiny(tiny_teacher)
    assert 0 < teacher_module.seconds_per_image(spec, "cpu", 2) < 60
