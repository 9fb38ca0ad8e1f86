"""The preview: which keyframes it shows, its page, its command, and the returns that it draws."""

from __future__ import annotations

import re

import numpy as np
import pytest

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid, transform
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.birdseye import occupied_at_body_height
from occfeat_targets.pictures.page import choose_keyframes, read_returns, write_preview
from occfeat_targets.pictures.sheet import WIDTH, draw_keyframe, why_absent
from tests.conftest import random_arrays
from tests.targets.command_line import run
from tests.targets.sheets import make_cache, size, texts


def test_a_skipped_keyframe_is_not_drawn_as_zeros(tmp_path):
    reader = make_cache(tmp_path, [(3, 18, 6)], skipped=[1])
    assert why_absent(reader, 0) is None
    assert why_absent(reader, 1) == ("SKIPPED: this keyframe has no targets", "no JPEG for token1")
    good, skipped = draw_keyframe(reader, 0), draw_keyframe(reader, 1)
    assert skipped.bbox.height < good.bbox.height / 2
    assert len(good.axes) > 6 and not skipped.axes
    assert {"SKIPPED: this keyframe has no targets", "no JPEG for token1"} <= set(texts(skipped))
    assert write_preview(reader.cache, tmp_path / "out", [1], points=True, progress=False).is_file()


def test_a_keyframe_that_is_not_built_yet_is_reported(small_cache, tmp_path):
    with pytest.raises(ValueError, match="nothing of .* is built yet"):
        choose_keyframes(small_cache)
    small_cache.write_shard(0, random_arrays(small_cache, 0), {"skipped": {}, "cosine": None})
    assert choose_keyframes(small_cache) == [0, 1, 2]
    reader = CacheReader(small_cache, allow_incomplete=True)
    assert why_absent(reader, 3)[0] == "NOT BUILT YET"
    assert "NOT BUILT YET" in texts(draw_keyframe(reader, 3))
    assert write_preview(small_cache, tmp_path / "out", [2, 3], progress=False).is_file()


def test_the_page_shows_every_sheet_and_states_what_is_simulated(finished_cache, tmp_path):
    simulated = make_cache(tmp_path / "a", simulated=["the teacher's <weights> are random"])
    page = write_preview(simulated.cache, tmp_path / "out", [0, 2], progress=False)
    text = page.read_text()
    names = sorted(p.name for p in page.parent.glob("*.png"))
    assert names == ["keyframe-000000.png", "keyframe-000002.png"]
    assert all(text.count(f'src="{name}"') == 1 for name in names)
    assert not re.search(r"<script|<link|https?://|src=\"(?!keyframe-)", text)
    assert "SIMULATED: the teacher&#39;s &lt;weights&gt; are random" in text
    assert "token2" in text
    assert simulated.cache.spec.fingerprint in text
    assert size(page.parent / names[1])[0] == WIDTH
    real = write_preview(finished_cache, tmp_path / "real", [0], progress=False).read_text()
    assert "SIMULATED" not in real
    assert "What a healthy picture looks like" in text and "What a healthy picture looks like" in real
    assert "Features have one colour" in real and "Features" not in text  # that cache has no teacher
    assert "LiDAR returns" not in text  # they are not drawn


def test_keyframes_are_chosen_by_number_by_token_or_evenly(finished_cache):
    assert choose_keyframes(finished_cache) == [0, 2, 4, 6]
    assert choose_keyframes(finished_cache, samples=99) == list(range(7))
    assert choose_keyframes(finished_cache, samples=1) == [0]
    assert choose_keyframes(finished_cache, numbers="5, 0", tokens=["token3", "token5"]) == [5, 0, 3]
    with pytest.raises(ValueError, match="numbers joined by commas"):
        choose_keyframes(finished_cache, numbers="1;2")
    with pytest.raises(ValueError, match="no keyframe 7: it has 7"):
        choose_keyframes(finished_cache, numbers="7")
    with pytest.raises(ValueError, match="no sample 'nobody'"):
        choose_keyframes(finished_cache, tokens=["nobody"])


def test_requests_that_a_cache_cannot_fulfil_are_refused_with_the_alternatives(finished_cache, tmp_path):
    reader = CacheReader(finished_cache)
    with pytest.raises(ValueError, match="no grid in frame 'CAM_FRONT': choose one of ego"):
        draw_keyframe(reader, 0, frame="CAM_FRONT")
    with pytest.raises(IndexError, match="keyframe 7 of a cache of 7"):
        draw_keyframe(reader, 7)
    with pytest.raises(ValueError, match="no keyframe 9"):
        write_preview(finished_cache, tmp_path / "out", [9])
    with pytest.raises(ValueError, match="no data set at None: pass --dataroot, or leave --points out"):
        write_preview(finished_cache, tmp_path / "out", [0], points=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="could not write"):
        write_preview(finished_cache, tmp_path / "file" / "out", [0])
    with pytest.raises(ValueError, match="nowhere"):
        read_returns(finished_cache, [0], tmp_path / "nowhere")


def test_the_command_writes_a_page_and_accepts_every_option(city, serial, tmp_path):
    where = ["--cache", serial, "--split", "mini_train"]
    out = run("preview", *where, "--out", tmp_path / "a", "--samples", "2", "--frame", "CAM_BACK").stdout
    assert str(tmp_path / "a" / "index.html") in out
    assert len(list((tmp_path / "a").glob("*.png"))) == 2
    token = CacheReader(serial / "mini_train.zarr").cache.identity.tokens[4]
    run("preview", *where, "--out", tmp_path / "b", "--keyframes", "1", "--token", token)
    assert [p.name for p in sorted((tmp_path / "b").glob("*.png"))] == ["keyframe-000001.png", "keyframe-000004.png"]
    run("preview", *where, "--out", tmp_path / "c", "--keyframes", "1", "--points", "--dataroot", city)
    heights = [size(tmp_path / folder / "keyframe-000001.png")[1] for folder in "bc"]
    assert heights[1] > heights[0] + 300
    refused = run("preview", *where, "--out", tmp_path / "d", "--frame", "moon", check=False)
    assert refused.returncode == 1
    assert "choose one of ego, CAM_FRONT_LEFT" in refused.stderr


def assert_every_return_lies_in_an_occupied_voxel(cache_path):
    reader = CacheReader(cache_path)
    grid = reader.cache.spec.grid
    (points,) = read_returns(reader.cache, [0], None).values()
    for index in range(len(reader.cache.spec.frames)):
        volume = grid.unpack_volume(reader.read("occupancy", 0)[index])
        cells = grid.cells_from_grid @ reader.read("grid_from_ego", 0)[index].astype(np.float64)
        found = np.zeros_like(volume)
        w, h, z = np.floor(transform(cells, points)).astype(int).T
        inside = (z >= 0) & (z < grid.shape[0]) & (h >= 0) & (h < grid.shape[1]) & (w >= 0) & (w < grid.shape[2])
        found[z[inside], h[inside], w[inside]] = True
        assert inside.sum() > 1000
        assert (found != volume).sum() <= 5  # returns at a cell's border


def test_the_returns_shown_lie_in_the_occupied_voxels(serial):
    assert_every_return_lies_in_an_occupied_voxel(serial / "mini_train.zarr")


def test_on_the_real_keyframe_returns_voxels_and_vehicles_coincide(real_sample, tmp_path):
    arguments = ["--dataroot", real_sample, "--cache", tmp_path, "--split", "mini_train", "--teacher", "none"]
    run("build", *arguments, "--label-kinds", "vehicles", "--workers", "0")
    assert_every_return_lies_in_an_occupied_voxel(tmp_path / "mini_train.zarr")
    reader = CacheReader(tmp_path / "mini_train.zarr")
    grid = reader.cache.spec.grid
    volume = grid.unpack_volume(reader.read("occupancy", 0)[0])
    vehicles = grid.unpack_map(reader.read("labels/vehicles", 0)[0])
    occupied = occupied_at_body_height(volume, grid, inverse_rigid(GRID_FROM_EGO_AXES))
    assert occupied[vehicles].mean() > 10 * occupied[~vehicles].mean()
    mirrored = vehicles[:, ::-1]
    assert occupied[mirrored].mean() < 0.5 * occupied[vehicles].mean()
