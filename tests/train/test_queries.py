"""Img-ALSO's queries: where they lie, what they are told, and which cells are near; against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.queries import (
    DELTA,
    NO_INTENSITY,
    RADIUS,
    cells_near,
    decimate,
    draw_queries,
    random_bits,
    scale_intensity,
    window,
)

SENSOR = np.array([1.0, 0.0, 1.8])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def wall(number: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Returns of a wall 10 m before the sensor, and intensities from 0 to 1."""
    spread = rng(1).uniform(-5, 5, (number, 2))
    return np.c_[np.full(number, SENSOR[0] + 10), spread], np.linspace(0, 1, number)


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


# -- random numbers -----------------------------------------------------------------------------------------------------


def slow_bits(seed: int, index: int, stream: int, bits: int) -> int:
    """SplitMix64 as it is written, in Python's integers: number stream * 2^32 + index of a seed."""
    mask = 2**64 - 1
    state = (seed + (stream * 2**32 + index + 1) * 0x9E3779B97F4A7C15) & mask
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return (state ^ (state >> 31)) >> (64 - bits)


def test_random_numbers_begin_as_published():
    """The first numbers of seed 1234567 of the reference implementation (prng.di.unimi.it/splitmix64.c)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = random_bits(torch.tensor(1234567), torch.arange(3), 0, 63)
    assert found.tolist() == [value >> 1 for value in published]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 63))
def test_random_numbers_equal_those_of_unsigned_integers(seed, index, stream, bits):
    assert random_bits(torch.tensor(seed), torch.tensor(index), stream, bits).item() == slow_bits(
        seed, index, stream, bits
    )


def test_random_numbers_are_uniform_and_streams_differ():
    found = torch.stack([random_bits(torch.tensor(5), torch.arange(40_000), stream, 4) for stream in range(4)])
    assert (found[0] != found[1]).float().mean() > 0.9
    for stream in found:
        # Chi-squared with 15 degrees of freedom; above 50 with a probability of 1e-5, and the seed is fixed.
        assert ((torch.bincount(stream, minlength=16) - 2500.0).square() / 2500).sum() < 50


# -- queries ----------------------------------------------------------------------------------------------------------


def draw(xyz, intensity, number, *, seed=0, sensor=SENSOR):
    """Queries of a single sample that exist, in float64, as arrays (q, 3), (q,), (q,)."""
    returns = torch.from_numpy(np.column_stack([xyz, intensity]).astype(np.float64))
    one = torch.zeros(len(returns), dtype=torch.int32)
    found = draw_queries(returns, one, torch.from_numpy(sensor)[None], torch.tensor([seed]), number)
    kept = found.exists[0]
    return tuple(each[0][kept].numpy() for each in (found.xyz, found.occupied, found.intensity))


def slow_queries(xyz, intensity, sensor, seed, number):
    """One query at a time."""
    third, found = number // 3, []
    kinds = [("front", third), ("sight", third), ("behind", number - 2 * third)]
    position = 0
    for stream, (kind, count) in enumerate(kinds):
        shuffled = sorted(range(len(xyz)), key=lambda i, s=stream: slow_bits(seed, i, s, 40))
        for place in range(count):
            if place < len(xyz):
                index, u = shuffled[place], slow_bits(seed, position, 3, 24) / 2**24
                ray = xyz[index] - sensor
                direction = ray / np.sqrt((ray * ray).sum())
                where = {
                    "front": xyz[index] - u * DELTA * direction,
                    "sight": sensor + u * ray,
                    "behind": xyz[index] + u * DELTA * direction,
                }[kind]
                found.append((*where, kind == "behind", NO_INTENSITY if kind == "sight" else intensity[index]))
            position += 1
    return np.array(found)


@pytest.mark.parametrize("number", [3, 100, 301, 4096])
def test_queries_equal_the_slow_reference(number):
    """Two samples of unlike size in a batch, with rows after them that do not count."""
    sizes, sensors = (500, 170), torch.from_numpy(np.stack([SENSOR, SENSOR + np.array([0.5, -2, 0.1])]))
    seeds = torch.tensor([7, -(2**62)])
    xyz, intensity = rng(2).uniform(-30, 30, (700, 3)), rng(3).uniform(0, 1, 700)
    sample = np.repeat([0, 1, -1], [*sizes, 30]).astype(np.int32)
    returns = torch.from_numpy(np.column_stack([xyz, intensity]))
    found = draw_queries(returns, torch.from_numpy(sample), sensors, seeds, number)
    for b, size in enumerate(sizes):
        mine = sample == b
        expected = slow_queries(xyz[mine], intensity[mine], sensors[b].numpy(), int(seeds[b]), number)
        assert len(expected) == sum(
            min(size, count) for count in (number // 3, number // 3, number - 2 * (number // 3))
        )
        kept = found.exists[b]
        np.testing.assert_allclose(found.xyz[b][kept], expected[:, :3], atol=1e-12)
        np.testing.assert_array_equal(found.occupied[b][kept], expected[:, 3] == 1)
        np.testing.assert_array_equal(found.intensity[b][kept], expected[:, 4])


def test_a_sample_has_the_same_queries_alone_as_in_any_batch():
    xyz, intensity = wall(400)
    alone = draw(xyz, intensity, 900, seed=11)
    returns = torch.from_numpy(np.column_stack([xyz, intensity])).repeat(3, 1)
    sample = torch.arange(3, dtype=torch.int32).repeat_interleave(400)
    batch = draw_queries(returns, sample, torch.from_numpy(SENSOR).expand(3, 3), torch.tensor([3, 4, 11]), 900)
    np.testing.assert_array_equal(batch.xyz[2], alone[0])
    assert not torch.equal(batch.xyz[0], batch.xyz[1])


def test_a_wall_is_occupied_behind_and_free_in_front():
    xyz, intensity = wall()
    found, occupied, light = draw(xyz, intensity, 600)
    depth, near = found[:, 0] - SENSOR[0] - 10, light != NO_INTENSITY
    assert (occupied.sum(), (~occupied & near).sum(), (~near).sum()) == (200, 200, 200)
    assert ((depth > 0) == occupied).all()
    assert (np.abs(depth[near]) <= DELTA).all() and np.abs(depth[near]).max() > 0.9 * DELTA / np.sqrt(1.5)
    assert depth[~near].min() < -9.5 and -2 < depth[~near].max() < 0
    # On the ray of one return, whose intensity they have.
    scale = 10 / (found[:, :1] - SENSOR[0])
    on_wall = SENSOR + (found - SENSOR) * scale
    source = np.linalg.norm(on_wall[:, None] - xyz, axis=2).argmin(1)
    np.testing.assert_allclose(on_wall, xyz[source], atol=1e-9)
    np.testing.assert_array_equal(light[near], intensity[source[near]])


def test_no_return_is_used_twice_in_a_third_and_thirds_are_independent():
    found = draw(*wall(300), 600)[0]
    assert len(found) == 600
    thirds = [np.round(part[:, 1] / (part[:, 0] - SENSOR[0]), 9) for part in np.split(found, 3)]
    assert all(len(set(part.tolist())) == 200 for part in thirds)
    shared = len(set(thirds[0].tolist()) & set(thirds[2].tolist()))
    assert 100 < shared < 170  # 133 expected


def test_every_return_is_drawn_as_often_as_others():
    """Each of 40 returns in a third of 10, over 2,000 seeds: 500 times, with a standard deviation of 19."""
    number, seeds = 40, torch.from_numpy(rng(4).integers(2**63, size=2000))
    returns = torch.zeros(number * len(seeds), 4)
    returns[:, 1:] = torch.arange(number).repeat(len(seeds))[:, None] + 1.0
    sample = torch.arange(len(seeds), dtype=torch.int32).repeat_interleave(number)
    found = draw_queries(returns, sample, torch.zeros(len(seeds), 3), seeds, 30)
    for third in (found.intensity[:, :10], found.intensity[:, 20:]):
        times = torch.bincount(third.flatten().long(), minlength=number + 1)[1:]
        assert times.sum() == 20_000 and times.min() > 420 and times.max() < 580


def test_a_single_return_gives_one_query_of_each_kind():
    found, occupied, intensity = draw(np.array([[11.0, 0, 1.8]]), np.array([0.2]), 4096)
    assert occupied.tolist() == [False, False, True]
    assert intensity.tolist() == [0.2, NO_INTENSITY, 0.2]
    front, sight, behind = found[:, 0]
    assert 10.9 <= front <= 11 <= behind <= 11.1 and 1 <= sight <= 11
    assert (found[:, 1:] == (0, 1.8)).all()


def test_no_return_gives_no_query():
    found = draw_queries(
        torch.empty(0, 4), torch.empty(0, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(2).long(), 9
    )
    assert found.exists.shape == (2, 9) and not found.exists.any()


def test_a_return_without_intensity_or_at_the_sensor_gives_finite_queries():
    intensity = scale_intensity(np.float32([np.nan, 0]))
    found, _, intensity = draw(np.array([[11.0, 0, 1.8], SENSOR]), intensity, 6)
    assert np.isfinite(found).all()
    assert sorted(intensity.tolist()) == [NO_INTENSITY] * 4 + [0, 0]


def test_intensities_are_scaled():
    assert scale_intensity(np.float32([0, 51, 255, np.inf])).tolist() == pytest.approx([0, 0.2, 1, NO_INTENSITY])


# -- cells near a query -----------------------------------------------------------------------------------------------


def slow_columns(xy, grid, radius):
    centers = grid.voxel_centers()[0, ..., :2].reshape(-1, 2).astype(np.float64)
    return [
        (i, cell)
        for i, position in enumerate(xy)
        for cell, center in enumerate(centers)
        if ((center - position) ** 2).sum() <= radius**2
    ]


def pairs(xy, grid, radius=RADIUS):
    """[(position, cell)] of `cells_near`, in float64, ascending."""
    cell, near = (
        each[0].numpy() for each in cells_near(torch.from_numpy(xy)[None], window(grid, radius), grid, radius)
    )
    assert ((cell >= 0) & (cell < grid.shape[1] * grid.shape[2])).all()
    return [(int(i), int(cell[i, w])) for i, w in zip(*np.nonzero(near), strict=True)]


@pytest.mark.parametrize(("position", "number"), [((0.25, 0.25), 13), ((0.0, 0.0), 12), ((4.75, 4.75), 6)])
def test_the_number_of_cells_of_half_a_metre_within_one_metre(position, number):
    """Whole pairs of i^2 + j^2 <= 4 around the centre of a cell; halves around a corner; a quadrant in the grid's corner."""
    grid = VoxelGrid((1, 20, 20), (-1, -5, -5), (1, 5, 5))
    assert len(pairs(np.array([position]), grid)) == number


def test_the_window_leaves_out_cells_that_are_never_near():
    """Corners of 5 x 5 cells: 1.5 cells in both directions are 1.06 m at least."""
    steps = window(VoxelGrid((1, 20, 20), (-1, -5, -5), (1, 5, 5)))
    assert len(steps) == 21 and steps.abs().sum(1).max() == 3


def test_a_position_far_outside_has_no_cell():
    grid = VoxelGrid((1, 20, 20), (-1, -5, -5), (1, 5, 5))
    assert pairs(np.array([[6.0, 0], [0, -5.8], [1e6, 0]]), grid) == []


def test_cells_count_rows_forward_and_columns_right():
    grid = VoxelGrid((1, 3, 4), (-1, -3, -4), (1, 3, 4))  # cells of 2 m
    assert pairs(np.array([[3.0, -2.0], [-3.0, 2.0]]), grid) == [(0, 3), (1, 8)]


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 9), st.floats(0.3, 2), st.floats(0.3, 2), st.floats(0.1, 3), st.integers(0, 99)
)
def test_pairs_equal_a_loop_over_all_cells(height, width, forward, right, radius, seed):
    grid = VoxelGrid((1, height, width), (0, -1, 2), (1, height * forward - 1, width * right + 2))
    span = np.array([width * right, height * forward])
    xy = (2, -1) + rng(seed).uniform(-0.3, 1.3, (20, 2)) * span
    assert pairs(xy, grid, radius) == slow_columns(xy, grid, radius)
