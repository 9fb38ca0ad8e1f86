"""Slow, independent checks of occupancy and rays from all sweeps of a keyframe, for `verify` and the tests.

Float64 NumPy, and pyquaternion for poses of boxes between annotations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import Keyframe, Track
from occfeat_targets.verify.slow_rays import is_passed, passed_voxels
from occfeat_targets.verify.slow_targets import SlowSource

BORDER = 1e-4  # [m]; a return this close to a cell's border may be on either side

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def own_rays(
    reference: SlowSource, keyframe: Keyframe, number: int, frame_from_ego: Matrix, ego_box: float
) -> tuple[Floats, Floats]:
    """Start (3,) and ends (n, 3) of the rays of a sweep in a grid [m], without those from the ego vehicle."""
    sweep = keyframe.sweeps[number]
    returns = reference.read_returns(sweep.path)[:, :3].astype(np.float64)
    own = (np.abs(returns[:, 0]) < ego_box) & (np.abs(returns[:, 1]) < ego_box)
    returns = returns[~own & np.isfinite(returns).all(axis=1)]
    grid_from_sensor = frame_from_ego @ sweep.ego_from_sensor
    return grid_from_sensor[:3, 3], returns @ grid_from_sensor[:3, :3].T + grid_from_sensor[:3, 3]


def wrong_occupied_voxels(
    reference: SlowSource, keyframe: Keyframe, frame_from_ego: Matrix, spec: TargetSpec, occupied: Mask
) -> int:
    """Number of voxels (Z, H, W) that are wrongly occupied or wrongly empty, beyond what rounding explains.

    Raises ValueError if a file is no sweep.
    """
    sweeps = [own_rays(reference, keyframe, i, frame_from_ego, spec.ego_box) for i in range(len(keyframe.sweeps))]
    must, may = occupancy_bounds([sweeps[0][1]], spec.grid)
    if spec.uses_boxes:
        moved = [_moved(ends, keyframe, i, frame_from_ego) for i, (_, ends) in enumerate(sweeps) if i]
        certain, possible = [sure for sure, _ in moved], [each for both in moved for each in both]
        earlier = occupancy_bounds(certain, spec.grid)[0], occupancy_bounds(possible, spec.grid)[1]
    else:
        earlier = occupancy_bounds([ends for _, ends in sweeps[1:]], spec.grid)
    if spec.dynamic != "carve":
        must, may = must | earlier[0], may | earlier[1]
        return int((must & ~occupied).sum() + (occupied & ~may).sum())
    passed = passed_voxels(*sweeps[0], spec.grid)
    must, may = must | (earlier[0] & ~passed), may | (earlier[1] & ~passed)
    wrong = 0
    for voxel in np.argwhere((must & ~occupied) | (occupied & ~may)):
        borders = {is_passed(voxel, *sweeps[0], spec.grid, grow) for grow in (BORDER, -BORDER)}
        wrong += len(borders) == 1
    return wrong


def wrong_free_voxels(
    reference: SlowSource, keyframe: Keyframe, frame_from_ego: Matrix, spec: TargetSpec, free: Mask, occupied: Mask
) -> int:
    """Number of voxels (Z, H, W) that are free and should not be, or the other way round, beyond what rounding explains."""
    sweeps = [own_rays(reference, keyframe, i, frame_from_ego, spec.ego_box) for i in range(len(keyframe.sweeps))]
    passed = np.any([passed_voxels(start, ends, spec.grid) for start, ends in sweeps], axis=0)
    wrong = 0
    for voxel in np.argwhere(free != (passed & ~occupied)):
        is_free = bool(free[tuple(voxel)])
        grow = BORDER if is_free else -BORDER
        wrong += is_free != any(is_passed(voxel, start, ends, spec.grid, grow) for start, ends in sweeps)
    return wrong


def occupancy_bounds(clouds: Sequence[Floats], grid: VoxelGrid) -> tuple[Mask, Mask]:
    """Two (Z, H, W) volumes: voxels that points (n, 3) in the grid [m] must occupy, and voxels that they may.

    They differ only where a point lies within BORDER of a cell's border.
    """
    must, may = np.zeros((2, *grid.shape), np.bool_)
    lower, size = np.array(grid.lower[::-1]), np.array(grid.cell_size[::-1])
    shifts = np.array([[dx, dy, dz] for dx in (-1, 0, 1) for dy in (-1, 0, 1) for dz in (-1, 0, 1)]) * BORDER
    for points in clouds:
        position = (points - lower) / size
        to_border = np.abs(position - np.rint(position)) * size
        clear = (to_border > BORDER).all(axis=1)
        _mark(must, np.floor(position[clear]).astype(np.int64))
        for shift in shifts:
            _mark(may, np.floor((points + shift - lower) / size).astype(np.int64))
    return must, may


def _mark(volume: Mask, index: NDArray[np.int64]) -> None:
    inside = ((index >= 0) & (index < volume.shape[::-1])).all(axis=1)
    right, forward, up = index[inside].T
    volume[up, forward, right] = True


def _moved(points: Floats, keyframe: Keyframe, number: int, frame_from_ego: Matrix) -> tuple[Floats, Floats]:
    """Returns (n, 3) of a sweep in a grid, moved with their boxes to the time of the keyframe.

    Two clouds: positions that are certain, and all possible positions of returns within BORDER of a side of a box.
    """
    global_from_grid = keyframe.global_from_ego @ np.linalg.inv(frame_from_ego)
    certain, possible = [], []
    still = np.ones(len(points), np.bool_)
    undecided = np.zeros(len(points), np.bool_)
    for track in keyframe.tracks:
        then = _pose(track, keyframe.sweeps[number].seconds)
        if then is None:
            continue
        box_from_grid = np.linalg.inv(then) @ global_from_grid
        local = points @ box_from_grid[:3, :3].T + box_from_grid[:3, 3]
        depth = (track.half_size - np.abs(local)).min(axis=1)  # inside of the box
        motion = np.linalg.inv(global_from_grid) @ _matrix(track.rotations[0], track.translations[0])
        there = local @ motion[:3, :3].T + motion[:3, 3]
        undecided |= still & (np.abs(depth) <= BORDER)
        possible.append(there[still & (depth >= -BORDER)])
        certain.append(there[still & ~undecided & (depth > 0)])
        still &= depth <= BORDER
    possible.append(points[still | undecided])
    certain.append(points[still & ~undecided])
    return np.concatenate(certain), np.concatenate(possible)


def _pose(track: Track, seconds: float) -> Matrix | None:
    """global_from_box at a time, or None before the first annotation."""
    from pyquaternion import Quaternion

    for i in range(len(track.seconds) - 1):
        newer, older = track.seconds[i], track.seconds[i + 1]
        if older <= seconds <= newer:
            share = (newer - seconds) / (newer - older)
            rotation = Quaternion.slerp(*(Quaternion(track.rotations[k]) for k in (i, i + 1)), amount=share)
            return _matrix(rotation.elements, (1 - share) * track.translations[i] + share * track.translations[i + 1])
    return None


def _matrix(rotation: Floats, translation: Floats) -> Matrix:
    from pyquaternion import Quaternion

    matrix: Matrix = Quaternion(rotation).transformation_matrix
    matrix[:3, 3] = translation
    return matrix
