"""Initial weights of the image encoders: the hub, local folders, MoCo-v2's file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import occfeat_train.networks.encoder_weights as backbones
from occfeat_train.networks.encoder import ImageEncoder
from occfeat_train.networks.encoder_weights import load_backbone_weights, resnet_name
from tests.train.test_encoder import efficientnet, resnet

__all__ = ["efficientnet", "resnet"]  # fixtures


# -- weights in transformers' layout ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("change", [None, (7, 7)], ids=["lacking", "of another shape"])
def test_a_folder_with_a_missing_or_misshapen_tensor_is_refused(resnet_folder, resnet, tmp_path, change):
    from safetensors.torch import load_file, save_file

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


# -- MoCo-v2's file ---------------------------------------------------------------------------------------------------


def torchvision_resnet50() -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of torchvision's resnet50, without the classifier."""
    state: dict[str, torch.Tensor] = {}

    def add(conv: str, norm: str, inside: int, outside: int, kernel: int) -> None:
        state[f"{conv}.weight"] = torch.randn(outside, inside, kernel, kernel) * (1 / inside / kernel**2) ** 0.5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{norm}.{name}"] = value + 0.2 * torch.rand(outside)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("conv1", "bn1", 3, 64, 7)
    inside = 64
    for layer, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256)), 1):
        for index in range(depth):
            place = f"layer{layer}.{index}"
            if index == 0:
                add(f"{place}.downsample.0", f"{place}.downsample.1", inside, 4 * width, 1)
            add(f"{place}.conv1", f"{place}.bn1", inside, width, 1)
            add(f"{place}.conv2", f"{place}.bn2", width, width, 3)
            add(f"{place}.conv3", f"{place}.bn3", width, 4 * width, 1)
            inside = 4 * width
    return state


def run_torchvision_resnet50(state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer2, layer3) of images, from the published definition (v1.5: the 3x3 convolution has the stride)."""

    def conv(x: torch.Tensor, name: str, norm: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, gamma, beta = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, gamma, beta)

    x = functional.max_pool2d(conv(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    outputs = []
    for layer, depth in ((1, 3), (2, 4), (3, 6)):
        for index in range(depth):
            place = f"layer{layer}.{index}"
            stride = 2 if index == 0 and layer > 1 else 1
            inner = conv(x, f"{place}.conv1", f"{place}.bn1").relu()
            inner = conv(inner, f"{place}.conv2", f"{place}.bn2", stride).relu()
            inner = conv(inner, f"{place}.conv3", f"{place}.bn3")
            if index == 0:
                x = conv(x, f"{place}.downsample.0", f"{place}.downsample.1", stride)
            x = (inner + x).relu()
        outputs.append(x)
    return outputs[1], outputs[2]


def write_moco(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the query encoder's tensors and some of the other tensors of a MoCo-v2 checkpoint."""
    named = {f"module.encoder_q.{name}": value for name, value in state.items()}
    named |= {f"module.encoder_k.{name}": -value for name, value in list(state.items())[:3]}
    named |= {"module.encoder_q.fc.0.weight": torch.zeros(4, 4), "module.queue": torch.zeros(2, 2)}
    named["module.encoder_q.layer4.0.conv1.weight"] = torch.zeros(4, 4, 1, 1)
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": named}, file)


def test_names_of_torchvision_are_mapped_and_unused_ones_to_none():
    assert resnet_name("bn1.bias") == "embedder.embedder.normalization.bias"
    assert resnet_name("layer2.3.conv1.weight") == "stages.1.layers.3.layer.0.convolution.weight"
    assert resnet_name("layer3.0.downsample.1.running_var") == "stages.2.layers.0.shortcut.normalization.running_var"
    assert resnet_name("layer4.0.conv1.weight") is resnet_name("fc.0.weight") is resnet_name("fc.bias") is None


def test_mocos_file_loads_torchvisions_resnet(tmp_path, resnet):
    torch.manual_seed(0)
    state = torchvision_resnet50()
    file = tmp_path / "moco.pth.tar"
    write_moco(file, state)
    said = load_backbone_weights(resnet, str(file))
    assert said == f"backbone: resnet-50 with MoCo-v2 weights from {file}"
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = run_torchvision_resnet50(state, images)
        found = resnet.backbone(images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_moco_file_with_a_missing_or_misshapen_tensor_is_refused(tmp_path, resnet):
    state = torchvision_resnet50()
    lost = state.pop("layer3.5.bn3.running_var")
    write_moco(tmp_path / "short.pth", state)
    with pytest.raises(ValueError, match=r"lack 1 of \d+ tensors: stages.2.layers.5.layer.2.normalization.running_var"):
        load_backbone_weights(resnet, str(tmp_path / "short.pth"))
    write_moco(tmp_path / "narrow.pth", {**state, "layer3.5.bn3.running_var": lost[:7]})
    with pytest.raises(ValueError, match=r"running_var of shape \(7,\), \(1024,\) expected"):
        load_backbone_weights(resnet, str(tmp_path / "narrow.pth"))


def test_mocos_weights_are_refused_for_an_efficientnet(efficientnet):
    with pytest.raises(ValueError, match="MoCo-v2's are of a resnet-50, the network has efficientnet-b0"):
        load_backbone_weights(efficientnet, "moco-v2")


class Marker:
    """Runs code when it is unpickled. Here the code creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path, resnet, resnet_folder):
    file = tmp_path / "evil.pth"
    torch.save({"state_dict": Marker(tmp_path / "ran")}, file)
    with pytest.raises(ValueError, match="evil.pth are refused .*pickles with code are never executed"):
        load_backbone_weights(resnet, str(file))
    file.write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(ValueError, match="evil.pth cannot be read"):
        load_backbone_weights(resnet, str(file))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text((resnet_folder / "config.json").read_text())
    torch.save({"weight": Marker(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"folder has only pickled weights, .*or pass .*/folder/pytorch_model.bin itself"
    ):
        load_backbone_weights(resnet, str(folder))
    with pytest.raises(ValueError, match=r"folder.* (are refused|cannot be read)"):
        load_backbone_weights(resnet, str(folder / "pytorch_model.bin"))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_folder_are_read_if_their_file_is_named(tmp_path, resnet, resnet_folder):
    shutil.copy(resnet_folder / "config.json", tmp_path)
    torch.save(load_file(resnet_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    load_backbone_weights(resnet, str(resnet_folder))
    expected = {name: value.clone() for name, value in resnet.backbone.state_dict().items()}
    for value in resnet.backbone.parameters():
        value.data.zero_()
    load_backbone_weights(resnet, str(tmp_path / "pytorch_model.bin"))
    assert all(torch.equal(value, expected[name]) for name, value in resnet.backbone.state_dict().items())


@pytest.mark.parametrize("contents", [b"", b"neither a zip nor a pickle", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_refused(tmp_path, resnet, contents):
    (tmp_path / "damaged.pth").write_bytes(contents)
    with pytest.raises(ValueError, match="damaged.pth (are refused|cannot be read)"):
        load_backbone_weights(resnet, str(tmp_path / "damaged.pth"))


def test_a_missing_file_or_another_layout_is_refused(tmp_path, resnet):
    with pytest.raises(ValueError, match="no.pth: there is no such file"):
        load_backbone_weights(resnet, str(tmp_path / "no.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="hold no 'state_dict': MoCo-v2's checkpoint expected"):
        load_backbone_weights(resnet, str(tmp_path / "bare.pth"))


def test_the_official_file_is_downloaded_once_and_checked(tmp_path, monkeypatch, resnet):
    source = tmp_path / "source"
    write_moco(source, torchvision_resnet50())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def download(url: str, target: str) -> None:
        asked.append(url)
        Path(target).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="arrived with MD5 .*a04e12f8 expected: download it again"):
        load_backbone_weights(resnet, "moco-v2")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    monkeypatch.setattr(backbones, "MOCO_V2_MD5", hashlib.md5(source.read_bytes()).hexdigest()[:8])
    for _ in range(2):
        assert "MoCo-v2 weights from" in load_backbone_weights(resnet, "moco-v2")
    assert asked == [backbones.MOCO_V2_URL] * 2


def test_ranks_that_download_the_official_file_together_each_get_it_whole(tmp_path, monkeypatch, resnet):
    """Every rank starts to write before any of them has finished, and another rank finishes first."""
    source = tmp_path / "source"
    write_moco(source, torchvision_resnet50())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(backbones, "MOCO_V2_MD5", hashlib.md5(source.read_bytes()).hexdigest()[:8])
    targets: list[str] = []

    def download(url: str, target: str) -> None:
        targets.append(target)
        Path(target).write_bytes(b"half")
        if len(targets) == 1:
            load_backbone_weights(resnet, "moco-v2")  # the other rank
        Path(target).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert "MoCo-v2 weights from" in load_backbone_weights(resnet, "moco-v2")
    assert len(set(targets)) == 2
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    assert file.read_bytes() == source.read_bytes()


def test_the_official_file_offline_is_an_error_with_its_address_and_path(tmp_path, monkeypatch, resnet):
    def download(url: str, target: str) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    place = tmp_path / "checkpoints" / "moco_v2_800ep_pretrain.pth.tar"
    with pytest.raises(ValueError, match=f"not at {place} .*no route.*fetch https://.*put it there, or pass its path"):
        load_backbone_weights(resnet, "moco-v2")
