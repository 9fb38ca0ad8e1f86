"""Predictions of a network for voxels, and the sheets that are drawn of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.bands import WIDTH
from occfeat_targets.pictures.colors import FeatureColors, correlation_scale, rgb
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.report.correlation import cosines, pick_class
from occfeat_train.report.feature_sheets import FeatureSheets
from occfeat_train.report.voxel_predictions import VoxelPredictions, predict_voxels
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.initial import restore
from tests.targets.sheets import maps, pixels, texts

CPU = Process(0, 1, torch.device("cpu"))


def opened(run: Path, cache: Path, split: str = "val") -> tuple[Pretraining, KeyframeDataset]:
    checkpoint = find_checkpoint(run)
    task = restore(checkpoint)
    assert isinstance(task, Pretraining)
    return task, KeyframeDataset(CacheReader(cache / f"{split}.zarr"), checkpoint.info.config, training=False)


@pytest.fixture(scope="module")
def found(pretrained, cache) -> VoxelPredictions:
    task, dataset = opened(pretrained, cache)
    return predict_voxels(task, dataset, 3, CPU)


def test_predictions_are_those_of_the_head_at_every_voxel(pretrained, cache, found):
    """Slow twin: the whole network, and the head at all voxels at once."""
    task, dataset = opened(pretrained, cache)
    task.eval()
    batch = dataset.batch([(0, 3)])
    with torch.no_grad():
        logits, features = task.head(task.bev(batch), torch.arange(dataset.grid.num_voxels))
    assert logits is not None and features is not None and found.guess is not None and found.imagined is not None
    assert (found.guess == (logits[0] > 0).numpy()).all()
    assert (found.imagined.voxels == np.flatnonzero(found.guess)).all()
    assert found.imagined.features == pytest.approx(features[found.imagined.voxels].numpy(), abs=1e-5)
    assert found.predicted.features == pytest.approx(features[found.predicted.voxels].numpy(), abs=1e-5)
    frame = dataset.reader.cache.spec.frames.index("CAM_FRONT")
    occupancy = dataset.grid.unpack_volume(dataset.reader.read("occupancy", 3)[frame])
    assert found.frame == frame and (found.true == occupancy).all()
    assert occupancy.reshape(-1)[found.predicted.voxels].all()
    assert (found.target.features == batch.arrays["features"].float().numpy()).all()


def test_metrics_are_those_of_evaluation(pretrained, cache, found):
    task, dataset = opened(pretrained, cache)
    metric = task.metric()
    task.eval()
    with torch.no_grad():
        task.measure(dataset.batch([(0, 3)]), metric)
    assert found.results == pytest.approx(metric.results())


def test_only_the_most_certain_voxels_have_features_if_there_are_too_many(pretrained, cache, found):
    task, dataset = opened(pretrained, cache)
    few = predict_voxels(task, dataset, 3, CPU, limit=7)
    assert few.imagined is not None and found.imagined is not None and found.guess is not None
    task.eval()
    with torch.no_grad():
        logits = task.head(task.bev(dataset.batch([(0, 3)])), None)[0]
    assert logits is not None
    best = np.argsort(-logits.numpy().reshape(-1), kind="stable")[:7]
    assert few.imagined.voxels.tolist() == sorted(best.tolist())
    sheet = FeatureSheets("run", few, []).features(FeatureColors.fit(few.predicted.features), "it")
    assert f"predicted features at the 7 most certain of {found.guess.sum()} voxels predicted to be occupied" in texts(
        sheet
    )


def test_a_sheet_of_features_names_run_keyframe_teacher_metrics_and_what_was_fitted(found):
    sheet = FeatureSheets("my <run>", found, ["SIMULATED: x"]).features(
        FeatureColors.fit(found.predicted.features), "z"
    )
    words = texts(sheet)
    assert "my <run>: features" in words and "SIMULATED: x" in words
    assert "ddeee"[3] + ", sample val-token3, val 3 of 5; teacher made up (digest of made up)" in words
    assert f"on this keyframe: {found.merits}" in words
    assert "three principal components as red, green and blue, fitted to z" in words
    assert [axes.get_title(loc="left") for axes in maps(sheet)][1].endswith("voxels predicted to be occupied")
    assert sheet.bbox.width == WIDTH


def test_a_correlation_map_shows_the_topmost_cosine_of_each_column_and_outlines_the_class(found):
    query = pick_class("road", [found])
    sheet = FeatureSheets("run", found, []).correlation(query, -0.5)
    drawn = pixels(sheet)
    predicted, teacher, imagined = maps(sheet)
    for axes, seen, feature in (
        (predicted, found.predicted, query.predicted),
        (teacher, found.target, query.target),
        (imagined, found.imagined, query.predicted),
    ):
        assert seen is not None
        voxel = int(seen.voxels[-1])  # the highest of its column: the last index of the highest layer
        _, h, w = np.unravel_index(voxel, found.grid.shape)
        expected = rgb(correlation_scale(-0.5), cosines(seen.features[-1:], feature))[0]
        assert (axes.images[0].get_array()[h, w] == expected).all()
        assert axes.collections  # the outline
    assert drawn.shape[1] == WIDTH
    assert any(
        re.match(r"mean cosine -?\d\.\d\d in voxels of road \(outlined below\), ", text) for text in texts(sheet)
    )
