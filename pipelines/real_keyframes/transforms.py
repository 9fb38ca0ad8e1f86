"""Wrong transforms on purpose: how a keyframe's measures change if its calibration is changed.

If every transform of the cache is right, each change makes them worse: borders in the LiDAR are no longer edges in the images,
cameras that see the same voxel agree less about it, and a network that fits the keyframe no longer does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.build.planned import open_plan
from occfeat_targets.cache.geometry import Matrix, inverse_rigid, project, rotation_matrix, transform
from occfeat_targets.pictures.colors import directions
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.ops.mean_over_views import sample_voxel_features_numpy
from occfeat_train.report.voxel_predictions import VoxelPredictions
from occfeat_train.tasks.pretraining import Pretraining
from pipelines.real_keyframes.edges import edge_alignment


@dataclass(frozen=True)
class Rig:
    """Transforms of a keyframe's V cameras. cam_from_ego: (V, 4, 4). ego_from_cam: (V, 4, 4), the calibration alone.

    order: (V,) the camera whose image stands for each camera.
    """

    cam_from_ego: Matrix
    ego_from_cam: Matrix
    order: NDArray[np.int64]


def turned(degrees: float, axis: int = 2) -> Callable[[Rig], Rig]:
    """All cameras turned about an axis of the ego frame: 0 forward, 1 left, 2 up."""
    half, turn = np.deg2rad(-degrees) / 2, np.eye(4)  # what they see turns the other way
    turn[:3, :3] = rotation_matrix((np.cos(half), *(np.sin(half) * (np.arange(3) == axis))))
    return lambda rig: replace(rig, cam_from_ego=rig.cam_from_ego @ turn)


CHANGES: dict[str, Callable[[Rig], Rig]] = {
    "as built": lambda rig: rig,
    "the ego's motion between LiDAR and camera ignored": lambda rig: replace(
        rig, cam_from_ego=inverse_rigid(rig.ego_from_cam)
    ),
    "cameras turned to the left by 0.5 degrees": turned(0.5),
    "cameras turned to the right by 0.5 degrees": turned(-0.5),
    "cameras turned to the right by 3 degrees": turned(-3),
    "rig pitched by 3 degrees": turned(3, axis=1),
    "grid mirrored left and right": lambda rig: replace(rig, cam_from_ego=rig.cam_from_ego @ np.diag([1.0, -1, 1, 1])),
    "image of another camera (the next in the list)": lambda rig: replace(rig, order=np.roll(rig.order, -1)),
}


def read_rig(dataset: KeyframeDataset, keyframe: int) -> Rig:
    """The rig as built. The calibration alone comes from the plan that the build keeps in the cache."""
    cache = dataset.reader.cache
    plan = open_plan(cache, Path(cache.provenance["dataroot"]))
    assert plan is not None, f"{cache.path} has no plan: it was not built by this command"
    cameras = plan.find(cache, [keyframe])[keyframe].cameras
    built = dataset.reader.read("cam_from_ego", keyframe).astype(np.float64)
    return Rig(built, np.stack([camera.ego_from_cam for camera in cameras]), np.arange(len(cameras)))


def shift(found: VoxelPredictions, rig: Rig, changed: Rig) -> float:
    """Median distance [px of the cached images] by which a change moves the projections of the voxels with targets."""
    reader, centers = found.reader, found.grid.centers_of(found.predicted.voxels).astype(np.float64)
    points = transform(inverse_rigid(found.grid_from_ego), centers)
    intrinsics = reader.read("intrinsics", found.keyframe).astype(np.float64)
    moved = []
    for k, before, after in zip(intrinsics, rig.cam_from_ego, changed.cam_from_ego, strict=True):
        (one, _, is_seen), (two, _, is_still) = (
            project(k, transform(matrix, points), reader.cache.spec.image_size) for matrix in (before, after)
        )
        moved.append(np.linalg.norm(one - two, axis=1)[is_seen & is_still])
    return float(np.median(np.concatenate(moved)))


@torch.no_grad()
def measure_network(
    task: Pretraining, dataset: KeyframeDataset, found: VoxelPredictions, changed: Rig
) -> dict[str, float]:
    """Occupancy IoU [%] and mean cosine to the targets as built, if the network gets the changed transforms."""
    batch = dataset.batch([(0, found.keyframe)])
    cam_from_grid = torch.from_numpy(changed.cam_from_ego @ inverse_rigid(found.grid_from_ego))[None]
    metric = task.metric()
    task.eval()
    task.measure(replace(batch, cam_from_grid=cam_from_grid, images=batch.images[:, changed.order]), metric)
    results = metric.results()
    return {"iou": results["occupancy_iou"], "cosine": results["cosine"]}


def agreement(found: VoxelPredictions, changed: Rig) -> float:
    """Mean cosine between the teacher's features of two cameras at an occupied voxel that both see, after subtracting the mean of Y_v.

    NaN if no two cameras see a voxel together.
    """
    reader = found.reader
    centers = found.grid.centers_of(np.flatnonzero(found.true))
    cam_from_grid = changed.cam_from_ego @ inverse_rigid(found.grid_from_ego)
    intrinsics = reader.read("intrinsics", found.keyframe).astype(np.float64)
    maps = reader.read("features", found.keyframe)[changed.order]

    def sample(cameras: slice) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        features, views = sample_voxel_features_numpy(
            maps[cameras], None, cam_from_grid[cameras], intrinsics[cameras], reader.cache.spec.image_size, centers
        )
        return directions(features), views > 0

    features, is_seen = sample(slice(None))
    mean = features[is_seen].mean(axis=0)
    alone = [sample(slice(camera, camera + 1)) for camera in range(len(maps))]
    pairs = [
        (directions(one[seen & also] - mean) * directions(other[seen & also] - mean)).sum(axis=1)
        for (one, seen), (other, also) in itertools.combinations(alone, 2)
    ]
    cosines = np.concatenate(pairs)
    return float(cosines.mean()) if len(cosines) else float("nan")


def measure_edges(found: VoxelPredictions, changed: Rig, returns: NDArray[np.float64]) -> float:
    """`edge_alignment` of a keyframe. returns: (n, 3) in the ego frame [m]."""
    reader = found.reader
    intrinsics = reader.read("intrinsics", found.keyframe).astype(np.float64)
    images = reader.read("images", found.keyframe)[changed.order]
    return edge_alignment(images, intrinsics, changed.cam_from_ego, returns)
