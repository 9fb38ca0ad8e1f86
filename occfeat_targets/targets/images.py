"""Camera JPEGs -> images for student and teacher.

A JPEG is decoded once, with libjpeg's scaled inverse DCT, to half (quarter, eighth) of its size if that leaves enough
pixels, and resized to all requested sizes with an antialiased bilinear (triangle) filter. Training never decodes a JPEG.
libjpeg goes on after damage with a warning, which Pillow and OpenCV do not report; simplejpeg makes it an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from occfeat_targets.cache.geometry import Area, fit
from occfeat_targets.common.compiled import compiled
from occfeat_targets.common.files import read_file

# The scaled DCT removes frequencies that the triangle filter would only attenuate. A slightly narrower triangle matches the
# result of a full decode to 53-55 dB at 5/3 and 2 decoded pixels per output pixel, but not with fewer pixels.
_MIN_OVERSAMPLING = 1.6
_SCALED_SUPPORT = 0.92
_MOST_BYTES = 1 << 28  # of a JPEG; nuScenes' have 200,000


def load_image(
    path: str | os.PathLike[str],
    sizes: Sequence[tuple[int, int]],
    *,
    expected_size: tuple[int, int] | None = None,
    corrupt: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
) -> tuple[NDArray[np.uint8], ...]:
    """Decode a JPEG once and resize it to each of `sizes`.

    sizes: (height, width) in pixels, not larger than the source. The largest determines the scale of the decode, so the
        last bits of an image depend on the other sizes. Axes are scaled independently: scale intrinsics by
        width / source width and height / source height.
    expected_size: (height, width) of the file in the data set's tables; another size is an error.
    corrupt: a change of the full image, which is then written and read as a JPEG of quality 95, as the images of nuScenes-C.
    Returns one (height, width, 3) uint8 RGB array per size; the same bytes on every machine with the same libjpeg.
    Raises ValueError that names the file and the remedy if the file is missing, no JPEG, truncated, of another size, or
        damaged in a way that libjpeg detects: always an area of zeros, seldom a single bit. Other damage shows only in a checksum.
    """
    content, source = _read(path)
    _check_sizes(path, source, sizes, expected_size)
    scale = _decoding_scale(source, sizes)
    height, width = (-(-n // scale) for n in source)  # libjpeg rounds up
    try:
        if corrupt is not None:
            content = _as_jpeg(corrupt(simplejpeg.decode_jpeg(content, "RGB", fastdct=False, strict=True)))
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width, strict=True)
    except ValueError as err:
        raise _damaged(path, len(content), source, err) from err
    assert pixels.shape == (height, width, 3), (path, scale, pixels.shape)
    resized = []
    for height, width in sizes:
        out = np.empty((height, width, 3), np.uint8)
        _resize(pixels, *_taps(source[0], height, scale), *_taps(source[1], width, scale), out)
        resized.append(out)
    return tuple(resized)


def load_image_reference(
    path: str | os.PathLike[str], sizes: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.uint8], ...]:
    """Slow reference of `load_image`: full decode, then Pillow's antialiased bilinear resize to each size."""
    content, source = _read(path)
    _check_sizes(path, source, sizes, None)
    try:
        full = Image.open(io.BytesIO(content), formats=("JPEG",)).convert("RGB")
    except (OSError, SyntaxError) as err:
        raise _damaged(path, len(content), source, err) from err
    return tuple(np.asarray(full.resize((width, height), Image.Resampling.BILINEAR)) for height, width in sizes)


def _as_jpeg(image: NDArray[np.uint8]) -> bytes:
    """The pixels that OpenCV writes by default. simplejpeg has only the fast DCT at this quality, which gives others."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return buffer.getvalue()


def letterbox(image: NDArray[np.uint8], area: Area, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(size, 3): black but for the image in `area`, (top, left, bottom, right) [px]; the image itself if it fills all."""
    if image.shape[:2] == tuple(size):
        return image
    out = np.zeros((*size, 3), np.uint8)
    top, left, bottom, right = area
    out[top:bottom, left:right] = image
    return out


def _read(path: str | os.PathLike[str]) -> tuple[bytes, tuple[int, int]]:
    """The bytes of a JPEG, and its (height, width) in pixels."""
    try:
        content = read_file(path, _MOST_BYTES)
    except FileNotFoundError as err:
        raise ValueError(f"image {path} is missing: check the dataroot, or download its blob again") from err
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
    except ValueError as err:
        raise ValueError(
            f"image {path} ({len(content)} bytes) has no JPEG header; expected a JPEG: restore the file"
        ) from err
    return content, (height, width)


def _damaged(path: str | os.PathLike[str], size: int, source: tuple[int, int], err: Exception) -> ValueError:
    return ValueError(
        f"image {path} ({size} bytes) is truncated or damaged ({err}); expected a complete JPEG of {source[1]}x{source[0]}: "
        "restore the file"
    )


def _check_sizes(
    path: str | os.PathLike[str],
    source: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    expected: tuple[int, int] | None,
) -> None:
    if expected is not None and source != tuple(expected):
        raise ValueError(
            f"image {path} is {source[1]}x{source[0]}; the tables say {expected[1]}x{expected[0]}, and intrinsics "
            "belong to that size: restore the original file"
        )
    require_not_enlarged(path, source, sizes)


def require_not_enlarged(
    path: str | os.PathLike[str], source: tuple[int, int], sizes: Sequence[tuple[int, int]]
) -> None:
    """Raises ValueError if an image of the size `source` would be enlarged to one of `sizes`, all (height, width) [px]."""
    for height, width in sizes:
        if not (0 < height <= source[0] and 0 < width <= source[1]):
            raise ValueError(
                f"image {path} is {source[1]}x{source[0]}; {width}x{height} was requested, and images are never "
                "enlarged: request a smaller size"
            )


def black_images(sources: Sequence[tuple[int, int]], size: tuple[int, int]) -> str:
    """A warning if most pixels of a keyframe's images would be black, and fewer with height and width exchanged; otherwise empty.

    sources: (height, width) of the source images [px]. size: of the images that they are fitted into.
    """
    height, width = size

    def pixels(of: tuple[int, int]) -> int:
        return sum(
            (bottom - top) * (right - left) for top, left, bottom, right in (fit(source, of) for source in sources)
        )

    seen = pixels(size)
    if 2 * seen >= len(sources) * height * width or pixels((width, height)) <= seen:
        return ""
    return (
        f"warning: images of {sources[0][0]}x{sources[0][1]} (height x width) fill less than half of --image-size {height}x{width}, the rest "
        "is black: the order is height, then width"
    )


def _decoding_scale(source: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """8, 4 or 2 for the smallest of libjpeg's decodes 1/8, 1/4, 1/2 with enough pixels on both axes for all sizes, else 1."""
    for scale in (8, 4, 2):
        if all(n / scale >= _MIN_OVERSAMPLING * m for size in sizes for n, m in zip(source, size, strict=True)):
            return scale
    return 1


@lru_cache(maxsize=64)
def _taps(source: int, target: int, scale: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One axis of the filter from source to target pixels, for an image decoded at 1/scale.

    Returns the first decoded pixel (target,) and the weights (target, taps) of each output pixel: Pillow's triangle
    filter on source pixels, summed over the `scale` source pixels that a decoded pixel covers.
    """
    ratio = source / target
    support = ratio * (1.0 if scale == 1 else _SCALED_SUPPORT)
    centers = (np.arange(target)[:, None] + 0.5) * ratio
    weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centers) / support)
    weights = np.pad(weights, ((0, 0), (0, -source % scale))).reshape(target, -1, scale).sum(axis=2)
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights > 0
    taps = int((weights.shape[1] - used[:, ::-1].argmax(axis=1) - used.argmax(axis=1)).max())
    first = np.minimum(used.argmax(axis=1), weights.shape[1] - taps)
    return first, np.take_along_axis(weights, first[:, None] + np.arange(taps), axis=1).astype(np.float32)


@compiled()
def _resize(
    source: NDArray[np.uint8],  # (H, W, 3)
    first_row: NDArray[np.int64],  # (h,)
    row_weights: NDArray[np.float32],  # (h, taps)
    first_column: NDArray[np.int64],  # (w,)
    column_weights: NDArray[np.float32],  # (w, taps)
    out: NDArray[np.uint8],  # (h, w, 3)
) -> None:
    """Filter rows, then columns, in float32, rounding once.

    Two output rows are computed at a time with the same column weights. A pixel is summed and stored as four lanes, because
    four vectorise; the fourth lane belongs to the next pixel and is overwritten.
    """
    height, width = out.shape[0], out.shape[1]
    pixels = source.reshape(source.shape[0], -1)
    target = out.reshape(height, -1)
    n, one, two, three = pixels.shape[1], np.uint32(1), np.uint32(2), np.uint32(3)
    rows = np.zeros((2, n + 1), np.float32)
    sums = np.empty((2, 3 * width + 1), np.float32)
    upper, lower, upper_sums, lower_sums = rows[0], rows[1], sums[0], sums[1]
    for y in range(0, height, 2):
        for k in range(min(2, height - y)):
            row = rows[k]
            weight, line = row_weights[y + k, 0], pixels[first_row[y + k]]
            for i in range(n):
                row[i] = weight * np.float32(line[i])
            for tap in range(1, row_weights.shape[1]):
                weight, line = row_weights[y + k, tap], pixels[first_row[y + k] + tap]
                for i in range(n):
                    row[i] += weight * np.float32(line[i])
        for x in range(width):
            j = np.uint32(3 * first_column[x])
            a = b = c = d = e = f = g = h = np.float32(0.5)
            for tap in range(column_weights.shape[1]):
                weight = column_weights[x, tap]
                a += weight * upper[j]
                b += weight * upper[j + one]
                c += weight * upper[j + two]
                d += weight * upper[j + three]
                e += weight * lower[j]
                f += weight * lower[j + one]
                g += weight * lower[j + two]
                h += weight * lower[j + three]
                j = np.uint32(j + three)
            at = np.uint32(3 * x)
            upper_sums[at], upper_sums[at + one], upper_sums[at + two], upper_sums[at + three] = a, b, c, d
            lower_sums[at], lower_sums[at + one], lower_sums[at + two], lower_sums[at + three] = e, f, g, h
        for k in range(min(2, height - y)):
            for i in range(3 * width):
                target[y + k, i] = np.uint8(sums[k, i])
