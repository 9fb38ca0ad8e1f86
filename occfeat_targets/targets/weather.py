"""nuScenes-C's Fog, Snow and MotionBlur: those of the package imagecorruptions 1.1.2, with random numbers of a generator.

All sums are float64 in the published order, so that the truncation to bytes gives the published bytes for the same random
numbers; Snow's float32 products, which OpenCV may round differently, can differ by 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled

# {severity: values}. Fog: amplitude, decay. Motion blur: radius, sigma [px]. They are severities 2, 4 and 5 of imagecorruptions.
FOG = {1: (2.0, 2.0), 2: (2.5, 1.5), 3: (3.0, 1.4)}
MOTION_BLUR = {1: (15, 5), 2: (15, 12), 3: (20, 15)}
# Mean and deviation of the flakes, zoom, threshold, radius and sigma of their blur [px], share of the image that is kept.
# Severities 1, 2 and 3 of imagecorruptions.
SNOW = {
    1: (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    2: (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    3: (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
}


def fog(image: NDArray[np.uint8], severity: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) -> the same size: a fractal height map is added, and the sum scaled to the image's largest value."""
    amplitude, decay = FOG[severity]
    side = 1 << (max(image.shape[:2]) - 1).bit_length()
    heights = _plasma(side, decay, rng)
    low = heights.min()
    out = np.empty_like(image)
    _add_fog(image, heights, low, heights.max() - low, amplitude, image.max() / 255.0, out)
    return out


def _plasma(side: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A diamond-square map of (side, side) that repeats at its borders; side is a power of 2.

    The published noise of an octave is w U(-w, w), w = 100 / decay^octave, so its amplitude falls with decay^2.
    """
    heights = np.zeros((side, side))
    step, wibble = side, 100.0
    while step >= 2:
        n = side // step
        _fill_squares(heights, step, wibble, rng.random((n, n)))
        _fill_diamonds(heights, step, wibble, rng.random((2, n, n)))
        step //= 2
        wibble /= decay
    return heights


@compiled()
def _fill_squares(heights: NDArray[np.float64], step: int, wibble: float, noise: NDArray[np.float64]) -> None:
    """The centre of each square: the mean of its corners and noise."""
    side, half = len(heights), step // 2
    for i in range(side // step):
        y, below = i * step, (i + 1) * step % side
        for j in range(side // step):
            x, right = j * step, (j + 1) * step % side
            total = (heights[y, x] + heights[below, x]) + (heights[y, right] + heights[below, right])
            heights[y + half, x + half] = total / 4 + wibble * (-wibble + 2 * wibble * noise[i, j])


@compiled()
def _fill_diamonds(heights: NDArray[np.float64], step: int, wibble: float, noise: NDArray[np.float64]) -> None:
    """The middle of each upper and each left side: the mean of its ends and of the centres beside it, and noise."""
    side, half = len(heights), step // 2
    for i in range(side // step):
        y, above, below = i * step, (i * step - half) % side, (i + 1) * step % side
        for j in range(side // step):
            x, left, right = j * step, (j * step - half) % side, (j + 1) * step % side
            center, corner = heights[y + half, x + half], heights[y, x]
            total = (center + heights[above, x + half]) + (corner + heights[y, right])
            heights[y, x + half] = total / 4 + wibble * (-wibble + 2 * wibble * noise[0, i, j])
            total = (center + heights[y + half, left]) + (corner + heights[below, x])
            heights[y + half, x] = total / 4 + wibble * (-wibble + 2 * wibble * noise[1, i, j])


@compiled()
def _add_fog(
    image: NDArray[np.uint8],  # (H, W, 3)
    heights: NDArray[np.float64],  # (side, side)
    low: float,
    span: float,
    amplitude: float,
    largest: float,
    out: NDArray[np.uint8],  # (H, W, 3)
) -> None:
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            added = amplitude * ((heights[y, x] - low) / span)
            for k in range(3):
                value = (image[y, x, k] / 255.0 + added) * largest / (largest + amplitude)
                out[y, x, k] = np.uint8(min(max(value, 0.0), 1.0) * 255)


def motion_blur(image: NDArray[np.uint8], severity: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) -> the same size: the mean of shifted copies, weighted by one half of a Gaussian."""
    radius, sigma = MOTION_BLUR[severity]
    blurred = _blur(image, radius, sigma, rng.uniform(-45, 45))
    return np.clip(blurred, 0, 255).astype(np.uint8)


def blur_taps(
    radius: int, sigma: float, angle: float, size: tuple[int, int]
) -> tuple[list[tuple[int, int]], list[float]]:
    """(dy, dx) [px] and weight of each shifted copy. angle: [degrees]. Copies that would be shifted out of the image are left out."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    weights = weights / np.sum(weights)
    width = len(weights)
    point = width * np.sin(np.deg2rad(angle)), width * np.cos(np.deg2rad(angle))
    hypot = math.hypot(*point)
    shifts = []
    for i in range(width):
        dy, dx = (-math.ceil(i * p / hypot - 0.5) for p in point)
        if abs(dy) >= size[0] or abs(dx) >= size[1]:
            break
        shifts.append((dy, dx))
    return shifts, weights[: len(shifts)].tolist()


def _blur(
    image: NDArray[np.uint8] | NDArray[np.float64], radius: int, sigma: float, angle: float
) -> NDArray[np.float64]:
    """(H, W) or (H, W, C) -> float64 of the same size. The border's pixels are repeated outside."""
    height, width = image.shape[:2]
    channels = image.shape[2] if image.ndim == 3 else 1
    shifts, weights = blur_taps(radius, sigma, angle, (height, width))
    margin = max(max(abs(dy), abs(dx)) for dy, dx in shifts)
    padded = np.pad(image, [(margin, margin)] * 2 + [(0, 0)] * (image.ndim - 2), mode="edge")
    starts = margin - np.array(shifts)  # first row and column of each copy
    out = np.zeros((height, width * channels))
    _add_shifted(padded.reshape(len(padded), -1), starts * (1, channels), np.array(weights), out)
    return out.reshape(image.shape)


@compiled()
def _add_shifted(
    padded: NDArray[np.float64],  # (H + 2 margin, (W + 2 margin) C), uint8 or float64
    starts: NDArray[np.int64],  # (taps, 2)
    weights: NDArray[np.float64],  # (taps,)
    out: NDArray[np.float64],  # (H, W C)
) -> None:
    n = out.shape[1]
    for y in range(out.shape[0]):
        total = out[y]
        for tap in range(len(weights)):
            weight, start = weights[tap], starts[tap, 1]
            row = padded[y + starts[tap, 0], start : start + n]
            for x in range(n):
                total[x] += weight * row[x]


def snow(image: NDArray[np.uint8], severity: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) -> the same size: the image whitened, and blurred flakes added, once as drawn and once rotated by 180 degrees.

    The published images have the channel order blue, green, red, so the weights of red and blue in the grey value are swapped.
    """
    mean, deviation, zoom, threshold, radius, sigma, keep = SNOW[severity]
    height, width = image.shape[:2]
    # Only the centre of the published noise of (H, W) is used, enlarged.
    drawn = rng.normal(mean, deviation, (-(-height // zoom), -(-width // zoom)))
    flakes = np.empty((drawn.shape[0] * zoom, drawn.shape[1] * zoom))
    _enlarge(drawn, threshold, flakes)
    flakes = _blur(flakes, radius, sigma, rng.uniform(-135, -45))
    layer = np.round(flakes[:height, :width] * 255).astype(np.uint8)
    out = np.empty_like(image)
    _add_snow(image, np.ascontiguousarray(layer), np.float32(keep), np.float32(1 - keep), out)
    return out


@compiled()
def _enlarge(drawn: NDArray[np.float64], threshold: float, out: NDArray[np.float64]) -> None:
    """Linear interpolation in which the first and the last pixels of both sizes coincide; 0 below the threshold, clipped to 1."""
    rows, columns = drawn.shape
    height, width = out.shape
    for y in range(height):
        at = y * (rows - 1) / max(height - 1, 1)
        top = min(int(at), max(rows - 2, 0))
        bottom, below = min(top + 1, rows - 1), at - top
        for x in range(width):
            at = x * (columns - 1) / max(width - 1, 1)
            left = min(int(at), max(columns - 2, 0))
            right, beyond = min(left + 1, columns - 1), at - left
            upper = drawn[top, left] * (1 - beyond) + drawn[top, right] * beyond
            lower = drawn[bottom, left] * (1 - beyond) + drawn[bottom, right] * beyond
            value = upper * (1 - below) + lower * below
            out[y, x] = 0.0 if value < threshold else min(max(value, 0.0), 1.0)


@compiled()
def _add_snow(
    image: NDArray[np.uint8],  # (H, W, 3)
    layer: NDArray[np.uint8],  # (H, W)
    keep: np.float32,
    rest: np.float32,
    out: NDArray[np.uint8],  # (H, W, 3)
) -> None:
    height, width = layer.shape
    full = np.float32(255)
    for y in range(height):
        for x in range(width):
            red, green, blue = (
                np.float32(image[y, x, 0]) / full,
                np.float32(image[y, x, 1]) / full,
                np.float32(image[y, x, 2]) / full,
            )
            gray = np.float32(0.299) * blue + np.float32(0.587) * green + np.float32(0.114) * red
            white = gray * np.float32(1.5) + np.float32(0.5)
            added, rotated = layer[y, x] / 255.0, layer[height - 1 - y, width - 1 - x] / 255.0
            for k in range(3):
                value = np.float32(image[y, x, k]) / full
                whitened = keep * value + rest * max(value, white)
                total = np.float64(whitened) + added + rotated
                out[y, x, k] = np.uint8(min(max(total, 0.0), 1.0) * 255)
