"""`occfeat-train figures --rerun`: what a recording holds, and the error without rerun. Skipped without rerun-sdk, which needs NumPy 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from occfeat_targets.pictures.colors import FeatureColors, correlation_scale, rgb
from occfeat_train.report.correlation import cosines, pick_voxel
from occfeat_train.report.feature_page import lowest_shown
from occfeat_train.report.voxel_predictions import predict_voxels
from tests.train.runs import mask_camera, write_cache
from tests.train.test_figures import figures, refused
from tests.train.test_voxel_predictions import CPU, opened

Table = dict[str, list[Any]]


@pytest.fixture
def chunk() -> Any:
    return pytest.importorskip("rerun.chunk", reason="needs rerun-sdk: pip install rerun-sdk, with NumPy 2")


def read(chunk: Any, file: Path) -> dict[str, dict[int | None, Table]]:
    """{entity: {number of the keyframe, None for static values: {column: values}}}."""
    found: dict[str, dict[int | None, Table]] = {}
    for each in chunk.RrdReader(file).stream().to_chunks():
        columns = each.to_record_batch().to_pydict()
        for row in range(each.num_rows):
            time = None if each.is_static else columns["keyframe"][row]
            values = {name: column[row] for name, column in columns.items() if ":" in name and column[row] is not None}
            found.setdefault(each.entity_path.replace("\\", ""), {}).setdefault(time, {}).update(values)
    return found


def rgb_of(boxes: Table) -> np.ndarray:
    """(n, 3) from 0xRRGGBBAA."""
    packed = np.array(boxes["Boxes3D:colors"])
    return np.stack([packed >> shift & 255 for shift in (24, 16, 8)], 1)


def test_a_recording_holds_images_voxels_and_their_colours(chunk, cache, pretrained, tmp_path):
    file = tmp_path / "recordings" / "figures.rrd"
    output = figures(cache, tmp_path, pretrained, "--voxel", "0,0,0", "--rerun", file)
    assert f"recording written to {file}: rerun {file}" in output and (tmp_path / "index.html").exists()
    assert [path.name for path in file.parent.iterdir()] == ["figures.rrd"]
    found = read(chunk, file)
    assert found["/keyframe"].keys() == {0, 1}
    assert "val 4 of" in found["/keyframe"][1]["TextDocument:text"][0]
    assert "SIMULATED: all of it" in found["/notes/run"][None]["TextDocument:text"][0]

    task, dataset = opened(pretrained, cache)
    of = [predict_voxels(task, dataset, keyframe, CPU) for keyframe in (0, 1, 4)]
    colors = FeatureColors.fit(np.concatenate([each.predicted.features for each in of[:2]]))  # those of scene d
    query = pick_voxel((0.0, 0.0, 0.0), of[0])
    scale = correlation_scale(lowest_shown(query, of[0]))
    for name, seen in (("predicted", of[2].predicted), ("target", of[2].target)):
        boxes = found[f"/ego/run/features/{name}"][1]
        np.testing.assert_array_equal(boxes["Boxes3D:centers"], of[2].grid.centers_of(seen.voxels))
        assert 2 * np.array(boxes["Boxes3D:half_sizes"][0]) == pytest.approx(of[2].grid.cell_size[::-1])
        np.testing.assert_array_equal(rgb_of(boxes), colors(seen.features))
        of_query = query.predicted if name == "predicted" else query.target
        shown = rgb_of(found[f"/ego/run/correlation with {query.name}/{name}"][1])
        np.testing.assert_array_equal(shown, rgb(scale, cosines(seen.features, of_query)))


def test_a_masked_camera_has_no_image(chunk, pretrained, tmp_path):
    write_cache(tmp_path, "val", scenes=("d", "d"), change=lambda arrays: mask_camera(arrays, [1], "CAM_BACK"))
    figures(tmp_path, tmp_path, pretrained, "--rerun", tmp_path / "x.rrd")
    found = read(chunk, tmp_path / "x.rrd")
    assert "EncodedImage:blob" in found["/ego/CAM_BACK"][0]
    assert found["/ego/CAM_BACK"][1].keys() == {"Clear:is_recursive"}
    assert found["/ego/CAM_FRONT"][1].keys() >= {"EncodedImage:blob", "Pinhole:resolution", "Transform3D:mat3x3"}


def test_without_rerun_the_error_says_what_to_install_before_anything_is_drawn(
    cache, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rerun", None)
    output = refused(cache, tmp_path / "out", pretrained, "--rerun", tmp_path / "x.rrd")
    assert "needs the package rerun-sdk" in output and "pip install -e '.[train,rerun]'" in output
    assert not list(tmp_path.glob("*.rrd")) and not list(tmp_path.glob("out/*.png"))
