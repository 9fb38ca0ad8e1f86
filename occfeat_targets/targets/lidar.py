"""Occupancy and rays of a keyframe from all of its sweeps (paper 3.2).

The occupancy accumulates the returns of all sweeps. Objects that moved in between are treated as `TargetSpec.dynamic` says:
``carve`` needs no labels and only bit operations, because dropping a return whose voxel is free is emptying that voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.targets.moving import move_returns
from occfeat_targets.targets.occupancy import voxelize
from occfeat_targets.targets.rays import walk_rays

Packed = NDArray[np.uint8]


def lidar_arrays(
    keyframe: Keyframe, returns: Sequence[NDArray[np.float32]], spec: TargetSpec, frames: Matrix
) -> dict[str, NDArray[Any]]:
    """The arrays ``occupancy`` and, if the spec has them, ``rays`` and ``ray_origin``, with a leading axis of frames.

    returns: (n, 3 or more) of each sweep of the keyframe, in its sensor's frame [m]. frames: (F, 4, 4) grids from the ego frame.
    Raises ValueError if no return is inside the grid.
    """
    sweeps = [(values, frames @ sweep.ego_from_sensor) for values, sweep in zip(returns, keyframe.sweeps, strict=True)]
    own = voxelize(*sweeps[0], spec.grid, ego_box=spec.ego_box)
    earlier = _earlier_occupancy(keyframe, sweeps, spec, frames)
    passed = np.zeros_like(own)
    if spec.rays or (spec.dynamic == "carve" and len(sweeps) > 1):
        walk_rays(*sweeps[0], spec.grid, ego_box=spec.ego_box, out=passed)
    if spec.dynamic == "carve":
        earlier &= ~passed
    occupied = own | earlier
    if not occupied.any():
        raise ValueError(
            f"none of the returns of {keyframe.sweeps[0].path} are inside the grid {spec.grid}: "
            "restore the sweep if it is damaged, or correct --range"
        )
    if not spec.rays:
        return {"occupancy": occupied}
    for values, grids_from_sensor in sweeps[1:]:
        walk_rays(values, grids_from_sensor, spec.grid, ego_box=spec.ego_box, out=passed)
    return {
        "occupancy": occupied,
        "rays": np.stack([passed | occupied, passed & ~occupied], axis=1),
        "ray_origin": sweeps[0][1][:, :3, 3].astype(np.float32),
    }


def _earlier_occupancy(
    keyframe: Keyframe, sweeps: Sequence[tuple[NDArray[np.float32], Matrix]], spec: TargetSpec, frames: Matrix
) -> Packed:
    """(F, packed_bytes) voxels with returns of the sweeps before the keyframe's own."""
    out = np.zeros((len(frames), spec.grid.packed_bytes), np.uint8)
    for number, (values, grids_from_sensor) in enumerate(sweeps[1:], 1):
        if spec.uses_boxes:
            values = values[(np.abs(values[:, :2]) >= spec.ego_box).any(axis=1)]
            is_moved, moved = move_returns(values, keyframe, number)
            voxelize(moved, frames, spec.grid, ego_box=0.0, out=out)
            values = values[~is_moved]
        voxelize(values, grids_from_sensor, spec.grid, ego_box=spec.ego_box, out=out)
    return out
