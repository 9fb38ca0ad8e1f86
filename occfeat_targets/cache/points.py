"""LiDAR returns of a keyframe, and the fixed-size arrays that hold them in a cache.

A keyframe has a different number of returns in each sweep. They are stored one sweep after the other, padded with zeros to the
most that the data set's sensor can send; the zeros compress to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.plural import count

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Points:
    """n LiDAR returns of a keyframe's S sweeps, in the ego frame at LiDAR time, without those from the ego vehicle.

    xyz: (n, 3) float32 [m]. intensity: (n,) float32, of the sensor's scale. sweep: (n,) int64, index of each return's sweep,
    ascending; 0 is the keyframe's own, then backwards in time.
    origins: (S, 3) float32 [m], position of the sensor during each sweep. times: (S,) float32 [s], time of each sweep
    relative to the keyframe's.
    """

    xyz: Floats
    intensity: Floats
    sweep: NDArray[np.int64]
    origins: Floats
    times: Floats

    def to_arrays(self, max_points: int, num_sweeps: int) -> dict[str, NDArray[Any]]:
        """The arrays of a cache. Raises ValueError if there are more than max_points returns."""
        if len(self.xyz) > max_points:
            raise ValueError(
                f"{count(len(self.xyz), 'LiDAR return')}, and the cache has room for {max_points}: correct max_returns of the source"
            )
        counts = np.bincount(self.sweep, minlength=num_sweeps).astype(np.int32)
        columns = np.concatenate([self.xyz, self.intensity[:, None]], axis=1)
        return {
            "points": _padded(columns, max_points),
            "num_points": counts,
            "sweep_origins": _padded(self.origins, num_sweeps),
            "sweep_times": _padded(self.times, num_sweeps),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Points:
        counts = arrays["num_points"]
        points, sweeps = arrays["points"][: counts.sum()], int(np.flatnonzero(counts).max(initial=-1)) + 1
        sweep = np.repeat(np.arange(len(counts)), counts)
        return cls(points[:, :3], points[:, 3], sweep, arrays["sweep_origins"][:sweeps], arrays["sweep_times"][:sweeps])


def _padded(values: Floats, length: int) -> Floats:
    out = np.zeros((length, *values.shape[1:]), np.float32)
    out[: len(values)] = values
    return out
