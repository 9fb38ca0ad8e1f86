"""Initial weights of ResNet-50 from MoCo-v2's file, and other pickled weights."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import occfeat_train.networks.encoder_weights as backbones
from occfeat_train.networks.backbone_names import resnet_name
from occfeat_train.networks.encoder_weights import load_backbone_weights
from tests.conftest import Marker
from tests.train.test_encoder import efficientnet, resnet
from tests.train.test_encoder_weights import resnet_folder

__all__ = ["efficientnet", "resnet", "resnet_folder"]  # fixtures


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
    assert said == (
        f"backbone: resnet-50 with weights from {file} (torchvision, timm and MoCo's names after 'module.encoder_q.': "
        "258 tensors; left out: fc.0 (1), layer4.0 (1), 4 tensors without this prefix, epoch, arch)"
    )
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
    with pytest.raises(ValueError, match="moco-v2: they are of a resnet-50, the network has efficientnet-b0"):
        load_backbone_weights(efficientnet, "moco-v2")


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
    with pytest.raises(ValueError, match="none of the names of a resnet-50 that are known: .*They have conv1.weight"):
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
        assert "resnet-50 with weights from" in load_backbone_weights(resnet, "moco-v2")
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
    assert "resnet-50 with weights from" in load_backbone_weights(resnet, "moco-v2")
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
