"""Walking rays through a grid: closed forms, a float64 twin that tests every voxel against every ray, and a real sweep."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.targets.occupancy import MAX_VOXELS, voxelize
from occfeat_targets.targets.rays import walk_rays

CUBE = VoxelGrid((4, 4, 4), (-2, -2, -2), (2, 2, 2))  # cells of 1 m
BORDER = 1e-4  # [m]; float32 may move a ray by this much
MARGIN = 1e-3  # [m] of the twin's points from the ends of their rays


def cloud(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array([(*row, 0, 0) for row in rows], np.float32)


def shifted(right: float, forward: float, up: float) -> np.ndarray:
    """Transform of a sensor at this position, with the grid's axes."""
    matrix = np.eye(4)
    matrix[:3, 3] = right, forward, up
    return matrix


def passed(points: np.ndarray, sensor: tuple[float, float, float], grid: VoxelGrid = CUBE) -> list[list[int]]:
    """Indices [z, h, w] of the voxels on the rays from `sensor` to points relative to it, with no ego box."""
    return np.argwhere(grid.unpack_volume(walk_rays(points, shifted(*sensor), grid, ego_box=0.0))).tolist()


def touches(volume: np.ndarray, start: np.ndarray, ends: np.ndarray, grid: VoxelGrid, grow: float) -> np.ndarray:
    """Which voxels of `volume`, made larger by `grow` [m] on each side, some ray passes: (Z, H, W) bool. The twin, float64.

    A voxel is passed if the ray is in it on an interval of positive length, and its end is not.
    """
    lower, size = np.array(grid.lower[::-1]), np.array(grid.cell_size[::-1])
    found = np.zeros(grid.shape, np.bool_)
    for z, h, w in np.argwhere(volume):
        low = lower + [w, h, z] * size - grow
        high = low + size + 2 * grow
        for end in ends:
            along = np.where(end == start, 1e-300, end - start)
            entry, leave = np.sort([(low - start) / along, (high - start) / along], axis=0)
            ends_inside = bool(((end > low) & (end < high)).all()) if grow < 0 else False
            if max(entry.max(), 0.0) < min(leave.min(), 1.0) and not ends_inside:
                found[z, h, w] = True
                break
    return found


def test_a_level_ray_passes_the_voxels_between_the_sensor_and_its_return() -> None:
    assert passed(cloud((3.0, 0, 0)), (-1.5, 0.5, 0.5)) == [[2, 2, 0], [2, 2, 1], [2, 2, 2]]
    assert passed(cloud((0, -3.0, 0)), (-1.5, 1.5, 0.5)) == [[2, 1, 0], [2, 2, 0], [2, 3, 0]]
    assert passed(cloud((0, 0, 2.0)), (-1.5, 0.5, -1.5)) == [[0, 2, 0], [1, 2, 0]]


def test_a_return_in_the_sensors_own_voxel_passes_nothing() -> None:
    assert passed(cloud((0.3, -0.2, 0.1)), (0.5, 0.5, 0.5)) == []


def test_a_ray_that_leaves_the_grid_passes_the_last_voxel_before_the_border() -> None:
    assert passed(cloud((100, 0, 0)), (0.5, 0.5, 0.5)) == [[2, 2, 2], [2, 2, 3]]
    assert passed(cloud((0, 0, -100)), (0.5, 0.5, 0.5)) == [[0, 2, 2], [1, 2, 2], [2, 2, 2]]


def test_a_ray_from_outside_passes_from_the_border_on() -> None:
    assert passed(cloud((12.0, 0, 0)), (-10.5, 0.5, 0.5)) == [[2, 2, w] for w in range(3)]
    assert passed(cloud((0, -12.0, 0)), (0.5, 10.5, 0.5)) == [[2, 1, 2], [2, 2, 2], [2, 3, 2]]
    assert passed(cloud((0, 0, 40.0)), (0.5, 0.5, -20.5)) == [[z, 2, 2] for z in range(4)]
    assert (
        passed(cloud((9.0, 0, 0), (0, 30, 0), (20, 5, 0)), (-11.5, 0.5, 0.5)) == []
    )  # too short, beside, past a corner


def test_a_diagonal_ray_passes_voxels_in_the_order_of_their_borders() -> None:
    # From (-1.5, -1.9) to (1.5, 0.4): borders of right at 1/6, 1/2, 5/6 of the ray, of forward at 0.39 and 0.83 - 0.01.
    points = cloud((3.0, 2.3, 0))
    assert passed(points, (-1.5, -1.9, 0.5)) == [[2, 0, 0], [2, 0, 1], [2, 1, 1], [2, 1, 2], [2, 2, 2]]


def test_the_vehicles_own_returns_have_no_rays() -> None:
    points = cloud((2.0, 0, 0), (0, 2.3, 0))
    volume = CUBE.unpack_volume(walk_rays(points, shifted(-0.5, -0.5, -0.5), CUBE))
    assert np.argwhere(volume).tolist() == [[1, 1, 1], [1, 2, 1]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_return_that_is_not_finite_has_no_ray(bad: float) -> None:
    assert passed(cloud((bad, 5, 0), (5, bad, 0), (5, 5, bad), (bad, bad, bad)), (0.5, 0.5, 0.5)) == []


def test_further_sweeps_are_added_to_out_and_several_frames_equal_a_call_per_frame() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-9, 9, (20_001, 4)).astype(np.float32)  # not a multiple of the kernel's block
    frames = np.stack([rigid(rng.normal(size=4), rng.normal(size=3)) for _ in range(3)])
    grid = VoxelGrid((6, 9, 11), (-5, -5, -5), (5, 5, 5))
    together = walk_rays(points[:3], frames, grid)
    assert walk_rays(points[3:30], frames, grid, out=together) is together
    np.testing.assert_array_equal(together, [walk_rays(points[:30], frame, grid) for frame in frames])
    whole = walk_rays(points, frames[0], grid)
    halves = walk_rays(points[:9000], frames[0], grid) | walk_rays(points[9000:], frames[0], grid)
    np.testing.assert_array_equal(whole, halves)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.floats(-20, 5, width=32)] * 3),
    st.tuples(*[st.floats(0.5, 30, width=32)] * 3),
    st.sampled_from([1.0, 10.0, 40.0]),
)
def test_voxels_equal_a_float64_twin_for_any_grid_and_pose(
    seed: int, shape: tuple[int, int, int], lower: tuple[float, ...], span: tuple[float, ...], away: float
) -> None:
    grid = VoxelGrid(shape, lower, tuple(lo + s for lo, s in zip(lower, span, strict=True)))  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    points = rng.uniform(-25, 25, (12, 5)).astype(np.float32)
    pose = rigid(rng.normal(size=4), away * rng.normal(size=3))
    volume = grid.unpack_volume(walk_rays(points, pose, grid, ego_box=0.0))
    ends = points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
    may = touches(np.ones(grid.shape, np.bool_), pose[:3, 3], ends, grid, BORDER)
    must = touches(np.ones(grid.shape, np.bool_), pose[:3, 3], ends, grid, -BORDER)
    ending = grid.unpack_volume(voxelize(points, pose, grid, ego_box=0.0))
    assert (volume <= may).all()
    assert (volume | ending >= must).all()


def test_axis_parallel_rays_on_borders_stay_in_the_grid_and_are_not_lost() -> None:
    for sensor in itertools.product((-2.0, -1.0, 0.0, 2.0), repeat=3):
        found = passed(cloud((9, 0, 0), (0, 9, 0), (0, 0, 9)), sensor)
        inside = all(-2 <= value < 2 for value in sensor)
        expected = 4 * 3 - sum(int(value + 2) for value in sensor) - 2 if inside else 0
        assert len(found) == expected, sensor


def test_wrong_shapes_are_refused() -> None:
    points, pose = cloud((5, 5, 0)), np.eye(4)
    for arguments, message in (
        ((points, pose[:3], CUBE), r"\(3, 4\).*expected \(4, 4\)"),
        ((points[:, :2], pose, CUBE), r"\(1, 2\).*expected \(n, 3 or more\)"),
        ((points, pose, VoxelGrid((600, 600, 600))), f"more than {MAX_VOXELS}: use larger cells"),
    ):
        with pytest.raises(ValueError, match=message):
            walk_rays(*arguments)
    with pytest.raises(ValueError, match=r"out is uint8\(5,\): expected contiguous uint8\(8,\)"):
        walk_rays(points, pose, CUBE, out=np.zeros(5, np.uint8))


def test_a_real_sweep_passes_the_voxels_of_a_sequential_walk(real_sample: Path) -> None:
    (file,) = (real_sample / "samples" / "LIDAR_TOP").iterdir()
    points, grid = np.fromfile(file, np.float32).reshape(-1, 5)[::5], VoxelGrid()
    pose = GRID_FROM_EGO_AXES @ rigid((0.7078, -0.0065, 0.0106, -0.7063), (0.94, 0, 1.84))
    volume = grid.unpack_volume(walk_rays(points, pose, grid))
    ends = points[(np.abs(points[:, :2]) >= 2.2).any(axis=1), :3] @ pose[:3, :3].T + pose[:3, 3]
    expected = np.zeros(grid.shape, np.bool_)
    for end in ends:
        step_by_step(expected, pose[:3, 3], end, grid)
    differing = np.argwhere(volume != expected)
    assert len(differing) < 20
    assert 30_000 < volume.sum() < 60_000


def step_by_step(volume: np.ndarray, start: np.ndarray, end: np.ndarray, grid: VoxelGrid) -> None:
    """Amanatides and Woo's walk in float64, from the sensor inside the grid to the voxel of the return or the border."""
    lower, size = np.array(grid.lower[::-1]), np.array(grid.cell_size[::-1])
    start, end = (start - lower) / size, (end - lower) / size
    cell, last, step = np.floor(start).astype(int), np.floor(end).astype(int), np.where(end > start, 1, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = 1 / np.abs(end - start)
        border = np.where(step > 0, cell + 1 - start, start - cell) * delta
    while (cell != last).any() and (cell >= 0).all() and (cell < grid.shape[::-1]).all():
        volume[tuple(cell[::-1])] = True
        axis = int(np.argmin(border))
        border[axis] += delta[axis]
        cell[axis] += step[axis]
