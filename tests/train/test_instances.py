"""Simple-BEV's protocol: its three heads as a task, its recipe, the presets that combine them, runs by the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import Config, LossConfig, NetworkConfig, OptimConfig
from occfeat_train.data.batch import Batch
from occfeat_train.presets import PRESETS, preset
from occfeat_train.simple_bev.import_reference import import_reference
from occfeat_train.tasks.build import build_task, count_parameters
from occfeat_train.tasks.heads import SegmentationHead
from occfeat_train.tasks.instance_losses import cell_loss, center_loss, gaussian, offset_loss, weighted_sum
from occfeat_train.tasks.instances import InstanceSegmentation
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.optim import build_optimizer
from occfeat_train.training.step import forward_backward
from tests.train.reference_seeds import GOLDEN, seeded_state_dict
from tests.train.runs import (
    QUIET,
    assert_same_run,
    config_of,
    evaluate,
    finetune,
    interrupt_at,
    records,
    refuse,
    steps,
    stop_early,
    succeed,
    weights,
    write_cache,
    write_caches,
)
from tests.train.test_batch import GRID, make_batch
from tests.train.test_tasks import CONFIG

PROTOCOL = dataclasses.replace(CONFIG, task="vehicles", loss=LossConfig(heads="simple-bev"))
PROTOCOL_PRESETS = [name for name in PRESETS if name.startswith("simple-bev/")]
FRAMES = ("CAM_FRONT", "CAM_BACK")


def batch_with_instances(samples: int = 3, seed: int = 0) -> Batch:
    batch, rng = make_batch(samples, seed=seed), np.random.default_rng(seed)
    center = torch.from_numpy(rng.integers(0, 30, (samples, 1, *GRID.map_shape), dtype=np.uint8))
    offset = torch.from_numpy(rng.integers(-9, 10, (samples, 2, *GRID.map_shape)).astype(np.int16))
    return dataclasses.replace(batch, arrays={**batch.arrays, "center": center, "offset": offset})


# -- the task ---------------------------------------------------------------------------------------------------------


def test_a_step_has_the_losses_of_three_heads_and_trains_every_parameter() -> None:
    task, batch = build_task(PROTOCOL, GRID, 0), batch_with_instances()
    assert isinstance(task, InstanceSegmentation)
    with torch.no_grad():
        task.head.log_variance.copy_(torch.tensor([0.1, -0.2, 0.3]))
    losses = task(batch)
    bev, (cells, valid) = task.bev(batch), task.labels(batch)
    center = gaussian(batch.arrays["center"], torch.float32)
    expected = (
        cell_loss(task.head.segmentation(bev), cells, valid, 2.13),
        center_loss(task.head.center(bev).sigmoid(), center),
        offset_loss(task.head.offset(bev), batch.arrays["offset"], cells & valid),
    )
    parts = [losses[name] for name in ("segmentation", "center", "offset")]
    torch.testing.assert_close(parts, list(expected))
    torch.testing.assert_close(losses["loss"], weighted_sum(*expected, task.head.log_variance))
    losses["loss"].backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    assert all(p.grad.any() for p in task.head.parameters())


def test_the_task_has_the_parameters_of_three_heads_and_three_weights() -> None:
    n = 8
    task = build_task(PROTOCOL, GRID, 0)
    assert count_parameters(task.head) == 3 * 9 * n * n + (1 + 1 + 2) * (n + 1) + 3
    assert not task.head.log_variance.any()


def test_evaluation_is_the_iou_of_the_segmentation_alone() -> None:
    task, batch = build_task(PROTOCOL, GRID, 0).eval(), make_batch(2)
    metric = task.metric()
    with torch.no_grad():
        task.measure(batch, metric)
        predicted = task.head.segmentation(task.bev(batch)) >= 0
    cells, valid = task.labels(batch)
    both, either = (predicted & cells & valid).sum(), ((predicted | cells) & valid).sum()
    assert task.score(metric.results()) == pytest.approx(100 * both.item() / either.item())


def test_only_vehicles_have_these_heads() -> None:
    for task in ("map", "occfeat"):
        with pytest.raises(ValueError, match=f"loss.heads=simple-bev with task={task}: it is for vehicles"):
            Config(task, loss=LossConfig(heads="simple-bev"))
    with pytest.raises(ValueError, match="heads='all': one of segmentation, simple-bev expected"):
        LossConfig(heads="all")  # type: ignore[arg-type]


# -- the recipe -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Loss w * x for a batch x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: float) -> dict[str, torch.Tensor]:
        return {"loss": self.weight * batch}


@pytest.mark.parametrize(("accumulate", "expected"), [("mean", 2.0), ("sum", 6.0)])
def test_gradients_of_accumulated_batches_are_averaged_or_summed(accumulate: Any, expected: float) -> None:
    task: Any = Linear()
    config = Config(optim=OptimConfig(accumulation=3, accumulate=accumulate), precision="float32")
    batches: list[Any] = [1.0, 2.0, 3.0]
    for batch in batches:
        assert forward_backward(task, config, torch.device("cpu"), batch)["loss"] == batch
    assert task.weight.grad == pytest.approx(expected)


def test_the_schedule_is_the_references() -> None:
    """train_nuscenes.py, fetch_optimizer: OneCycleLR over 100 more steps than are taken."""
    found, expected = [], []
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, schedule = build_optimizer(
        [parameter], OptimConfig("adamw", "onecycle", lr=3e-4, schedule_tail=100), num_steps=50
    )
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4, weight_decay=1e-7, eps=1e-8)
    reference = OneCycleLR(theirs, 3e-4, 50 + 100, pct_start=0.05, cycle_momentum=False, anneal_strategy="linear")
    for _ in range(50):
        for each, rates, plan in ((optimizer, found, schedule), (theirs, expected, reference)):
            rates.append(plan.get_last_lr()[0])
            each.step()
            plan.step()
    assert found == pytest.approx(expected)
    assert optimizer.param_groups[0]["eps"] == 1e-8 and optimizer.param_groups[0]["weight_decay"] == 1e-7
    with pytest.raises(ValueError, match="optim.schedule_tail=-1: 0 to"):
        OptimConfig(schedule_tail=-1)


@pytest.mark.parametrize("name", PROTOCOL_PRESETS)
def test_presets_are_the_references_protocol(name: str) -> None:
    config = preset(name)
    assert (config.task, config.frame, config.precision, config.labels) == ("vehicles", "cameras", "float32", 100)
    assert config.loss == LossConfig(heads="simple-bev") and config.loss.pos_weight == 2.13
    assert config.network.compat == "simple-bev" and config.augment == Config().augment
    assert config.optim == OptimConfig(
        optimizer="adamw", schedule="onecycle", lr=3e-4, weight_decay=1e-7, epochs=35.55, batch=8, accumulation=5,
        accumulate="sum", clip=5.0, schedule_tail=100,
    )  # fmt: skip
    assert config.optim.num_steps(28_130) == 25_000
    needs = ["--frames cameras", "--compat simple-bev", "--instances"]
    large = ["--image-size 540x960"] if name.endswith("448x800") else []
    assert config.build_options == large + needs
    (line,) = (line for line in succeed("config", "list").splitlines() if line.split()[0] == name)
    assert line.endswith(f"a cache built with {' '.join(large + needs)}")
    assert f"or more, and {' '.join(needs)}" in succeed("config", "show", name)


def test_there_is_a_preset_of_either_network_with_either_backbone_and_image_size() -> None:
    networks = {(c.lifting, c.backbone, c.image_size) for c in (preset(name).network for name in PROTOCOL_PRESETS)}
    backbones, sizes = ("resnet-101", "efficientnet-b0"), ((224, 400), (448, 800))
    assert networks == {(x, y, z) for x in ("simplebev", "bevformer") for y in backbones for z in sizes}


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_instances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-instances")
    return write_caches(folder, dim=0, labels=("vehicles",), frames=FRAMES, compat="simple-bev", instances=True)


def protocol(cache: Path, out: Path, *more: object) -> list[str]:
    """Arguments of a tiny run of the protocol: 4 steps of 2 batches of 1 sample."""
    small = ["--preset", "small/simple-bev", "--set", "network.channels=8", "--set", "network.image_size=32x48"]
    recipe = ["--set", "augment.num_cameras=2", "--batch", "1", *steps(4, samples=7)]
    start = ["finetune", "--cache", cache, "--out", out, *small, *recipe, "--no-tensorboard", *QUIET]
    return [str(a) for a in (*start, *more)]


def test_the_protocol_is_trained_resumed_evaluated_and_reported(
    with_instances: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = succeed(*protocol(with_instances, whole, "--validate", "val"))
    assert "4 steps of 1 x 2 accumulated; adamw onecycle" in said
    config = config_of(whole)
    assert config["loss"]["heads"] == "simple-bev" and config["frame"] == "cameras"
    assert (config["optim"]["accumulate"], config["optim"]["schedule_tail"]) == ("sum", 4)
    assert {"loss", "segmentation", "center", "offset"} <= records(whole)[0].keys()
    assert weights(whole)["head.log_variance"].count_nonzero() == 3

    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        stop_early(*protocol(with_instances, stopped, "--validate", "val"))
    succeed(*protocol(with_instances, stopped, "--validate", "val"))
    assert_same_run(stopped, whole)

    assert "IoU at 0.5 [%]" in succeed(*evaluate(whole, with_instances))
    results = json.loads((whole / "evaluation" / "val.json").read_text())
    assert results["samples"] == 5 and results["frames"] == ["CAM_FRONT"] and 0 <= results["iou"] <= 100
    page = tmp_path / "report.html"
    succeed("report", whole, "--cache", with_instances, "--out", page, "--samples", 1, "--device", "cpu")
    assert "loss.heads" in page.read_text()

    plain = tmp_path / "plain"
    said = succeed(*finetune(with_instances, plain, "--from", whole, *steps(1)))
    assert "network from" in said and "network and head from" not in said
    more = tmp_path / "more"
    assert "network and head from" in succeed(*protocol(with_instances, more, "--from", whole))


@pytest.mark.parametrize("has", [{}, {"compat": "simple-bev"}, {"frames": FRAMES, "compat": "simple-bev"}])
def test_a_cache_without_instances_is_refused_with_all_options_of_its_build(has: Any, tmp_path: Path) -> None:
    cache = write_cache(tmp_path, dim=0, labels=("vehicles",), **{"frames": ("ego",), **has}).path.parent
    said = " ".join(refuse(*protocol(cache, tmp_path / "run"), out=tmp_path / "run").split())
    assert "has no instances, which loss.heads=simple-bev needs: build it with" in said
    assert "--frames cameras --compat simple-bev --instances, or train the segmentation alone" in said


def test_all_heads_of_a_reference_checkpoint_are_imported_if_asked_for(tmp_path: Path) -> None:
    name, grid = "segnet-effb0_64x112_40x8x40", VoxelGrid((8, 40, 40))
    state = {key: torch.as_tensor(value) for key, value in seeded_state_dict(GOLDEN / f"{name}.npz").items()}
    torch.save(state, tmp_path / "model.pth")
    network = NetworkConfig(weights="none", image_size=(64, 112), compat="simple-bev")
    config = Config("vehicles", network, loss=LossConfig(heads="simple-bev"))
    import_reference(tmp_path / "model.pth", config, grid, tmp_path / "run")
    found = find_checkpoint(tmp_path / "run").weights()
    for head, theirs in (
        ("segmentation", "segmentation"),
        ("center", "instance_center"),
        ("offset", "instance_offset"),
    ):
        for part in ("0.weight", "3.weight", "3.bias"):
            assert torch.equal(found[f"head.{head}.{part}"], state[f"decoder.{theirs}_head.{part}"])
    expected = [state[f"{loss}_weight"].item() for loss in ("ce", "center", "offset")]
    assert found["head.log_variance"].tolist() == expected

    alone = dataclasses.replace(config, loss=LossConfig())
    import_reference(tmp_path / "model.pth", alone, grid, tmp_path / "alone")
    names = {key for key in find_checkpoint(tmp_path / "alone").weights() if not key.startswith("network.")}
    assert names == {f"head.{key}" for key in SegmentationHead(128, 1).state_dict()}
