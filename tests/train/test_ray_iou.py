"""RayIoU: closed forms, and depths against a float64 loop over all occupied voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.tasks.ray_iou import (
    DEPTH_ERRORS,
    count_rays,
    first_depths,
    query_directions,
    ray_counts,
    ray_ious,
)

GRID = VoxelGrid((8, 40, 40), (-5, -20, -20), (5, 20, 20))  # cells of 1 m, 1.25 m high
AHEAD = np.array([[0.0, 1.0, 0.0]])


def wall(distance: int, thickness: int = 1, grid: VoxelGrid = GRID) -> np.ndarray:
    """(Z, H, W) with a wall over the whole width and height whose near side is `distance` [m] ahead."""
    volume = np.zeros(grid.shape, np.bool_)
    first = distance + grid.shape[1] // 2
    volume[:, first : first + thickness] = True
    return volume


def slow_depths(volume: np.ndarray, origin: np.ndarray, directions: np.ndarray, grid: VoxelGrid) -> np.ndarray:
    """The twin: the nearest entry into any occupied voxel, each as an interval of three slabs."""
    lower, size = np.array(grid.lower[::-1]), np.array(grid.cell_size[::-1])
    depths = np.full(len(directions), np.inf)
    for z, h, w in np.argwhere(volume):
        low = lower + [w, h, z] * size
        for i, direction in enumerate(directions):
            safe = np.where(direction == 0, 1e-300, direction)
            entry, leave = np.sort([(low - origin) / safe, (low + size - origin) / safe], axis=0)
            near = max(entry.max(), 0.0)
            if near < leave.min():
                depths[i] = min(depths[i], near)
    return depths


def ious(predicted: np.ndarray, true: np.ndarray, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> list[float]:
    """RayIoU at 1, 2 and 4 m."""
    depths = first_depths(true, np.array(origin), query_directions(), GRID)
    counts = ray_counts(torch.from_numpy(predicted)[None], torch.from_numpy(depths)[None], torch.tensor([origin]), GRID)
    found = ray_ious(counts)
    assert found.pop("ray_iou") == pytest.approx(np.mean(list(found.values())))
    return list(found.values())


# -- depths -----------------------------------------------------------------------------------------------------------


def test_a_wall_at_10_m_is_at_exactly_10_m_ahead_and_further_at_an_angle() -> None:
    directions = query_directions()
    depths = first_depths(wall(10), np.zeros(3), directions, GRID)
    assert first_depths(wall(10), np.zeros(3), AHEAD, GRID).tolist() == [10]
    met = np.isfinite(depths)
    np.testing.assert_allclose(depths[met] * directions[met, 1], 10, rtol=1e-14)
    reach = 10 * directions / np.where(directions[:, 1] > 0, directions[:, 1], 1)[:, None]  # in the plane of the wall
    inside = (directions[:, 1] > 0) & (np.abs(reach[:, 0]) < 20) & (np.abs(reach[:, 2]) < 5)
    on_border = np.isclose(np.abs(reach[:, 2]), 5) | np.isclose(np.abs(reach[:, 0]), 20)
    np.testing.assert_array_equal(met[~on_border], inside[~on_border])
    assert met.sum() > 1000


def test_the_depth_is_0_in_an_occupied_voxel_and_infinite_where_nothing_is_met() -> None:
    full = np.ones(GRID.shape, np.bool_)
    assert first_depths(full, np.array([0.3, 0.2, 0.1]), query_directions(), GRID).max() == 0
    assert np.isinf(first_depths(~full, np.zeros(3), query_directions(), GRID)).all()
    assert np.isinf(first_depths(wall(10), np.zeros(3), -AHEAD, GRID)).all()


def test_rays_from_outside_start_at_the_border_and_may_miss_the_grid() -> None:
    full = np.ones(GRID.shape, np.bool_)
    assert first_depths(full, np.array([0.5, -30.0, 0.5]), AHEAD, GRID).tolist() == [10]
    assert first_depths(wall(10), np.array([0.5, -30.0, 0.5]), AHEAD, GRID).tolist() == [40]
    for beside in ([25.0, -30.0, 0.5], [0.5, 30.0, 0.5], [20.0, -30.0, 0.5]):
        assert np.isinf(first_depths(full, np.array(beside), AHEAD, GRID)).all()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 7)] * 3),
    st.floats(0.01, 0.5),
    st.sampled_from([0.5, 3.0, 20.0]),
)
def test_depths_equal_a_loop_over_all_voxels(seed: int, shape: tuple[int, int, int], share: float, away: float) -> None:
    rng = np.random.default_rng(seed)
    lower = rng.uniform(-3, 0, 3)
    grid = VoxelGrid(shape, tuple(lower), tuple(lower + rng.uniform(0.5, 6, 3)))  # type: ignore[arg-type]
    volume, origin = rng.random(grid.shape) < share, away * rng.standard_normal(3)
    directions = rng.standard_normal((30, 3))
    directions[0], directions[1:4] = (0, 0, 1), np.eye(3) * -1
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    fast, slow = first_depths(volume, origin, directions, grid), slow_depths(volume, origin, directions, grid)
    np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-9)


def test_query_rays_are_those_of_sparseocc() -> None:
    directions = query_directions()
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    elevations = np.unique(np.arcsin(directions[:, 2]).round(9))
    assert len(directions) == 360 * len(elevations)
    ground = 1 / np.tan(-elevations[:10])
    np.testing.assert_allclose(ground, range(1, 11), rtol=1e-6)
    assert elevations[-2] < 0.21 <= elevations[-1] < 0.221
    np.testing.assert_allclose(np.diff(elevations[8:]), elevations[9] - elevations[8], atol=1e-6)


# -- RayIoU -----------------------------------------------------------------------------------------------------------


def test_a_perfect_prediction_has_a_ray_iou_of_100() -> None:
    true = np.random.default_rng(0).random(GRID.shape) < 0.02
    assert ious(true, true) == [100, 100, 100]


def test_a_prediction_of_nothing_has_a_ray_iou_of_0() -> None:
    assert ious(np.zeros(GRID.shape, np.bool_), wall(10)) == [0, 0, 0]


@pytest.mark.parametrize(
    ("shift", "expected"), [(0, [1, 1, 1]), (1, [0, 1, 1]), (2, [0, 0, 1]), (3, [0, 0, 1]), (4, [0, 0, 0])]
)
def test_depth_errors_count_below_their_threshold(shift: int, expected: list[int]) -> None:
    """The error straight ahead is `shift`; the comparison is strict, as in SparseOcc."""
    true, predicted = (first_depths(wall(d), np.zeros(3), AHEAD, GRID) for d in (10, 10 + shift))
    assert count_rays(true, predicted).tolist() == [1, 1, *expected]


def test_thickness_behind_a_surface_does_not_count_and_voxels_before_it_do() -> None:
    assert ious(wall(10, thickness=5), wall(10)) == [100, 100, 100]
    assert ious(wall(5, thickness=6), wall(10)) == [0, 0, 0]


def test_rays_without_a_true_depth_do_not_count() -> None:
    behind = wall(-10)
    assert ious(wall(10) | behind, wall(10)) == [100, 100, 100]
    assert ray_ious(torch.from_numpy(count_rays(np.array([np.inf]), np.array([3.0])))) == dict.fromkeys(
        ("ray_iou", "ray_iou_1m", "ray_iou_2m", "ray_iou_4m")
    )


def test_missed_rays_lower_the_iou_by_their_share() -> None:
    """Of 4 rays one is met at the right depth, one 3 m too far, one is missed, and one has no true depth."""
    counts = count_rays(np.array([5, 5, 5, np.inf]), np.array([5.5, 8, np.inf, 2]))
    assert counts.tolist() == [3, 2, 1, 1, 2]
    found = ray_ious(torch.from_numpy(counts))
    assert found["ray_iou_1m"] == pytest.approx(100 / 4)
    assert found["ray_iou_4m"] == pytest.approx(100 * 2 / 3)


def test_samples_are_summed_before_the_division() -> None:
    origins = torch.tensor([[0.0, 0.0, 0.0], [0.5, -3.0, 1.0]])
    volumes = torch.from_numpy(np.random.default_rng(1).random((2, 2, *GRID.shape)) < 0.02)
    true = [first_depths(volumes[1, i].numpy(), origins[i].numpy(), query_directions(), GRID) for i in range(2)]
    depths = torch.from_numpy(np.stack(true))
    total = ray_counts(volumes[0], depths, origins, GRID)
    each = [ray_counts(volumes[0, i : i + 1], depths[i : i + 1], origins[i : i + 1], GRID) for i in range(2)]
    assert total.tolist() == (each[0] + each[1]).tolist()
    with_depth, found, *hits = total.tolist()
    assert with_depth >= found >= max(hits) > 0
    assert math.isclose(ray_ious(total)["ray_iou_2m"] or 0, 100 * hits[1] / (with_depth + found - hits[1]))
    assert list(DEPTH_ERRORS) == [1, 2, 4]
