"""Img-ALSO as a task: decoder, losses and metric against slow references; batches with few, no and padded pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from occfeat_targets.cache.geometry import rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import NO_AUGMENTATION, OptimConfig
from occfeat_train.data.batch import Batch, Sample, collate
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.queries import Queries, draw_queries
from occfeat_train.distributed import Process
from occfeat_train.tasks import img_also
from occfeat_train.tasks.build import build_task
from occfeat_train.tasks.img_also import ImgALSO
from occfeat_train.tasks.losses import mean_over_samples
from occfeat_train.training.graph import copy_padded, padded
from occfeat_train.training.step import Trainer
from tests.targets.command_line import run as targets
from tests.train.host_waits import HostWaits
from tests.train.test_batch import make_batch, make_samples
from tests.train.test_tasks import CONFIG

GRID = VoxelGrid((4, 12, 10), (-2, -3, -2.5), (2, 3, 2.5))  # cells of half a metre
SENSOR = np.float32([0.5, 0, 1.8])
ALSO = dataclasses.replace(CONFIG, task="img-also")


def also_sample(index: int, returns: int, *, capacity: int = 400, pose: np.ndarray | None = None) -> Sample:
    """A sample with random LiDAR returns in and around the grid, in the ego frame."""
    rng = np.random.default_rng((index, 5))
    points = np.zeros((capacity, 4), np.float32)
    points[:returns] = rng.uniform((-4, -4, -2, 0), (4, 4, 2, 255), (returns, 4))
    arrays = {
        "points": points, "num_points": np.array([returns], np.int32), "sweep_origins": SENSOR[None],
        "grid_from_ego": (rigid((1, 0, 0, 0.3), (0.2, 0, 0)) if pose is None else pose).astype(np.float32),
    }  # fmt: skip
    plain = make_samples(index + 1, grid=GRID)[index]
    return dataclasses.replace(plain, arrays=arrays, rng=np.random.default_rng(index))


def also_batch(*returns: int) -> Batch:
    """A batch of samples with that many returns each."""
    drawn = [ImgALSO.targets(also_sample(i, n), ALSO) for i, n in enumerate(returns)]
    return dataclasses.replace(make_batch(len(returns), grid=GRID), arrays=collate(drawn, ImgALSO.ragged))


def task_of(**changes: Any) -> ImgALSO:
    task = build_task(dataclasses.replace(ALSO, **changes), GRID, 0)
    assert isinstance(task, ImgALSO)
    return task


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(img_also, "NUM_QUERIES", 60)


# -- decoder ----------------------------------------------------------------------------------------------------------


def plain_decoder(head: img_also.ReconstructionHead, latent: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """ALSO's layers one after the other, for pairs: F_B in the cell (p, C), query - cell (p, 3)."""
    hidden = head.first(torch.cat([head.latent(latent), offset], dim=1))
    for layer in (head.second, head.third):
        hidden = layer(F.relu(hidden))
    out = head.output(hidden)
    return out[:, 0], out[:, 1]


def test_the_decoder_equals_its_layers_one_after_the_other():
    torch.manual_seed(0)
    head = img_also.ReconstructionHead(8).double()
    bev, cell = torch.randn(2, 8, 5, 4).double(), torch.randint(20, (2, 9, 6))
    centers, xyz = torch.randn(20, 3).double(), torch.randn(2, 9, 3).double()

    def plain(leaf: Tensor) -> tuple[Tensor, ...]:
        found = [
            plain_decoder(head, leaf[b].flatten(1)[:, cell[b, q]].T, xyz[b, q] - centers[cell[b, q]])
            for b, q in np.ndindex(2, 9)
        ]
        return tuple(torch.stack(values).unflatten(0, (2, 9)) for values in zip(*found, strict=True))

    found = gradients(head, bev, lambda leaf: head(leaf, centers, xyz, cell))
    for ours, theirs in zip(found, gradients(head, bev, plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def gradients(head: torch.nn.Module, bev: Tensor, function: Any) -> list[Tensor]:
    """Outputs, and gradients of a weighted sum of them with respect to F_B and all weights."""
    leaf = bev.clone().requires_grad_()
    outputs = function(leaf)
    weights = [torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out) for out in outputs]
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(total, [leaf, *head.parameters()])]


def test_the_decoder_has_alsos_layers():
    shapes = {name: tuple(p.shape) for name, p in task_of().head.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [(128, 8), (128, 131), (128, 128), (128, 128), (2, 128)]


# -- losses -----------------------------------------------------------------------------------------------------------


def drawn_queries(batch: Batch) -> Queries:
    return draw_queries(**batch.arrays, number=img_also.NUM_QUERIES)


def slow_losses(task: ImgALSO, batch: Batch, bev: Tensor) -> tuple[Tensor, Tensor]:
    """Every cell within 1 m of every query, one pair at a time, in float64."""
    centers, queries = GRID.voxel_centers()[0].astype(np.float64), drawn_queries(batch)
    means: dict[str, list[Tensor]] = {"occupancy": [], "intensity": []}
    for b in range(len(batch)):
        found: dict[str, list[Tensor]] = {"occupancy": [], "intensity": []}
        for q in torch.nonzero(queries.exists[b]).flatten():
            occupied, intensity = queries.occupied[b, q], queries.intensity[b, q]
            for h, w in np.ndindex(GRID.map_shape):
                offset = queries.xyz[b, q].double() - torch.tensor([*centers[h, w, :2], 0])
                if offset[:2].norm() > 1:
                    continue
                logit, predicted = plain_decoder(task.head, bev[b : b + 1, :, h, w], offset[None])
                found["occupancy"].append(F.softplus(-logit if occupied else logit)[0])
                if intensity >= 0:
                    found["intensity"].append((predicted - intensity).abs()[0])
        for name, values in found.items():
            means[name].append(torch.stack(values).mean() if values else torch.zeros(()).double())
    return torch.stack(means["occupancy"]).mean(), torch.stack(means["intensity"]).mean()


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("returns", [(300, 200), (300, 7), (1, 2), (300, 0)])
def test_losses_and_gradients_equal_the_slow_reference(returns, monkeypatch):
    task, batch = task_of().double(), also_batch(*returns)
    torch.manual_seed(1)
    bev = torch.randn(len(returns), 8, *GRID.map_shape).double().requires_grad_()
    monkeypatch.setattr(task, "bev", lambda batch: bev)
    losses = task(batch)
    expected = slow_losses(task, batch, bev)
    torch.testing.assert_close(torch.stack([losses["reconstruction"], losses["intensity"]]), torch.stack(expected))
    torch.testing.assert_close(losses["loss"], sum(expected))
    leaves = [bev, *task.head.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, leaves) for loss in (losses["loss"], sum(expected))), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-7)


def test_a_mean_over_samples_is_the_mean_of_the_samples_own():
    values, mask = torch.tensor([[1.0, 3, 100], [7, 7, 7], [8, 100, 100]]), torch.zeros(3, 3, dtype=torch.bool)
    mask[0, :2] = mask[2, 0] = True
    assert mean_over_samples(values, mask).item() == pytest.approx((2 + 0 + 8) / 3)


def test_what_is_masked_may_be_infinite():
    values, mask = torch.tensor([[1.0, torch.nan], [torch.inf, 3]], requires_grad=True), torch.eye(2, dtype=torch.bool)
    loss = mean_over_samples(values, mask)
    loss.backward()
    assert loss.item() == 2 and values.grad.tolist() == [[0.5, 0], [0, 0.5]]


def test_losses_of_bfloat16_predictions_are_computed_in_float32(monkeypatch):
    task, batch = task_of(), also_batch(300, 250)
    pairs = task.predict(batch)
    rounded = dataclasses.replace(pairs, logits=pairs.logits.bfloat16(), intensity=pairs.intensity.bfloat16())
    exact = dataclasses.replace(rounded, logits=rounded.logits.double(), intensity=rounded.intensity.double())
    losses = []
    for each in (rounded, exact):
        monkeypatch.setattr(task, "predict", lambda _, found=each: found)
        losses.append(task(batch))
    for name, value in losses[0].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), losses[1][name], rtol=1e-5, atol=0)


def test_every_parameter_gets_a_gradient():
    task = task_of()
    losses = task(also_batch(300, 300))
    assert list(losses) == ["loss", "reconstruction", "intensity"]
    losses["loss"].backward()
    assert [name for name, p in task.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_a_batch_without_a_pair_has_no_loss_and_finite_gradients():
    task = task_of()
    losses = task(also_batch(0, 0))
    losses["loss"].backward()
    assert losses["loss"].item() == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.head.parameters())


def test_padded_returns_as_of_a_cuda_graph_change_nothing():
    task, batch = task_of(), also_batch(300, 250)
    longer = padded(batch, task.ragged)
    copy_padded(batch, longer)
    assert len(longer.arrays["returns"]) > len(batch.arrays["returns"]) and longer.arrays["sample"][-1] == -1
    losses = [task(each)["loss"] for each in (batch, longer)]
    ours, theirs = (torch.autograd.grad(loss, list(task.head.parameters())) for loss in losses)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(ours, theirs)


def test_a_step_makes_the_host_wait_nowhere():
    task, batch = task_of().train(), also_batch(300, 300)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = task.predict(batch)
    bev = torch.randn(2, 8, *GRID.map_shape)
    task.bev = lambda batch: bev  # type: ignore[method-assign, assignment]
    with HostWaits() as waits, torch.autocast("cpu", torch.bfloat16):
        task(batch)["loss"].backward()
    assert waits.found == []
    assert (pairs.logits.dtype, pairs.intensity.dtype) == (torch.bfloat16, torch.bfloat16)


# -- metric -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_queries")
def test_the_metric_counts_queries_by_the_mean_of_their_pairs():
    task, metric, batch = task_of().eval(), task_of().metric(), also_batch(300, 5)
    with torch.no_grad():
        task.measure(batch, metric)
        pairs = task.predict(batch)
    right = union = both = number = 0
    errors = []
    for b, q in np.ndindex(*pairs.near.shape[:2]):
        mine, occupied, target = pairs.near[b, q], pairs.queries.occupied[b, q], pairs.queries.intensity[b, q]
        if mine.any():
            predicted = bool(pairs.logits[b, q][mine].mean() > 0)
            number, right = number + 1, right + (predicted == bool(occupied))
            both, union = both + (predicted and bool(occupied)), union + (predicted or bool(occupied))
            errors += [abs(float(pairs.intensity[b, q][mine].mean() - target))] if target >= 0 else []
    results = metric.results()
    assert (results["samples"], results["queries"]) == (2, number) and 20 < number < 75
    assert results["query_accuracy"] == pytest.approx(100 * right / number)
    assert results["query_iou"] == pytest.approx(100 * both / union)
    assert results["intensity_error"] == pytest.approx(np.mean(errors), abs=1e-6)
    assert task.score(results) == results["query_iou"]


def test_the_metric_of_no_pair_is_none():
    task = task_of().eval()
    metric = task.metric()
    with torch.no_grad():
        task.measure(also_batch(0), metric)
    results = metric.results()
    assert results == {"samples": 1, "queries": 0, "query_iou": None, "query_accuracy": None, "intensity_error": None}
    assert set(task.columns(results).values()) == {"-"}


# -- real keyframe ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pretraining_overfits_the_queries_of_a_real_keyframe(real_sample, tmp_path, monkeypatch):
    """With 1,024 queries, of which about half lie within 10 m, and few layers' channels, so that it takes about a minute."""
    targets(
        "build", "--dataroot", real_sample, "--cache", tmp_path, "--split", "mini_train", "--teacher", "none", "--points",
        "--no-labels", "--image-size", "80x140", "--grid", "4x40x40", "--range", "-5", "5", "-10", "10", "-10", "10", "--workers", "0",
    )  # fmt: skip
    monkeypatch.setattr(img_also, "NUM_QUERIES", 1024)
    network = dataclasses.replace(ALSO.network, channels=16, image_size=(64, 112), recompute=False)
    config = dataclasses.replace(
        ALSO, network=network, frame="ego", augment=NO_AUGMENTATION, optim=OptimConfig(lr=2e-3, batch=1)
    )
    dataset = KeyframeDataset(CacheReader(Path(tmp_path) / "mini_train.zarr"), config, training=False)
    task, batch = build_task(config, dataset.grid, 0), dataset.batch([(0, 0)])
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3  # statistics follow such fast training
    trainer = Trainer(task, config, Process(0, 1, torch.device("cpu")), 400)
    accuracy = [0.0]
    while accuracy[-1] <= 95 and trainer.step < 400:
        for _ in range(25):
            trainer.take_step(iter([batch]))
        metric = task.eval().metric()
        with torch.no_grad():
            task.measure(batch, metric)
        accuracy.append(metric.results()["query_accuracy"])
    assert accuracy[1] < 85 and accuracy[-1] > 95, accuracy
    assert metric.results()["query_iou"] > 80 and metric.results()["queries"] > 400
