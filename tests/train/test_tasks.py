"""Tasks: the loss of a step equals the equations, every parameter is trained, and the seed determines the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_train.config import Config, LossConfig, NetworkConfig
from occfeat_train.networks.network import build_network
from occfeat_train.ops.mean_over_views import sample_voxel_features_numpy
from occfeat_train.presets import FEAT_ONLY, OCC_ONLY
from occfeat_train.tasks.build import build_task, count_parameters, freeze_batchnorm, move_to_device
from occfeat_train.tasks.losses import segmentation_loss
from occfeat_train.tasks.metrics import PretrainingMetric, SegmentationMetric
from occfeat_train.tasks.segmentation import Segmentation
from tests.conftest import small_spec
from tests.train import head_twin
from tests.train.head_twin import DenseHead
from tests.train.test_batch import GRID, make_batch, make_samples
from tests.train.test_decoder import parameters

SIZE, N_Y = (32, 48), 6
CONFIG = Config(network=NetworkConfig(weights="none", channels=8, image_size=SIZE, drop_connect=0.0))
LOSSES = {"both": LossConfig(feat=0.3), "occ-only": OCC_ONLY, "feat-only": FEAT_ONLY}


def task_of(loss: str = "both", **changes: Any) -> Any:
    return build_task(dataclasses.replace(CONFIG, loss=LOSSES[loss], **changes), GRID, N_Y)


# -- pretraining ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_step_equals_eq_1():
    task, batch = task_of(), make_batch(3)
    losses = task(batch)
    with torch.no_grad():
        bev = task.network(batch.views(SIZE), batch.bev_flip)
        logits, features = DenseHead.of(task.head)(bev)
    occupied = torch.from_numpy(GRID.unpack_volume(batch.arrays["occupancy"].numpy()))
    target, is_seen = torch.zeros(3, GRID.num_voxels, N_Y), torch.zeros(3, GRID.num_voxels, dtype=torch.bool)
    for b, sample in enumerate(make_samples(3)):
        cameras, centers = (sample.cam_from_grid, sample.intrinsics), GRID.voxel_centers().reshape(-1, 3)
        y, views = sample_voxel_features_numpy(sample.arrays["features"], None, *cameras, (24, 40), centers)
        target[b], is_seen[b] = torch.from_numpy(y).float(), torch.from_numpy(views > 0)
    target, is_seen = target.mT.unflatten(2, GRID.shape), is_seen.unflatten(1, GRID.shape)
    assert 0 < (occupied & is_seen).sum() < occupied.sum()
    occ = head_twin.occupancy_loss(logits, occupied)
    feat = head_twin.feature_loss(features, target + ~is_seen[:, None], occupied, is_seen)
    torch.testing.assert_close(losses["occupancy"], occ, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["features"], feat, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["loss"], occ + 0.3 * feat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        ("both", ["loss", "occupancy", "features"]),
        ("occ-only", ["loss", "occupancy"]),
        ("feat-only", ["loss", "features"]),
    ],
)
def test_every_parameter_gets_a_gradient(loss, names):
    task = task_of(loss)
    losses = task(make_batch())
    assert list(losses) == names
    losses["loss"].backward()
    trained = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not torch.isfinite(grad).all()] == []
    assert {name for name, _ in task.named_parameters()} - trained.keys() == {"head.conv.bias"}
    assert (task.head.occupancy is None, task.head.features is None) == (loss == "feat-only", loss == "occ-only")


def test_each_loss_alone_equals_its_term_of_eq_1():
    """The occupancy projection is initialised before the features', so omitting the latter changes no other weight."""
    batch, both = make_batch(), task_of()(make_batch())
    torch.testing.assert_close(task_of("occ-only")(batch)["loss"], both["occupancy"])
    alone = task_of("feat-only")
    alone.load_state_dict({k: v for k, v in task_of().state_dict().items() if not k.startswith("head.occupancy")})
    torch.testing.assert_close(alone(batch)["loss"], both["features"])


def test_a_batch_without_an_occupied_voxel_still_trains():
    batch = make_batch(2, share=0.0)
    task = task_of()
    losses = task(batch)
    losses["loss"].backward()
    assert losses["features"].item() == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.parameters() if p.requires_grad)


def test_occupancy_needs_no_features_in_the_batch():
    batch, task = make_batch(), task_of("occ-only")
    assert task.arrays(task.config, small_spec(teacher=None)) == ["occupancy"]
    (occupancy,) = {*task.targets(make_samples(1)[0], task.config)}
    batch = dataclasses.replace(batch, arrays={occupancy: batch.arrays[occupancy]})
    assert torch.isfinite(task(batch)["loss"])


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_metric_of_pretraining_contains_what_is_predicted(loss):
    task = task_of(loss).eval()
    metric, batch = task.metric(), make_batch(2, augmented=False)
    assert isinstance(metric, PretrainingMetric)
    with torch.no_grad():
        task.measure(batch, metric)
        losses = task(batch)
    results = metric.results()
    assert results["samples"] == 2
    assert (results["occupancy_iou"] is None, results["cosine"] is None) == (loss == "feat-only", loss == "occ-only")
    if loss != "occ-only":  # the metric is a mean over voxels, eq. 3 a mean over samples
        assert results["cosine"] == pytest.approx(-losses["features"].item(), abs=0.05)


# -- segmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task_name", "classes"), [("vehicles", ("vehicles",)), ("map", MAP_CLASSES)])
def test_a_segmentation_step_has_its_loss_and_all_gradients(task_name, classes):
    task, batch = task_of(task=task_name), make_batch(2, classes=len(classes))
    assert isinstance(task, Segmentation)
    loss = task(batch)["loss"]
    logits = task.logits(batch)
    assert logits.shape == (2, len(classes), *GRID.map_shape)
    torch.testing.assert_close(loss, segmentation_loss(logits, *task.labels(batch), 2.13))
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())


def test_without_a_mask_every_cell_is_valid():
    batch = make_batch(2, classes=5)
    batch = dataclasses.replace(batch, arrays={"labels": batch.arrays["labels"]})
    labels, valid = Segmentation.labels(batch)
    assert labels.shape == (2, 5, 12, 10) and valid.shape == (2, 1, 12, 10)
    assert valid.all()


def test_the_metric_of_segmentation_is_the_iou_of_its_classes():
    task, batch = task_of(task="map").eval(), make_batch(3, classes=5)
    metric = task.metric()
    assert isinstance(metric, SegmentationMetric)
    with torch.no_grad():
        task.measure(batch, metric)
        predicted = task.logits(batch) >= 0
    target, valid = task.labels(batch)
    intersection = (predicted & target & valid).sum((0, 2, 3)) * 100
    expected = intersection / ((predicted | target) & valid).sum((0, 2, 3))
    results = metric.results()
    assert list(results["per_class"]) == list(MAP_CLASSES)
    assert list(results["per_class"].values()) == pytest.approx(expected.tolist())
    assert results["samples"] == 3


# -- building ---------------------------------------------------------------------------------------------------------


def states(task: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in task.state_dict().items()}


def test_the_seed_determines_the_weights_and_the_global_generator_is_unchanged():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = states(task_of())
    torch.testing.assert_close(torch.rand(3), expected)
    again, other = states(task_of()), states(task_of(seed=1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(
        first["network.lifting.compressor.0.weight"], other["network.lifting.compressor.0.weight"]
    )


def test_a_task_has_the_parameters_of_its_network_and_head():
    network = parameters(build_network(GRID, "efficientnet-b0", 8))
    n, z = 8, GRID.shape[0]
    head = (n * n * 9 + n) + (n * n * z + n * z) + (2 * n * n + 2 * n) + (2 * n * n + n) + (n + 1) + (n * N_Y + N_Y)
    assert count_parameters(task_of()) == network + head
    assert count_parameters(task_of(task="vehicles")) == network + n * n * 9 + n + 1


def test_moving_a_task_makes_weights_channels_last_without_changing_them():
    task = task_of()
    before = states(task)
    move_to_device(task, torch.device("cpu"))
    for name, value in task.state_dict().items():
        assert value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last), name
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_frozen_batchnorm_keeps_its_statistics_and_samples_independent():
    task = task_of(task="vehicles").train()
    freeze_batchnorm(task)
    assert task.training
    statistics = {name: value.clone() for name, value in task.named_buffers()}
    assert statistics
    batch = make_batch(3)
    tensors = {name: value[:1] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    alone = dataclasses.replace(batch, tokens=batch.tokens[:1], **tensors)
    together = task.logits(batch)
    torch.testing.assert_close(together[:1], task.logits(alone), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, statistics[name]) for name, value in task.named_buffers())
    together.sum().backward()
    norms = [m for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(m.weight.grad is not None for m in norms)  # scale and shift are still trained

    task.train()
    task.logits(batch)
    assert any(not torch.equal(value, statistics[name]) for name, value in task.named_buffers())
