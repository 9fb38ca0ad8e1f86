"""The reference frames in which a sample's grid can lie: the ego frame, or a camera's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import EGO_FRAME

EVALUATION_CAMERA = "CAM_FRONT"  # reference frame in evaluation (Simple-BEV)
NEVER_REFERENCE = "CAM_FRONT_LEFT"  # Simple-BEV samples the reference camera from the other five


def has_grid(reader: CacheReader) -> NDArray[np.bool_]:
    """(N, F) whether a keyframe has a grid in a reference frame: not if it was skipped, or if the frame's camera is masked."""
    spec = reader.cache.spec
    is_seen = reader.camera_valid
    columns = [reader.is_valid if name == EGO_FRAME else is_seen[:, spec.cameras.index(name)] for name in spec.frames]
    return np.stack(columns, axis=1) & reader.is_valid[:, None]


def resolve_frame(available: Sequence[str], wanted: str) -> str:
    """Resolve ``auto`` for a cache with these frames; other values are returned unchanged."""
    if wanted != "auto":
        return wanted
    return EGO_FRAME if set(available) <= {EGO_FRAME} else "cameras"


def reference_frames(available: Sequence[str], wanted: str, *, training: bool) -> list[int]:
    """Indices of a sample's possible reference frames: one in evaluation, several cameras in training.

    wanted: ``auto`` (cameras where the cache has them), ``ego``, ``cameras``, or a camera's name.
    Raises ValueError if the cache has no such frame.
    """
    cameras = [name for name in available if name != EGO_FRAME]
    wanted = resolve_frame(available, wanted)
    if wanted == "cameras":
        if training:
            names = [name for name in cameras if name != NEVER_REFERENCE] or cameras
        else:
            names = [EVALUATION_CAMERA] if EVALUATION_CAMERA in cameras or not cameras else cameras[:1]
    else:
        names = [wanted]
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise ValueError(
            f"frame={wanted}: this cache has grids in {', '.join(available)}: choose one of them, or build it with --frames both"
        )
    return [list(available).index(name) for name in names]


def why_left_out(frames: Sequence[str]) -> str:
    """Why a valid keyframe has no grid in any of these reference frames."""
    return f"the camera of the grid, {' or '.join(frames)}, is masked"


def none_left(available: Sequence[str], frames: Sequence[str]) -> str:
    """Why no keyframe of a cache with the frames `available` has a grid in any of `frames`, and what to do."""
    remedy = "" if EGO_FRAME in available else "build a cache with --frames both, and "
    return f"{why_left_out(frames)}: {remedy}use --set frame=ego (evaluate --frame ego)"
