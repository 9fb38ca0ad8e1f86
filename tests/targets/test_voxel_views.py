"""Voxels in perspective: which faces are visible, and a drawing compared with a ray caster."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.pictures.canvas import place
from occfeat_targets.pictures.voxels import EGO_COLOR, draw_voxels, ego_voxels, viewpoint, visible_faces

GRID = VoxelGrid((3, 9, 7), (-1.5, -9, -7), (1.5, 9, 7))
BEHIND = np.array([0.0, -30, 20])  # (right, forward, up) of a viewer [m]


def faces(cells, viewer=BEHIND, grid=GRID):
    """{(cell, axis): (4, 3) corners} of the visible faces."""
    shown = np.zeros(grid.shape, np.bool_)
    for cell in cells:
        shown[cell] = True
    corners, owners, across = visible_faces(shown, viewer, grid)
    keys = [
        (tuple(map(int, np.unravel_index(owner, grid.shape))), int(axis))
        for owner, axis in zip(owners, across, strict=True)
    ]
    return dict(zip(keys, corners, strict=True))


def test_a_cube_shows_its_top_its_rear_and_the_side_that_looks_to_the_viewer():
    found = faces([(1, 4, 6)])  # right of the viewer
    assert set(found) == {((1, 4, 6), 0), ((1, 4, 6), 1), ((1, 4, 6), 2)}
    top, rear, side = (found[(1, 4, 6), axis] for axis in range(3))
    assert sorted(map(tuple, top)) == [(5, -1, 0.5), (5, 1, 0.5), (7, -1, 0.5), (7, 1, 0.5)]
    assert set(rear[:, 1]) == {-1} and set(side[:, 0]) == {5}
    assert set(faces([(1, 4, 0)])[(1, 4, 0), 2][:, 0]) == {-5}  # left of the viewer: its right side


def test_a_cube_straight_ahead_shows_neither_side():
    assert set(faces([(1, 4, 3)])) == {((1, 4, 3), 0), ((1, 4, 3), 1)}


def test_faces_between_shown_voxels_are_left_out():
    found = faces([(0, 4, 6), (1, 4, 6), (0, 5, 6), (0, 4, 5)])
    assert ((0, 4, 6), 0) not in found  # a voxel on top
    assert ((0, 5, 6), 1) not in found  # a voxel behind it
    assert ((0, 4, 6), 2) not in found  # a voxel to its left
    assert ((0, 4, 5), 2) in found


def test_the_outline_of_a_face_does_not_cross_itself():
    for corners in faces([(1, 4, 6), (2, 0, 0)]).values():
        edges = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
        diagonals = np.linalg.norm(corners[:2] - corners[2:], axis=1)
        assert edges.max() < diagonals.min()


def test_nothing_shown_has_no_faces():
    assert not faces([])


@given(st.tuples(*[st.integers(1, 9)] * 3), st.floats(0.3, 60), st.floats(-40, 40))
def test_the_viewer_is_behind_and_above_every_grid_and_looks_at_its_middle(shape, reach, shift):
    grid = VoxelGrid(shape, (-1, shift - reach, shift - reach), (2, shift + reach, shift + reach))
    position, camera_from_grid = viewpoint(grid)
    assert position[1] < grid.lower[1] and position[2] > grid.upper[0]
    assert camera_from_grid @ camera_from_grid.T == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(camera_from_grid) == pytest.approx(1)
    x, y, depth = camera_from_grid @ (np.array([shift, shift, 0.5]) - position)
    assert (x, y) == pytest.approx((0, 0), abs=1e-9 * (1 + reach)) and depth > 0
    assert (camera_from_grid @ [1, 0, 0])[0] > 0 > (camera_from_grid @ [0, 0, 1])[1]  # right is right, up is up


def test_the_ego_vehicle_covers_the_cells_around_the_origin_of_its_frame():
    grid = VoxelGrid()
    right, forward, up = grid.voxel_centers()[ego_voxels(grid, GRID_FROM_EGO_AXES)].T
    assert right.min() == -0.75 and right.max() == 0.75
    assert forward.min() == -0.75 and forward.max() == 3.75
    assert up.min() > -0.5 and up.max() < 1.7


def cast(position, direction, shown, grid):
    """Flat index of the first shown voxel on a ray, by intersecting it with every voxel's box; None if there is none."""
    nearest, found = np.inf, None
    size = np.array(grid.cell_size[::-1])
    for index in np.flatnonzero(shown):
        center = grid.centers_of(np.array([index]))[0].astype(np.float64)
        with np.errstate(divide="ignore"):
            at = np.stack([center - size / 2 - position, center + size / 2 - position]) / direction
        enter, leave = at.min(axis=0).max(), at.max(axis=0).min()
        if 0 < enter < leave and enter < nearest:
            nearest, found = enter, int(index)
    return found


def test_a_drawing_shows_the_voxels_that_a_ray_caster_finds():
    rng = np.random.default_rng(5)
    shown = rng.random(GRID.shape) < 0.35
    shown |= ego_voxels(GRID, GRID_FROM_EGO_AXES)
    voxels = np.flatnonzero(shown)
    colors = np.column_stack([120 + voxels % 128, 40 + 4 * (voxels // 7 % 20), 200 - voxels % 60]).astype(np.uint8)
    figure = Figure((6, 4), 100, facecolor="white")
    axes = place(figure, 0, 0, 600, 400)
    draw_voxels(axes, voxels, colors, GRID, GRID_FROM_EGO_AXES)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float64)
    shades = np.zeros((GRID.num_voxels, 3))
    shades[voxels] = colors
    shades[ego_voxels(GRID, GRID_FROM_EGO_AXES).reshape(-1)] = EGO_COLOR
    position, camera_from_grid = viewpoint(GRID)
    wrong = compared = 0
    for row in range(20, 380, 12):
        for column in range(20, 580, 12):
            x, y = axes.transData.inverted().transform((column + 0.5, 400 - row - 0.5))
            found = cast(position, np.array([x, y, 1]) @ camera_from_grid, shown, GRID)
            patch = drawn[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
            if np.ptp(patch, axis=0).max() > 3 or found is None:
                continue  # at the border of a face
            compared += 1
            faces = shades[found] * np.array([[1], [0.82], [0.68]])
            wrong += np.abs(faces - drawn[row, column]).max(axis=1).min() > 2
    assert compared > 200
    assert wrong == 0


def test_the_drawing_keeps_proportions_and_shows_the_whole_grid():
    figure = Figure((5, 4), 100)
    axes = place(figure, 0, 0, 500, 400)
    draw_voxels(axes, np.array([0]), np.array([(255, 0, 0)], np.uint8), GRID, GRID_FROM_EGO_AXES)
    FigureCanvasAgg(figure).draw()
    position, camera_from_grid = viewpoint(GRID)
    corner = np.array([GRID.upper[2], GRID.upper[1], GRID.upper[0]])
    x, y, depth = camera_from_grid @ (corner - position)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left <= x / depth <= right and top <= y / depth <= bottom
    units = axes.transData.transform([(0, 0), (0.1, 0), (0, 0.1)])
    assert np.linalg.norm(units[1] - units[0]) == pytest.approx(np.linalg.norm(units[2] - units[0]))
    assert units[2][1] < units[0][1]  # y points down, like a camera's
