"""Sampling of voxel features: closed forms, a float64 loop as the reference, and torch's grid_sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.cache.geometry import project, rigid, transform
from occfeat_train.ops.mean_over_views import sample_voxel_features, sample_voxel_features_numpy

SIZE = (40, 60)  # height, width [px]; maps below are 4 x 6 tokens, of 10 x 10 px each
BACKENDS = ["numba", "torch"]
# (right, forward, up) -> a camera at the origin that looks forward: x right, y down, z forward
FORWARD = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
BACKWARD = FORWARD * np.array([[-1], [1], [-1], [1]])
PINHOLE = np.array([[30, 0, 30], [0, 30, 20], [0, 0, 1.0]])


def sample(
    backend: str, features: np.ndarray, scale: np.ndarray | None, *arguments: Any, dtype: str = "float16"
) -> tuple[np.ndarray, np.ndarray]:
    """Plain torch needs features that are already multiplied by their scale, and returns float32."""
    if backend == "numba":
        return sample_voxel_features_numpy(features, scale, *arguments, dtype=dtype)  # type: ignore[arg-type]
    if scale is not None:
        features = features * scale[..., None].astype(np.float32)
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in (features, *arguments)]
    found, views = sample_voxel_features(*tensors)
    return found.numpy().astype(dtype), views.numpy()


def point_at(u: float, v: float, depth: float = 5.0) -> tuple[float, float, float]:
    """The point (right, forward, up) that FORWARD and PINHOLE project to pixel (u, v)."""
    return (u - 30) / 30 * depth, depth, -(v - 20) / 30 * depth


def one_camera(backend: str, maps: np.ndarray, *points: tuple[float, float, float], **options: Any) -> Any:
    return sample(
        backend, maps[None], None, FORWARD[None], PINHOLE[None], SIZE, np.array(points, np.float32), **options
    )


def random_maps(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_voxel_at_a_tokens_centre_gets_the_token(backend: str) -> None:
    maps = random_maps(4, 6, 8)
    features, views = one_camera(backend, maps, point_at(35, 25), point_at(5, 5), point_at(55, 35))
    np.testing.assert_allclose(features, [maps[2, 3], maps[0, 0], maps[3, 5]], rtol=2e-3, atol=1e-4)
    assert views.tolist() == [1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_voxel_between_tokens_gets_their_mean(backend: str) -> None:
    maps = random_maps(4, 6, 8).astype(np.float32)
    features, _ = one_camera(backend, maps, point_at(30, 25), point_at(30, 20), dtype="float32")
    np.testing.assert_allclose(features[0], (maps[2, 2] + maps[2, 3]) / 2, atol=1e-5)
    np.testing.assert_allclose(features[1], maps[1:3, 2:4].mean(axis=(0, 1)), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_valid_projection_is_never_attenuated_at_the_images_border(backend: str) -> None:
    maps = np.ones((4, 6, 8), np.float16)
    corners = [point_at(u, v) for u in (0.01, 30, 59.99) for v in (0.01, 20, 39.99)]
    features, views = one_camera(backend, maps, *corners)
    assert (views == 1).all()
    np.testing.assert_array_equal(features, np.ones((9, 8), np.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_voxel_that_no_camera_sees_has_no_views_and_zeros(backend: str) -> None:
    outside = [point_at(30, 20, -5), point_at(30, 20, 0), point_at(60.01, 20), point_at(-0.01, 20), point_at(30, 40.01)]
    features, views = one_camera(backend, np.ones((4, 6, 8), np.float16), *outside)
    assert views.tolist() == [0] * 5
    assert not features.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_image_is_half_open(backend: str) -> None:
    """With unit intrinsics and depth 1 the projection is exact. Pixel 0 is inside, pixel W is not."""
    maps = np.ones((1, 4, 6, 8), np.float16)
    points = np.array([[0, 1, 0], [60, 1, 0], [0, 1, -40], [59, 1, -39]], np.float32)
    _, views = sample(backend, maps, None, FORWARD[None], np.eye(3)[None], SIZE, points)
    assert views.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_averaged(backend: str) -> None:
    maps = np.stack([np.full((4, 6, 8), value, np.float16) for value in (1, 4, 100)])
    cameras, pinholes = np.stack([FORWARD, FORWARD, BACKWARD]), np.stack([PINHOLE] * 3)
    points = np.array([[0, 5, 0], [0, -5, 0]], np.float32)
    features, views = sample(backend, maps, None, cameras, pinholes, SIZE, points)
    assert views.tolist() == [2, 1]
    assert (features == [[2.5], [100]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_features_are_multiplied_by_their_tokens_scale(backend: str) -> None:
    maps = np.full((1, 4, 6, 8), -100, np.int8)
    scale = np.full((1, 4, 6), 0.5, np.float16)
    scale[0, 2, 3] = 0.25
    points = np.array([point_at(35, 25), point_at(30, 25)], np.float32)
    features, _ = sample(backend, maps, scale, FORWARD[None], PINHOLE[None], SIZE, points)
    np.testing.assert_allclose(features, np.repeat([[-25], [-37.5]], 8, axis=1), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_affects_only_its_channel(backend: str, bad: float) -> None:
    maps = np.ones((4, 6, 8), np.float16)
    maps[2, 3, 5] = bad
    features, _ = one_camera(backend, maps, point_at(34, 26), point_at(5, 5))
    np.testing.assert_array_equal(np.isfinite(features[0]), np.arange(8) != 5)
    assert np.isfinite(features[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_voxels_give_no_features(backend: str) -> None:
    centers = np.empty((0, 3), np.float32)
    features, views = sample(backend, random_maps(1, 4, 6, 8), None, FORWARD[None], PINHOLE[None], SIZE, centers)
    assert features.shape == (0, 8)
    assert views.shape == (0,)


# -- references -------------------------------------------------------------------------------------------------------


def twin(
    features: np.ndarray, scale: np.ndarray | None, cameras: np.ndarray, pinholes: np.ndarray, centers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A float64 loop over voxels and cameras."""
    maps = features.astype(np.float64) * (1 if scale is None else scale.astype(np.float64)[..., None])
    _, h, w, channels = maps.shape
    out, views = np.zeros((len(centers), channels)), np.zeros(len(centers), np.uint8)
    for n, center in enumerate(centers.astype(np.float64)):
        seen = []
        for tokens, camera, pinhole in zip(maps, cameras, pinholes, strict=True):
            (u, v), _, is_valid = project(pinhole, transform(camera, center), SIZE)
            if is_valid:
                x, y = np.clip(u / SIZE[1] * w - 0.5, 0, w - 1), np.clip(v / SIZE[0] * h - 0.5, 0, h - 1)
                wx, wy = 1 - abs(np.arange(w) - x), 1 - abs(np.arange(h) - y)
                seen.append(np.einsum("h,w,hwc->c", np.maximum(wy, 0), np.maximum(wx, 0), tokens))
        views[n] = len(seen)
        if seen:
            out[n] = np.mean(seen, axis=0)
    return out, views


def scene(seed: int, cams: int = 4, h: int = 4, w: int = 6, channels: int = 19, n: int = 90) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    cameras = np.stack([rigid(rng.normal(size=4), rng.normal(size=3)) for _ in range(cams)])
    pinholes = np.stack([PINHOLE + np.diag(rng.uniform(-5, 5, 3) * [1, 1, 0]) for _ in range(cams)])
    centers = rng.uniform(-10, 10, (n, 3)).astype(np.float32)
    return rng.standard_normal((cams, h, w, channels)).astype(np.float16), cameras, pinholes, centers


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.sampled_from(BACKENDS))
def test_features_and_views_equal_a_float64_loop(seed: int, cams: int, h: int, w: int, backend: str) -> None:
    maps, cameras, pinholes, centers = scene(seed, cams, h, w)
    expected, expected_views = twin(maps, None, cameras, pinholes, centers)
    for dtype, tolerance in (("float32", 1e-4), ("float16", 4e-3)):
        features, views = sample(backend, maps, None, cameras, pinholes, SIZE, centers, dtype=dtype)
        assert features.dtype == dtype
        assert views.dtype == np.uint8
        np.testing.assert_array_equal(views, expected_views)
        np.testing.assert_allclose(features, expected, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_features_equal_a_float64_loop(backend: str) -> None:
    maps, cameras, pinholes, centers = scene(1, n=700)  # more than one block of the kernel
    maps = (maps * 30).astype(np.int8)
    scale = np.random.default_rng(0).uniform(0.01, 0.1, maps.shape[:-1]).astype(np.float16)
    expected, expected_views = twin(maps, scale, cameras, pinholes, centers)
    features, views = sample(backend, maps, scale, cameras, pinholes, SIZE, centers, dtype="float32")
    np.testing.assert_array_equal(views, expected_views)
    np.testing.assert_allclose(features, expected, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_view_equals_grid_sample_with_its_border_padding(backend: str) -> None:
    maps, _, _, _ = scene(2, cams=1)
    rng = np.random.default_rng(3)
    pixels = rng.uniform((0, 0), (SIZE[1], SIZE[0]), (200, 2))
    points = np.array([point_at(u, v, d) for (u, v), d in zip(pixels, rng.uniform(1, 9, 200), strict=True)], np.float32)
    features, views = sample(backend, maps, None, FORWARD[None], PINHOLE[None], SIZE, points, dtype="float32")
    assert (views == 1).all()
    position = torch.from_numpy(pixels / (SIZE[1], SIZE[0]) * 2 - 1)[None, None]
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(maps).double().permute(0, 3, 1, 2), position, align_corners=False, padding_mode="border"
    )
    np.testing.assert_allclose(features, expected[0, :, 0].T.numpy(), atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_equals_the_cpu() -> None:
    maps, cameras, pinholes, centers = scene(9, n=500)
    tensors = [torch.from_numpy(a) for a in (maps, cameras, pinholes, centers)]
    on_cpu = sample_voxel_features(*tensors[:3], SIZE, tensors[3])
    tensors = [t.cuda() for t in tensors]
    on_gpu = sample_voxel_features(*tensors[:3], SIZE, tensors[3])
    assert on_gpu[0].is_cuda
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: random_maps(4, 6, 8)}, r"features of shape \(4, 6, 8\): expected \(V, h, w, C\)"),
        ({2: FORWARD[None]}, r"cam_from_grid of shape \(1, 4, 4\) .*: expected \(2, 4, 4\)"),
        ({3: PINHOLE}, r"intrinsics of shape \(3, 3\) .*: expected \(2, 3, 3\)"),
        ({5: np.zeros((3, 4), np.float32)}, r"centers of shape \(3, 4\) .*: expected \(3, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(backend: str, changes: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [random_maps(2, 4, 6, 8), None, np.stack([FORWARD] * 2), np.stack([PINHOLE] * 2), SIZE]
    arguments += [np.zeros((3, 3), np.float32)]
    for position, value in changes.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        sample(backend, *arguments)


@pytest.mark.parametrize(
    ("features", "scale", "message"),
    [
        (
            random_maps(1, 4, 6, 8),
            np.ones((1, 4, 6), np.float16),
            "int8 needs feature_scale, other types must not have it",
        ),
        (np.ones((1, 4, 6, 8), np.int8), None, "int8 needs feature_scale"),
        (np.ones((1, 4, 6, 8)), None, "features are float64: expected float16, float32, or int8"),
    ],
)
def test_features_of_another_type_are_refused(features: np.ndarray, scale: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_voxel_features_numpy(features, scale, FORWARD[None], PINHOLE[None], SIZE, np.zeros((3, 3), np.float32))
