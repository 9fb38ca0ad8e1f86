import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid
from occfeat_targets.cache.labels import LABEL_KINDS, MAP_CLASSES
from occfeat_targets.pictures.birdseye import (
    coincidence_colors,
    draw_cameras,
    draw_cells,
    label_colors,
    occupancy_colors,
    occupied_at_body_height,
)
from occfeat_targets.pictures.cameras import MAX_COLUMNS, arrange
from occfeat_targets.pictures.canvas import png
from occfeat_targets.pictures.colors import COINCIDENT, EMPTY, SOLID, FeatureColors, height_scale, rgb
from tests.conftest import SMALL_GRID

SCALE = height_scale(SMALL_GRID)


def square():
    """A figure of 100x100 px and its axes, which fill it."""
    figure = Figure((1, 1), 100)
    return figure, figure.add_axes((0, 0, 1, 1))


def looking(*degrees):
    """Cameras (V, 4, 4) that look to the left of the ego's x axis by these angles."""
    matrices = np.tile(np.eye(4), (len(degrees), 1, 1))
    for matrix, yaw in zip(matrices, np.deg2rad(degrees), strict=True):
        matrix[:3, :3] = [(np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1), (np.cos(yaw), np.sin(yaw), 0)]
    return matrices


def test_cameras_are_arranged_as_on_the_vehicle_whatever_their_names_and_order():
    def rows(*degrees, masked=()):
        return arrange(looking(*degrees), ~np.isin(np.arange(len(degrees)), masked))

    assert rows(55, 0, -55, 110, 180, -110) == [[0, 1, 2], [3, 4, 5]]
    assert rows(180, 0) == [[1], [0]]
    assert rows(-99, 0, 153, 45, -153, -45, 99) == [[3, 1, 5], [6, 2, 4, 0]]  # seven cameras in a ring
    assert rows(0) == [[0]]
    assert rows(55, 0, -55, 110, 180, -110, masked=(0, 4)) == [[1, 2], [3, 5], [0, 4]]
    assert rows(0, masked=[0]) == [[0]]
    many = rows(*range(-80, 81, 20))
    assert [camera for row in many for camera in row] == list(range(8, -1, -1))
    assert max(map(len, many)) <= MAX_COLUMNS


def test_cells_are_drawn_at_their_position_in_metres():
    figure, axes = square()
    cells = np.random.default_rng(0).integers(0, 255, (20, 12, 3)).astype(np.uint8)
    draw_cells(axes, cells, SMALL_GRID, GRID_FROM_EGO_AXES)
    for drawn in [*axes.patches, *axes.texts]:
        drawn.remove()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    x, y = axes.transData.transform(SMALL_GRID.voxel_centers()[0, ..., :2].reshape(-1, 2)).astype(int).T
    np.testing.assert_array_equal(np.asarray(canvas.buffer_rgba())[99 - y, x, :3].reshape(cells.shape), cells)


@pytest.mark.parametrize(("turn", "nose"), [(0, (0, 4.2)), (90, (4.2, 0)), (180, (0, -4.2))])
def test_the_nose_of_the_ego_points_ahead_in_any_frame(turn, nose):
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    turned = np.eye(4)
    turned[:2, :2] = [[cos, sin], [-sin, cos]]  # the frame is rotated to the left, so the ego points to the right
    _, axes = square()
    draw_cells(axes, np.zeros((20, 12, 3), np.uint8), SMALL_GRID, turned @ GRID_FROM_EGO_AXES)
    corners = axes.patches[-1].get_xy()
    np.testing.assert_allclose(corners[np.linalg.norm(corners, axis=1).argmax()], nose, atol=1e-9)


def test_names_of_cameras_with_the_same_direction_do_not_overlap():
    _, axes = square()
    axes.set(xlim=(-6, 6), ylim=(-10, 10))
    names = ("$a$", "b", "c", "d")
    draw_cameras(axes, GRID_FROM_EGO_AXES @ inverse_rigid(looking(0, 5, 90, -5)), names, 2)
    at = {text.get_text(): text.xy for text in axes.texts}
    assert list(at) == [*names]
    assert at["b"][1] - at["$a$"][1] > 0.3 and at["d"][1] - at["b"][1] > 0.3
    assert at["c"] == pytest.approx((-2.2, 0), abs=1e-9)


def test_a_column_has_the_colour_of_its_highest_voxel():
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    volume[[0, 2], 4, 5] = True
    colors = occupancy_colors(volume, SCALE, SMALL_GRID)
    np.testing.assert_array_equal(colors[4, 5], rgb(SCALE, SMALL_GRID.voxel_centers()[2, 4, 5, 2]))
    colors[4, 5] = EMPTY
    assert (colors == EMPTY).all()


def test_vehicles_lie_on_top_of_the_map():
    vehicles = np.zeros((1, 20, 12), np.bool_)
    vehicles[0, 3:9, 2:8] = True
    colors = label_colors({"vehicles": vehicles, "map": np.ones((len(MAP_CLASSES), 20, 12), np.bool_)}, (20, 12))
    color = LABEL_KINDS["vehicles"].colors["vehicles"]
    np.testing.assert_array_equal((colors == color).all(axis=-1), vehicles[0])


@pytest.mark.parametrize("kind", ["hatched", "outlined"])
def test_marks_end_at_the_borders_of_their_cells_even_at_the_grids_border(kind):
    mask = np.zeros((20, 12), np.bool_)
    mask[3:6, 8:] = True
    figure, axes = square()
    draw_cells(axes, np.zeros((20, 12, 3), np.uint8), SMALL_GRID, GRID_FROM_EGO_AXES, **{kind: mask})
    (contours,) = axes.collections
    bounds = contours.get_paths()[0].get_extents()
    np.testing.assert_allclose([*bounds.p0, *bounds.p1], (2, -7, 6, -4), atol=1e-6)
    assert png(figure)


def test_all_map_classes_have_different_colours():
    masks = np.eye(len(MAP_CLASSES), dtype=np.bool_)[:, None]
    colors = {tuple(color) for color in label_colors({"map": masks}, (1, len(MAP_CLASSES)))[0].tolist()}
    assert len(colors | {EMPTY, *LABEL_KINDS["vehicles"].colors.values()}) == len(MAP_CLASSES) + 2


@pytest.mark.parametrize(("up", "counts"), [(0, False), (1, False), (2, True), (3, False)])
def test_body_height_excludes_the_road_and_the_air(up, counts):
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    volume[up, 7, 7] = True
    ego_from_grid = inverse_rigid(GRID_FROM_EGO_AXES)
    ego_from_grid[2, 3] = 0.7  # centres at -0.8, 0.2, 1.2 and 2.2 m above the ground
    occupied = occupied_at_body_height(volume, SMALL_GRID, ego_from_grid)
    assert occupied[7, 7] == counts
    assert occupied.sum() == counts


def test_vehicle_cells_with_and_without_a_voxel_have_different_colours():
    vehicles, occupied = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    both, alone, other, nothing = map(tuple, coincidence_colors(vehicles, occupied)[0])
    assert both == COINCIDENT
    assert alone == SOLID
    assert nothing == EMPTY
    assert len({both, alone, other, nothing}) == 4


def test_feature_colours_do_not_depend_on_the_order_and_span_the_range():
    tokens = np.random.default_rng(1).normal(size=(500, 8)) * np.arange(1, 9)
    colors = FeatureColors.fit(tokens)(tokens)
    np.testing.assert_allclose(FeatureColors.fit(tokens[::-1])(tokens).astype(int), colors, atol=1)
    assert colors.min() == 0
    assert colors.max() == 255


def test_constant_features_are_grey_and_two_channels_are_enough():
    assert (FeatureColors.fit(np.ones((9, 5)))(np.ones((2, 5))) == 128).all()
    colors = FeatureColors.fit(np.random.default_rng(0).normal(size=(50, 2)))(np.eye(2))
    assert colors.shape == (2, 3)
    assert (colors[:, 2] == 128).all()


def test_the_length_of_a_feature_does_not_change_its_colour():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 8))
    colors = FeatureColors.fit(features)
    np.testing.assert_array_equal(colors(features), colors(features * rng.uniform(0.1, 9, (50, 1))))
    assert len(np.unique(colors(features), axis=0)) > 40
    assert (colors(-features) != colors(features)).any()


def test_colours_follow_the_largest_component():
    angle = np.linspace(-0.5, 0.5, 41)
    features = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], 1)
    red = FeatureColors.fit(features)(features)[:, 0].astype(int)
    assert (np.diff(red) >= 0).all()
    assert (red.min(), red.max()) == (0, 255)
