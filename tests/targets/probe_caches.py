"""Caches of several scenes with chosen contents, for the tests of the probe."""

from __future__ import annotations

import numpy as np

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.store import Identity
from tests.conftest import SMALL_GRID, small_spec
from tests.targets.sheets import INTRINSICS, YAWS, cam_from_ego

FRONT = np.arange(6) == 1  # of CAMERAS
CENTERS = SMALL_GRID.voxel_centers()[0]  # (H, W, 3) of the cells
IS_RIGHT = CENTERS[..., 0] > 0


def write_cache(path, scenes, *, spec=None, seed=0, simulated=(), seen_by=FRONT, is_cut=False, **contents):
    """A cache with one keyframe for each name in `scenes`, random voxels, images, features and labels, and the contents given.

    seen_by: (V,) the cameras that are not masked. is_cut: only the first half of the keyframes is built.
    """
    spec = spec or small_spec()
    n = len(scenes)
    identity = Identity(tuple(f"{path.stem}-{i}" for i in range(n)), tuple(scenes), tuple(range(1, n + 1)))
    built = n // 2 if is_cut else n
    cache = create_cache(path, spec, identity, keyframes_per_shard=built, provenance={"simulated": list(simulated)})
    rng = np.random.default_rng(seed)
    arrays = {a.name: rng.integers(0, 100, (n, *a.shape)).astype(a.dtype) for a in spec.arrays()}
    pose = np.array([cam_from_ego(yaw) for yaw in YAWS]) * seen_by[:, None, None]
    chosen = {
        "is_valid": True,
        "camera_valid": seen_by,
        "image_area": (0, 0, *spec.image_size),
        "intrinsics": INTRINSICS * seen_by[:, None, None],
        "cam_from_ego": pose,
        "grid_from_ego": GRID_FROM_EGO_AXES,
        "occupancy": spec.grid.pack_volume(rng.random((n, len(spec.frames), *spec.grid.shape)) < 0.3),
        **contents,
    }
    if "vehicles" in spec.labels:
        chosen.setdefault("labels/vehicles_valid", 255)
    for name, values in chosen.items():
        arrays[name][:] = values
    cache.write_shard(0, {name: values[:built] for name, values in arrays.items()}, {"skipped": {}, "cosine": None})
    return CacheReader(cache, allow_incomplete=is_cut)


def vehicles(mask):
    """Contents in which vehicles are the cells of a mask (..., H, W)."""
    return {"labels/vehicles": SMALL_GRID.pack_map(np.asarray(mask))}


def columns(shape):
    """(..., w, C) of this shape, whose values are the column."""
    return np.broadcast_to(np.arange(shape[-2])[:, None], shape)


def scenes(n):
    return [f"scene-{i:04d}" for i in range(n)]
