"""The eight corruptions of nuScenes-C (RoboBEV, arXiv 2304.06719) of one image.

Written from the published numbers. RoboBEV's generator parses a seed but never uses it, so its random numbers cannot be had
again; these depend only on (seed, file name, corruption, severity), see `generator`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.common.compiled import compiled
from occfeat_targets.targets.low_light import low_light
from occfeat_targets.targets.weather import fog, motion_blur, snow

# {severity: value}. Added to V of HSV, of [0, 1]; bits of each channel that are kept.
BRIGHTNESS = {1: 0.2, 2: 0.4, 3: 0.5}
BITS = {1: 4, 2: 3, 3: 2}
# Number of camera indices that CameraCrash draws, with replacement, once for all keyframes; chance of six of FrameLost's views.
LOST = {1: 2, 2: 4, 3: 5}


def generator(corruption: CorruptionSpec, what: str) -> np.random.Generator:
    """Random numbers of one image. what: its file name, without folders, as in nuScenes-C."""
    key = f"{corruption.seed}/{what}/{corruption.name}/{corruption.severity}"
    return np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")))


def corrupt(image: NDArray[np.uint8], corruption: CorruptionSpec, file: Path) -> NDArray[np.uint8]:
    """A corrupted image (H, W, 3) uint8 RGB. file: where it was read from; its name determines the random numbers.

    The corruptions of LOST_VIEWS change nothing: `lost_cameras` says which views are black.
    """
    severity, rng = corruption.severity, generator(corruption, file.name)
    match corruption.name:
        case "brightness":
            return brightness(image, severity)
        case "low-light":
            return low_light(image, severity, rng)
        case "fog":
            return fog(image, severity, rng)
        case "snow":
            return snow(image, severity, rng)
        case "motion-blur":
            return motion_blur(image, severity, rng)
        case "color-quant":
            return image & np.uint8(256 - (1 << (8 - BITS[severity])))
    return image


def lost_cameras(corruption: CorruptionSpec, files: Sequence[Path]) -> list[bool]:
    """Which views of a keyframe are lost, by camera-crash or frame-lost; none for other corruptions. files: of the views.

    camera-crash: the same cameras for all keyframes, and fewer than published numbers if one is drawn twice, as published.
    frame-lost: each view on its own. Published indices count the cameras in another order, and its draws are not known.
    """
    number, cameras = LOST[corruption.severity], len(files)
    if corruption.name == "camera-crash":
        crashed = generator(corruption, "").integers(cameras, size=number)
        return [i in crashed for i in range(cameras)]
    if corruption.name == "frame-lost":
        return [bool(generator(corruption, file.name).random() < number / 6) for file in files]
    return [False] * cameras


def brightness(image: NDArray[np.uint8], severity: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> the same size: V of HSV is increased."""
    out = np.empty_like(image)
    _brighten(image, BRIGHTNESS[severity], out)
    return out


@compiled()
def _brighten(image: NDArray[np.uint8], added: float, out: NDArray[np.uint8]) -> None:
    """To HSV and back in float64, in the order of scikit-image's sums, so that the truncated bytes are the published ones."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            # The published images are blue, green, red.
            a, b, c = image[y, x, 2] / 255.0, image[y, x, 1] / 255.0, image[y, x, 0] / 255.0
            value = max(a, b, c)
            delta = value - min(a, b, c)
            hue, saturation = 0.0, 0.0
            if delta != 0:
                saturation = delta / value
                if c == value:
                    hue = 4.0 + (a - b) / delta
                elif b == value:
                    hue = 2.0 + (c - a) / delta
                else:
                    hue = (b - c) / delta
                hue = (hue / 6.0) % 1.0
            value = min(value + added, 1.0)
            sector = np.floor(hue * 6)
            f = hue * 6 - sector
            p, q, t = value * (1 - saturation), value * (1 - f * saturation), value * (1 - (1 - f) * saturation)
            i = int(sector) % 6
            if i == 0:
                a, b, c = value, t, p
            elif i == 1:
                a, b, c = q, value, p
            elif i == 2:
                a, b, c = p, value, t
            elif i == 3:
                a, b, c = p, q, value
            elif i == 4:
                a, b, c = t, p, value
            else:
                a, b, c = value, p, q
            for k, channel in ((2, a), (1, b), (0, c)):
                out[y, x, k] = np.uint8(min(max(channel, 0.0), 1.0) * 255)
