import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyquaternion import Quaternion

from occfeat_targets.cache.geometry import (
    GRID_FROM_CAMERA_AXES,
    GRID_FROM_EGO_AXES,
    crop_intrinsics,
    fit,
    fit_intrinsics,
    inverse_rigid,
    project,
    rigid,
    rotation_matrix,
    scale_area,
    scale_intrinsics,
    transform,
)
from occfeat_targets.verify.slow_targets import filled_part

K = np.array([[100.0, 0, 40], [0, 110, 30], [0, 0, 1]])
quaternions = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 1e-2)


def test_ego_axes_become_right_forward_up():
    # 10 m ahead, 3 m to the left, 2 m up of the ego origin
    np.testing.assert_allclose(transform(GRID_FROM_EGO_AXES, np.array([10.0, 3, 2])), [-3, 10, 1.5])


def test_camera_axes_become_right_forward_up():
    # 3 m right of the camera, 2 m below it, 10 m ahead; the grid's origin is 1 m below the camera
    np.testing.assert_allclose(transform(GRID_FROM_CAMERA_AXES, np.array([3.0, 2, 10])), [3, 10, -1])


@given(quaternions)
def test_rotation_matrix_agrees_with_pyquaternion(q):
    np.testing.assert_allclose(rotation_matrix(q), Quaternion(q).normalised.rotation_matrix, atol=1e-9)


@given(quaternions, st.tuples(*[st.floats(-1000, 1000)] * 3))
def test_inverse_rigid_undoes_a_transform(q, t):
    a_from_b = rigid(q, t)
    np.testing.assert_allclose(inverse_rigid(a_from_b) @ a_from_b, np.eye(4), atol=1e-9)
    stacked = np.stack([a_from_b, np.eye(4)])
    np.testing.assert_allclose(inverse_rigid(stacked)[0], np.linalg.inv(a_from_b), atol=1e-6)


@pytest.mark.parametrize("q", [(0, 0, 0, 0), (float("nan"), 0, 0, 1), (1, 0, 0)])
def test_an_invalid_quaternion_is_refused(q):
    with pytest.raises(ValueError, match="no quaternion"):
        rotation_matrix(q)


def test_a_nan_translation_is_refused():
    with pytest.raises(ValueError, match="three finite numbers"):
        rigid((1, 0, 0, 0), (0, float("nan"), 0))


def test_a_point_on_the_optical_axis_hits_the_principal_point():
    pixels, depth, is_valid = project(K, np.array([0.0, 0, 7]), (60, 80))
    assert pixels.tolist() == [40, 30]
    assert depth == 7
    assert is_valid


def test_points_behind_beside_and_on_the_far_border_are_not_valid():
    points = np.array([[0, 0, -1.0], [0, 0, 0], [0.4 * 1.0, 0, 1], [-0.4, 0, 1], [-0.4001, 0, 1]])
    _, _, is_valid = project(K, points, (60, 80))
    assert is_valid.tolist() == [False, False, False, True, False]  # u = 80 is outside, u = 0 inside


def test_scaling_and_cropping_intrinsics_move_pixels_as_the_image_does():
    point = np.array([[0.2, -0.1, 2.0]])
    (pixel,), _, _ = project(K, point, (60, 80))
    (scaled,), _, _ = project(scale_intrinsics(K, 0.5, 0.25), point, (60, 80))
    np.testing.assert_allclose(scaled, pixel * [0.5, 0.25])
    (cropped,), _, _ = project(crop_intrinsics(K, 7, -3), point, (60, 80))
    np.testing.assert_allclose(cropped, pixel - [7, -3])


@pytest.mark.parametrize(
    ("source", "size", "area"),
    [
        ((900, 1600), (270, 480), (0, 0, 270, 480)),
        ((900, 1600), (224, 392), (0, 0, 224, 392)),  # 1.6 % of stretch
        ((100, 104), (50, 50), (0, 0, 50, 50)),
        ((100, 105), (50, 50), (0, 0, 50, 50)),  # exactly the limit
        ((100, 106), (50, 50), (1, 0, 48, 50)),
        ((200, 100), (33, 50), (0, 17, 33, 33)),  # 16.5 columns: the even number
        ((1600, 900), (270, 480), (0, 164, 270, 316)),  # a portrait camera
        ((400, 1600), (270, 480), (75, 0, 195, 480)),
        ((10, 100_000), (16, 16), (7, 0, 8, 16)),  # at least one pixel
    ],
)
def test_an_image_fills_the_size_or_fits_inside(source, size, area):
    assert fit(source, size) == area


@given(st.tuples(*[st.integers(16, 3000)] * 2), st.tuples(*[st.integers(16, 600)] * 2))
def test_a_fitted_image_is_centred_touches_two_sides_and_keeps_its_shape(source, size):
    top, left, bottom, right = fit(source, size)
    if min(bottom - top, right - left) > 1:
        assert [top, left, bottom, right] == filled_part(source, size, size)  # verify's own definition
    assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
    assert (top, bottom) == (0, size[0]) or (left, right) == (0, size[1])
    assert abs(top + bottom - size[0]) <= 1 and abs(left + right - size[1]) <= 1
    if (bottom - top, right - left) != size:
        scale = min(size[0] / source[0], size[1] / source[1])
        assert abs(bottom - top - source[0] * scale) < 1 and abs(right - left - source[1] * scale) < 1


def test_a_point_keeps_its_place_in_the_scene_when_its_image_is_fitted():
    source, area = (900, 1600), (10, 20, 100, 260)
    intrinsics = np.array([[1000.0, 0, 800], [0, 1000, 450], [0, 0, 1]])
    point = np.array([0.4, -0.2, 1.0])  # at (1200, 250): three quarters of the width, 250/900 of the height
    pixels, _, _ = project(fit_intrinsics(intrinsics, source, area), point, (120, 300))
    np.testing.assert_allclose(pixels, [20 + 0.75 * 240, 10 + 250 / 900 * 90])
    assert (fit_intrinsics(K, (30, 40), (0, 0, 15, 20)) == scale_intrinsics(K, 0.5, 0.5)).all()


def test_an_area_is_the_same_part_of_an_image_of_another_size():
    assert scale_area((0, 0, 270, 480), (270, 480), (224, 392)) == (0, 0, 224, 392)
    assert scale_area((0, 164, 270, 316), (270, 480), (224, 392)) == (0, 134, 224, 258)
    assert scale_area((7, 0, 8, 16), (16, 16), (14, 14)) == (6, 0, 7, 14)
    assert scale_area((3, 0, 4, 16), (16, 16), (1, 1)) == (0, 0, 1, 1)


def test_a_point_outside_the_area_is_not_seen():
    area = (5, 20, 50, 60)
    uv = np.array([[19.9, 30], [20.1, 30], [59.9, 30], [60.1, 30], [40, 4.9], [40, 5.1], [40, 49.9], [40, 50.1]])
    points = np.concatenate([(uv - K[:2, 2]) / K[[0, 1], [0, 1]], np.ones((8, 1))], axis=1)
    pixels, _, is_valid = project(K, points, (60, 80), area)
    np.testing.assert_allclose(pixels, uv)
    assert is_valid.tolist() == [False, True, True, False, False, True, True, False]
    assert project(K, points, (60, 80))[2].all()
