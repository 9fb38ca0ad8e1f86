"""Ray targets in training and evaluation: eq. 2 over observed voxels, IoU over observed voxels, RayIoU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_train.config import Config, LossConfig
from occfeat_train.data.batch import Batch
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.tasks.build import build_task
from occfeat_train.tasks.losses import occupancy_loss
from occfeat_train.tasks.metrics import PretrainingMetric
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.tasks.ray_iou import first_depths, query_directions
from tests.train.runs import config_of, evaluate, pretrain, reader, refuse, steps, succeed, write_cache, write_caches
from tests.train.test_batch import GRID, make_batch
from tests.train.test_tasks import CONFIG, N_Y

OBSERVED = LossConfig(feat=0.0, occ_on="observed")


@pytest.fixture(scope="module")
def with_rays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_caches(tmp_path_factory.mktemp("with-rays"), rays=True)


def batch_with_rays(samples: int = 3, seed: int = 0) -> Batch:
    batch, rng = make_batch(samples, seed=seed), np.random.default_rng(seed)
    observed = torch.from_numpy(GRID.pack_volume(rng.random((samples, *GRID.shape)) < 0.5))
    origins = rng.standard_normal((samples, 3)).astype(np.float32)
    occupied = zip(batch.volume("occupancy").numpy(), origins, strict=True)
    depths = np.stack([first_depths(volume, origin, query_directions(), GRID) for volume, origin in occupied])
    rays = {"ray_origin": torch.from_numpy(origins), "ray_depths": torch.from_numpy(depths)}
    return dataclasses.replace(batch, arrays={**batch.arrays, "observed": observed, **rays})


# -- eq. 2 ------------------------------------------------------------------------------------------------------------


def test_the_loss_over_observed_voxels_ignores_all_others() -> None:
    logits = torch.tensor([0.9, 0.1, 0.25, 0.5]).double().logit().view(1, 1, 2, 2)
    occupied = torch.tensor([True, False, True, False]).view(1, 1, 2, 2)
    observed = torch.tensor([True, True, False, False]).view(1, 1, 2, 2)
    assert occupancy_loss(logits, occupied, observed).item() == pytest.approx(-np.log(0.9))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_values_and_gradients_equal_a_loop_over_samples(seed: int, samples: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, 2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    occupied, observed = (torch.rand(samples, 2, 3, 4, generator=rng) < share for share in (0.2, 0.3))
    observed[0] = False  # adds 0, and counts in the mean
    p = torch.sigmoid(logits)
    each = -(occupied * p.log() + ~occupied * (1 - p).log())
    expected = (
        sum((each[b][observed[b]].mean() for b in range(1, samples) if observed[b].any()), torch.zeros(())) / samples
    )
    loss = occupancy_loss(logits, occupied, observed)
    torch.testing.assert_close(loss.double(), expected.double())
    if samples > 1:
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients)
        assert not gradients[0][~observed].any()


def test_with_every_voxel_observed_the_loss_is_eq_2() -> None:
    logits, occupied = torch.randn(2, 2, 3, 4), torch.rand(2, 2, 3, 4) < 0.3
    torch.testing.assert_close(
        occupancy_loss(logits, occupied, torch.ones_like(occupied)), occupancy_loss(logits, occupied)
    )


def test_the_task_trains_on_observed_voxels_only_if_it_is_asked_to() -> None:
    batch = batch_with_rays()
    losses = {}
    for occ_on in ("all", "observed"):
        task = build_task(dataclasses.replace(CONFIG, loss=dataclasses.replace(OBSERVED, occ_on=occ_on)), GRID, N_Y)
        logits = task.head(task.bev(batch), None)[0]
        mask = {"all": None, "observed": batch.volume("observed")}[occ_on]
        torch.testing.assert_close(task(batch)["occupancy"], occupancy_loss(logits, batch.volume("occupancy"), mask))
        losses[occ_on] = task(batch)["loss"].item()
    assert losses["all"] != losses["observed"]


def test_a_value_that_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="occ_on='free': one of all, observed expected"):
        LossConfig(occ_on="free")  # type: ignore[arg-type]


# -- data -------------------------------------------------------------------------------------------------------------


def test_rays_are_read_where_they_are_used(with_rays: Path) -> None:
    for config, training, expected in (
        (Config(), True, set()),
        (Config(), False, {"rays", "ray_origin"}),
        (Config(loss=OBSERVED), True, {"rays"}),
        (Config(loss=OBSERVED), False, {"rays", "ray_origin"}),
        (Config(loss=LossConfig(occ=0, feat=1)), False, set()),
    ):
        config = dataclasses.replace(config, allow_upsampling=True, frame="CAM_BACK")
        dataset = KeyframeDataset(reader(with_rays, "val"), config, training=training)
        assert {name for name in dataset.arrays if name.startswith("ray")} == expected
        batch = dataset.batch([(0, 2)])
        if expected:
            packed = reader(with_rays, "val").read("rays", 2)[2, 0]  # the frame of CAM_BACK; observed
            np.testing.assert_array_equal(batch.arrays["observed"][0].numpy(), packed)
        if not training and expected:
            occupied, origin = batch.volume("occupancy")[0].numpy(), batch.arrays["ray_origin"][0].numpy()
            depths = first_depths(occupied, origin, query_directions(), dataset.grid)
            np.testing.assert_array_equal(batch.arrays["ray_depths"][0].numpy(), depths)


def test_a_cache_without_rays_is_refused_if_they_are_trained_on(cache: Path, tmp_path: Path) -> None:
    output = refuse(*pretrain(cache, tmp_path / "run", "--occ-on", "observed"), out=tmp_path / "run")
    assert "has no rays, which loss.occ_on=observed needs: build it with --rays" in output


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_the_metric_equals_a_computation_sample_by_sample() -> None:
    batch, task = batch_with_rays(2), build_task(dataclasses.replace(CONFIG, loss=OBSERVED), GRID, N_Y).eval()
    metric = task.metric()
    with torch.no_grad():
        task.measure(batch, metric)
        predicted = (task.head(task.bev(batch), None)[0] > 0).numpy()
    occupied, observed = batch.volume("occupancy").numpy(), batch.volume("observed").numpy()
    results = metric.results()
    both, either = (predicted & occupied & observed).sum(), ((predicted | occupied) & observed).sum()
    assert results["occupancy_iou_observed"] == pytest.approx(100 * both / either)
    hits = found = true = 0
    for ours, theirs, origin in zip(predicted, occupied, batch.arrays["ray_origin"].numpy(), strict=True):
        depth, expected = (first_depths(volume, origin, query_directions(), GRID) for volume in (ours, theirs))
        for a, b in zip(depth.tolist(), expected.tolist(), strict=True):
            if np.isfinite(b):
                true, found, hits = true + 1, found + np.isfinite(a), hits + (abs(a - b) < 2)
    assert results["ray_iou_2m"] == pytest.approx(100 * hits / (true + found - hits))
    columns = task.columns(results)
    assert columns["IoU over observed voxels [%]"] == f"{results['occupancy_iou_observed']:.1f}"
    assert columns["RayIoU at 1, 2, 4 m [%]"].split() == [f"{results[f'ray_iou_{limit}m']:.1f}" for limit in (1, 2, 4)]


def test_without_rays_the_results_are_those_of_earlier_releases() -> None:
    metric = PretrainingMetric()
    metric.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool), None)
    assert list(metric.results()) == ["samples", "occupancy_iou", "cosine"]
    assert not any("ray" in name.lower() for name in Pretraining.columns(metric.results()))


def test_a_run_on_observed_voxels_is_trained_validated_and_evaluated(with_rays: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = succeed(*pretrain(with_rays, run, "--occ-on", "observed", "--validate", "val", *steps(2)))
    assert "RayIoU at 1, 2, 4 m [%]" in output
    assert config_of(run)["loss"] == {
        "occ": 1.0,
        "feat": 0.01,
        "occ_on": "observed",
        "occlusion": "none",
        "pos_weight": 2.13,
        "heads": "segmentation",
    }
    output = succeed(*evaluate(run, with_rays))
    assert "IoU over observed voxels [%]" in output and "RayIoU at 1, 2, 4 m [%]" in output
    results = json.loads((run / "evaluation" / "val.json").read_text())
    assert 0 < results["occupancy_iou_observed"] < 100
    assert 0 <= results["ray_iou_1m"] <= results["ray_iou_2m"] <= results["ray_iou_4m"] <= 100
    page = succeed(
        "report", run, "--cache", with_rays, "--split", "val", "--out", tmp_path / "report.html", "--device", "cpu"
    )
    assert "report.html" in page
    html = (tmp_path / "report.html").read_text()
    assert "RayIoU at 1, 2, 4 m [%]" in html and "loss.occ_on" in html


def test_a_run_on_a_cache_without_rays_is_evaluated_with_them_and_the_other_way_round(
    pretrained: Path, with_rays: Path, tmp_path: Path
) -> None:
    output = succeed(*evaluate(pretrained, with_rays, "--out", tmp_path))
    assert "RayIoU" in output
    write_cache(tmp_path / "plain", "val")
    assert "RayIoU" not in succeed(*evaluate(pretrained, tmp_path / "plain", "--out", tmp_path))


def test_occ_on_without_an_occupancy_loss_is_refused(cache: Path, tmp_path: Path) -> None:
    assert "--feat-only has no occupancy loss" in refuse(
        *pretrain(cache, tmp_path / "run", "--feat-only", "--occ-on", "observed")
    )
