"""Inputs of the probes: the teacher's features, and baselines without a teacher."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.probe.voxels import Voxels

TEACHER = "teacher's features"
BASELINES = ("colour", "height and distance", "colour, height and distance")
INPUTS = (TEACHER, *BASELINES)


def inputs_of(voxels: Voxels) -> dict[str, NDArray[np.float32]]:
    """{name: (n, channels)} of each input of INPUTS. Colour, and height and distance, are expanded to second order."""
    colour = expand(voxels.colors)
    place = expand(np.stack([voxels.centers[:, 2], np.hypot(voxels.centers[:, 0], voxels.centers[:, 1])], 1))
    values = (voxels.features, colour, place, np.concatenate([colour, place], 1))
    return dict(zip(INPUTS, values, strict=True))


def expand(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, C) -> (n, C + C (C + 1) / 2): the values, their squares and their products."""
    i, j = np.triu_indices(values.shape[1])
    return np.concatenate([values, values[:, i] * values[:, j]], 1)
