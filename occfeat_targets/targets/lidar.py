"""Occupancy and rays of a keyframe from all of its sweeps (paper 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.targets.occupancy import voxelize
from occfeat_targets.targets.rays import walk_rays


def lidar_arrays(
    keyframe: Keyframe, returns: Sequence[NDArray[np.float32]], spec: TargetSpec, frames: Matrix
) -> dict[str, NDArray[Any]]:
    """The arrays ``occupancy`` and, if the spec has them, ``rays`` and ``ray_origin``, with a leading axis of frames.

    returns: (n, 3 or more) of each sweep of the keyframe, in its sensor's frame [m]. frames: (F, 4, 4) grids from the ego frame.
    Raises ValueError if no return is inside the grid.
    """
    grids_from_sensors = [frames @ sweep.ego_from_sensor for sweep in keyframe.sweeps]
    occupied = np.zeros((len(frames), spec.grid.packed_bytes), np.uint8)
    for values, grids_from_sensor in zip(returns, grids_from_sensors, strict=True):
        voxelize(values, grids_from_sensor, spec.grid, ego_box=spec.ego_box, out=occupied)
    if not occupied.any():
        raise ValueError(
            f"none of the returns of {keyframe.sweeps[0].path} are inside the grid {spec.grid}: "
            "restore the sweep if it is damaged, or correct --range"
        )
    if not spec.rays:
        return {"occupancy": occupied}
    passed = np.zeros_like(occupied)
    for values, grids_from_sensor in zip(returns, grids_from_sensors, strict=True):
        walk_rays(values, grids_from_sensor, spec.grid, ego_box=spec.ego_box, out=passed)
    return {
        "occupancy": occupied,
        "rays": np.stack([passed | occupied, passed & ~occupied], axis=1),
        "ray_origin": grids_from_sensors[0][:, :3, 3].astype(np.float32),
    }
