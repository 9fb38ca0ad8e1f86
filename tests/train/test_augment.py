"""Augmentation: images against torch's antialiased resize, and intrinsics that match the resized images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from occfeat_train.config import AugmentConfig
from occfeat_train.data.augment import Draw, draw, filter_matrix, resample, transform_area, transform_intrinsics
from occfeat_train.ops.views import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
SIZE = (224, 400)
DEFAULT = AugmentConfig()


def one(
    resized: tuple[int, int], crop: tuple[int, int] = (0, 0), mirror: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Augmentation parameters (resized, crop, mirror) of one sample with one camera."""
    return torch.tensor([[resized]]), torch.tensor([[crop]]), torch.tensor([[mirror]])


def pixels(images: Tensor) -> Tensor:
    """Undo the normalisation: values in [0, 255]."""
    return (images * STD + MEAN) * 255


def drawn(config: AugmentConfig = DEFAULT, seed: Any = 0, frames: list[int] | None = None) -> Draw:
    return draw(np.random.default_rng(seed), config, SIZE, 6, frames or [4, 5, 7, 8, 9])


# -- the filter -------------------------------------------------------------------------------------------------------


def axis(source: int, resized: int, crop: int, size: int) -> Tensor:
    return filter_matrix(source, torch.tensor(resized), torch.tensor(crop), size)


def test_the_same_size_is_the_identity():
    torch.testing.assert_close(axis(7, 7, 0, 7), torch.eye(7))


def test_doubling_weights_the_two_nearest_pixels_by_one_and_three_quarters():
    expected = torch.zeros(6, 3)
    expected[0, 0] = expected[5, 2] = 1
    expected[1, :2] = expected[3, 1:] = torch.tensor([0.75, 0.25])
    expected[2, :2] = expected[4, 1:] = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(axis(3, 6, 0, 6), expected)


def test_halving_weights_four_pixels_and_fewer_at_the_border():
    matrix = axis(6, 3, 0, 3)
    torch.testing.assert_close(matrix[1], torch.tensor([0, 1, 3, 3, 1, 0]) / 8)
    torch.testing.assert_close(matrix[0], torch.tensor([3, 3, 1, 0, 0, 0]) / 7)


def test_a_crop_selects_rows_and_is_zero_outside():
    whole, cropped = axis(6, 8, 0, 8), axis(6, 8, -2, 12)
    assert torch.equal(cropped[2:10], whole)
    assert not cropped[:2].any()
    assert not cropped[10:].any()
    assert torch.equal(axis(6, 8, 3, 4), whole[3:7])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(-20, 70), st.integers(1, 40))
def test_a_pixels_weights_sum_to_1_inside_and_0_outside(source, resized, crop, size):
    position = torch.arange(size) + crop
    expected = ((position >= 0) & (position < resized)).float()
    matrix = axis(source, resized, crop, size)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), expected)


@pytest.mark.parametrize("size", [(9, 31), (15, 12), (40, 24)])
def test_a_resize_equals_pillows(size):
    values = np.random.default_rng(0).uniform(0, 255, (15, 24)).astype(np.float32)
    expected = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
    ours = axis(15, size[0], 0, size[0]) @ torch.from_numpy(values) @ axis(24, size[1], 0, size[1]).T
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


# -- images -----------------------------------------------------------------------------------------------------------


def twin(image: Tensor, resized: Tensor, crop: Tensor, mirror: bool, size: tuple[int, int]) -> Tensor:
    """(h, w, 3) uint8 of one camera -> (3, *size): resize the image with torch, copy the crop to a black canvas, mirror."""
    height, width = resized.tolist()
    whole = torch.nn.functional.interpolate(
        image.permute(2, 0, 1)[None].double(), (height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]
    canvas = torch.zeros(3, *size, dtype=torch.float64)
    for row, y in enumerate(range(int(crop[0]), int(crop[0]) + size[0])):
        for column, x in enumerate(range(int(crop[1]), int(crop[1]) + size[1])):
            if 0 <= y < height and 0 <= x < width:
                canvas[:, row, column] = whole[:, y, x]
    return ((canvas.flip(-1) if mirror else canvas) / 255 - MEAN) / STD


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
)
def test_images_equal_torchs_resize_and_a_crop_of_each_camera(seed, source, size):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (2, 2, *source, 3), dtype=np.uint8))
    # Sizes of at least 2, because torch 2.13 resizes 4 x 3 to 25 x 1 wrongly. Pillow agrees with ours.
    resized, crop = (torch.from_numpy(rng.integers(low, high, (2, 2, 2))) for low, high in ((2, 30), (-12, 16)))
    mirror = torch.from_numpy(rng.random((2, 2)) < 0.5)
    ours = resample(images, resized, crop, mirror, size)
    for at in np.ndindex(2, 2):
        expected = twin(images[at], resized[at], crop[at], bool(mirror[at]), size)
        torch.testing.assert_close(ours[at].double(), expected, atol=2e-4, rtol=0)


def test_under_bfloat16_an_image_is_off_by_little_more_than_its_rounding():
    """The products are in float16: two roundings of 2^-11 of 255 grey levels, and bfloat16's of 2^-9."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 2, 40, 60, 3), dtype=torch.uint8, generator=generator)
    draws = (torch.tensor([[[30, 50], [36, 70]]]), torch.tensor([[[2, 3], [4, 5]]]), torch.tensor([[False, True]]))
    exact = resample(images, *draws, (24, 40))
    with torch.autocast("cpu", torch.bfloat16):
        ours = resample(images, *draws, (24, 40))
    assert ours.dtype == torch.bfloat16
    assert ours.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    grey = (ours.double() - exact).abs() * STD * 255
    assert grey.max() < 255 * (2 * 2**-11 + 1.2 * 2**-9)


def test_a_plain_resize_to_the_same_size_only_normalises():
    images = torch.randint(0, 256, (2, 3, 8, 10, 3), dtype=torch.uint8)
    draws = (t.expand(2, 3, *t.shape[2:]) for t in one((8, 10)))
    ours = resample(images, *draws, (8, 10))
    assert ours.shape == (2, 3, 3, 8, 10)
    assert ours.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, (images.permute(0, 1, 4, 2, 3) / 255 - MEAN) / STD, atol=1e-5, rtol=0)


def test_the_outside_is_black_and_is_mirrored_with_the_image():
    white = torch.full((1, 1, 6, 8, 3), 255, dtype=torch.uint8)
    plain, mirrored = (pixels(resample(white, *one((6, 8), (2, -3), m), (6, 8)))[0, 0] for m in (False, True))
    expected = torch.zeros(3, 6, 8)
    expected[:, :4, 3:] = 255
    torch.testing.assert_close(plain, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(mirrored, expected.flip(-1), atol=1e-3, rtol=0)


# -- intrinsics -------------------------------------------------------------------------------------------------------


def test_intrinsics_of_a_resize_and_a_crop_are_scaled_and_shifted():
    pinhole = torch.tensor([[30.0, 0, 25], [0, 40, 15], [0, 0, 1]], dtype=torch.float64)
    ours = transform_intrinsics(pinhole[None, None], (30, 50), *one((90, 100), (7, -4)), (60, 80))
    assert ours[0, 0].tolist() == [[60, 0, 54], [0, 120, 38], [0, 0, 1]]


def test_a_mirrored_image_has_a_negative_focal_length():
    pinhole = torch.tensor([[30.0, 0, 20], [0, 40, 15], [0, 0, 1]], dtype=torch.float64)
    ours = transform_intrinsics(pinhole[None, None], (30, 50), *one((30, 50), (0, 0), True), (30, 50))
    assert ours[0, 0].tolist() == [[-30, 0, 30], [0, 40, 15], [0, 0, 1]]


def test_intrinsics_have_float64_accuracy():
    pinhole = torch.tensor([[400.0, 0, 240], [0, 400, 135], [0, 0, 1]], dtype=torch.float64)
    ours = transform_intrinsics(pinhole[None, None], (270, 480), *one((179, 319)), (179, 319))
    assert ours[0, 0, 0, 0].item() == pytest.approx(400 * 319 / 480, rel=1e-15)
    assert ours[0, 0, 1, 1].item() == pytest.approx(400 * 179 / 270, rel=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.6, 1.6),
    st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    st.booleans(),
)
def test_a_point_is_projected_to_the_pixel_that_shows_it(seed, factor, crop, mirror):
    """Red and green of the image are u and v, so the pixel at a point's new projection contains its old projection."""
    rng, source, size = np.random.default_rng(seed), (40, 60), (36, 50)
    v, u = np.meshgrid(np.arange(source[0]) + 0.5, np.arange(source[1]) + 0.5, indexing="ij")
    image = torch.from_numpy(np.stack([u, v, 0 * u], -1)).float()[None, None]
    resized = (int(size[0] * factor), int(size[1] * factor))
    draws = one(resized, (int((resized[0] - size[0]) / 2) + crop[0], int((resized[1] - size[1]) / 2) + crop[1]), mirror)
    moved = pixels(resample(image, *draws, size))[0, 0].numpy()

    pinhole = np.array([[rng.uniform(20, 90), 0, rng.uniform(20, 40)], [0, rng.uniform(20, 90), 18], [0, 0, 1]])
    old = rng.uniform((4, 4), (source[1] - 4, source[0] - 4), (300, 2))
    points = np.concatenate([old, np.ones((300, 1))], 1) @ np.linalg.inv(pinhole).T * rng.uniform(1, 50, (300, 1))
    ours = transform_intrinsics(torch.from_numpy(pinhole)[None, None], source, *draws, size)[0, 0].numpy()
    assert (ours[0, 0] < 0) == mirror
    projected = points @ ours.T
    new = projected[:, :2] / projected[:, 2:]
    inside = ((new > 0.5) & (new < np.array(size[::-1]) - 0.5)).all(1)
    assert inside.any()
    columns, rows = (new[inside] - 0.5).astype(int).T  # the nearest pixel centre to the upper left
    right, down = (new[inside] - 0.5).T - (columns, rows)
    seen = [
        (channel[rows, columns] * (1 - right) + channel[rows, columns + 1] * right) * (1 - down)
        + (channel[rows + 1, columns] * (1 - right) + channel[rows + 1, columns + 1] * right) * down
        for channel in moved[:2]
    ]
    # A wrong convention is off by half a pixel. The filter's error is at most 0.084 at these sizes.
    np.testing.assert_allclose(np.stack(seen, 1), old[inside], atol=0.1)


# -- random parameters ------------------------------------------------------------------------------------------------


def values(d: Draw) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in vars(d).items()}


def test_an_area_follows_resize_crop_and_mirroring_and_keeps_borders_shared_with_the_image():
    """A 40x60 image is resized to 20x120. The crop of 24x100 starts 2 px above it and 10 px right of its left side."""
    resized, crop = torch.tensor([[20, 120]] * 4), torch.tensor([[-2, 10]] * 4)
    areas = torch.tensor([[0.0, 0, 40, 60], [10, 15, 30, 45], [0, 15, 40, 60], [0, 0, 4, 3]])
    plain = transform_area(areas, (40, 60), resized, crop, torch.tensor([False] * 4), (24, 100))
    assert plain.tolist() == [[0, 0, 24, 100], [7, 20, 17, 80], [0, 20, 24, 100], [0, 0, 4, 0]]
    mirrored = transform_area(areas, (40, 60), resized, crop, torch.tensor([True] * 4), (24, 100))
    assert mirrored.tolist() == [[0, 0, 24, 100], [7, 20, 17, 80], [0, 0, 24, 80], [0, 100, 4, 100]]


def test_the_corners_of_an_area_move_like_points_of_the_scene():
    generator = torch.Generator().manual_seed(0)
    area = torch.tensor([10.0, 12, 30, 50]).double()
    intrinsics = torch.tensor([[30.0, 0, 31], [0, 33, 19], [0, 0, 1]]).double()
    for mirror in (torch.tensor(False), torch.tensor(True)):
        resized, crop = torch.tensor([44, 71]), torch.randint(-3, 8, (2,), generator=generator)
        after = transform_intrinsics(intrinsics, (40, 60), resized, crop, mirror, (42, 64))
        found = transform_area(area, (40, 60), resized, crop, mirror, (42, 64))
        pixels = torch.stack([area[[1, 3]], area[[0, 2]], torch.ones(2)])
        u, v, _ = after @ torch.linalg.inv(intrinsics) @ pixels
        expected = torch.stack([v.min(), u.min(), v.max(), u.max()]).clamp(min=0)
        torch.testing.assert_close(found, torch.minimum(expected, torch.tensor([42.0, 64, 42, 64]).double()))
