"""Voxelizing a sweep: closed forms, a float64 twin, and a real sweep read without the devkit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyquaternion import Quaternion

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, GRID_FROM_EGO_AXES, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.sources.sweeps import read_sweep
from occfeat_targets.targets.occupancy import MAX_VOXELS, voxelize

GRID = VoxelGrid()
ODD = VoxelGrid((3, 5, 7), (-0.9, -1.0, -2.1), (0.6, 1.5, 2.1))  # 105 bits, not a whole number of bytes
BORDER = 1e-4  # [m]; float32 may put a return this close to a cell's border on either side


def cloud(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array([(*row, 0, 0) for row in rows], np.float32)


def occupied(points: np.ndarray, grid: VoxelGrid = GRID, grid_from_sensor: np.ndarray | None = None) -> list[list[int]]:
    """Indices [z, h, w] of the occupied voxels, with no ego box."""
    transform = np.eye(4) if grid_from_sensor is None else grid_from_sensor
    return np.argwhere(grid.unpack_volume(voxelize(points, transform, grid, ego_box=0.0))).tolist()


def float64_bounds(
    points: np.ndarray, grid_from_sensor: np.ndarray, grid: VoxelGrid, ego_box: float
) -> tuple[np.ndarray, np.ndarray]:
    """(must, may): voxels with a return at least BORDER inside; voxels with a return inside or at most BORDER outside."""
    xyz = points[:, :3].astype(np.float64)
    xyz = xyz[~((np.abs(xyz[:, 0]) < ego_box) & (np.abs(xyz[:, 1]) < ego_box))]
    right_forward_up = (grid_from_sensor @ np.c_[xyz, np.ones(len(xyz))].T).T[:, :3]
    lower, upper, size = (np.array(v[::-1]) for v in (grid.lower, grid.upper, grid.cell_size))
    must, may = np.zeros(grid.shape, np.bool_), np.zeros(grid.shape, np.bool_)
    cells = []
    for offset in itertools.product((-BORDER, BORDER), repeat=3):
        moved = right_forward_up + offset
        inside = ((moved >= lower) & (moved < upper)).all(axis=1)
        index = np.where(inside[:, None], np.floor((moved - lower) / size), -1).astype(int)
        cells.append(index)
        w, h, z = index[inside].T
        may[z, h, w] = True
    clear = (np.stack(cells) == cells[0]).all(axis=(0, 2)) & (cells[0] >= 0).all(axis=1)
    w, h, z = cells[0][clear].T
    must[z, h, w] = True
    return must, may


def test_a_return_sets_the_bit_of_its_cell_and_no_other() -> None:
    packed = voxelize(cloud((10.3, -20.2, 2.0)), np.eye(4), GRID)  # right, forward, up
    z, h, w = 5, 59, 120
    flat = (z * 200 + h) * 200 + w
    assert np.flatnonzero(packed).tolist() == [flat // 8]
    assert packed[flat // 8] == 1 << flat % 8


@pytest.mark.parametrize("grid", [GRID, ODD], ids=str)
def test_cells_are_half_open_on_every_axis(grid: VoxelGrid) -> None:
    center = (np.array(grid.lower) + grid.upper) / 2
    for axis in range(3):  # axes are (up, forward, right), points (right, forward, up)
        for value, expected in ((grid.lower[axis], [0]), (grid.upper[axis], [])):
            point = center.copy()
            point[axis] = value
            assert [index[axis] for index in occupied(cloud(tuple(point[::-1])), grid)] == expected


def test_returns_outside_the_grid_leave_every_bit_unset() -> None:
    far = [(x, y, z) for x, y, z in itertools.product((-1e30, -51, 0, 51, 1e30), repeat=3) if (x, y, z) != (0, 0, 0)]
    assert occupied(cloud(*far)) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_return_with_a_coordinate_that_is_not_finite_sets_no_voxel(bad: float) -> None:
    assert occupied(cloud((bad, 5, 0), (5, bad, 0), (5, 5, bad))) == []


def test_the_vehicles_own_returns_are_dropped_in_the_sensors_frame() -> None:
    grid_from_sensor = np.eye(4)
    grid_from_sensor[0, 3] = 10  # the ego box is not centred on the grid's origin
    edge = float(np.float32(2.2))
    points = cloud((2.1, -2.1, 0), (edge, 0, 0), (0, -edge, 1.5), (-10, 0, 0))
    volume = GRID.unpack_volume(voxelize(points, grid_from_sensor, GRID))
    assert np.argwhere(volume).tolist() == [[4, 100, 100], [4, 100, 124], [5, 95, 120]]


def test_an_empty_sweep_occupies_nothing() -> None:
    assert not voxelize(np.empty((0, 5), np.float32), np.eye(4), ODD).any()


def test_further_sweeps_are_added_to_out() -> None:
    first, second = cloud((5, 5, 0)), cloud((-5, 5, 0))
    out = voxelize(first, np.eye(4), GRID)
    assert voxelize(second, np.eye(4), GRID, out=out) is out
    np.testing.assert_array_equal(out, voxelize(np.concatenate([first, second]), np.eye(4), GRID))


def test_several_frames_at_once_equal_a_call_per_frame() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-60, 60, (9001, 4)).astype(np.float32)  # not a multiple of the kernel's block; four columns
    points[:, 2] /= 10
    frames = np.stack([rigid(rng.normal(size=4), rng.normal(size=3)) for _ in range(7)])
    together = voxelize(points, frames, GRID)
    assert together.shape == (7, GRID.packed_bytes)
    np.testing.assert_array_equal(together, [voxelize(points, frame, GRID) for frame in frames])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 30)] * 3),
    st.tuples(*[st.floats(-40, 10, width=32)] * 3),
    st.tuples(*[st.floats(0.5, 60, width=32)] * 3),
)
def test_voxels_equal_a_float64_twin_for_any_grid_and_pose(
    seed: int, shape: tuple[int, int, int], lower: tuple[float, ...], span: tuple[float, ...]
) -> None:
    grid = VoxelGrid(shape, lower, tuple(lo + s for lo, s in zip(lower, span, strict=True)))  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    points = rng.uniform(-40, 40, (500, 5)).astype(np.float32)
    grid_from_sensor = rigid(rng.normal(size=4), rng.normal(size=3))
    volume = grid.unpack_volume(voxelize(points, grid_from_sensor, grid))
    must, may = float64_bounds(points, grid_from_sensor, grid, 2.2)
    assert (volume >= must).all()
    assert (volume <= may).all()


def test_wrong_shapes_are_refused() -> None:
    points, pose = cloud((5, 5, 0)), np.eye(4)
    for arguments, message in (
        ((points, pose[:3], GRID), r"\(3, 4\).*expected \(4, 4\)"),
        ((points[:, :2], pose, GRID), r"\(1, 2\).*expected \(n, 3 or more\)"),
        ((points, pose, VoxelGrid((600, 600, 600))), f"more than {MAX_VOXELS}: use larger cells"),
    ):
        with pytest.raises(ValueError, match=message):
            voxelize(*arguments)
    with pytest.raises(ValueError, match=r"out is uint8\(5,\): expected contiguous uint8\(40000,\)"):
        voxelize(points, pose, GRID, out=np.zeros(5, np.uint8))


# -- the real keyframe ------------------------------------------------------------------------------------------------


def pose(row: dict) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Quaternion(row["rotation"]).rotation_matrix
    matrix[:3, 3] = row["translation"]
    return matrix


def test_the_real_sweeps_voxels_equal_a_float64_computation_from_the_tables_in_all_seven_frames(
    real_sample: Path,
) -> None:
    tables = {
        name: json.loads((real_sample / "v1.0-mini" / f"{name}.json").read_text())
        for name in ("sample_data", "calibrated_sensor", "sensor")
    }
    channels = {row["token"]: row["channel"] for row in tables["sensor"]}
    ego_from_sensor = {channels[row["sensor_token"]]: pose(row) for row in tables["calibrated_sensor"]}
    (sweep,) = [row["filename"] for row in tables["sample_data"] if "LIDAR_TOP" in row["filename"]]
    cameras = sorted(channel for channel in ego_from_sensor if channel.startswith("CAM_"))
    assert len(cameras) == 6
    grid_from_ego = [GRID_FROM_EGO_AXES]
    grid_from_ego += [GRID_FROM_CAMERA_AXES @ np.linalg.inv(ego_from_sensor[camera]) for camera in cameras]
    frames = np.stack([matrix @ ego_from_sensor["LIDAR_TOP"] for matrix in grid_from_ego])

    points = np.fromfile(real_sample / sweep, np.float32).reshape(-1, 5)
    np.testing.assert_array_equal(read_sweep(real_sample / sweep), points)
    volumes = GRID.unpack_volume(voxelize(points, frames, GRID))
    for volume, grid_from_lidar in zip(volumes, frames, strict=True):
        must, may = float64_bounds(points, grid_from_lidar, GRID, 2.2)
        assert must.sum() > 3000
        assert may.sum() - must.sum() < 40
        assert (volume >= must).all()
        assert (volume <= may).all()
