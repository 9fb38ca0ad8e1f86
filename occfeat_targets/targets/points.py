"""LiDAR returns of all sweeps of a keyframe, in its ego frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import transform
from occfeat_targets.cache.points import Points
from occfeat_targets.sources.keyframe import Keyframe


def points_of(keyframe: Keyframe, returns: Sequence[NDArray[np.float32]], ego_box: float) -> Points:
    """The returns (n, 4 or more) of each sweep of a keyframe in its ego frame, without those from the ego vehicle."""
    kept = [values[(np.abs(values[:, :2]) >= ego_box).any(axis=1), :4] for values in returns]
    sensors = np.stack([sweep.ego_from_sensor for sweep in keyframe.sweeps])
    xyz = [transform(sensor, values[:, :3].astype(np.float64)) for sensor, values in zip(sensors, kept, strict=True)]
    return Points(
        xyz=np.concatenate(xyz).astype(np.float32),
        intensity=np.concatenate([values[:, 3] for values in kept]),
        sweep=np.repeat(np.arange(len(kept)), [len(values) for values in kept]),
        origins=sensors[:, :3, 3].astype(np.float32),
        times=np.array([sweep.seconds for sweep in keyframe.sweeps], np.float32),
    )
