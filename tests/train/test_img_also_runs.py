"""Img-ALSO by the command line: pretrain, resume, evaluate, finetune, report; caches that lack something; presets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_train.config import Config
from occfeat_train.presets import preset
from occfeat_train.training.checkpoint import find_checkpoint
from tests.train.runs import (
    GRID,
    assert_same_run,
    config_of,
    evaluate,
    finetune,
    mask_camera,
    pretrain,
    reader,
    records,
    refuse,
    steps,
    succeed,
    weights,
    write_cache,
    write_caches,
)

METHOD = ["--method", "img-also"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Without a teacher, as such caches need none. CAM_FRONT, the camera of the grid in evaluation, is masked once in each split."""

    def mask(arrays: dict[str, np.ndarray]) -> None:
        mask_camera(arrays, [1], "CAM_FRONT")

    return write_caches(tmp_path_factory.mktemp("caches"), points=500, dim=0, change=mask)


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory) -> Path:
    """A run of four steps, in the frames of cameras."""
    out = tmp_path_factory.mktemp("runs") / "run"
    said = succeed(*pretrain(cache, out, *METHOD, *steps(4), "--save-every", "2", "--validate", "val"))
    assert "img-also: simplebev efficientnet-b0" in said
    return out


def test_a_run_has_the_presets_task_and_logs_both_losses(run):
    config = Config.from_dict(config_of(run))
    assert (config.task, config.frame) == ("img-also", "cameras")
    for record in records(run):
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["intensity"])
        assert 0.3 < record["reconstruction"] < 3 and 0 < record["intensity"] < 1
    assert find_checkpoint(run / "checkpoints" / "best").step in (2, 4)  # by the IoU of queries


def test_a_stopped_run_continues_bit_by_bit(cache, run, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped, symlinks=True)
    shutil.rmtree(stopped / "checkpoints" / "step-00000004")
    shutil.rmtree(stopped / "checkpoints" / "best", ignore_errors=True)
    again = pretrain(cache, stopped, *METHOD, *steps(4), "--save-every", "2", "--validate", "val")
    assert "continuing at step 2 of 4" in succeed(*again)
    assert_same_run(stopped, run)


def test_it_is_evaluated_on_the_same_queries_each_time(cache, run, tmp_path):
    results = []
    for name, batch in (("a", "1"), ("b", "4")):
        said = succeed(*evaluate(run, cache, "--out", tmp_path / name, "--batch", batch))
        assert "occupancy IoU of queries [%]" in said and "error of intensities" in said
        results.append(json.loads((tmp_path / name / "val.json").read_text()))
    for found in results:
        assert (found["task"], found["samples"], found["without_frame"], found["without_targets"]) == (
            "img-also",
            4,
            1,
            0,
        )
        assert found["queries"] > 1000 and 0 <= found["query_accuracy"] <= 100
    assert results[0]["queries"] == results[1]["queries"]
    for name in ("query_iou", "query_accuracy", "intensity_error"):
        assert results[0][name] == pytest.approx(results[1][name], abs=0.1)


def test_finetuning_starts_from_its_network(cache, run, tmp_path):
    out = tmp_path / "vehicles"
    said = succeed(*finetune(cache, out, "--from", run, *steps(1), "--set", "optim.lr=1e-30"))
    assert f"network from {find_checkpoint(run).path} (img-also, step 4)" in said
    ours, theirs = weights(out), weights(run)
    name = next(name for name in theirs if name.startswith("network.decoder") and name.endswith("weight"))
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-12)
    assert "head.centers" not in theirs and "centers" not in theirs


def test_the_report_shows_curves_metrics_and_queries(cache, run, tmp_path):
    out = tmp_path / "report.html"
    succeed("report", run, "--cache", cache, "--out", out, "--samples", "1", "--device", "cpu")
    page = out.read_text()
    assert ">Img-ALSO" in page and "<code>table1/simplebev-enb0/img-also</code>: run" in page
    for caption in (
        "occupied queries, highest cell",
        "queries predicted as occupied",
        "queries of a column",
        "queries from behind",
    ):
        assert f'alt="run: {caption}' in page
    for title in ("occupancy loss of queries", "intensity loss of queries", "validation: occupancy IoU of queries"):
        assert f'alt="{title}' in page
    assert not re.search(r'alt="(validation: )?queries of', page)


def test_a_cache_without_returns_is_refused(tmp_path):
    cache, out = write_caches(tmp_path / "cache"), tmp_path / "run"
    said = refuse(*pretrain(cache, out, *METHOD), out=out)
    assert "train.zarr has no LiDAR returns, which img-also draws its queries from: build it with --points" in said
    said = refuse(*pretrain(cache, out, *METHOD, "--occ-only"), out=out)
    assert (
        "--occ-only, --feat-only, --lambda, --occ-on and --occlusion are about occfeat's losses, not img-also's" in said
    )


def test_keyframes_without_a_return_of_their_own_sweep_are_left_out_and_counted(tmp_path):
    def empty(keyframes: list[int]):
        def change(arrays: dict[str, np.ndarray]) -> None:
            arrays["num_points"][keyframes] = 0

        return change

    cache, out = tmp_path / "cache", tmp_path / "run"
    write_cache(cache, "train", points=50, change=empty([0, 3]))
    write_cache(cache, "val", points=50, change=empty(list(range(7))))
    said = succeed(*pretrain(cache, out, *METHOD, *steps(1, samples=5), "--set", "frame=ego"))
    assert "2 of 7 keyframes of train.zarr are left out: their own sweep has no LiDAR return" in said
    assert "5 samples" in said
    said = refuse(*evaluate(out, cache))
    assert "none of the 7 valid keyframes can be used: their own sweep has no LiDAR return" in said
    said = succeed(*pretrain(cache, tmp_path / "occfeat", *steps(1)))
    assert "7 samples" in said  # OccFeat reads no returns


def test_returns_that_are_all_outside_of_the_grid_give_no_score_and_no_error(run, tmp_path):
    def far(arrays: dict[str, np.ndarray]) -> None:
        arrays["points"][..., :2] += 200
        arrays["sweep_origins"][..., :2] += 200

    write_cache(tmp_path, "val", scenes=tuple("ddeee"), points=20, dim=0, change=far)
    said = succeed(*evaluate(run, tmp_path, "--out", tmp_path / "out"))
    assert re.search(r"occupancy IoU of queries \[%\] +-\n", said)
    assert json.loads((tmp_path / "out" / "val.json").read_text())["query_iou"] is None


@pytest.mark.parametrize("network", ["simplebev-enb0", "simplebev-rn50"])
def test_its_preset_differs_from_occfeats_only_in_the_task(network):
    also, occfeat = (preset(f"table1/{network}/{task}") for task in ("img-also", "occfeat"))
    assert also.differences(occfeat) == ["task: img-also != occfeat"]


def test_the_presets_say_that_they_need_points():
    lines = succeed("config", "list").splitlines()
    needy = [line.split()[0] for line in lines if line.endswith("a cache built with --points")]
    assert needy == ["table1/simplebev-enb0/img-also", "table1/simplebev-rn50/img-also", "small/img-also"]
    assert "or more, and --points" in succeed("config", "show", "small/img-also")


def test_the_method_alone_uses_its_own_preset_and_another_preset_keeps_its_network(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, name in (([], "img-also"), (["--preset", "table1/simplebev-enb0/occfeat"], "occfeat-img-also")):
        arguments = pretrain(cache, Path("unused"), *METHOD, *given, *steps(1))
        at = arguments.index("--out")
        succeed(*arguments[:at], *arguments[at + 2 :])
        assert config_of(tmp_path / "runs" / f"table1-simplebev-enb0-{name}")["task"] == "img-also"


def test_random_returns_lie_in_the_grid(cache):
    points = reader(cache).points(0)
    assert len(points.xyz) == 500 and (np.abs(points.xyz[:, :2]) <= GRID.upper[1]).all()
