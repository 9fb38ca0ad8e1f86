"""Options that change a cache's contents: each has its documented effect, and `verify` agrees."""

from __future__ import annotations

import json

import numpy as np
import pytest

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.opening import open_cache
from tests.targets.command_line import GRID, build_arguments, contents, run


def built(city, cache, teacher, *more):
    run(*build_arguments(city, cache, teacher, "--workers", "0", *more))
    verified = run("verify", "--cache", cache, "--split", "mini_train", "--samples", "2", check=False)
    assert verified.returncode == 0, verified.stdout
    return contents(cache)


def cells(packed: np.ndarray) -> int:
    return int(np.unpackbits(packed).sum())


def test_another_grid_and_range_hold_the_same_occupancy_in_other_cells(city, tmp_path, expected):
    found = built(city, tmp_path, "none", "--grid", "4x50x30", "--range", "-5", "5", "-25", "25", "-15", "15")
    grid = open_cache(tmp_path / "mini_train.zarr").spec.grid
    assert grid == VoxelGrid((4, 50, 30), (-5, -25, -15), (5, 25, 15))
    coarse = grid.unpack_volume(found["occupancy"][:, 0])
    fine = GRID.unpack_volume(expected["occupancy"][:, 0])[..., 20:80]
    merged = fine.reshape(10, 4, 2, 50, 2, 30, 2).any(axis=(2, 4, 6))
    np.testing.assert_array_equal(coarse, merged)


def test_compat_simple_bev_draws_vehicles_larger(city, tmp_path, expected):
    found = built(city, tmp_path, "none", "--compat", "simple-bev")
    ours = cells(expected["labels/vehicles"][:, 0])
    assert 1.15 * ours < cells(found["labels/vehicles"][:, 0]) < 2 * ours


def test_lane_dividers_join_the_divider_class(city, tmp_path, expected):
    found = built(city, tmp_path, "none", "--dividers", "road+lane")
    assert not (expected["labels/map"][:, 0, 4] & ~found["labels/map"][:, 0, 4]).any()
    assert cells(found["labels/map"][:, 0, 4]) > 1.2 * cells(expected["labels/map"][:, 0, 4])
    np.testing.assert_array_equal(found["labels/map"][:, :, :4], expected["labels/map"][:, :1, :4])


def test_pre_norm_features_differ_and_are_verified(city, tiny_teacher, tmp_path, expected):
    found = built(city, tmp_path, tiny_teacher, "--teacher-layer", "pre-norm", "--device", "cpu")
    assert not np.allclose(found["features"], expected["features"], atol=0.1)
    information = run("info", "--cache", tmp_path, "--split", "mini_train", "--json").stdout
    assert json.loads(information)["spec"]["teacher"]["layer"] == "pre-norm"
    assert json.loads(information)["finished_shards"] == [0, 1, 2, 3, 4]


def test_frames_cameras_equals_frames_both_without_the_ego_frame(city, tmp_path, expected):
    found = built(city, tmp_path, "none", "--frames", "cameras")
    np.testing.assert_array_equal(found["occupancy"], expected["occupancy"][:, 1:])
    np.testing.assert_array_equal(found["grid_from_ego"], expected["grid_from_ego"][:, 1:])


def test_environment_variables_replace_dataroot_and_cache(city, tmp_path, monkeypatch):
    monkeypatch.setenv("NUSCENES_ROOT", str(city))
    monkeypatch.setenv("OCCFEAT_CACHE", str(tmp_path / "there"))
    run("build", "--split", "mini_val", "--teacher", "none", "--image-size", "96x160", "--workers", "0")
    assert "5 of 5 keyframes" in run("status", "--split", "mini_val").stdout


@pytest.mark.parametrize(
    "option", [["--grid", "8x200"], ["--image-size", "axb"], ["--label-kinds", "boxes"], ["--shard", "1"]]
)
def test_malformed_options_are_refused(city, tmp_path, option):
    result = run(*build_arguments(city, tmp_path, "none", *option), check=False)
    assert result.returncode == 2
    assert option[1] in result.stderr


@pytest.mark.slow
def test_synth_writes_the_requested_city(tmp_path):
    out = tmp_path / "city"
    asked = ["--scenes", "1", "--val-scenes", "1", "--keyframes", "2", "--image-size", "90x160", "--sweeps", "2"]
    run("synth", "--out", out, *asked, "--seed", "5", "--version", "v1.0-trainval", "--workers", "1")
    scenes, samples, files = (
        json.loads((out / "v1.0-trainval" / f"{table}.json").read_text())
        for table in ("scene", "sample", "sample_data")
    )
    assert len(scenes) == 2
    assert len(samples) == 4
    assert {(r["height"], r["width"]) for r in files if r["fileformat"] == "jpg"} == {(90, 160)}
    again = run("synth", "--out", out, *asked, check=False)
    assert again.returncode == 1
    assert str(out) in again.stderr
