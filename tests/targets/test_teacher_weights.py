"""The weights of a teacher: what identifies them, and folders whose weights are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.targets import teacher as teacher_module
from occfeat_targets.targets.teacher import (
    LoadedTeacher,
    TeacherError,
    teacher_spec,
)
from tests.conftest import Marker
from tests.targets.test_teacher import images

SMALL = "random:facebook/dinov2-small"


def digest_of(folder) -> str:
    return teacher_spec(str(folder), input_size=(28, 42), dtype="float32").digest


def copy_of(teacher: str, to: Path, **config: object) -> Path:
    """A copy of a teacher's folder with changed settings in its config.json."""
    teacher_module._config.cache_clear()
    folder = Path(shutil.copytree(teacher, to))
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_teacher_is_identified_by_its_weights_and_not_by_their_location(tiny_teacher, tmp_path, monkeypatch):
    spec = teacher_spec(tiny_teacher, input_size=(28, 42), dtype="float32")
    monkeypatch.chdir(Path(tiny_teacher).parent)
    for name in (Path(tiny_teacher).name, f"{Path(tiny_teacher).name}/", f"{tiny_teacher}/"):
        again = teacher_spec(name, input_size=(28, 42), dtype="float32")
        assert (again.name, again.digest) == (tiny_teacher, spec.digest)
        assert TargetSpec(teacher=again).fingerprint == TargetSpec(teacher=spec).fingerprint
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    assert digest_of(copy) == spec.digest
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    assert digest_of(copy / "pytorch_model.bin") == spec.digest


def test_pickled_weights_are_read_only_if_their_file_is_named(tiny_teacher, tmp_path):
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    torch.save({"weight": Marker(tmp_path / "ran")}, copy / "pytorch_model.bin")
    assert digest_of(copy) == digest_of(Path(tiny_teacher))
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"^the model in .* has only pickled weights, .*or pass .*/copy/pytorch_model.bin itself"
    ):
        digest_of(copy)
    with pytest.raises(TeacherError, match="cannot be loaded"):
        digest_of(copy / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
    torch.save(state, copy / "pytorch_model.bin")
    assert digest_of(copy / "pytorch_model.bin") == digest_of(Path(tiny_teacher))


def test_one_flipped_bit_or_another_architecture_is_another_teacher(tiny_teacher, tmp_path):
    spec = teacher_spec(tiny_teacher, input_size=(28, 42), dtype="float32")
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert digest_of(copy) != spec.digest
    assert digest_of(copy_of(tiny_teacher, tmp_path / "heads", num_attention_heads=4)) != spec.digest
    with pytest.raises(TeacherError, match=f"have digest {digest_of(copy)}, the cache was started with {spec.digest}"):
        LoadedTeacher(dataclasses.replace(spec, name=str(copy)))


def test_random_teachers_of_different_architectures_have_different_digests():
    digests = {teacher_spec(f"random:facebook/{n}").digest for n in ("dinov2-small", "dinov2-with-registers-small")}
    assert len(digests) == 2


def hub_names(name: str) -> str:
    """A tensor's name in the checkpoints of facebookresearch/dinov2; only prefixes are converted."""
    return name.replace("encoder.layer.", "blocks.").replace("embeddings.", "").replace("layernorm.", "norm.")


UNFIT = {
    "torch hub's names": (
        lambda state: {hub_names(n): v for n, v in state.items()},
        "missing: .*unexpected: .*blocks.0",
    ),
    "a prefix": (lambda state: {f"module.{n}": v for n, v in state.items()}, "missing: .*unexpected: .*module."),
    "a layer less": (
        lambda state: {n: v for n, v in state.items() if "layer.1." not in n},
        r"\d+ missing: encoder.layer.1.attention.*: pass a folder",
    ),
    "a layer more": (
        lambda state: (
            state | {n.replace("layer.1.", "layer.2."): v.clone() for n, v in state.items() if "layer.1." in n}
        ),
        r"\d+ unexpected: encoder.layer.2.attention",
    ),
    "another shape": (
        lambda state: state | {"layernorm.bias": torch.zeros(48)},
        r"1 of another shape: layernorm.bias \(48,\) instead of \(32,\)",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_match_the_model_are_refused_by_name(tiny_teacher, tmp_path, name):
    change, reason = UNFIT[name]
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=reason):
        teacher_spec(str(copy))
    spec = teacher_spec(tiny_teacher, input_size=(28, 42))
    with pytest.raises(TeacherError, match=reason):  # in a worker, if the file changed after planning
        LoadedTeacher(dataclasses.replace(spec, name=str(copy)))


def test_an_additional_head_and_a_missing_mask_token_are_accepted(tiny_teacher, tmp_path):
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    del state["embeddings.mask_token"]
    state |= {"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert digest_of(copy) == digest_of(tiny_teacher)


def test_half_precision_weights_are_used_in_float32(tiny_teacher, tmp_path):
    copy = copy_of(tiny_teacher, tmp_path / "copy", dtype="float16")
    state = {name: value.half() for name, value in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    spec = teacher_spec(str(copy), input_size=(28, 42), dtype="float32")
    assert np.isfinite(LoadedTeacher(spec)(images(spec))).all()


@pytest.mark.parametrize("damage", ["git-lfs pointer", "cut", "empty", "a file instead of a folder"])
def test_an_invalid_weight_file_is_refused_with_the_remedy(tiny_teacher, tmp_path, damage):
    copy = copy_of(tiny_teacher, tmp_path / "copy")
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    contents = {"git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n", "cut": data[: len(data) // 2]}
    weights.write_bytes(contents.get(damage, b""))
    with pytest.raises(TeacherError, match=r"cannot be loaded .*a folder in transformers' layout"):
        teacher_spec(str(weights if damage.startswith("a file") else copy))


def test_a_folders_processor_determines_the_normalisation(tiny_teacher, tmp_path):
    copy = shutil.copytree(tiny_teacher, tmp_path / "copy")
    settings = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    assert teacher_spec(str(copy)).mean == (0.1, 0.2, 0.3)
    assert teacher_spec(tiny_teacher).mean == (0.485, 0.456, 0.406)


def test_an_unreachable_hub_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=r"hf download facebook/dinov2-base.*--teacher random:facebook/dinov2-small"):
        teacher_spec("facebook/dinov2-base")


def test_a_folder_without_weights_and_an_unknown_architecture_are_refused(tiny_teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(f"{tiny_teacher}/config.json", tmp_path / "empty")
    with pytest.raises(TeacherError, match="expected a folder in transformers' layout"):
        teacher_spec(str(tmp_path / "empty"))
    with pytest.raises(TeacherError, match="unknown architecture"):
        teacher_spec("random:facebook/dinov2-huge")
    with pytest.raises(TeacherError, match="float32, bfloat16 or auto"):
        teacher_spec(SMALL, dtype="float16")
