"""Colours of the pictures can be told apart with normal vision and without red or green cones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.pictures.colors import COINCIDENT, EMPTY, OCCUPIED_ONLY, SOLID, depth_scale, height_scale, rgb
from occfeat_train.report.figures import LINE_COLORS, OUTCOMES, UNSCORED

# Linear RGB as it looks to each kind of vision (Machado, Oliveira and Fernandes 2009, severity 1).
VISIONS = {
    "normal": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
XYZ_FROM_RGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

# Distances in CIE Lab (1976). About 2.3 are just noticeable side by side.
CLASSES_APART, METRES_APART = 22, 14


def lab(colors: NDArray, vision: str) -> NDArray:
    """(n, 3) sRGB of 0 to 255 -> (n, 3) L, a, b."""
    encoded = np.asarray(colors) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.transpose(VISIONS[vision]), 0, 1) @ XYZ_FROM_RGB.T / XYZ_FROM_RGB.sum(axis=1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)


def distances(colors: NDArray, vision: str) -> NDArray:
    found = lab(colors, vision)
    return np.linalg.norm(found[:, None] - found, axis=-1)


def legends() -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Colours that one picture shows together, with the background."""
    yield "labels", {name: color for kind in LABEL_KINDS.values() for name, color in kind.colors.items()}
    yield "coincidence", {"both": COINCIDENT, "solid": SOLID, "voxel": OCCUPIED_ONLY}
    yield "outcomes", OUTCOMES | {"unscored": UNSCORED}
    yield "runs", {color: tuple(bytes.fromhex(color[1:])) for color in LINE_COLORS}


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("legend", dict(legends()))
def test_any_two_colours_of_a_legend_and_the_background_differ(legend, vision):
    colors = {"background": EMPTY, **dict(legends())[legend]}
    apart = distances(list(colors.values()), vision)
    for (i, one), (j, other) in combinations(enumerate(colors), 2):
        assert apart[i, j] >= CLASSES_APART, f"{one} and {other}: {apart[i, j]:.1f}"


@pytest.mark.parametrize("vision", VISIONS)
def test_heights_a_metre_apart_and_the_background_differ(vision):
    heights = np.arange(-5, 5.01, 0.25)
    colors = rgb(height_scale(VoxelGrid()), heights)
    apart = distances(colors, vision)[np.abs(heights[:, None] - heights) >= 1]
    assert apart.min() >= METRES_APART
    assert distances([EMPTY, *colors], vision)[0, 1:].min() >= CLASSES_APART


@pytest.mark.parametrize("vision", VISIONS)
def test_depths_in_a_ratio_of_two_differ(vision):
    depths = np.geomspace(2, 64, 41)
    colors = rgb(depth_scale(), depths)
    assert distances(colors, vision)[np.abs(np.log2(depths[:, None] / depths)) >= 0.999].min() >= METRES_APART


@pytest.mark.parametrize("scale", [height_scale(VoxelGrid()), depth_scale()], ids=["heights", "depths"])
@pytest.mark.parametrize("vision", VISIONS)
def test_lightness_grows_or_falls_along_a_scale(scale, vision):
    """So a scale can be read in grey, and no colour stands for two values."""
    lightness = lab(rgb(scale, scale.norm.inverse(np.linspace(0, 1, 40))), vision)[:, 0]
    assert (np.diff(lightness) > 0).all() or (np.diff(lightness) < 0).all()
