"""A pretext task is one class and one row, a segmentation task one row. Toy tasks run with the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from occfeat_targets.cache.labels import LABEL_KINDS, LabelKind
from occfeat_train.config import PRETEXTS, Config
from occfeat_train.tasks.base import Task
from occfeat_train.training.checkpoint import find_checkpoint
from tests.train.runs import (
    assert_same_run,
    evaluate,
    finetune,
    pretrain,
    refuse,
    steps,
    succeed,
    weights,
    write_caches,
)


class Height(Task):
    """A toy pretext task that predicts the number of occupied cells in each column of the grid."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.head = nn.Conv2d(self.config.network.channels, 1, 1)

    @staticmethod
    def arrays(config, spec):
        return ["occupancy"]

    def forward(self, batch):
        cells = batch.volume("occupancy").float().sum(1, keepdim=True)
        return {"loss": nn.functional.mse_loss(self.head(self.bev(batch)), cells)}


class Sounds(Height):
    @staticmethod
    def arrays(config, spec):
        return ["sounds"]


RING = LabelKind(
    name="ring",
    classes=("near", "far_away"),
    colors={"near": (90, 120, 0), "far_away": (240, 240, 240)},
    draw="",
    reference="",
    description="cells near the ego vehicle and far from it",
    invalid="behind the ego vehicle",
)


@pytest.mark.parametrize("name", [*PRETEXTS, *LABEL_KINDS])
def test_every_row_names_a_task(name):
    config = Config(name)
    assert issubclass(config.task_class, Task)
    assert config.is_pretext == (name in PRETEXTS)


def test_a_pretext_task_is_one_class_and_one_row(tmp_path, monkeypatch):
    monkeypatch.setitem(PRETEXTS, "height", f"{__name__}:Height")
    cache, run, stopped = write_caches(tmp_path / "cache"), tmp_path / "run", tmp_path / "stopped"
    command = ["--method", "height", *steps(2), "--save-every", "1", "--validate", "val"]
    assert "height: simplebev efficientnet-b0" in succeed(*pretrain(cache, run, *command))
    checkpoint = find_checkpoint(run)
    assert checkpoint.info.config.task == "height"
    assert {name for name in weights(run) if name.startswith("head.")} == {"head.weight", "head.bias"}

    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / checkpoint.path.name)
    assert "continuing at step 1 of 2" in succeed(*pretrain(cache, stopped, *command))
    assert_same_run(stopped, run)

    assert "loss" in succeed(*evaluate(run, cache))
    results = json.loads((run / "evaluation" / "val.json").read_text())
    assert (results["task"], results["samples"]) == ("height", 5) and results["loss"] > 0

    said = succeed(*finetune(cache, tmp_path / "vehicles", "--from", run, *steps(1), "--set", "optim.lr=1e-30"))
    assert f"network from {checkpoint.path} (height, step 2)" in said
    ours, theirs = weights(tmp_path / "vehicles"), weights(run)
    name = next(name for name in theirs if name.startswith("network.decoder") and name.endswith("weight"))
    torch.testing.assert_close(ours[name], theirs[name], atol=1e-12, rtol=0)

    page = report(cache, tmp_path / "vehicles", run)
    assert ">Height<" in page and ">Vehicles<" in page and "validation: loss" in page
    assert "pretrained: run, step 2" in page


def report(cache: Path, *runs: Path) -> str:
    out = runs[0] / "report.html"
    succeed("report", *runs, "--cache", cache, "--split", "val", "--samples", "1", "--device", "cpu", "--out", out)
    return out.read_text()


def test_a_pretext_task_names_the_array_that_the_cache_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(PRETEXTS, "sounds", f"{__name__}:Sounds")
    cache, run = write_caches(tmp_path / "cache"), tmp_path / "run"
    said = refuse(*pretrain(cache, run, "--method", "sounds"), out=run)
    assert "train.zarr has no sounds, which sounds reads: build a cache with it" in said
    assert "'vehicles' is not one of 'occfeat', 'img-also', 'sounds'" in refuse(
        *pretrain(cache, run, "--method", "vehicles"), out=run
    )
    said = refuse(*pretrain(cache, run, "--method", "sounds", "--lambda", "1"), out=run)
    assert (
        "--occ-only, --feat-only, --lambda, --occ-on and --occlusion are about occfeat's losses, not sounds's" in said
    )


def test_a_segmentation_task_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setitem(LABEL_KINDS, "ring", RING)
    cache, run = write_caches(tmp_path / "cache", labels=("ring",)), tmp_path / "run"
    assert "ring: simplebev efficientnet-b0" in succeed(*finetune(cache, run, "--task", "ring", *steps(1)))
    assert weights(run)["head.3.weight"].shape[0] == 2
    succeed(*evaluate(run, cache))
    results = json.loads((run / "evaluation" / "val.json").read_text())
    assert list(results["per_class"]) == ["near", "far_away"] and 0 <= results["iou"] <= 100
    page = report(cache, run)
    assert ">Ring<" in page and "far away" in page and "behind the ego vehicle, not scored" in page
    assert "has no map labels (it has: ring)" in refuse(*finetune(cache, tmp_path / "map", "--task", "map"))
