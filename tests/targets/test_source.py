"""A new data set is a class and a row in SOURCES. It may have any number, size and orientation of cameras, and LiDAR points."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import occfeat_train
from occfeat_targets import voxelize
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.targets.images import load_image_reference
from occfeat_train.cli import main as train
from tests.targets.command_line import run
from tests.targets.toy_source import SECONDS, SIZES, WHERE, ToySource, build, ego_from_lidar, invoke, pretrain, returns


def test_a_toy_source_is_built_verified_previewed_and_trained_on(toy, tiny_teacher, tmp_path):
    cache = tmp_path / "cache"
    built = build(toy, cache, tiny_teacher)
    assert "all of 1: 4 keyframes of 2 scenes" in built.stdout
    assert "no map labels: the toy has no maps" in built.stdout
    assert "finished: 2 of 2 shards" in run("status", *WHERE, cache).stdout
    information = run("info", *WHERE, cache).stdout
    assert "all of toy 1 at" in information
    assert "images 48x80 of 3 cameras" in information
    planned, read = (run("verify", *WHERE, cache, "--samples", "2", *tables).stdout for tables in ([], ["--tables"]))
    assert "paths, transforms and boxes are those of the build's plan" in planned
    assert "toy has no independent reader" in read
    assert planned.count(" 0 voxels wrong") == read.count(" 0 voxels wrong") == 2
    run("preview", *WHERE, cache, "--out", tmp_path / "preview", "--points", "--samples", "1", "--frame", "tall")
    reader = CacheReader(cache / "all.zarr")
    assert reader.cache.spec.cameras == tuple(SIZES) and reader.cache.spec.frames == ("ego", *SIZES)
    assert reader.read("occupancy", 0).any(axis=1).all()
    assert "4 keyframes read" in invoke(train, "check", *WHERE, cache)
    pretrain(cache, tmp_path / "run")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 2


def test_the_filter_of_the_ego_vehicles_returns_is_the_sources(toy, tmp_path, monkeypatch):
    spec, more = {}, {}
    for box in (ToySource.ego_box, 0):
        monkeypatch.setattr(ToySource, "ego_box", box)
        build(toy, tmp_path / str(box), "none", "--points")
        reader = CacheReader(tmp_path / str(box) / "all.zarr")
        spec[box], more[box] = reader.cache.spec, len(reader.points(0).xyz) - len(returns())
    assert {box: s.ego_box for box, s in spec.items()} == {2.15: 2.15, 0: 0}
    assert more == {2.15: -3, 0: 0}
    assert run("verify", *WHERE, tmp_path / "0").stdout.count(" 0 voxels wrong") == 3


def test_an_unknown_source_is_refused_with_the_list_of_sources(tmp_path):
    refused = run("build", "--source", "kitti", "--split", "train", "--cache", tmp_path, check=False)
    assert refused.returncode == 2
    assert "'kitti' is not 'nuscenes'" in refused.stderr
    assert "reading" not in refused.stdout


AREAS = {"front": (0, 0, 48, 80), "tall": (0, 26, 48, 53), "wide": (14, 0, 34, 80)}  # in images of 48x80


def test_images_of_other_proportions_are_scaled_to_fit_and_the_rest_is_black(toy, tmp_path):
    build(toy, tmp_path, "none")
    reader = CacheReader(tmp_path / "all.zarr")
    assert reader.read("image_area", 1).tolist() == [list(AREAS[name]) for name in SIZES]
    assert reader.read("camera_valid", 1).all()
    for camera, (name, (height, width)) in enumerate(SIZES.items()):
        top, left, bottom, right = AREAS[name]
        image = reader.read("images", 1)[camera].astype(int)
        (expected,) = load_image_reference(toy / name / "1.jpg", [(bottom - top, right - left)])
        assert np.abs(image[top:bottom, left:right] - expected).max() <= 3
        assert image.sum() == image[top:bottom, left:right].sum()
        # The corners of the source image are the corners of the area.
        source = np.array([[80.0, 0, width / 2], [0, 80, height / 2], [0, 0, 1]])
        rays = np.linalg.inv(source) @ [[0, width], [0, height], [1, 1]]
        corners = reader.read("intrinsics", 1)[camera] @ rays
        np.testing.assert_allclose(corners, [[left, right], [top, bottom], [1, 1]], atol=1e-4)


def test_features_cover_the_same_part_of_the_teachers_input(toy, tiny_teacher, tmp_path, monkeypatch):
    seen = []
    call = "occfeat_targets.targets.teacher.LoadedTeacher.__call__"
    monkeypatch.setattr(call, lambda self, images: seen.append(images) or np.ones((len(images), 4, 7, 32), np.float32))
    build(toy, tmp_path, tiny_teacher)
    for image, (top, left, bottom, right) in zip(seen[0], AREAS.values(), strict=True):
        used = [round(n * scale) for n, scale in zip((top, left, bottom, right), (56 / 48, 98 / 80) * 2, strict=True)]
        filled = image.any(axis=-1)
        rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
        assert [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1] == used


def test_an_image_that_would_be_enlarged_is_refused(toy, tmp_path):
    build(toy, tmp_path / "a", "none", "--image-size", "96x160")  # the size of front; the others are scaled down to fit
    for on_error in ("fail", "skip", "mask-camera"):
        refused = build(toy, tmp_path / "b", "none", "--image-size", "98x162", "--on-error", on_error, check=False)
        assert refused.returncode == 1
        assert "162x98 was requested, and images are never enlarged" in refused.stderr
        assert not (tmp_path / "b").exists()  # found when planning


def test_cached_points_contain_all_sweeps_and_give_their_occupancy_on_any_grid(toy, tmp_path):
    build(toy, tmp_path / "points", "none", "--sweeps", "2", "--points", "--frames", "cameras")
    assert "LiDAR points of each keyframe, at most 2000" in run("info", *WHERE, tmp_path / "points").stdout
    reader = CacheReader(tmp_path / "points" / "all.zarr")
    points = reader.points(3)
    each = len(returns()) - 3
    assert points.xyz.shape == (2 * each, 3) and points.sweep.tolist() == [0] * each + [1] * each
    np.testing.assert_array_equal(points.intensity, np.tile(returns()[:-3, 3], 2))
    np.testing.assert_allclose(points.origins, [ego_from_lidar(i)[:3, 3] for i in (0, 1)], atol=1e-6)
    np.testing.assert_array_equal(points.times, np.float32(SECONDS))
    distances = np.linalg.norm((points.xyz - points.origins[points.sweep])[:, :2], axis=1)
    np.testing.assert_allclose(distances, 6.03, atol=1e-5)

    other = ("--grid", "5x30x20", "--range", "-1", "3", "-9", "9", "-7", "7", "--sweeps", "2", "--dynamic", "smear")
    build(toy, tmp_path / "other", "none", *other)
    grids = CacheReader(tmp_path / "other" / "all.zarr")
    grid = grids.cache.spec.grid
    for packed, grid_from_ego in zip(grids.read("occupancy", 3), grids.read("grid_from_ego", 3), strict=True):
        np.testing.assert_array_equal(
            voxelize(points.xyz, grid, grid_from_points=grid_from_ego), grid.unpack_volume(packed)
        )

    verified = run("verify", *WHERE, tmp_path / "points", "--samples", "2").stdout
    assert verified.count(f"{2 * each:,} LiDAR points within") == 2
    shutil.rmtree(toy)
    run("preview", *WHERE, tmp_path / "points", "--out", tmp_path / "preview", "--points", "--samples", "1")
    dataset = occfeat_train.open_cache(tmp_path / "points" / "all.zarr")
    np.testing.assert_array_equal(dataset.points(3).xyz, points.xyz)
    with pytest.raises(CacheError, match="has no array 'points'"):
        grids.points(0)


def test_more_returns_than_the_maximum_of_a_source_are_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.targets.toy_source.ToySource.max_returns", 100)
    refused = build(toy, tmp_path, "none", "--points", check=False)
    assert refused.returncode == 1
    assert "LiDAR returns, and the cache has room for 100: correct max_returns of the source" in refused.stdout
