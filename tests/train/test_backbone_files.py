"""Backbone weights in files of torchvision, timm and efficientnet_pytorch: the same maps as their networks, or a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from occfeat_train.config import Config
from occfeat_train.networks.backbone_names import efficientnet_pytorch_name
from occfeat_train.networks.encoder import ImageEncoder
from occfeat_train.networks.encoder_weights import load_backbone_weights
from occfeat_train.simple_bev.weights import convert
from tests.train.make_backbone_golden import MODELS, images
from tests.train.reference_seeds import GOLDEN, seeded_state_dict
from tests.train.runs import GRID, finetune, pretrain, refuse, steps, succeed, write_caches

TORCHVISION, TIMM, TIMM_TF = "torchvision-efficientnet_b0", "timm-efficientnet_b0", "timm-tf_efficientnet_b0"


def tensors_of(model: str) -> dict[str, Tensor]:
    weights = seeded_state_dict(GOLDEN / "backbones" / f"{model}.npz")
    return {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}


def encoder_for(model: str, convention: str | None = None) -> ImageEncoder:
    backbone = {"efficientnet_b0": "efficientnet-b0", "resnet50": "resnet-50", "resnet101": "resnet-101"}
    name = model.split("-")[1].removeprefix("tf_")
    own = "torch" if model in (TORCHVISION, TIMM) else "tensorflow"
    return ImageEncoder(backbone[name], 4, efficientnet=convention or own).eval()


def distance_to_golden(encoder: ImageEncoder, model: str) -> float:
    """Largest error of both maps, relative to their largest values."""
    with np.load(GOLDEN / "backbones" / f"{model}.npz") as golden, torch.no_grad():
        pairs = zip(encoder.backbone(images()), (golden["skip"], golden["deep"]), strict=True)
        return max(float(np.abs(found[:, ::8].numpy() - own).max() / np.abs(own).max()) for found, own in pairs)


def write(file: Path, tensors: dict[str, Tensor]) -> str:
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return str(file)


# -- loaded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["-1a2b3c4d.pth", ".safetensors"])
@pytest.mark.parametrize("model", MODELS)
def test_the_maps_equal_those_of_the_files_network(tmp_path: Path, model: str, ending: str) -> None:
    encoder = encoder_for(model)
    said = load_backbone_weights(encoder, write(tmp_path / f"{model.split('-')[1]}{ending}", tensors_of(model)))
    assert distance_to_golden(encoder, model) < 1e-5
    used = len([name for name in encoder.backbone.state_dict() if "num_batches" not in name])
    assert f"{used + used_norms(encoder)} tensors; left out: " in said


def used_norms(encoder: ImageEncoder) -> int:
    return len([name for name in encoder.backbone.state_dict() if name.endswith("num_batches_tracked")])


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        (TORCHVISION, "features.6 (88), features.7 (22), features.8 (6), classifier.1 (2)"),
        (TIMM_TF, "blocks.5 (88), blocks.6 (22), conv_head (1), bn2 (5), classifier (2)"),
        ("torchvision-resnet50", "layer4.0 (24), layer4.1 (18), layer4.2 (18), fc (2)"),
    ],
)
def test_what_was_loaded_and_what_was_left_out_is_said(tmp_path: Path, model: str, left_out: str) -> None:
    tensors = tensors_of(model)
    file = write(tmp_path / f"{model.split('-')[1]}.pth", tensors)
    said = load_backbone_weights(encoder_for(model), file)
    rest = sum(int(n) for n in re.findall(r"\((\d+)\)", left_out))
    assert f"weights from {file} ({model.split('-')[0]}" in said
    assert said.endswith(f"'s names: {len(tensors) - rest} tensors; left out: {left_out})")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "encoder.backbone."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_prefixes_and_trainers_checkpoints_do_not_matter(tmp_path: Path, prefix: str, entry: str | None) -> None:
    state = {f"{prefix}{name}": value for name, value in tensors_of(TIMM_TF).items()} | {"queue": torch.zeros(2)}
    content = state if entry is None else {entry: state, "epoch": 7, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "tf_efficientnet_b0.pth")
    encoder = encoder_for(TIMM_TF)
    said = load_backbone_weights(encoder, str(tmp_path / "tf_efficientnet_b0.pth"))
    assert distance_to_golden(encoder, TIMM_TF) < 1e-5
    beside = "" if entry is None else ", epoch, optimizer"
    assert f"timm's names after '{prefix}'" in said
    assert said.endswith(f"classifier (2), 1 tensors without this prefix{beside})")


def test_a_folder_of_timm_says_itself_which_efficientnet_it_is(tmp_path: Path) -> None:
    """As `hf download timm/... --local-dir` makes it."""
    write(tmp_path / "model.safetensors", tensors_of(TIMM))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_b0", "num_classes": 1000}))
    encoder = encoder_for(TIMM)
    load_backbone_weights(encoder, str(tmp_path))
    assert distance_to_golden(encoder, TIMM) < 1e-5
    with pytest.raises(ValueError, match=r"of an EfficientNet with torch's .*--set network.efficientnet=torch"):
        load_backbone_weights(encoder_for(TIMM, "tensorflow"), str(tmp_path))


def test_a_hub_id_of_timm_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--tf_efficientnet_b0.in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    for each in (snapshot, folder / "refs"):
        each.mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_b0"}))
    write(snapshot / "model.safetensors", tensors_of(TIMM_TF))
    encoder = encoder_for(TIMM_TF)
    load_backbone_weights(encoder, "timm/tf_efficientnet_b0.in1k")
    assert distance_to_golden(encoder, TIMM_TF) < 1e-5
    with pytest.raises(ValueError, match="timm/absent cannot be loaded .*run 'hf download timm/absent'"):
        load_backbone_weights(encoder, "timm/absent")


def test_efficientnet_pytorch_has_the_names_of_the_reference_repository(tmp_path: Path) -> None:
    prefix = "encoder.backbone."
    weights = seeded_state_dict(GOLDEN / "segnet-effb0_64x112_40x8x40.npz")
    tensors = {n.removeprefix(prefix): torch.from_numpy(np.asarray(v)) for n, v in weights.items() if prefix in n}
    encoder = encoder_for(TIMM_TF)
    said = load_backbone_weights(encoder, write(tmp_path / "efficientnet-b0-355c32eb.pth", tensors))
    assert "(efficientnet_pytorch's names: " in said
    expected = convert({f"{prefix}{n}": v for n, v in tensors.items()}, GRID)
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, expected[f"network.encoder.backbone.{name}"]) or name.endswith("batches_tracked")
    assert efficientnet_pytorch_name("_blocks.11._bn1.bias") is efficientnet_pytorch_name("_fc.bias") is None


def test_a_run_keeps_the_convention_and_runs_from_it_inherit_it(tmp_path: Path) -> None:
    cache, file = write_caches(tmp_path / "cache"), write(tmp_path / "weights.pth", tensors_of(TORCHVISION))
    options = ["--backbone-weights", file, *steps(1)]
    assert "pass --set network.efficientnet=torch" in refuse(*pretrain(cache, tmp_path / "run", *options))
    said = succeed(*pretrain(cache, tmp_path / "run", *options, "--set", "network.efficientnet=torch"))
    assert f"weights from {file} (torchvision's names: " in said
    succeed(*finetune(cache, tmp_path / "tuned", "--from", tmp_path / "run", *steps(1)))
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())["config"]
    assert config["network"]["efficientnet"] == "torch"


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "convention"), [(TORCHVISION, "tensorflow"), (TIMM, "tensorflow"), (TIMM_TF, "torch")]
)
def test_the_other_convention_is_refused_because_it_is_another_function(
    tmp_path: Path, model: str, convention: str
) -> None:
    name = model.split("-")[1]
    other, own = encoder_for(model, convention), encoder_for(model)
    with pytest.raises(ValueError, match=f"pass --set network.efficientnet={own.efficientnet}"):
        load_backbone_weights(other, write(tmp_path / f"{name}.pth", tensors_of(model)))
    load_backbone_weights(own, str(tmp_path / f"{name}.pth"))
    other.load_state_dict(own.state_dict())
    assert distance_to_golden(other, model) > 0.1


@pytest.mark.parametrize("name", ["model.pth", "efficientnet_b0x.pth", "my-efficientnet_b0.pth"])
def test_a_file_of_timm_that_does_not_say_its_convention_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"have the same tensors, but other padding .*file's name begin with"):
        load_backbone_weights(encoder_for(TIMM_TF), write(tmp_path / name, tensors_of(TIMM_TF)))


def test_torchs_convention_is_only_for_an_efficientnet_of_ours() -> None:
    for override in ("network.backbone=resnet-50", "network.compat=simple-bev"):
        with pytest.raises(
            ValueError, match=r"network.efficientnet=torch with .* it is for efficientnet-b0 and compat=none"
        ):
            Config().override(["network.efficientnet=torch", override])


def test_other_architectures_are_refused_by_the_tensor_that_does_not_fit(tmp_path: Path) -> None:
    small, large = tensors_of("torchvision-resnet50"), tensors_of("timm-resnet101")
    squeezed = small | {"layer1.0.se.fc1.weight": torch.zeros(16, 256, 1, 1)}
    wider = tensors_of(TIMM_TF) | {"blocks.1.2.conv_pw.weight": torch.zeros(144, 24, 1, 1)}
    stem = {n.replace("conv1.", "conv1.0.") if n.startswith("conv1") else n: v for n, v in small.items()}
    cases = [
        ("torchvision-resnet50", large, r"306 tensors that a resnet-50 has not, such as layer3.6.conv1.weight"),
        ("timm-resnet101", small, r"lack \d+ of \d+ tensors: stages.2.layers.6"),
        ("torchvision-resnet50", squeezed, r"1 tensor that a resnet-50 has not, such as layer1.0.se.fc1.weight"),
        ("torchvision-resnet50", stem, r"1 tensor that a resnet-50 has not, such as conv1.0.weight"),
        (TIMM_TF, wider, r"1 tensor that a efficientnet-b0 has not, such as blocks.1.2.conv_pw.weight"),
        (TIMM_TF, small, r"none of the names of a efficientnet-b0 that are known: torchvision \(such as features.1.0"),
    ]
    for model, tensors, reason in cases:
        file = tmp_path / "tf_efficientnet_b0.pth"
        with pytest.raises(ValueError, match=reason):
            load_backbone_weights(encoder_for(model), write(file, tensors))


def test_several_networks_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of("torchvision-resnet50")
    twice = {f"{side}.{name}": value for side in ("student", "teacher") for name, value in tensors.items()}
    with pytest.raises(ValueError, match=r"holds several networks, named 'student.', 'teacher.': save the state_dict"):
        load_backbone_weights(encoder_for("torchvision-resnet50"), write(tmp_path / "dino.pth", twice))
    tensors["layer2.0.bn1.running_var"][3] = float("nan")
    with pytest.raises(
        ValueError, match=r"stages.1.layers.0.layer.0.normalization.running_var has values that are not"
    ):
        load_backbone_weights(encoder_for("torchvision-resnet50"), write(tmp_path / "nan.pth", tensors))


@pytest.mark.parametrize("ending", ["pth", "safetensors", "pt"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"resnet50.{ending}"
    with pytest.raises(ValueError, match=f"weights {file}: there is no such file"):
        load_backbone_weights(encoder_for("torchvision-resnet50"), str(file))
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 99):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights {file} cannot be read .*: download them again"):
            load_backbone_weights(encoder_for("torchvision-resnet50"), str(file))
    for content in ({}, {"state_dict": {}}, [1], {"epoch": 3}):
        torch.save(content, file.with_suffix(".pth"))
        with pytest.raises(
            ValueError, match="cannot be used: it holds no state_dict, alone or as one of .* save it alone from what"
        ):
            load_backbone_weights(encoder_for("torchvision-resnet50"), str(file.with_suffix(".pth")))
