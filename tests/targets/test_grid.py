import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occfeat_targets.cache.grid import VoxelGrid


def test_default_grid_is_simple_bevs():
    grid = VoxelGrid()
    assert grid.shape == (8, 200, 200)
    assert grid.cell_size == (1.25, 0.5, 0.5)
    centers = grid.voxel_centers()
    assert centers.shape == (8, 200, 200, 3)
    np.testing.assert_allclose(centers[0, 0, 0], [-49.75, -49.75, -4.375])
    np.testing.assert_allclose(centers[7, 199, 0], [-49.75, 49.75, 4.375])


@pytest.mark.parametrize(
    ("grid", "found"),
    [
        (VoxelGrid((200, 200, 8)), "cells are 0.5 m long and 12.5 m wide; the order is up, forward, right"),
        (VoxelGrid((200, 8, 200)), "cells are 12.5 m long and 0.5 m wide; "),
        (
            VoxelGrid((200, 200, 8), (-50, -50, -5), (50, 50, 5)),
            "the grid is 100 m high, 100 m long and 10 m wide; the order is up, forward, right",
        ),
    ],
    ids=str,
)
def test_a_grid_whose_axes_are_probably_in_another_order_has_a_warning(grid, found):
    assert found in grid.shape_warning


@pytest.mark.parametrize(
    "grid",
    [
        VoxelGrid(),
        VoxelGrid((1, 400, 400)),  # one layer of tall cells
        VoxelGrid((80, 100, 100)),  # flat cells
        VoxelGrid((8, 200, 50)),  # four times as wide as long
        VoxelGrid((16, 200, 80), (-2, 0, -20), (6, 100, 20)),  # only the road ahead
    ],
    ids=str,
)
def test_cells_of_usual_shapes_have_no_warning(grid):
    assert grid.shape_warning is None


def test_axes_are_up_forward_right():
    centers = VoxelGrid((2, 3, 4), (0, 0, 0), (2, 3, 4)).voxel_centers()
    np.testing.assert_allclose(centers[1, 2, 3], [3.5, 2.5, 1.5])  # (right, forward, up)


def test_cells_from_grid_maps_cell_centres_to_index_plus_half():
    grid = VoxelGrid((2, 5, 9), (-1, 0, 3), (4, 7, 5))
    centers = grid.voxel_centers().reshape(-1, 3).astype(np.float64)
    cells = centers @ grid.cells_from_grid[:3, :3].T + grid.cells_from_grid[:3, 3]
    z, h, w = np.unravel_index(np.arange(grid.num_voxels), grid.shape)
    np.testing.assert_allclose(cells, np.stack([w, h, z], -1) + 0.5, atol=1e-5)
    np.testing.assert_array_equal(grid.centers_of(np.arange(grid.num_voxels)), grid.voxel_centers().reshape(-1, 3))


def test_bits_are_little_endian_along_the_flattened_volume():
    grid = VoxelGrid((1, 2, 8), (0, 0, 0), (1, 1, 1))
    volume = np.zeros(grid.shape, bool)
    volume[0, 0, 3] = volume[0, 1, 7] = True
    assert grid.pack_volume(volume).tolist() == [1 << 3, 1 << 7]


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 2**31),
    leading=st.sampled_from([(), (2,), (2, 3)]),
)
def test_packing_round_trips_for_any_shape(shape, seed, leading):
    grid = VoxelGrid(shape, (0, 0, 0), (1, 1, 1))
    volume = np.random.default_rng(seed).random((*leading, *shape)) < 0.3
    packed = grid.pack_volume(volume)
    assert packed.shape == (*leading, grid.packed_bytes)
    np.testing.assert_array_equal(grid.unpack_volume(packed), volume)
    mask = volume[..., 0, :, :]
    assert grid.pack_map(mask).shape[-1] == grid.map_row_bytes
    np.testing.assert_array_equal(grid.unpack_map(grid.pack_map(mask)), mask)


def test_a_volume_of_another_shape_is_refused():
    grid = VoxelGrid((1, 2, 8), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(2, 8, 1\)"):
        grid.pack_volume(np.zeros((2, 8, 1), bool))
    with pytest.raises(ValueError, match="2 expected"):
        grid.unpack_volume(np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="map of shape"):
        grid.pack_map(np.zeros((3, 8), bool))
    with pytest.raises(ValueError, match="packed map"):
        grid.unpack_map(np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize(
    "bad", [{"shape": (0, 1, 1)}, {"shape": (1.5, 1, 1)}, {"lower": (5, -50, -50)}, {"upper": (float("nan"), 50, 50)}]
)
def test_a_grid_without_volume_is_refused(bad):
    with pytest.raises(ValueError, match="grid"):
        VoxelGrid(**bad)


def test_fingerprint_differs_between_grids_and_survives_a_round_trip():
    grid = VoxelGrid()
    assert VoxelGrid.from_dict(grid.to_dict()) == grid
    assert VoxelGrid.from_dict(grid.to_dict()).fingerprint == grid.fingerprint
    assert VoxelGrid((8, 200, 100)).fingerprint != grid.fingerprint
    assert grid.fingerprint in str(grid)
