"""The depth test of target features: closed forms, a slow float64 reference, both samplers, training."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.cache.geometry import transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import LossConfig
from occfeat_train.ops.mean_over_views import sample_voxel_features, sample_voxel_features_numpy
from occfeat_train.ops.occlusion import hidden_voxels
from occfeat_train.ops.views import Cameras
from pipelines.occlusion import main
from tests.train.runs import config_of, evaluate, pretrain, refuse, steps, succeed
from tests.train.test_sampling import BACKWARD, FORWARD, PINHOLE, SIZE

CUBES = (0.5, 0.5, 0.5)


def cameras_of(cam_from_grid: np.ndarray, area: np.ndarray | None = None) -> Cameras:
    """Cameras with PINHOLE."""
    matrices = torch.from_numpy(PINHOLE @ cam_from_grid[..., :3, :])
    return Cameras.from_matrices(matrices, SIZE, None if area is None else torch.from_numpy(area))


def wall(forward: float, right: np.ndarray, up: np.ndarray) -> np.ndarray:
    """(n, 3) centres of voxels side by side."""
    return np.array([(x, forward, z) for x in right for z in up])


def hidden_in_front(centers: np.ndarray, cell_size: tuple[float, float, float] = CUBES) -> np.ndarray:
    """(n,) of one camera at the origin that looks forward."""
    return hidden_voxels(centers, cell_size, cameras_of(FORWARD[None]))[0]


# -- closed forms -----------------------------------------------------------------------------------------------------

BETWEEN = np.arange(-1, 1.1, 0.5)


def test_a_wall_hides_a_smaller_wall_behind_it():
    near, far = wall(4, BETWEEN, BETWEEN), wall(8, BETWEEN, BETWEEN)
    hidden = hidden_in_front(np.concatenate([far, near]))
    assert hidden[: len(far)].all() and not hidden[len(far) :].any()


def test_a_voxel_is_seen_through_a_hole():
    near = wall(4, BETWEEN, BETWEEN)
    far = [0, 8, 0]
    assert hidden_in_front(np.array([*near, far]))[-1]
    with_hole = near[(near[:, [0, 2]] != 0).any(1)]
    assert not hidden_in_front(np.array([*with_hole, far]))[-1]


def test_a_voxel_of_which_any_part_is_seen_is_not_hidden():
    """The wall ends at 1.25 m in 4 m distance, so its shadow ends at 2.5 m in 8 m: slightly less at a voxel's near side."""
    near = wall(4, BETWEEN, BETWEEN)
    for right, expected in ((2.0, True), (2.5, False), (3.0, False)):
        assert hidden_in_front(np.array([*near, [right, 8, 0]]))[-1] == expected


def test_voxels_closer_than_a_diagonal_do_not_hide_each_other():
    near, diagonal = wall(4, BETWEEN, BETWEEN), np.sqrt(3) / 2
    for behind, expected in ((diagonal - 0.01, False), (diagonal + 0.01, True)):
        assert hidden_in_front(np.array([*near, [0, 4 + behind, 0]]))[-1] == expected


def test_a_road_does_not_hide_itself():
    """The default grid's voxels, and a camera 1.6 m above their centres. The line of sight to most centres passes other voxels of the road."""
    up, forward, right = cell_size = VoxelGrid().cell_size
    size, tenfold = (400, 600), np.diag([10.0, 10, 1]) @ PINHOLE
    camera = Cameras.from_matrices(torch.from_numpy(tenfold @ FORWARD[None, :3]), size)
    road = np.array([(x * right, y * forward, -1.6) for x in range(-40, 41) for y in range(6, 50)])
    assert not hidden_voxels(road, cell_size, camera).any()
    fence = np.array([(x * right, 3.0, -1.6 + z * up) for x in range(-40, 41) for z in range(3)])
    hidden = hidden_voxels(np.concatenate([road, fence]), cell_size, camera)[0, : len(road)]
    in_view = np.abs(road[:, 0]) < road[:, 1] - 0.5
    np.testing.assert_array_equal(hidden[in_view], (road[:, 1] > 3 + np.linalg.norm(cell_size))[in_view])


def test_voxels_around_or_behind_a_camera_hide_nothing_and_are_not_hidden():
    far = [0.0, 8, 0]
    for y in (0.0, 0.2, -0.2, -4):
        assert not hidden_in_front(np.array([[0.1, y, 0.1], far])).any()
    assert not hidden_voxels(np.array([[0.0, 4, 0], far]), CUBES, cameras_of(np.zeros((1, 4, 4)))).any()  # masked


def test_only_the_part_that_shows_the_scene_counts():
    """Behind the right border of a narrow wall, half a voxel is hidden: the half that is inside the area."""
    centers = np.array([*wall(4, np.array([-0.5, 0]), BETWEEN), [0.5, 8, 0]])  # the voxel covers columns 31 to 33
    areas = np.array([[0, 0, 40, 60], [0, 0, 40, 31.5]])
    whole, narrow = hidden_voxels(centers, CUBES, cameras_of(np.stack([FORWARD] * 2), areas))[:, -1]
    assert not whole and narrow


# -- slow reference ---------------------------------------------------------------------------------------------------


def slow_hidden(
    centers: np.ndarray, cell_size: tuple[float, float, float], cam_from_grid: np.ndarray, area: np.ndarray
) -> np.ndarray:
    """(n,) of one camera, with a mask of the image for each voxel."""
    corners = np.array(list(product((-0.5, 0.5), repeat=3))) * cell_size[::-1]
    depths = transform(cam_from_grid, centers)[:, 2]
    row, column = np.mgrid[: SIZE[0], : SIZE[1]]
    in_area = (row + 1 > area[0]) & (row < area[2]) & (column + 1 > area[1]) & (column < area[3])
    drawn, touched = np.zeros((2, len(centers), *SIZE), bool)
    for i, center in enumerate(centers):
        at = transform(cam_from_grid, center + corners) @ PINHOLE.T
        if (at[:, 2] > 0).all():
            (left, top), (right, bottom) = ((at[:, :2] / at[:, 2:]).min(0), (at[:, :2] / at[:, 2:]).max(0))
            drawn[i] = (left <= column + 0.5) & (column + 0.5 <= right) & (top <= row + 0.5) & (row + 0.5 <= bottom)
            touched[i] = in_area & (left < column + 1) & (right >= column) & (top < row + 1) & (bottom >= row)
    diagonal = np.linalg.norm(cell_size)
    covered = [drawn[depths < depth - diagonal].any(0) for depth in depths]
    return np.array([mask.any() and cover[mask].all() for mask, cover in zip(touched, covered, strict=True)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_kernel_equals_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    grid = VoxelGrid((4, 12, 12), (-2, 0, -3), (2, 9, 3))
    volume = rng.random(grid.shape) < rng.choice([0.05, 0.3])
    volume[:, 4, 2:10] |= rng.random() < 0.5  # a wall
    centers = grid.centers_of(np.flatnonzero(volume)).astype(float)
    turn, _ = np.linalg.qr(np.eye(3) + 0.2 * rng.standard_normal((3, 3)))
    cams = np.stack([FORWARD, FORWARD])
    cams[0, :3] = turn * np.sign(np.diag(turn)) @ FORWARD[:3]
    cams[:, :3, 3] += rng.standard_normal((2, 3)) * (0.5, 0.5, 1.5)
    areas = np.array([[0, 0, 40, 60], [3.5, 7.25, 30.75, 44]])
    found = hidden_voxels(centers, grid.cell_size, cameras_of(cams, areas))
    for view in range(2):
        expected = slow_hidden(centers, grid.cell_size, cams[view], areas[view])
        np.testing.assert_array_equal(found[view], expected)


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_hidden_view_is_left_out_of_the_mean(backend):
    """Two cameras face each other with a wall between them. Each sees the voxel on its own side."""
    opposite = BACKWARD.copy()
    opposite[2, 3] = 12.0  # at forward = 12
    cams, pinholes = np.stack([FORWARD, opposite]), np.stack([PINHOLE] * 2)
    maps = np.stack([np.full((4, 6, 8), value, np.float16) for value in (1, 3)])
    centers = np.concatenate([[[0, 3, 0], [0, 9, 0], [5, 6, 0]], wall(6, BETWEEN, BETWEEN)]).astype(np.float32)
    if backend == "numba":
        results = [
            sample_voxel_features_numpy(maps, None, cams, pinholes, SIZE, centers, cell_size=size, dtype="float32")
            for size in (None, CUBES)
        ]
    else:
        tensors = [torch.from_numpy(array) for array in (maps.astype(np.float32), cams, pinholes, centers)]
        leaf = tensors[0].requires_grad_()
        results = []
        for size in (None, CUBES):
            features, views = sample_voxel_features(leaf, *tensors[1:3], SIZE, tensors[3], cell_size=size)
            results.append((features.detach().numpy(), views.numpy()))
            leaf.grad = None
            features[0].sum().backward()
            sums = leaf.grad.sum((1, 2, 3)).tolist()
            assert sums == (
                [4, 4] if size is None else [8, 0]
            )  # of 8 channels: only the view that sees the first voxel
    (without, all_views), (tested, views) = results
    assert all_views[:3].tolist() == [2, 2, 2] and without[:3, 0].tolist() == [2, 2, 2]
    assert views[:3].tolist() == [1, 1, 2] and tested[:3, 0].tolist() == [1, 3, 2]


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_run_with_a_depth_test_is_trained_and_evaluated(cache: Path, tmp_path: Path):
    run = tmp_path / "run"
    succeed(*pretrain(cache, run, "--occlusion", "zbuffer", *steps(1)))
    assert config_of(run)["loss"]["occlusion"] == "zbuffer"
    assert "mean cosine" in succeed(*evaluate(run, cache))


def test_other_values_and_runs_without_features_are_refused(cache: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="occlusion='rays': one of none, zbuffer expected"):
        LossConfig(occlusion="rays")  # type: ignore[arg-type]
    message = refuse(*pretrain(cache, tmp_path / "run", "--occ-only", "--occlusion", "zbuffer"))
    assert "--occlusion is about the feature loss, which this run does not have" in message


# -- pipelines/occlusion.py -------------------------------------------------------------------------------------------


def rows_of(*arguments: str) -> dict[tuple[str, str], list[float]]:
    output = CliRunner().invoke(main, arguments, catch_exceptions=False).output
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")][2:]
    return {(cells[0], cells[1]): [float(value) for value in cells[2:]] for cells in lines}


def test_the_table_of_a_cache(cache: Path):
    rows = rows_of("--cache", str(cache / "train.zarr"))
    assert list(rows) == [("train.zarr", "depth test"), ("train.zarr", "line of sight to the centre")]
    assert all(0 <= value <= 100 for row in rows.values() for value in row)


def test_a_folder_that_is_no_cache_is_an_error_of_one_line(tmp_path: Path):
    refused = CliRunner().invoke(main, ["--cache", str(tmp_path)])
    assert refused.exit_code == 1 and refused.output.startswith("error: no cache at")


@pytest.mark.slow
def test_the_depth_test_finds_what_is_hidden_in_a_small_city(tmp_path: Path):
    rows = rows_of("--out", str(tmp_path / "city"), "--scenes", "1", "--keyframes", "2", "--sweeps", "5")
    assert list(dict.fromkeys(targets for targets, _ in rows)) == ["1 sweep", "5 sweeps, smear", "5 sweeps, carve"]
    for targets, test in rows:
        left_out, _, hidden, precision, recall, hidden_after = rows[targets, test]
        assert hidden_after < hidden / 2 and recall > 70
        if test == "depth test":
            simple = rows[targets, "line of sight to the centre"]
            assert left_out < simple[0] / 2 and precision > 2 * simple[3]
