"""`occfeat-train figures`: what its sheets and its page show, every option, and every refusal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_targets.pictures.bands import WIDTH
from occfeat_targets.pictures.colors import FeatureColors
from occfeat_train.cli import main
from occfeat_train.report import feature_page
from occfeat_train.report.feature_sheets import FeatureSheets
from occfeat_train.report.voxel_predictions import predict_voxels
from tests.targets.sheets import size, texts
from tests.train.runs import finetune, mask_camera, pretrain, steps, succeed, write_cache
from tests.train.test_voxel_predictions import CPU, opened


def figures(cache: Path, out: Path, *arguments: object) -> str:
    command = ["figures", *arguments, "--cache", cache, "--out", out, "--device", "cpu", "--no-progress"]
    result = CliRunner().invoke(main, [str(a) for a in command])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def refused(cache: Path, out: Path, *arguments: object, code: int = 1) -> str:
    command = ["figures", *arguments, "--cache", cache, "--out", out, "--device", "cpu"]
    result = CliRunner().invoke(main, [str(a) for a in command])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert not (out / "index.html").exists()
    return result.output


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Most tests are about which sheets there are, not about their pixels, whose compression takes most of the time."""
    monkeypatch.setattr(feature_page, "png", lambda sheet: "\n".join(texts(sheet)).encode())


def sheets_of(out: Path) -> dict[str, str]:
    """{name of a PNG: the texts drawn on it}."""
    return {file.name: file.read_text() for file in sorted(out.glob("*.png"))}


def test_the_page_shows_the_fitted_scene_and_two_keyframes_with_the_papers_classes(pretrained, cache, tmp_path):
    output = figures(cache, tmp_path, pretrained)
    names = [
        f"run-val-00000{k}-{kind}.png"
        for k in (0, 4)
        for kind in ("correlation-road", "correlation-vehicles", "features")
    ]
    found = sheets_of(tmp_path)
    assert list(found) == names
    assert all(
        "fitted to the run's predictions for d (val, 2 keyframes)" in found[name]
        for name in names
        if "features" in name
    )
    assert "in d (val)" in found["run-val-000004-correlation-road.png"]  # compared with the first keyframe
    assert "6 sheets of 2 keyframes, about" in output and f"written to {tmp_path / 'index.html'}" in output
    page = (tmp_path / "index.html").read_text()
    assert '<p class="simulated">SIMULATED: all of it' in page
    assert not re.search(r"<script|<link|https?://", page)
    assert sorted(re.findall(r'src="([^"]+)"', page)) == names
    assert "step 2" in page


def test_pictures_are_pngs(pretrained, cache, tmp_path, monkeypatch):
    monkeypatch.undo()
    figures(cache, tmp_path, pretrained, "--samples", "1", "--voxel", "0,0,0")
    sizes = [size(file) for file in sorted(tmp_path.glob("*.png"))]
    assert len(sizes) == 2 and all(width == WIDTH for width, _ in sizes)


def test_keyframes_are_chosen_by_number_or_number_of_samples(pretrained, cache, tmp_path):
    figures(cache, tmp_path / "a", pretrained, "--keyframes", "3,1,3", "--of", "road")
    assert {name[:14] for name in sheets_of(tmp_path / "a")} == {"run-val-000001", "run-val-000003"}
    figures(cache, tmp_path / "b", pretrained, "--samples", "3", "--of", "road")
    assert {name[:14] for name in sheets_of(tmp_path / "b")} == {"run-val-000000", "run-val-000002", "run-val-000004"}


def test_the_split_of_the_keyframes_is_chosen(pretrained, cache, tmp_path):
    figures(cache, tmp_path, pretrained, "--split", "train", "--samples", "1", "--of", "road")
    assert "run-train-000000-features.png" in sheets_of(tmp_path)


def test_colours_are_fitted_to_the_scene_that_was_asked_for_which_is_shown_first(pretrained, cache, tmp_path):
    figures(cache, tmp_path / "a", pretrained, "--samples", "1", "--fit-on", "e", "--of", "road")
    found = sheets_of(tmp_path / "a")
    assert {name[:14] for name in found} == {"run-val-000000", "run-val-000002"}
    assert all("predictions for e (val, 3 keyframes)" in text for name, text in found.items() if "features" in name)
    assert all("in e (val)" in text for name, text in found.items() if "road" in name)
    figures(cache, tmp_path / "b", pretrained, "--samples", "1", "--fit-split", "train", "--of", "road")
    found = sheets_of(tmp_path / "b")
    assert {name.rpartition("-")[0][:16] for name in found} >= {"run-train-000000", "run-val-000000"}
    assert all("predictions for a (train, 3 keyframes)" in text for name, text in found.items() if "features" in name)
    figures(
        cache, tmp_path / "c", pretrained, "--samples", "1", "--fit-split", "train", "--fit-on", "c", "--of", "road"
    )
    assert "run-train-000005-features.png" in sheets_of(tmp_path / "c")


def test_the_colours_of_all_keyframes_are_those_fitted_to_the_scene(pretrained, cache, tmp_path, monkeypatch):
    fits: list[np.ndarray] = []
    used: list[Any] = []
    fit, draw = FeatureColors.fit, FeatureSheets.features
    monkeypatch.setattr(FeatureColors, "fit", lambda features: fits.append(features) or fit(features))
    monkeypatch.setattr(
        FeatureSheets, "features", lambda self, colors, to: used.append(colors) or draw(self, colors, to)
    )
    figures(cache, tmp_path, pretrained, "--samples", "2", "--fit-on", "e", "--of", "road")
    task, dataset = opened(pretrained, cache)
    expected = [predict_voxels(task, dataset, keyframe, CPU).predicted.features for keyframe in (2, 3, 4)]
    assert len(fits) == 1 and fits[0] == pytest.approx(np.concatenate(expected), abs=1e-6)
    assert len(used) == 2 and used[0] is used[1]


def test_voxels_and_classes_are_chosen_and_may_be_repeated(pretrained, cache, tmp_path):
    few = ["--samples", "1"]
    figures(
        cache,
        tmp_path,
        pretrained,
        *few,
        "--voxel",
        "0,1.2,-0.4",
        "--voxel",
        "-3,-3,0",
        "--of",
        "crosswalk",
        "--of",
        "vehicles",
    )
    kinds = [name.removeprefix("run-val-000000-") for name in sheets_of(tmp_path)]
    assert sum(kind.startswith("correlation-voxel-") for kind in kinds) == 2
    assert {"correlation-crosswalk.png", "correlation-vehicles.png", "features.png"} <= set(kinds) and len(kinds) == 5


def test_several_runs_have_a_section_each_and_their_own_files(pretrained, cache, tmp_path):
    copy = shutil.copytree(pretrained, tmp_path / "other" / "run")
    checkpoint = next((pretrained / "checkpoints").glob("step-*"))
    output = figures(cache, tmp_path / "out", pretrained, copy, checkpoint, "--samples", "1", "--of", "road")
    names = set(sheets_of(tmp_path / "out"))
    prefixes = ("run", "run-2", f"run-{checkpoint.name}")
    assert names == {f"{name}-val-000000-{kind}.png" for name in prefixes for kind in ("features", "correlation-road")}
    page = (tmp_path / "out" / "index.html").read_text()
    assert re.findall(r"<h2>(\S+)", page) == list(prefixes)
    assert "run-2: step 2" in output


def test_runs_without_features_are_left_out_and_listed(pretrained, cache, tmp_path):
    succeed(*pretrain(cache, tmp_path / "occ", "--occ-only", *steps(1)))
    succeed(*finetune(cache, tmp_path / "seg", *steps(1)))
    runs = [tmp_path / "occ", tmp_path / "seg", tmp_path / "absent"]
    output = figures(cache, tmp_path / "out", *runs, pretrained, "--samples", "1", "--of", "road")
    page = (tmp_path / "out" / "index.html").read_text()
    for run, reason in zip(runs, ("(loss.feat=0)", "(task vehicles)", "no checkpoint in"), strict=True):
        for text in (output, page):
            assert re.search(rf"{re.escape(str(run))} is left out: .*{re.escape(reason)}", text)
    assert len(re.findall("<h2>", page)) == 1
    assert "expected; " in refused(cache, tmp_path / "none", *runs[:2])


def test_a_run_without_an_occupancy_loss_shows_features_where_lidar_is(cache, tmp_path):
    succeed(*pretrain(cache, tmp_path / "feat", "--feat-only", *steps(1)))
    figures(cache, tmp_path / "out", tmp_path / "feat", "--samples", "1", "--of", "road")
    found = sheets_of(tmp_path / "out")
    assert set(found) == {"feat-val-000000-features.png", "feat-val-000000-correlation-road.png"}
    assert not any("predicted to be occupied" in text for text in found.values())
    assert not any("occupancy IoU" in text for text in found.values())


def test_a_cache_without_the_papers_classes_has_no_correlation_map_unless_a_voxel_is_picked(tmp_path):
    write_cache(tmp_path, "train", labels=())
    write_cache(tmp_path, "val", scenes=("d", "d"), labels=())
    succeed(*pretrain(tmp_path, tmp_path / "run", *steps(1)))
    figures(tmp_path, tmp_path / "a", tmp_path / "run")
    assert list(sheets_of(tmp_path / "a")) == ["run-val-000000-features.png", "run-val-000001-features.png"]
    assert "--of road: the cache has no such class: it has no labels" in refused(
        tmp_path, tmp_path / "b", tmp_path / "run", "--of", "road"
    )


def test_a_default_class_that_no_keyframe_has_is_named(pretrained, tmp_path):
    def without_road(arrays: dict[str, np.ndarray]) -> None:
        arrays["labels/map"][:, :, 0] = 0

    write_cache(tmp_path, "val", scenes=("d", "d"), change=without_road)
    output = figures(tmp_path, tmp_path / "out", pretrained)
    assert "no correlation map: --of road: no voxel of that class in d" in output
    assert "no voxel of that class" in refused(tmp_path, tmp_path / "b", pretrained, "--of", "road")


def test_what_is_not_there_is_refused_with_what_is(pretrained, cache, tmp_path):
    out = tmp_path / "out"
    cases = (
        (["--keyframes", "5"], "--keyframes 5: .*val.zarr has keyframes 0 to 4"),
        (["--fit-on", "moon"], "--fit-on moon: .*val.zarr has no usable keyframe of that scene: it has d, e"),
        (["--of", "moon"], "--of moon: the cache has no such class: it has vehicles, road"),
        (["--voxel", "0,99,0"], "--voxel 0,99,0 is outside of the grid"),
        (["--split", "moon"], "moon.zarr"),
        (["--fit-split", "moon"], "moon.zarr"),
    )
    for arguments, message in cases:
        assert re.search(message, refused(cache, out, pretrained, *arguments))
    for arguments, message in (
        (["--keyframes", "1;2"], "'1;2': numbers joined by commas expected, such as 0,5,9"),
        (["--voxel", "1,2"], "'1,2': 3 numbers joined by commas expected, such as 0,12,-0.4"),
        (["--voxel", "1,2,nan"], "'1,2,nan': 3 numbers"),
        (["--samples", "0"], "--samples"),
    ):
        assert message in " ".join(refused(cache, out, pretrained, *arguments, code=2).split())


def test_a_keyframe_whose_frame_is_that_of_a_masked_camera_is_refused(pretrained, tmp_path):
    write_cache(tmp_path, "val", scenes=tuple("ddeee"), change=lambda arrays: mask_camera(arrays, [1], "CAM_FRONT"))
    assert "no grid for it in CAM_FRONT" in refused(tmp_path, tmp_path / "out", pretrained, "--keyframes", "1")


def test_a_cache_with_another_grid_or_teacher_is_refused(pretrained, tmp_path):
    write_cache(tmp_path, "val", scenes=("d", "d"), dim=7)
    assert "features of 7 channels" in refused(tmp_path, tmp_path / "out", pretrained)
    write_cache(tmp_path, "mini_val", scenes=("d", "d"), dim=0)
    assert "no teacher features" in refused(tmp_path, tmp_path / "out", pretrained, "--split", "mini_val")


def test_a_directory_that_cannot_be_written_is_an_error_before_anything_is_drawn(pretrained, cache, tmp_path):
    (tmp_path / "file").touch()
    assert "could not write" in refused(cache, tmp_path / "file" / "out", pretrained)
