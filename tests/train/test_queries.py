"""Img-ALSO's queries: where they lie, what they are told, and which cells are near; against slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.queries import DELTA, NO_INTENSITY, columns_near, decimate, draw_queries

SENSOR = np.array([1.0, 0.0, 1.8])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def wall(number: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Returns of a wall 10 m before the sensor, and intensities from 0 to 255."""
    spread = rng(1).uniform(-5, 5, (number, 2))
    return np.c_[np.full(number, SENSOR[0] + 10), spread], np.linspace(0, 255, number, dtype=np.float32)


# -- decimation -------------------------------------------------------------------------------------------------------


def test_the_first_return_of_a_cell_is_kept():
    xyz = np.array([[0.31, 0, 0], [0.35, 0.05, 0.09], [0.42, 0, 0], [0.39, 0.01, 0]])
    assert decimate(xyz).tolist() == [0, 2]


def test_cells_beside_zero_are_as_large_as_others():
    """Rounding towards zero would put both in one cell."""
    assert decimate(np.array([[-0.05, 0, 0], [0.05, 0, 0]])).tolist() == [0, 1]


def test_no_return_is_decimated_to_none():
    assert decimate(np.empty((0, 3))).tolist() == []


@settings(max_examples=50)
@given(arrays(np.float64, (40, 3), elements=st.floats(-0.5, 0.5)))
def test_decimation_equals_a_loop(xyz):
    seen, kept = set(), []
    for index, point in enumerate(xyz):
        cell = tuple(int(np.floor(value / 0.1)) for value in point)
        if cell not in seen:
            seen.add(cell)
            kept.append(index)
    assert decimate(xyz).tolist() == kept


# -- queries ----------------------------------------------------------------------------------------------------------


def slow_queries(xyz, intensity, sensor, generator, number):
    """One query at a time, in the same order of random numbers."""
    third = number // 3
    sources = [
        (kind, index)
        for kind, count in (("front", third), ("sight", third), ("behind", number - 2 * third))
        for index in generator.permutation(len(xyz))[:count]
    ]
    found = []
    for (kind, index), u in zip(sources, generator.random(len(sources)), strict=True):
        ray = xyz[index] - sensor
        direction = ray / np.sqrt((ray * ray).sum())
        position = {
            "front": xyz[index] - u * DELTA * direction,
            "sight": sensor + u * ray,
            "behind": xyz[index] + u * DELTA * direction,
        }[kind]
        found.append((*position, kind == "behind", NO_INTENSITY if kind == "sight" else intensity[index] / 255))
    return np.array(found)


@pytest.mark.parametrize("number", [3, 100, 301, 4096])
def test_queries_equal_the_slow_reference(number):
    xyz, intensity = rng(2).uniform(-30, 30, (500, 3)), rng(3).uniform(0, 255, 500).astype(np.float32)
    found = draw_queries(xyz, intensity, SENSOR, rng(), number)
    expected = slow_queries(xyz, intensity, SENSOR, rng(), number)
    np.testing.assert_allclose(found.xyz, expected[:, :3], atol=1e-12)
    np.testing.assert_array_equal(found.occupied, expected[:, 3] == 1)
    np.testing.assert_allclose(found.intensity, expected[:, 4], atol=1e-6)


def test_a_wall_is_occupied_behind_and_free_in_front():
    xyz, intensity = wall()
    queries = draw_queries(xyz, intensity, SENSOR, rng(), 600)
    depth, near = queries.xyz[:, 0] - SENSOR[0] - 10, queries.intensity != NO_INTENSITY
    assert (queries.occupied.sum(), (~queries.occupied & near).sum(), (~near).sum()) == (200, 200, 200)
    assert ((depth > 0) == queries.occupied).all()
    assert (np.abs(depth[near]) <= DELTA).all() and np.abs(depth[near]).max() > 0.9 * DELTA / np.sqrt(1.5)
    assert depth[~near].min() < -9.5 and -2 < depth[~near].max() < 0
    # On the ray of one return, whose intensity they have.
    scale = 10 / (queries.xyz[:, :1] - SENSOR[0])
    on_wall = SENSOR + (queries.xyz - SENSOR) * scale
    source = np.linalg.norm(on_wall[:, None] - xyz, axis=2).argmin(1)
    np.testing.assert_allclose(on_wall, xyz[source], atol=1e-9)
    np.testing.assert_allclose(queries.intensity[near], intensity[source[near]] / 255, atol=1e-6)


def test_no_return_is_used_twice_in_a_third_and_thirds_are_independent():
    xyz, intensity = wall(300)
    queries = draw_queries(xyz, intensity, SENSOR, rng(), 600)
    assert len(queries.xyz) == 600
    thirds = [np.round(part[:, 1] / (part[:, 0] - SENSOR[0]), 9) for part in np.split(queries.xyz, 3)]
    assert all(len(set(part.tolist())) == 200 for part in thirds)
    shared = len(set(thirds[0].tolist()) & set(thirds[2].tolist()))
    assert 100 < shared < 170  # 133 expected


def test_a_single_return_gives_one_query_of_each_kind():
    queries = draw_queries(np.array([[11.0, 0, 1.8]]), np.float32([51]), SENSOR, rng(), 4096)
    assert queries.occupied.tolist() == [False, False, True]
    assert queries.intensity.tolist() == pytest.approx([0.2, NO_INTENSITY, 0.2])
    front, sight, behind = queries.xyz[:, 0]
    assert 10.9 <= front <= 11 <= behind <= 11.1 and 1 <= sight <= 11
    assert (queries.xyz[:, 1:] == (0, 1.8)).all()


def test_no_return_gives_no_query():
    queries = draw_queries(np.empty((0, 3)), np.empty(0, np.float32), SENSOR, rng(), 4096)
    assert (queries.xyz.shape, queries.occupied.shape, queries.intensity.shape) == ((0, 3), (0,), (0,))


def test_a_return_without_intensity_or_at_the_sensor_gives_finite_queries():
    queries = draw_queries(np.array([[11.0, 0, 1.8], SENSOR]), np.float32([np.nan, 0]), SENSOR, rng(), 6)
    assert np.isfinite(queries.xyz).all()
    assert sorted(queries.intensity.tolist()) == [NO_INTENSITY] * 4 + [0, 0]


# -- cells near a query -----------------------------------------------------------------------------------------------


def slow_columns(xy, grid, radius):
    centers = grid.voxel_centers()[0, ..., :2].reshape(-1, 2).astype(np.float64)
    return [
        (i, cell)
        for i, position in enumerate(xy)
        for cell, center in enumerate(centers)
        if ((center - position) ** 2).sum() <= radius**2
    ]


@pytest.mark.parametrize(("position", "number"), [((0.25, 0.25), 13), ((0.0, 0.0), 12), ((4.75, 4.75), 6)])
def test_the_number_of_cells_of_half_a_metre_within_one_metre(position, number):
    """Whole pairs of i^2 + j^2 <= 4 around the centre of a cell; halves around a corner; a quadrant in the grid's corner."""
    grid = VoxelGrid((1, 20, 20), (-1, -5, -5), (1, 5, 5))
    assert len(columns_near(np.array([position]), grid)[0]) == number


def test_a_position_far_outside_has_no_cell():
    grid = VoxelGrid((1, 20, 20), (-1, -5, -5), (1, 5, 5))
    assert len(columns_near(np.array([[6.0, 0], [0, -5.8], [1e6, 0]]), grid)[0]) == 0


def test_cells_count_rows_forward_and_columns_right():
    grid = VoxelGrid((1, 3, 4), (-1, -3, -4), (1, 3, 4))  # cells of 2 m
    position, cell = columns_near(np.array([[3.0, -2.0], [-3.0, 2.0]]), grid)
    assert (position.tolist(), cell.tolist()) == ([0, 1], [3, 8])


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 9), st.floats(0.3, 2), st.floats(0.3, 2), st.floats(0.1, 3), st.integers(0, 99)
)
def test_pairs_equal_a_loop_over_all_cells(height, width, forward, right, radius, seed):
    grid = VoxelGrid((1, height, width), (0, -1, 2), (1, height * forward - 1, width * right + 2))
    span = np.array([width * right, height * forward])
    xy = (2, -1) + rng(seed).uniform(-0.3, 1.3, (20, 2)) * span
    assert list(zip(*map(np.ndarray.tolist, columns_near(xy, grid, radius)), strict=True)) == slow_columns(
        xy, grid, radius
    )
