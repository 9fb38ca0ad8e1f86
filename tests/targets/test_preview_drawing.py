import numpy as np
import pytest
from PIL import Image

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid
from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_targets.pictures.birdseye import (
    BirdsEye,
    coincidence_colors,
    label_colors,
    occupancy_colors,
    occupied_at_body_height,
)
from occfeat_targets.pictures.colors import COINCIDENT, EMPTY, HATCH, INK, VEHICLE, ColorScale, FeatureColors
from occfeat_targets.pictures.drawing import draw_dots, wrap
from tests.conftest import SMALL_GRID

GREY = (100, 100, 100)
SCALE = ColorScale("", SMALL_GRID.lower[0], SMALL_GRID.upper[0])


def pixels_of(image, color):
    """(n, 2) x, y of the pixels of exactly this colour."""
    return np.argwhere((np.asarray(image) == color).all(axis=-1))[:, ::-1]


def test_the_nearer_of_two_dots_covers_the_farther():
    for order in ([0, 1], [1, 0]):
        image = Image.new("RGB", (20, 20), GREY)
        depth, colors = np.array([2.0, 9.0])[order], np.array([(255, 0, 0), (0, 0, 255)], np.uint8)[order]
        draw_dots(image, np.full((2, 2), 10.5), depth, colors, np.array([4.0, 4.0]), rim=1)
        assert image.getpixel((10, 10)) == (255, 0, 0)
        assert len(pixels_of(image, (0, 0, 255))) == 0


def test_birdseye_pixels_agree_with_the_cells_drawn_there():
    view, centers = BirdsEye(SMALL_GRID), SMALL_GRID.voxel_centers()[0, ..., :2]
    cells = np.arange(20 * 12).reshape(20, 12).astype(np.uint8)
    picture = view.enlarge(cells)
    assert picture.shape == (view.height, view.width) == (600, 360)
    x, y = np.moveaxis(view.pixels(centers).astype(int), -1, 0)
    np.testing.assert_array_equal(picture[y, x], cells)


def test_the_ego_arrow_points_ahead_in_any_frame():
    view, blank = BirdsEye(SMALL_GRID), np.zeros((20, 12, 3), np.uint8)
    for turn, axis, sign in ((0, 1, -1), (90, 0, 1), (180, 1, 1)):  # the frame is turned left: the ego points right
        cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
        turned = np.eye(4)
        turned[:2, :2] = [[cos, sin], [-sin, cos]]
        picture = view.draw(blank, turned @ GRID_FROM_EGO_AXES)
        marker = pixels_of(picture, INK)
        origin = view.pixels(np.zeros(2))
        far = (marker - origin)[np.abs(marker - origin).max(axis=1) > 3.5 * 30]
        far = far[np.abs(far[:, 1 - axis]) < 60]
        assert np.sign(np.median(far[:, axis])) == sign


def test_a_column_has_the_colour_of_its_highest_voxel():
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    volume[[0, 2], 4, 5] = True
    colors = occupancy_colors(volume, SMALL_GRID, SCALE)
    np.testing.assert_array_equal(colors[4, 5], SCALE.colors(SMALL_GRID.voxel_centers()[2, 4, 5, 2]))
    colors[4, 5] = EMPTY
    assert (colors == EMPTY).all()


def test_vehicles_lie_on_top_of_the_map_and_unscored_cells_are_hatched(tmp_path):
    vehicles, is_hidden = np.zeros((2, 20, 12), np.bool_)
    vehicles[3:9, 2:8] = is_hidden[3:6, 2:8] = True
    masks = np.ones((len(MAP_CLASSES), 20, 12), np.bool_)
    colors = label_colors(masks, vehicles, (20, 12))
    assert (colors[vehicles] == VEHICLE).all()
    assert not (colors[~vehicles] == VEHICLE).all(axis=-1).any()
    picture = np.asarray(BirdsEye(SMALL_GRID).draw(colors, GRID_FROM_EGO_AXES, is_hidden))[::-1]
    assert (picture[3 * 30 : 6 * 30, 2 * 30 : 8 * 30] == HATCH).all(axis=-1).mean() == pytest.approx(0.5, abs=0.1)
    assert not (picture[6 * 30 :] == HATCH).all(axis=-1).any()


def test_every_map_class_has_a_colour_of_its_own():
    colors = {
        tuple(label_colors(np.arange(5)[:, None, None] == np.full((1, 1, 1), k), None, (1, 1))[0, 0]) for k in range(5)
    }
    assert len(colors | {EMPTY, VEHICLE}) == len(MAP_CLASSES) + 2


@pytest.mark.parametrize(("up", "counts"), [(0, False), (1, False), (2, True), (3, False)])
def test_body_height_leaves_out_the_road_and_the_air(up, counts):
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    volume[up, 7, 7] = True
    ego_from_grid = inverse_rigid(GRID_FROM_EGO_AXES)
    ego_from_grid[2, 3] = 0.7  # centres at -0.8, 0.2, 1.2 and 2.2 m above the ground
    occupied = occupied_at_body_height(volume, SMALL_GRID, ego_from_grid)
    assert occupied[7, 7] == counts
    assert occupied.sum() == counts


def test_vehicle_cells_with_a_voxel_are_told_from_those_without():
    vehicles, occupied = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    both, alone, other, nothing = map(tuple, coincidence_colors(vehicles, occupied)[0])
    assert both == COINCIDENT
    assert alone == VEHICLE
    assert nothing == EMPTY
    assert len({both, alone, other, nothing}) == 4


def test_feature_colours_depend_on_no_order_and_span_the_range():
    tokens = np.random.default_rng(1).normal(size=(500, 8)) * np.arange(1, 9)
    colors = FeatureColors.fit(tokens)(tokens)
    np.testing.assert_allclose(FeatureColors.fit(tokens[::-1])(tokens).astype(int), colors, atol=1)
    assert colors.min() == 0
    assert colors.max() == 255


def test_features_that_do_not_vary_are_grey_and_two_channels_are_enough():
    assert (FeatureColors.fit(np.ones((9, 5)))(np.ones((2, 5))) == 128).all()
    colors = FeatureColors.fit(np.random.default_rng(0).normal(size=(50, 2)))(np.eye(2))
    assert colors.shape == (2, 3)
    assert (colors[:, 2] == 128).all()


def test_long_warnings_are_wrapped_and_lose_no_word():
    text = "SIMULATED: " + " and ".join(f"phrase {i}" for i in range(60))
    lines = wrap(text, 400, 20)
    assert len(lines) > 3
    assert " ".join(lines) == text
