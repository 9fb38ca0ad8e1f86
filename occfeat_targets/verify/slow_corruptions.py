"""Slow references of nuScenes-C's corruptions, in plain NumPy, with the same random numbers; and slow corrupted images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.targets.corruptions import BITS, BRIGHTNESS, generator
from occfeat_targets.targets.low_light import LEVELS, random_words
from occfeat_targets.targets.weather import FOG, MOTION_BLUR, SNOW

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


def corrupt_reference(image: Bytes, corruption: CorruptionSpec, file: Path) -> Bytes:
    """Slow reference of `targets.corruptions.corrupt`. A byte may differ by 1 where a sum is rounded across a whole number."""
    severity, rng = corruption.severity, generator(corruption, file.name)
    if corruption.name == "color-quant":
        step = 2 ** (8 - BITS[severity])
        return image // step * step
    functions = {
        "brightness": _brightness,
        "low-light": _low_light,
        "fog": _fog,
        "snow": _snow,
        "motion-blur": _motion_blur,
    }
    return functions[corruption.name](image, severity, rng) if corruption.name in functions else image


def load_corrupted_reference(path: Path, size: tuple[int, int], corruption: CorruptionSpec) -> Bytes:
    """Slow reference of an image (size, 3) that is not lost: all decodes are full, and Pillow resizes.

    path: of the clean image, or of the downloaded one.
    """
    full = Image.open(path).convert("RGB")
    if corruption.protocol == "native":
        content = io.BytesIO()
        corrupted = Image.fromarray(corrupt_reference(np.asarray(full), corruption, path))
        corrupted.save(content, "JPEG", quality=95, subsampling="4:2:0")
        full = Image.open(content).convert("RGB")
    resized = np.asarray(full.resize(size[::-1], Image.Resampling.BILINEAR))
    return corrupt_reference(resized, corruption, path) if corruption.protocol == "network" else resized


def _to_bytes(values: Floats) -> Bytes:
    """[0, 1] to bytes, truncated as in nuScenes-C. 1e-9: whole numbers stay whole."""
    return (np.clip(values, 0, 1) * 255 + 1e-9).astype(np.uint8)


def _brightness(image: Bytes, severity: int, rng: np.random.Generator) -> Bytes:
    """With hue and saturation fixed, all channels are proportional to V, their maximum; a black pixel becomes gray."""
    values = image / 255
    value = values.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + BRIGHTNESS[severity], 1)
    return _to_bytes(np.where(value > 0, values / np.where(value > 0, value, 1), 1) * brighter)


def _low_light(image: Bytes, severity: int, rng: np.random.Generator) -> Bytes:
    factor, photons, sigma = LEVELS[severity]
    low, high = int(image.min()), int(image.max())
    words = random_words(rng, image.size).reshape(image.shape) / 2.0**32
    out = np.zeros_like(image)
    for level in np.unique(image).tolist():
        mean = photons * factor * ((level - low) / max(high - low, 1)) ** 2
        below, chance = np.zeros(255), math.exp(-mean)
        for counted in range(4 * photons):  # the rest has no noticeable chance
            brightness = min(counted / photons, 1)
            below += chance * np.array(
                [0.5 * math.erfc((brightness - o / 255) / (sigma * math.sqrt(2))) for o in range(1, 256)]
            )
            chance *= mean / (counted + 1)
            if chance < 1e-15 and counted > mean:
                break
        out[image == level] = np.searchsorted(below, words[image == level], side="right")
    return out


def _fog(image: Bytes, severity: int, rng: np.random.Generator) -> Bytes:
    amplitude, decay = FOG[severity]
    side = 1
    while side < max(image.shape):
        side *= 2
    heights, step, wibble = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        squares = (corners + np.roll(corners, -1, 0) + np.roll(corners, -1, 1) + np.roll(corners, (-1, -1), (0, 1))) / 4
        heights[half::step, half::step] = squares + wibble * rng.uniform(-wibble, wibble, squares.shape)
        centers = heights[half::step, half::step]
        for axis, (rows, columns) in enumerate(((0, half), (half, 0))):
            sides = (centers + np.roll(centers, 1, axis) + corners + np.roll(corners, -1, 1 - axis)) / 4
            heights[rows::step, columns::step] = sides + wibble * rng.uniform(-wibble, wibble, sides.shape)
        step, wibble = half, wibble / decay
    heights = (heights - heights.min()) / (heights.max() - heights.min())
    values, largest = image / 255, image.max() / 255
    added = amplitude * heights[: image.shape[0], : image.shape[1], None]
    return _to_bytes((values + added) * largest / (largest + amplitude))


def _motion_blur(image: Bytes, severity: int, rng: np.random.Generator) -> Bytes:
    return _to_bytes(_blurred(image / 255, *MOTION_BLUR[severity], rng.uniform(-45, 45)))


def _blurred(values: Floats, radius: int, sigma: float, angle: float) -> Floats:
    """The weighted mean of copies along a line, i = 0 .. 2 radius, by one half of a Gaussian; border pixels are repeated."""
    height, width = values.shape[:2]
    out = np.zeros_like(values)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    for i, weight in enumerate(weights):
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        if abs(dy) >= height or abs(dx) >= width:
            break
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        out += weight * values[rows][:, columns]
    return out / sum(weights)


def _snow(image: Bytes, severity: int, rng: np.random.Generator) -> Bytes:
    mean, deviation, zoom, threshold, radius, sigma, keep = SNOW[severity]
    height, width = image.shape[:2]
    drawn = rng.normal(mean, deviation, (math.ceil(height / zoom), math.ceil(width / zoom)))
    flakes = _stretched(_stretched(drawn, zoom).T, zoom).T
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    layer = np.round(_blurred(flakes, radius, sigma, rng.uniform(-135, -45))[:height, :width] * 255) / 255
    values = image / 255
    gray = values @ [0.114, 0.587, 0.299]  # the weights of red, green, blue, as they fall on blue, green, red
    whitened = keep * values + (1 - keep) * np.maximum(values, 1.5 * gray[..., None] + 0.5)
    return _to_bytes(whitened + (layer + layer[::-1, ::-1])[..., None])


def _stretched(values: Floats, zoom: int) -> Floats:
    """Rows interpolated linearly to `zoom` times their length; the first and the last values stay."""
    n = values.shape[1]
    at = np.linspace(0, n - 1, n * zoom)
    return np.array([np.interp(at, np.arange(n), row) for row in values])
