"""DINOv2's file of torch.hub as a teacher: the tokens of its own code, the digest of transformers' folder, or a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from occfeat_targets.targets.teacher import LoadedTeacher, TeacherError, teacher_spec
from occfeat_targets.targets.teacher_dinov2_hub import describe_file
from tests.conftest import Marker
from tests.targets.command_line import build_arguments, run
from tests.targets.make_dinov2_golden import FILE, MODELS, SIZES, image
from tests.train.reference_seeds import seeded_array


def tensors_of(model: str) -> dict[str, Tensor]:
    with np.load(FILE) as golden:
        names, shapes, kinds = (golden[f"{model}/{key}"].tolist() for key in ("names", "shapes", "kinds"))
    each = zip(names, shapes, kinds, strict=True)
    return {n: torch.from_numpy(np.asarray(seeded_array(n, tuple(json.loads(s)), k))) for n, s, k in each}


def write(file: Path, content: Any) -> str:
    torch.save(content, file)
    return str(file)


def load(name: str, size: tuple[int, int] = (70, 70)) -> LoadedTeacher:
    return LoadedTeacher(teacher_spec(name, input_size=size, dtype="float32"), "cpu")


@pytest.mark.parametrize("array", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_equal_those_of_the_hubs_code(tmp_path: Path, model: str, array: str) -> None:
    teacher = load(write(tmp_path / "dinov2_vits14_pretrain.pth", tensors_of(model)), SIZES[array])
    with np.load(FILE) as golden:
        np.testing.assert_allclose(teacher(image(SIZES[array])), golden[f"{model}/{array}"], atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_weights_in_transformers_layout_are_the_same_teacher(tmp_path: Path, model: str) -> None:
    teacher = load(write(tmp_path / "hub.pth", tensors_of(model)))
    teacher.teacher.model.save_pretrained(tmp_path / "folder")
    again = teacher_spec(str(tmp_path / "folder"), input_size=(70, 70), dtype="float32")
    assert (again.digest, again.mean, again.std) == (teacher.spec.digest, teacher.spec.mean, teacher.spec.std)


def test_what_was_read_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    tensors = tensors_of("registers")
    plain = describe_file(write(tmp_path / "plain.pth", tensors))
    assert plain == "a dinov2_with_registers of 2 layers of 128 channels, 36 tensors; left out: mask_token"
    assert describe_file(str(tmp_path)) is None


def test_a_checkpoint_of_dinov2s_training_holds_the_same_teacher(tmp_path: Path) -> None:
    """Its layers are in parts, and it has a head."""
    tensors = tensors_of("mlp")
    parts = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", n): v for n, v in tensors.items()}
    own = {f"module.backbone.{n}": v for n, v in parts.items()} | {"module.dino_head.last.weight": torch.zeros(2)}
    file = write(tmp_path / "teacher_checkpoint.pth", {"teacher": own, "iteration": 3})
    said = describe_file(file)
    assert said is not None
    assert said.endswith("left out: mask_token, 1 tensor without the prefix 'module.backbone.', iteration")
    assert load(file).spec.digest == load(write(tmp_path / "plain.pth", tensors)).spec.digest


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    tensors = tensors_of("mlp")
    head = {"weight": torch.zeros(1000, 768), "bias": torch.zeros(1000)}
    cases = {
        "a linear head": (head, r"it has no tensor patch_embed.proj.weight, but weight, bias"),
        "DINOv3": (
            tensors | {"rope_embed.periods": torch.zeros(16)},
            "rope_embed.periods is no tensor of DINOv2: DINO, ",
        ),
        "DINO": (
            {n: v for n, v in tensors.items() if ".ls" not in n},
            "4 missing: encoder.layer.0.layer_scale1.lambda1",
        ),
        "cut": (
            tensors | {"norm.bias": torch.zeros(7)},
            r"1 of another shape: layernorm.bias \(7,\) instead of \(128,\)",
        ),
        "another width": ({"patch_embed.proj.weight": torch.zeros(100, 3, 14, 14)}, "shapes .'pos_embed'"),
        "code": ({"x": Marker(tmp_path / "ran")}, "code in a checkpoint is never run; save only its state_dict"),
        "nothing": ([], "it holds no state_dict"),
    }
    for name, (content, reason) in cases.items():
        with pytest.raises(TeacherError, match=reason):
            load(write(tmp_path / f"{name}.pth", content))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("lfs.pth", "absent.pth"):
        with pytest.raises(
            TeacherError, match=rf"{name} cannot be loaded .*expected DINOv2's file of torch.hub, such as "
        ):
            teacher_spec(str(tmp_path / name))


def test_a_cache_is_built_and_verified_with_the_file(city: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "dinov2_vits14_pretrain.pth", tensors_of("mlp"))
    said = run(*build_arguments(city, tmp_path / "cache", file, "--workers", "0")).stdout
    assert f"{file} is a dinov2 of 2 layers of 128 channels, 35 tensors; left out: mask_token" in said
    run("verify", "--dataroot", city, "--cache", tmp_path / "cache", "--split", "mini_train", "--samples", "1")
