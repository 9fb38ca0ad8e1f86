"""A lifting is a file and a row. A toy lifting is pretrained, resumed and evaluated with the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import LIFTINGS, Config
from occfeat_train.networks.network import BEVNetwork, build_network
from occfeat_train.ops.views import Views
from tests.train.runs import GRID, assert_same_run, evaluate, finetune, pretrain, refuse, steps, succeed, write_caches

ROW = f"{__name__}:MeanOfTokens"


class MeanOfTokens(nn.Module):
    """The value of every cell is the mean of all tokens plus a learned value."""

    mirrors_grid = False

    def __init__(self, grid: VoxelGrid, channels: int) -> None:
        super().__init__()
        self.grid, self.feature_channels = grid, channels
        self.value = nn.Parameter(torch.zeros(channels, *grid.map_shape))

    def forward(self, features: Tensor, views: Views) -> Tensor:
        return features.mean((1, 3, 4))[..., None, None] + self.value


def test_a_toy_lifting_is_pretrained_resumed_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIFTINGS, "toy", ROW)
    cache = write_caches(tmp_path / "cache")
    options = ["--network", "toy", *steps(2), "--save-every", "1"]
    assert "toy efficientnet-b0" in succeed(*pretrain(cache, tmp_path / "whole", *options))
    stopped = Path(shutil.copytree(tmp_path / "whole", tmp_path / "stopped"))
    shutil.rmtree(max((stopped / "checkpoints").iterdir()))
    assert "continuing at step 1 of 2" in succeed(*pretrain(cache, stopped, *options))
    assert_same_run(stopped, tmp_path / "whole")
    succeed(*evaluate(stopped, cache))
    succeed(*finetune(cache, tmp_path / "tuned", "--from", stopped, *steps(1)))
    succeed(*evaluate(tmp_path / "tuned", cache))
    message = refuse(*pretrain(cache, tmp_path / "compat", *options, "--set", "network.compat=simple-bev"))
    assert "lifting='toy' with compat='simple-bev': one of simplebev, bevformer, lss expected" in message


def test_activation_checkpointing_is_an_attribute_of_the_lifting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIFTINGS, "toy", ROW)
    network: BEVNetwork = build_network(GRID, "efficientnet-b0", 8, "toy", recompute=False)
    assert isinstance(network.lifting, MeanOfTokens) and network.lifting.recompute is False


def test_a_lifting_without_a_row_is_refused_with_the_names_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lifting='toy': one of simplebev, bevformer, lss, cvt expected"):
        Config().override(["network.lifting=toy"])
    monkeypatch.setitem(LIFTINGS, "toy", ROW)
    assert Config().override(["network.lifting=toy"]).network.lifting == "toy"
