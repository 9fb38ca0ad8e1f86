"""nuScenes-C's LowLight: a darker image with the noise of a sensor, sampled from tables.

For a value x in [0, 1] of an image whose smallest and largest values are a and b, the published generator computes
y = c ((x - a) / (b - a))^2, draws p ~ Poisson(n y) / n and g ~ p + N(0, sigma), clips each to [0, 1] and truncates 255 g. So the
distribution of an output byte depends only on the input byte. This samples it by inversion: one 32-bit number per byte.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled

# (c, n, sigma) of each severity. They are rows 2, 3 and 4, counted from 0, of the generator's own tables: it indexes these by
# the severity of imagecorruptions (2, 3, 4) without subtracting 1, so the values are darker than its authors' lists suggest.
LEVELS = {1: (0.40, 120, 0.018), 2: (0.30, 50, 0.026), 3: (0.20, 30, 0.038)}


def low_light(image: NDArray[np.uint8], severity: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) -> the same size. A uniform image, whose stretch is undefined, becomes noise on black."""
    cdf, first = _tables(severity, int(image.min()), int(image.max()))
    out = np.empty_like(image)
    _sample(image.reshape(-1), random_words(rng, image.size), cdf, first, out.reshape(-1))
    return out


def random_words(rng: np.random.Generator, number: int) -> NDArray[np.uint32]:
    """Uniform 32-bit numbers, two of each word of the generator."""
    raw: NDArray[np.uint64] = rng.bit_generator.random_raw(-(-number // 2))
    return raw.astype("<u8").view("<u4")[:number].astype(np.uint32, copy=False)


@lru_cache(maxsize=32)
def _tables(severity: int, low: int, high: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """(256, 256) 2^32 times the probability that input byte i gives at most o; and the o where the search for each top byte starts."""
    factor, photons, sigma = LEVELS[severity]
    stretched = np.clip((np.arange(256) - low) / max(high - low, 1), 0, 1)
    mean = photons * factor * stretched[:, None] ** 2  # (256, 1)
    counts = np.arange(photons)
    log_factorial = np.array([math.lgamma(k + 1) for k in counts])
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.where((mean == 0) & (counts == 0), 0.0, counts * np.log(mean) - mean - log_factorial)
    poisson = np.exp(log)
    poisson = np.column_stack([poisson, np.maximum(1 - poisson.sum(axis=1), 0)])  # all counts that are clipped to 1
    bounds = np.arange(1, 256) / 255
    deviations = (bounds - np.arange(photons + 1)[:, None] / photons) / (sigma * math.sqrt(2))
    normal = np.array([[(1 + math.erf(d)) / 2 for d in row] for row in deviations.tolist()])  # (photons + 1, 255)
    # Without BLAS, whose sums depend on its threads.
    below = np.einsum("ik,ko->io", poisson, normal, optimize=False)
    cdf = np.full((256, 256), 1 << 32, np.uint64)
    cdf[:, :255] = np.minimum(np.round(below * 2.0**32), 2.0**32).astype(np.uint64)
    starts = np.arange(256, dtype=np.uint64) << np.uint64(24)
    return cdf, np.array([np.searchsorted(row, starts, side="right") for row in cdf], np.uint8)


@compiled()
def _sample(
    source: NDArray[np.uint8],  # (n,)
    words: NDArray[np.uint32],  # (n,)
    cdf: NDArray[np.uint64],  # (256, 256)
    first: NDArray[np.uint8],  # (256, 256)
    out: NDArray[np.uint8],  # (n,)
) -> None:
    for i in range(len(source)):
        word = np.uint64(words[i])
        row = cdf[source[i]]
        byte = np.int64(first[source[i], words[i] >> np.uint32(24)])
        while word >= row[byte]:
            byte += 1
        out[i] = byte
