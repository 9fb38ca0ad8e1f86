"""Initial weights of the image encoders in transformers' layout: the hub and local folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from occfeat_train.networks.encoder import ImageEncoder
from occfeat_train.networks.encoder_weights import load_backbone_weights
from tests.train.test_encoder import efficientnet, resnet

__all__ = ["efficientnet", "resnet"]  # fixtures


@pytest.fixture(scope="module")
def efficientnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete EfficientNet-B0 with classifier, as on the hub."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    folder = tmp_path_factory.mktemp("weights") / "b0"
    torch.manual_seed(1)
    config = EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280)
    model = EfficientNetForImageClassification(config)
    randomise_norms(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-50 with a small last stage, which the encoder does not use."""
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("weights") / "r50"
    torch.manual_seed(1)
    model = ResNetModel(ResNetConfig(hidden_sizes=[256, 512, 1024, 64], depths=[3, 4, 6, 1]))
    randomise_norms(model)
    model.save_pretrained(folder)
    return folder


def randomise_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)


def test_a_folders_efficientnet_equals_the_complete_model(efficientnet_folder):
    from transformers import EfficientNetModel

    encoder = ImageEncoder("efficientnet-b0", 8).eval()
    said = load_backbone_weights(encoder, str(efficientnet_folder))
    assert said == f"backbone: efficientnet-b0 with weights from {efficientnet_folder}"
    whole = EfficientNetModel.from_pretrained(efficientnet_folder).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        states = whole(images, output_hidden_states=True).hidden_states
        skip, deep = encoder.backbone(images)
    torch.testing.assert_close(skip, states[1 + 4])
    torch.testing.assert_close(deep, states[1 + 10])


def test_a_folders_resnet_equals_the_complete_model(resnet_folder, resnet):
    from transformers import ResNetModel

    load_backbone_weights(resnet, str(resnet_folder))
    whole = ResNetModel.from_pretrained(resnet_folder).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        states = whole(images, output_hidden_states=True).hidden_states
        skip, deep = resnet.backbone(images)
    torch.testing.assert_close(skip, states[2])
    torch.testing.assert_close(deep, states[3])


def test_weights_none_changes_nothing(resnet):
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    assert load_backbone_weights(resnet, "none") == "backbone: from scratch, random weights"
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_code_in_a_folder_is_never_run_and_nothing_asks(efficientnet_folder, efficientnet, tmp_path, monkeypatch):
    """The model has a type that transformers does not know, and then one that it knows."""
    folder, marker = tmp_path / "own", tmp_path / "marker"
    shutil.copytree(efficientnet_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(ValueError, match="in folder .* cannot be read .*a model's own code is never run"):
        load_backbone_weights(efficientnet, str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    load_backbone_weights(efficientnet, str(folder))
    assert not asked and not marker.exists()


def test_another_kind_of_model_is_refused(resnet_folder, efficientnet):
    with pytest.raises(ValueError, match="are of a resnet: a efficientnet expected for efficientnet-b0"):
        load_backbone_weights(efficientnet, str(resnet_folder))


def test_another_width_or_layout_is_refused(tmp_path, efficientnet, resnet):
    from transformers import EfficientNetConfig, ResNetConfig

    EfficientNetConfig(width_coefficient=1.1).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="have width_coefficient 1.1: 1.0 expected for efficientnet-b0"):
        load_backbone_weights(efficientnet, str(tmp_path / "wide"))
    ResNetConfig(depths=[3, 4, 23, 3]).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"have depths \[3, 4, 23\]: \[3, 4, 6\] expected for resnet-50"):
        load_backbone_weights(resnet, str(tmp_path / "deep"))


def test_another_padding_is_refused(tmp_path):
    from transformers import EfficientNetConfig

    EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, depthwise_padding=[3, 15]).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match=r"have depthwise_padding \[3\]: \[\] expected .*network.efficientnet=tensorflow"
    ):
        load_backbone_weights(ImageEncoder("efficientnet-b0", 4), str(tmp_path))
    EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have depthwise_padding \[\]: \[0, .*expected .*network.efficientnet=torch"):
        load_backbone_weights(ImageEncoder("efficientnet-b0", 4, efficientnet="torch"), str(tmp_path))


@pytest.mark.parametrize("change", [None, (7, 7)], ids=["lacking", "of another shape"])
def test_a_folder_with_a_missing_or_misshapen_tensor_is_refused(resnet_folder, resnet, tmp_path, change):
    from safetensors.torch import save_file

    state = load_file(resnet_folder / "model.safetensors")
    name = "encoder.stages.2.layers.5.layer.0.convolution.weight"
    del state[name]
    if change is not None:
        state[name] = torch.zeros(change)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((resnet_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lack 1 of \d+ tensors: stages.2.layers.5.layer.0.convolution.weight"):
        load_backbone_weights(resnet, str(tmp_path))


def test_a_git_lfs_pointer_is_refused_with_the_remedy(resnet_folder, resnet, tmp_path):
    (tmp_path / "config.json").write_text((resnet_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="cannot be read .*no git-lfs pointers"):
        load_backbone_weights(resnet, str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path, resnet):
    with pytest.raises(ValueError, match="backbone weights in folder .* cannot be read"):
        load_backbone_weights(resnet, str(tmp_path))


@pytest.mark.parametrize("weights", ["/no/folder", "./folder"])
def test_a_missing_folder_is_refused_without_a_request_to_the_hub(efficientnet, weights):
    with pytest.raises(ValueError, match=f"backbone weights {weights}: there is no such folder"):
        load_backbone_weights(efficientnet, weights)


def test_a_hub_id_offline_is_an_error_with_the_remedy(monkeypatch, efficientnet):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing cannot be loaded .*run 'hf download nobody/nothing'.*'none'"):
        load_backbone_weights(efficientnet, "nobody/nothing")
