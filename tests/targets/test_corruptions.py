"""nuScenes-C's corruptions: against closed forms, slow references at full size, and the published package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.corruption import CORRUPTIONS, LOST_VIEWS, SEVERITIES, CorruptionSpec, wanted_corruptions
from occfeat_targets.targets.corruptions import corrupt, generator, lost_cameras
from occfeat_targets.targets.images import load_image, load_image_reference
from occfeat_targets.targets.low_light import LEVELS
from occfeat_targets.verify.slow_corruptions import corrupt_reference
from tests.targets.make_corruptions_golden import FILE, NAME, PUBLISHED, smooth_image

IMAGE_CORRUPTIONS = [name for name in CORRUPTIONS if name not in LOST_VIEWS]


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(np.int16) - b)


@pytest.mark.parametrize("size", [(120, 200), pytest.param((900, 1600), marks=pytest.mark.slow)], ids=["small", "full"])
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", IMAGE_CORRUPTIONS)
def test_an_image_is_corrupted_as_by_the_slow_reference(name, severity, size):
    corruption, image = CorruptionSpec(name, severity), smooth_image(*size)
    before = image.copy()
    found, expected = (f(image, corruption, NAME) for f in (corrupt, corrupt_reference))
    differs = difference(found, expected)
    assert differs.max() <= 1  # where a sum is rounded across a whole number
    assert (differs > 0).mean() < (0.05 if name == "brightness" else 0.001)
    assert difference(found, image).mean() > 3
    assert (image == before).all()


@pytest.mark.parametrize(("name", "severity"), [(name, severity) for name in PUBLISHED for severity in SEVERITIES])
def test_the_bytes_are_those_of_the_published_package(name, severity):
    golden = np.load(FILE)
    found = corrupt(golden["image"], CorruptionSpec(name, severity), NAME)
    assert difference(found, golden[f"{name}-{severity}"]).max() <= (1 if name == "snow" else 0)


@pytest.mark.parametrize("name", ["low-light", "fog", "snow", "motion-blur"])
def test_random_numbers_depend_on_seed_file_name_and_severity_only(name):
    image, spec = smooth_image(60, 80), CorruptionSpec(name, 2)
    same = corrupt(image, spec, Path("elsewhere") / NAME)
    assert (corrupt(image, spec, NAME) == same).all()
    assert (corrupt(image, spec, Path("other.jpg")) != same).any()
    assert (corrupt(image, CorruptionSpec(name, 2, seed=1), NAME) != same).any()
    draws = [generator(CorruptionSpec(name, severity), NAME.name).random() for severity in SEVERITIES]
    assert len(set(draws)) == 3


@pytest.mark.parametrize(("severity", "step"), [(1, 16), (2, 32), (3, 64)])
def test_color_quantisation_keeps_multiples_of_a_power_of_two(severity, step):
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    found = corrupt(image, CorruptionSpec("color-quant", severity), NAME)
    assert (found == image // step * step).all()


@pytest.mark.parametrize(("severity", "added"), [(1, 51), (2, 102), (3, 127.5)])
def test_brightness_adds_to_the_largest_channel_and_keeps_proportions(severity, added):
    image = np.array([[(0, 0, 0), (50, 50, 50), (250, 250, 250), (100, 50, 0), (20, 200, 40)]], np.uint8)
    black, gray, bright, orange, green = corrupt(image, CorruptionSpec("brightness", severity), NAME)[0].astype(float)
    for color, expected in (
        (black, added), (gray, 50 + added), (bright, 255), (orange, np.array([1, 0.5, 0]) * (100 + added)),
        (green, np.array([0.1, 1, 0.2]) * min(200 + added, 255)),
    ):  # fmt: skip
        assert ((color <= expected + 1e-9) & (color > expected - 2)).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_motion_blur_of_a_dot_is_a_one_sided_fading_line(severity):
    image = np.zeros((101, 101, 3), np.uint8)
    image[50, 50] = 255
    line = corrupt(image, CorruptionSpec("motion-blur", severity), NAME)[..., 0].astype(int)
    rows, columns = np.nonzero(line)
    assert columns.max() == 50 and columns.min() < 40  # the angle is within 45 degrees of the row's direction
    near, far = line[:, 36:51].sum(), line[:, :36].sum()  # one copy or two land on a pixel
    assert near > far and near + far == pytest.approx(255, abs=41)
    assert (np.abs(rows - 50) <= 50 - columns + 1).all()


def test_blurring_repeats_the_border():
    image = np.full((40, 60, 3), 200, np.uint8)
    assert difference(corrupt(image, CorruptionSpec("motion-blur", 3), NAME), image).max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_low_light_has_the_distribution_of_poisson_and_gaussian_noise(severity):
    """The table gives the distribution that the published generator samples in two steps."""
    factor, photons, sigma = LEVELS[severity]
    image = np.repeat(np.array([0, 64, 128, 192, 255], np.uint8), 60_000).reshape(500, 200, 3)
    found = corrupt(image, CorruptionSpec("low-light", severity), NAME)
    rng = np.random.default_rng(1)
    stretched = factor * (image / 255.0) ** 2
    sampled = np.clip(
        np.clip(rng.poisson(stretched * photons) / photons, 0, 1) + rng.normal(0, sigma, image.shape), 0, 1
    )
    expected = (sampled * 255).astype(np.uint8)
    for level in np.unique(image):
        a, b = (np.bincount(values[image == level], minlength=256).cumsum() / 60_000 for values in (found, expected))
        assert np.abs(a - b).max() < 0.012  # Kolmogorov-Smirnov, p < 0.001
    assert np.mean(found[image == 255]) == pytest.approx(255 * factor - 0.5, abs=0.5)


def test_low_light_stretches_an_image_to_its_own_smallest_and_largest_value():
    narrow, wide = (
        np.tile(np.array(ends, np.uint8), (50, 60))[..., None].repeat(3, -1) for ends in ((90, 110), (0, 255))
    )
    spec = CorruptionSpec("low-light", 1)
    assert (corrupt(narrow, spec, NAME) == corrupt(wide, spec, NAME)).all()
    assert corrupt(np.full((50, 60, 3), 90, np.uint8), spec, NAME).mean() < 4


def test_fog_of_a_black_image_is_black_and_of_a_white_one_brighter_where_it_is_dense():
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    spec = CorruptionSpec("fog", 1)
    assert not corrupt(black, spec, NAME).any()  # scaled to the largest value of the image, as published
    found = corrupt(white, spec, NAME)
    assert found.min() == pytest.approx(255 / 3, abs=1) and found.max() == pytest.approx(255, abs=1)  # (1 + 2 h) / 3


@pytest.mark.parametrize(("severity", "most"), [(1, 2), (2, 4), (3, 5)])
def test_the_same_cameras_crash_in_all_keyframes(severity, most):
    views = [[Path(f"{keyframe}-{camera}.jpg") for camera in range(6)] for keyframe in range(20)]
    lost = [lost_cameras(CorruptionSpec("camera-crash", severity), files) for files in views]
    assert lost == lost[:1] * 20
    assert 1 <= sum(lost[0]) <= most
    numbers = {sum(lost_cameras(CorruptionSpec("camera-crash", severity, seed), views[0])) for seed in range(50)}
    assert max(numbers) == most and min(numbers) < most  # drawn with replacement


@pytest.mark.parametrize(("severity", "chance"), [(1, 2 / 6), (2, 4 / 6), (3, 5 / 6)])
def test_each_view_is_lost_on_its_own_chance(severity, chance):
    views = [[Path(f"{keyframe}-{camera}.jpg") for camera in range(6)] for keyframe in range(1000)]
    lost = np.array([lost_cameras(CorruptionSpec("frame-lost", severity), files) for files in views])
    assert lost.mean() == pytest.approx(chance, abs=0.03)
    assert np.abs(np.corrcoef(lost.T) - np.eye(6)).max() < 0.15


def test_a_corrupted_image_goes_through_the_jpeg_that_opencv_writes(tmp_path):
    cv2 = pytest.importorskip("cv2")
    image, file = smooth_image(90, 160), tmp_path / "image.jpg"
    cv2.imwrite(str(file), image[..., ::-1])
    original = load_image_reference(file, [(90, 160)])[0]
    cv2.imwrite(str(tmp_path / "again.jpg"), 255 - original[..., ::-1])
    (found,) = load_image(file, [(90, 160)], corrupt=lambda pixels: 255 - pixels)
    (expected,) = load_image(tmp_path / "again.jpg", [(90, 160)])
    assert (found == expected).all()


def test_values_that_no_corruption_has_are_refused():
    for wrong in ({"name": "rain"}, {"severity": 4}, {"protocol": "screen"}, {"masks_lost": True}):
        with pytest.raises(ValueError, match=r"expected|loses no view"):
            CorruptionSpec(**{"name": "fog", "severity": 1, **wrong})
    assert len(wanted_corruptions("all", None)) == 24
    assert wanted_corruptions("fog", None) == [("fog", 1), ("fog", 2), ("fog", 3)]
    assert wanted_corruptions("snow", 2) == [("snow", 2)]
