"""Voxel features sampled from six feature maps, against torch, NumPy and the time of one pass over the memory.

python pipelines/benchmarks/sampling.py [--dataroot nuscenes --split mini_train]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numba
import numpy as np
import torch
from _inputs import find_dataroot
from _timing import compare, machine, table

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid, project, scale_intrinsics, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.mean_over_views import sample_voxel_features, sample_voxel_features_numpy

SIZE = (270, 480)  # size of the cached images
MAPS = (6, 16, 28, 384)  # DINOv2 ViT-S/14 at 224x392
CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")


def real_scene(dataroot: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cam_from_grid, intrinsics, centres of the occupied voxels) of a split's first keyframe."""
    from occfeat_targets.sources.nuscenes import read_split
    from occfeat_targets.sources.sweeps import read_sweep
    from occfeat_targets.targets.occupancy import voxelize

    keyframe = read_split(dataroot, split, version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False).keyframes[0]
    grid, sweep = VoxelGrid(), keyframe.sweeps[0]
    volume = grid.unpack_volume(voxelize(read_sweep(sweep.path), GRID_FROM_EGO_AXES @ sweep.ego_from_sensor, grid))
    cam_from_grid = np.stack([view.cam_from_ego for view in keyframe.cameras]) @ inverse_rigid(GRID_FROM_EGO_AXES)
    scaled = [
        scale_intrinsics(view.intrinsics, SIZE[1] / view.source_size[1], SIZE[0] / view.source_size[0])
        for view in keyframe.cameras
    ]
    return cam_from_grid, np.stack(scaled), grid.centers_of(np.flatnonzero(volume))


def synthetic_scene(voxels: int = 6000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ring of six cameras with nuScenes' focal length, and voxels whose density decreases with the distance."""
    rng = np.random.default_rng(0)
    cameras = []
    for yaw in np.radians([55, 0, -55, 110, 180, -110]):
        camera = np.eye(4)
        camera[:3, :3] = [[np.cos(yaw), np.sin(yaw), 0], [0, 0, -1], [-np.sin(yaw), np.cos(yaw), 0]]
        camera[:3, 3] = -camera[:3, :3] @ [0, 0.5, 1.0]
        cameras.append(camera)
    pinhole = scale_intrinsics(np.array([[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]]), 0.3, 0.3)
    angle, distance = rng.uniform(-np.pi, np.pi, 20 * voxels), np.exp(rng.uniform(np.log(3), np.log(50), 20 * voxels))
    points = np.stack([distance * np.cos(angle), distance * np.sin(angle), rng.uniform(-1.5, 2, angle.size)], axis=1)
    grid = VoxelGrid()
    w, h, z = (transform(grid.cells_from_grid, points)).astype(int).T
    occupied = np.unique((z * grid.shape[1] + h) * grid.shape[2] + w)
    occupied = np.sort(rng.choice(occupied, voxels, replace=False))
    return np.stack(cameras), np.stack([pinhole] * 6), grid.centers_of(occupied)


@numba.njit
def touch(source: np.ndarray, target: np.ndarray) -> None:
    """Read every word of the maps once and write every word of the result once."""
    checksum = np.uint64(0)
    for i in range(source.size):
        checksum ^= source[i]
    for i in range(target.size):
        target[i] = checksum


def projections(
    cam_from_grid: np.ndarray, intrinsics: np.ndarray, centers: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per camera: indices of the voxels that it sees, and their positions (x, y) in -1..1."""
    seen = []
    for camera, pinhole in zip(cam_from_grid, intrinsics, strict=True):
        pixels, _, is_valid = project(pinhole, transform(camera, centers), SIZE)
        seen.append((np.flatnonzero(is_valid), pixels[is_valid] / (SIZE[1], SIZE[0]) * 2 - 1))
    return seen


def with_numpy(features: np.ndarray, scene: tuple[np.ndarray, ...]) -> np.ndarray:
    """Indexing at the valid pairs of voxel and camera, in float32."""
    _, h, w, channels = features.shape
    total, views = np.zeros((len(scene[2]), channels), np.float32), np.zeros((len(scene[2]), 1), np.float32)
    for tokens, (voxels, position) in zip(features, projections(*scene), strict=True):
        x = np.clip((position[:, 0] + 1) / 2 * w - 0.5, 0, w - 1).astype(np.float32)
        y = np.clip((position[:, 1] + 1) / 2 * h - 0.5, 0, h - 1).astype(np.float32)
        x0, y0 = x.astype(int), y.astype(int)
        right, lower = (x - x0)[:, None], (y - y0)[:, None]
        x1, y1 = np.minimum(x0 + 1, w - 1), np.minimum(y0 + 1, h - 1)
        top = tokens[y0, x0] * (1 - right) + tokens[y0, x1] * right
        total[voxels] += top * (1 - lower) + (tokens[y1, x0] * (1 - right) + tokens[y1, x1] * right) * lower
        views[voxels] += 1
    return (total / np.maximum(views, 1)).astype(np.float16)


def with_grid_sample(maps: torch.Tensor, scene: tuple[np.ndarray, ...]) -> torch.Tensor:
    """grid_sample at the voxels that each camera sees. maps: (V, C, h, w) float32."""
    total, views = torch.zeros(len(scene[2]), maps.shape[1]), torch.zeros(len(scene[2]), 1)
    for tokens, (voxels, position) in zip(maps, projections(*scene), strict=True):
        grid = torch.from_numpy(position).float()[None, None]
        sampled = torch.nn.functional.grid_sample(tokens[None], grid, align_corners=False, padding_mode="border")
        index = torch.from_numpy(voxels)
        total[index] += sampled[0, :, 0].T
        views[index] += 1
    return (total / views.clamp(min=1)).half()


def bags_of(scene: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """(tokens, offsets, weights) for embedding_bag with one bag per voxel."""
    cam_from_grid, intrinsics, centers = scene
    h, w = MAPS[1:3]
    pixels_from_grid = intrinsics @ cam_from_grid[:, :3]
    u, v, depth = (centers.double() @ pixels_from_grid[..., :3].mT + pixels_from_grid[:, None, :, 3]).unbind(-1)
    u, v = (u / depth).T, (v / depth).T
    is_valid = (depth.T > 0) & (u >= 0) & (u < SIZE[1]) & (v >= 0) & (v < SIZE[0])
    num_views = is_valid.sum(1)
    voxel, cam = is_valid.nonzero(as_tuple=True)
    x = (u[voxel, cam] * (w / SIZE[1]) - 0.5).clamp(0, w - 1)
    y = (v[voxel, cam] * (h / SIZE[0]) - 0.5).clamp(0, h - 1)
    x0, y0 = x.long(), y.long()
    columns, rows = torch.stack([x0, (x0 + 1).clamp(max=w - 1)], 1), torch.stack([y0, (y0 + 1).clamp(max=h - 1)], 1)
    tokens = ((cam * h)[:, None, None] + rows[:, :, None]) * w + columns[:, None]
    right, lower = x - x0, y - y0
    weights = torch.stack([1 - lower, lower], 1)[:, :, None] * torch.stack([1 - right, right], 1)[:, None]
    weights /= num_views[voxel, None, None]
    return tokens.view(-1), (num_views.cumsum(0) - num_views) * 4, weights.half().view(-1)


def with_embedding_bag(tokens: torch.Tensor, bags: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One sparse product. tokens: (V * h * w, C) float16."""
    index, offsets, weights = bags
    return torch.nn.functional.embedding_bag(index, tokens, offsets, mode="sum", per_sample_weights=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", type=Path, help="a nuScenes dataroot")
    parser.add_argument("--split", default="mini_train", help="split whose first keyframe is used")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; ours uses one")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataroot = find_dataroot(options.dataroot)
    scene = synthetic_scene() if dataroot is None else real_scene(dataroot, options.split)
    features = np.random.default_rng(0).standard_normal(MAPS).astype(np.float16)
    scale = (np.abs(features).max(axis=-1).astype(np.float32) / 127).astype(np.float16)
    quantised = np.round(features / scale[..., None].astype(np.float32)).clip(-127, 127).astype(np.int8)
    cameras, pinholes, centers = (torch.from_numpy(array) for array in scene)
    tensor, first = torch.from_numpy(features), torch.from_numpy(features).float().permute(0, 3, 1, 2).contiguous()
    bags = bags_of((cameras, pinholes, centers))
    tokens = tensor.view(-1, MAPS[-1])
    target = np.empty(len(centers) * MAPS[-1] // 4, np.uint64)
    contenders = {
        "limit: reading the maps and writing the result once": lambda: touch(features.view(np.uint64).ravel(), target),
        "ours: fused numba, float16": lambda: sample_voxel_features_numpy(features, None, *scene[:2], SIZE, scene[2])[
            0
        ],
        "ours: fused numba, int8 with a scale per token": lambda: sample_voxel_features_numpy(
            quantised, scale, *scene[:2], SIZE, scene[2]
        )[0],
        "ours: plain torch": lambda: sample_voxel_features(tensor, cameras, pinholes, SIZE, centers)[0],
        "torch embedding_bag": lambda: with_embedding_bag(tokens, bags_of((cameras, pinholes, centers))),
        "torch embedding_bag, without the projection": lambda: with_embedding_bag(tokens, bags),
        "torch grid_sample on valid pairs, float32 maps": lambda: with_grid_sample(first, scene),
        "NumPy gathers on valid pairs": lambda: with_numpy(features, scene),
    }
    limit, ours, *peers = contenders
    result, views = sample_voxel_features_numpy(features, None, *scene[:2], SIZE, scene[2])
    source = "SYNTHETIC ring of cameras: no nuScenes dataroot found" if dataroot is None else "real keyframe"
    print(f"{machine()}\n{source}: {len(views):,} voxels, {np.bincount(views).tolist()} of them with 0, 1, 2 views;")
    print("6 x 384 x 16 x 28 maps")
    for name in peers:
        error = np.abs(np.asarray(contenders[name]()).astype(np.float32) - result).max()
        print(f"largest difference from ours: {error:.1e} ({name})")
    cell_size = VoxelGrid().cell_size
    contenders["ours: fused numba, float16, with the depth test (--occlusion zbuffer)"] = lambda: (
        sample_voxel_features_numpy(features, None, *scene[:2], SIZE, scene[2], cell_size=cell_size)[0]
    )
    print("\n" + table(compare(contenders, ours=ours, limit=limit, seconds=options.seconds)))


if __name__ == "__main__":
    main()
