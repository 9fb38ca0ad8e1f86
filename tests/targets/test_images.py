"""Decoding and resizing: closed forms of the filter, Pillow's full decode as the reference, and damaged JPEGs."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_targets.targets import images
from occfeat_targets.targets.images import load_image, load_image_reference

TEACHER_SIZE = (224, 392)
SIZES = (STUDENT_SIZE, TEACHER_SIZE)


def street(height: int = 900, width: int = 1600, seed: int = 0) -> np.ndarray:
    """A picture with edges, gradients and texture, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([200 - y * 120 / height, 190 - y * 90 / height, 210 - x * 90 / width], axis=-1)
    for _ in range(40):
        top, left = rng.integers(0, height), rng.integers(0, width)
        picture[top : top + rng.integers(8, 200), left : left + rng.integers(8, 300)] = rng.uniform(20, 235, 3)
    picture += rng.normal(0, 10, (height, width, 1))
    for axis in (0, 1):  # blur, as a lens does
        picture = (np.roll(picture, 1, axis) + 2 * picture + np.roll(picture, -1, axis)) / 4
    return np.clip(picture, 0, 255).astype(np.uint8)


def write_jpeg(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path, quality=90)
    return path


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpeg(tmp_path_factory.mktemp("images") / "street.jpg", street())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


def resize(pixels: np.ndarray, size: tuple[int, int], scale: int = 1) -> np.ndarray:
    """The resize of `load_image`, for pixels decoded at 1/scale."""
    out, pixels = np.empty((*size, 3), np.uint8), np.ascontiguousarray(pixels)
    height, width = (n * scale for n in pixels.shape[:2])
    images._resize(pixels, *images._taps(height, size[0], scale), *images._taps(width, size[1], scale), out)
    return out


@pytest.mark.parametrize("scale", [1, 2])
def test_a_constant_stays_constant_up_to_the_border(scale: int) -> None:
    for value in (0, 1, 127, 254, 255):
        assert (resize(np.full((61, 83, 3), value, np.uint8), (23, 31), scale) == value).all()


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_ramp_is_not_shifted(scale: int) -> None:
    """A symmetric filter preserves a linear function, so a half-pixel shift would show."""
    x = (np.arange(240) + 0.5) * scale  # position of a decoded pixel in the source
    pixels = np.broadcast_to((x * 0.2 / scale)[None, :, None], (240, 240, 3)).round().astype(np.uint8)
    for size in ((100, 90), (72, 71)):
        for picture in (
            resize(pixels, size, scale),
            resize(np.swapaxes(pixels, 0, 1), size[::-1], scale).swapaxes(0, 1),
        ):
            expected = (np.arange(size[1]) + 0.5) * (240 / size[1]) * 0.2
            error = picture[:, 5:-5].astype(float) - expected[None, 5:-5, None]
            assert abs(error).max() < 1.05  # rounding of the ramp and of the result
            assert abs(error.mean()) < 0.02


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 2, 4, 8]))
def test_weights_of_every_output_pixel_are_a_weighted_mean(source: int, target: int, scale: int) -> None:
    target = min(source, target)
    first, weights = images._taps(source, target, scale)
    assert first.shape == (target,)
    assert first.min() >= 0
    assert (first + weights.shape[1]).max() <= -(-source // scale)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70), st.floats(0.1, 1), st.floats(0.1, 1))
def test_the_filter_of_a_full_decode_is_pillows(seed: int, height: int, width: int, by_y: float, by_x: float) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = (max(1, int(height * by_y)), max(1, int(width * by_x)))
    twin = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    assert abs(resize(pixels, size).astype(int) - twin).max() <= 1  # Pillow also rounds between its two passes


@pytest.mark.parametrize("sizes", [((224, 400),), SIZES, ((180, 320), (112, 196))], ids=str)
def test_a_scaled_decode_has_a_psnr_above_50_db(jpeg: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    assert images._decoding_scale((900, 1600), sizes) == 2
    for ours, twin in zip(load_image(jpeg, sizes), load_image_reference(jpeg, sizes), strict=True):
        assert ours.shape == twin.shape
        assert psnr(ours, twin) > 50


def test_sizes_that_half_does_not_oversample_enough_use_the_full_decode(jpeg: Path) -> None:
    size = (300, 533)
    assert images._decoding_scale((900, 1600), (size, TEACHER_SIZE)) == 1
    assert abs(load_image(jpeg, [size])[0].astype(int) - load_image_reference(jpeg, [size])[0]).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_any_source_is_decoded_at_the_scale_that_the_filter_assumes(height: int, width: int, divisor: int) -> None:
    size = (max(1, height // divisor), max(1, width // divisor))
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.new("RGB", (width, height), (90, 120, 150)).save(file, format="JPEG", quality=100)
        file.flush()
        (picture,) = load_image(file.name, [size])
    np.testing.assert_allclose(picture.reshape(-1, 3), [[90, 120, 150]] * (size[0] * size[1]), atol=2)


def test_an_image_of_odd_sides_is_decoded_at_a_quarter(tmp_path: Path) -> None:
    path = write_jpeg(tmp_path / "odd.jpg", street(451, 805))
    ours, twin = load_image(path, [(60, 100)])[0], load_image_reference(path, [(60, 100)])[0]
    assert images._decoding_scale((451, 805), [(60, 100)]) == 4
    assert psnr(ours, twin) > 44


def test_the_source_size_is_the_plain_decode(jpeg: Path) -> None:
    np.testing.assert_array_equal(load_image(jpeg, [(900, 1600)])[0], np.asarray(Image.open(jpeg)))


def test_two_loads_give_the_same_bytes(jpeg: Path) -> None:
    for a, b in zip(load_image(jpeg, SIZES), load_image(jpeg, SIZES), strict=True):
        assert a.tobytes() == b.tobytes()


def test_channels_are_red_green_blue(tmp_path: Path) -> None:
    path = write_jpeg(tmp_path / "red.jpg", np.full((160, 320, 3), (200, 40, 10), np.uint8))
    np.testing.assert_allclose(load_image(path, [(40, 80)])[0].reshape(-1, 3), [[200, 40, 10]] * 3200, atol=2)


def test_a_grey_jpeg_gives_three_equal_channels(tmp_path: Path) -> None:
    path = write_jpeg(tmp_path / "grey.jpg", street(90, 160)[..., 0])
    (picture,) = load_image(path, [(27, 48)])
    assert picture.shape == (27, 48, 3)
    assert (picture == picture[..., :1]).all()


def test_a_size_other_than_the_tables_is_an_error(jpeg: Path) -> None:
    load_image(jpeg, SIZES, expected_size=(900, 1600))
    with pytest.raises(ValueError, match=r"street\.jpg is 1600x900; the tables say 1600x1200.*restore the original"):
        load_image(jpeg, SIZES, expected_size=(1200, 1600))


@pytest.mark.parametrize("size", [(901, 1600), (900, 1601), (0, 5)])
def test_an_image_is_never_enlarged(jpeg: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"is 1600x900; .* was requested.*request a smaller size"):
        load_image(jpeg, [STUDENT_SIZE, size])


@pytest.mark.parametrize("load", [load_image, load_image_reference])
def test_a_missing_file_is_an_error_with_a_remedy(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jpg is missing: check the dataroot"):
        load(tmp_path / "none.jpg", SIZES)
    with pytest.raises(ValueError, match="is no regular file"):
        load(tmp_path, SIZES)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1600, 900)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", png(), b"\xff\xd8\xff"], ids=["empty", "text", "png", "stub"]
)
def test_a_file_that_is_not_a_jpeg_is_an_error_with_its_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jpg \({len(content)} bytes\) has no JPEG header.*restore the file"):
        load_image(tmp_path / "bad.jpg", SIZES)


@pytest.mark.parametrize("load", [load_image, load_image_reference])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_half_a_jpeg_is_an_error_and_never_a_grey_half_image(jpeg: Path, tmp_path: Path, part: float, load) -> None:
    content = jpeg.read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: int(part * len(content))])
    with pytest.raises(
        ValueError, match=r"half\.jpg \(\d+ bytes\) is truncated or damaged .*1600x900: restore the file"
    ):
        load(tmp_path / "half.jpg", SIZES)


def test_a_jpeg_whose_second_half_was_never_written_is_an_error(jpeg: Path, tmp_path: Path) -> None:
    content = jpeg.read_bytes()
    (tmp_path / "zeros.jpg").write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_image(tmp_path / "zeros.jpg", SIZES)


def test_a_jpeg_with_damage_inside_is_an_error(jpeg: Path, tmp_path: Path) -> None:
    """libjpeg decodes it completely, with a warning only; Pillow accepts it."""
    content = bytearray(jpeg.read_bytes())
    path = tmp_path / "hole.jpg"
    for start in range(len(content) // 8, len(content) - 4096, len(content) // 8):
        damaged = content.copy()
        damaged[start : start + 4096] = bytes(4096)  # a block that was never written
        path.write_bytes(damaged)
        load_image_reference(path, SIZES)
        with pytest.raises(ValueError, match=r"hole\.jpg \(\d+ bytes\) is truncated or damaged .*restore the file"):
            load_image(path, SIZES)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_decode_has_the_same_bytes_as_pillows_at_the_same_scale(jpeg: Path, scale: int) -> None:
    """Caches that were built with Pillow's decoder can be continued and verified."""
    size = (900 // scale, 1600 // scale)
    with Image.open(jpeg) as image:
        image.draft("RGB", size[::-1])
        pixels = np.asarray(image)
    content = jpeg.read_bytes()
    found = simplejpeg.decode_jpeg(content, "RGB", min_height=pixels.shape[0], min_width=pixels.shape[1])
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg is no regular file"):
        load_image(tmp_path / "pipe.jpg", SIZES)


def test_a_sparse_file_of_a_terabyte_is_an_error_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 1 << 40)
    with pytest.raises(
        ValueError, match=r"huge\.jpg has 1,099,511,627,776 bytes, at most 268,435,456 expected: restore"
    ):
        load_image(tmp_path / "huge.jpg", SIZES)


def test_a_truncated_jpeg_is_an_error_or_decodes_completely(tmp_path: Path) -> None:
    path = write_jpeg(tmp_path / "small.jpg", street(48, 64))
    content, whole = path.read_bytes(), load_image(path, [(16, 20)])[0]
    for length in range(len(content) - 1, 0, -3):
        path.write_bytes(content[:length])
        try:
            picture = load_image(path, [(16, 20)])[0]
        except ValueError:
            continue
        np.testing.assert_array_equal(picture, whole)


def test_real_images_have_a_psnr_above_50_db(real_sample: Path) -> None:
    paths = sorted(real_sample.glob("samples/CAM_*/*.jpg"))
    assert len(paths) == 6
    for path in paths:
        sizes = (*SIZES, (224, 400))
        ours, twin = load_image(path, sizes, expected_size=(900, 1600)), load_image_reference(path, sizes)
        assert min(psnr(a, b) for a, b in zip(ours, twin, strict=True)) > 50
