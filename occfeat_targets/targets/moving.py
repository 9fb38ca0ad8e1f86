"""Returns of earlier sweeps that move with the annotated boxes of their objects to the time of the keyframe.

The pose of a box between two annotated keyframes is interpolated as by nuscenes-devkit: linearly in the position, and along the
shortest rotation. Returns outside of all boxes stay where they are. So do those in the box of an object that the keyframe
itself, or a keyframe before the sweep, does not annotate, because one of its two poses is unknown.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, rigid, transform
from occfeat_targets.sources.keyframe import Keyframe, Track


def box_pose(track: Track, seconds: float) -> Matrix | None:
    """(4, 4) global_from_box at a time relative to the keyframe; None before the first annotation."""
    after = int(np.searchsorted(-track.seconds, -seconds, side="right")) - 1  # the last annotation that is not earlier
    if after < 0 or (after == len(track.seconds) - 1 and seconds < track.seconds[after]):
        return None
    before = min(after + 1, len(track.seconds) - 1)
    span = track.seconds[after] - track.seconds[before]
    share = (track.seconds[after] - seconds) / span if span else 0.0
    translation = (1 - share) * track.translations[after] + share * track.translations[before]
    return rigid(_slerp(track.rotations[after], track.rotations[before], share), translation)


def _slerp(a: NDArray[np.float64], b: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Quaternion at a share of the shortest way from a to b."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    cosine = float(a @ b)
    if cosine < 0:
        b, cosine = -b, -cosine
    if cosine > 1 - 1e-9:
        return (1 - share) * a + share * b
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


def move_returns(
    returns: NDArray[np.float32], keyframe: Keyframe, number: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which returns (n, 3 or more) of sweep `number` are in a box that moves, and where they are at the time of the keyframe.

    Returns a mask (n,) and (m, 3) positions of the masked returns in the keyframe's ego frame [m]. Borders of a box belong to
    it. A return in several boxes moves with the first one.
    """
    sweep = keyframe.sweeps[number]
    ego_from_global = inverse_rigid(keyframe.global_from_ego)
    xyz = returns[:, :3].astype(np.float64)
    is_moved, moved = np.zeros(len(xyz), np.bool_), np.zeros((len(xyz), 3))
    x, y = np.ascontiguousarray(xyz[:, :2].T)
    for track in keyframe.tracks:
        then, now = (box_pose(track, seconds) for seconds in (sweep.seconds, 0.0))
        if then is None or now is None:
            continue
        box_from_sensor = inverse_rigid(then) @ keyframe.global_from_ego @ sweep.ego_from_sensor
        # Only returns within half a diagonal of the box, because transforming all of them for each box takes most of a build.
        middle, reach = inverse_rigid(box_from_sensor)[:3, 3], np.linalg.norm(track.half_size) + 1e-3
        near = np.flatnonzero((np.abs(x - middle[0]) <= reach) & (np.abs(y - middle[1]) <= reach) & ~is_moved)
        local = transform(box_from_sensor, xyz[near])
        inside = (np.abs(local) <= track.half_size).all(axis=1)
        chosen = near[inside]
        moved[chosen], is_moved[chosen] = transform(ego_from_global @ now, local[inside]), True
    return is_moved, moved[is_moved].astype(np.float32)
