import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyquaternion import Quaternion

from occfeat_targets.cache.geometry import (
    GRID_FROM_CAMERA_AXES,
    GRID_FROM_EGO_AXES,
    crop_intrinsics,
    inverse_rigid,
    project,
    rigid,
    rotation_matrix,
    scale_intrinsics,
    transform,
)

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
