"""One picture of a camera's clean and corrupted images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.corruption import CORRUPTIONS
from occfeat_targets.cache.opening import open_cache
from pipelines import corruption_sheet
from pipelines.corruption_sheet import draw_sheet
from tests.targets.command_line import contents, run
from tests.targets.corrupted_caches import SPLIT, build_clean, make


@pytest.fixture(scope="module")
def clean(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("clean")
    run(*build_clean(city, cache))
    return cache


def test_the_sheet_shows_the_clean_and_the_corrupted_images_and_leaves_the_place_of_a_missing_one_white(clean):
    make(clean, "color-quant", 3)
    sheet = np.asarray(draw_sheet(clean, SPLIT, 1, "CAM_BACK"))
    height, width = 96 + 16, 160
    assert sheet.shape == (8 * height, 4 * width, 3)
    camera = open_cache(clean / f"{SPLIT}.zarr").spec.cameras.index("CAM_BACK")
    row = list(CORRUPTIONS).index("color-quant")
    for folder, column in ((clean, 0), (clean / "corruptions/color-quant-3", 3)):
        shown = sheet[row * height + 16 : (row + 1) * height, column * width : (column + 1) * width]
        assert (shown == contents(folder, SPLIT)["images"][1, camera]).all()
    assert (sheet[16:height, width:] == 255).all()


def test_the_command_says_how_many_caches_are_missing(clean, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["sheet", "--cache", str(clean), "--split", SPLIT, "--out", str(tmp_path / "a.png"), "--folder", "none"],
    )
    corruption_sheet.main()
    assert f"24 of 24 caches are missing, such as {clean}/none/brightness-1/{SPLIT}.zarr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--cache": "nowhere"}, "no cache at nowhere/mini_val.zarr"),
        ({"--split": "mini_vla"}, "mini_vla.zarr (splits there: mini_val)"),
        ({"--camera": "CAM_TOP"}, "--camera CAM_TOP: {cache}/mini_val.zarr has CAM_FRONT_LEFT, "),
        ({"--keyframe": "5"}, "--keyframe 5: {cache}/mini_val.zarr has keyframes 0 to 4"),
    ],
)
def test_the_sheet_of_nothing_is_an_error_of_one_line(clean, tmp_path, monkeypatch, capsys, change, expected):
    given = {"--cache": str(clean), "--split": SPLIT, "--out": str(tmp_path / "sheet.png"), **change}
    monkeypatch.setattr("sys.argv", ["corruption_sheet", *(word for pair in given.items() for word in pair)])
    with pytest.raises(SystemExit) as end:
        corruption_sheet.main()
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert expected.format(cache=clean) in error
