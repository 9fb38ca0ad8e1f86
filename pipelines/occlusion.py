"""How often do occupied voxels hide each other from the cameras, and does the depth test of `pretrain --occlusion zbuffer` find it?

    python -m pipelines.occlusion --out hidden-city
    python -m pipelines.occlusion --cache nuscenes/train.zarr

With --out, on the synthetic city, whose geometry is known: a (voxel, camera) pair is truly hidden if the ray from the camera to
the mean of the voxel's returns meets a surface more than a voxel's diagonal before. The depth test is compared with a simpler one:
whether the line of sight to the voxel's centre enters an occupied voxel that much before. With --cache, on the first
keyframes of a cache, only how much the tests leave out, because the truth is not known. The city is written to --out if it is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.build.assemble import grids_from_ego
from occfeat_targets.cache.geometry import Matrix, fit, fit_intrinsics, inverse_rigid, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_targets.common.command_line import reports_errors
from occfeat_targets.common.compiled import compiled
from occfeat_targets.common.terminal import echo
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.nuscenes import NuScenes
from occfeat_targets.synth.raycast import trace
from occfeat_targets.synth.world import World
from occfeat_targets.targets.lidar import lidar_arrays
from occfeat_train.ops.occlusion import hidden_voxels
from occfeat_train.ops.views import Cameras
from occfeat_train.tasks.ray_iou import first_depths
from pipelines.moving_objects import cases, keyframes_with_worlds, prepare_city

REACH = 200.0  # [m] of rays from the cameras
NUM_COUNTS = 6
Pairs = NDArray[np.bool_]  # (V, n) of a camera and a voxel


@compiled(error_model="numpy")
def distances(start, rays, reach, world, out):  # type: ignore[no-untyped-def]
    """To the first surface on each of n rays (n, 3) of unit directions -> out (n,) [m]."""
    for i in range(len(rays)):
        out[i], _, _ = trace(start[0], start[1], start[2], rays[i, 0], rays[i, 1], rays[i, 2], reach, False, world)


def origins_of(cam_from_grid: Matrix) -> Matrix:
    """(V, 4, 4) -> (V, 3) positions of the cameras in the grid [m]."""
    return inverse_rigid(cam_from_grid)[:, :3, 3]


def tests(
    occupied: NDArray[np.bool_], grid: VoxelGrid, cam_from_grid: Matrix, cameras: Cameras
) -> tuple[Pairs, dict[str, Pairs]]:
    """Which cameras' images contain the centre of an occupied voxel, and which of these pairs each test calls hidden."""
    centers = grid.centers_of(np.flatnonzero(occupied)).astype(np.float64)
    seen = cameras.project(*torch.from_numpy(centers)[..., None].unbind(1)).is_seen.numpy().T
    by_sight = np.zeros_like(seen)
    for view, origin in enumerate(origins_of(cam_from_grid)):
        rays = centers - origin
        lengths = np.linalg.norm(rays, axis=1)
        first = first_depths(occupied, origin, rays / lengths[:, None], grid)
        by_sight[view] = first < lengths - np.linalg.norm(grid.cell_size)
    return seen, {
        "depth test": hidden_voxels(centers, grid.cell_size, cameras),
        "line of sight to the centre": by_sight,
    }


def truly_hidden(
    keyframe: Keyframe, returns: list[NDArray[np.float32]], flat: NDArray[np.int64], grid: VoxelGrid, grid_from_ego: Matrix,
    cam_from_grid: Matrix, world: World,
) -> Pairs:  # fmt: skip
    """flat: indices of the occupied voxels. returns: of the keyframe's sweeps."""
    sweeps = zip(keyframe.sweeps, returns, strict=True)
    points = np.concatenate(
        [transform(grid_from_ego @ s.ego_from_sensor, xyz[:, :3].astype(np.float64)) for s, xyz in sweeps]
    )
    cells = np.floor(transform(grid.cells_from_grid, points)).astype(np.int64)[:, ::-1]
    inside = ((cells >= 0) & (cells < grid.shape)).all(1)
    of_point = np.ravel_multi_index(tuple(cells[inside].T), grid.shape)
    number = np.bincount(of_point, minlength=grid.num_voxels)[flat, None]
    total = np.stack([np.bincount(of_point, values, grid.num_voxels)[flat] for values in points[inside].T], 1)
    # Rounding may put all returns of a voxel into its neighbour.
    mean = np.where(number > 0, total / np.maximum(number, 1), grid.centers_of(flat))
    global_from_grid = keyframe.global_from_ego @ inverse_rigid(grid_from_ego)
    surface = transform(global_from_grid, mean)
    hidden = np.zeros((len(cam_from_grid), len(flat)), np.bool_)
    for view, origin in enumerate(transform(global_from_grid, origins_of(cam_from_grid))):
        lengths = np.linalg.norm(surface - origin, axis=1)
        found = np.empty(len(flat))
        distances(origin, (surface - origin) / lengths[:, None], REACH, world, found)
        hidden[view] = found < lengths - np.linalg.norm(grid.cell_size)
    return hidden


def count(seen: Pairs, hidden: Pairs, true: Pairs | None) -> NDArray[np.int64]:
    """(NUM_COUNTS,): pairs, found hidden, truly hidden, both; voxels in view, those of them hidden in all their views."""
    true = np.zeros_like(seen) if true is None else true
    pairs = [seen, seen & hidden, seen & true, seen & hidden & true]
    lost = seen.any(0) & ~(seen & ~hidden).any(0)
    return np.array([*(p.sum() for p in pairs), seen.any(0).sum(), lost.sum()], np.int64)


def print_table(counts: Mapping[tuple[str, str], NDArray[np.int64]], *, has_truth: bool) -> None:
    heads = ["targets", "test", "pairs left out", "voxels left out"]
    echo(
        f"| {' | '.join(heads + ['truly hidden', 'precision', 'recall', 'truly hidden after the test'] * has_truth)} |"
    )
    echo("| --- " * (4 + 4 * has_truth) + "|")
    for name, row in counts.items():
        pairs, found, true, both, voxels, lost = row.tolist()
        shares = [(found, pairs), (lost, voxels)]
        shares += [(true, pairs), (both, found), (both, true), (true - both, pairs - found)] * has_truth
        echo(f"| {' | '.join([*name, *(f'{100 * a / b:.1f}' if b else '-' for a, b in shares)])} |")


def measure_city(out: Path, scenes: int, keyframes: int, sweeps: int, seed: int) -> None:
    prepare_city(out, scenes=scenes, keyframes=keyframes, sweeps=sweeps, seed=seed)
    counts: dict[tuple[str, str], NDArray[np.int64]] = {}
    number, specs = 0, [spec for spec in cases(sweeps) if spec.dynamic != "boxes"]
    for keyframe, world in keyframes_with_worlds(out, scenes, keyframes, seed, sweeps):
        (grid_from_ego,), grid = grids_from_ego(keyframe, specs[0]), specs[0].grid
        cam_from_grid = np.stack([view.cam_from_ego for view in keyframe.cameras]) @ inverse_rigid(grid_from_ego)
        intrinsics = np.stack(
            [fit_intrinsics(v.intrinsics, v.source_size, fit(v.source_size, STUDENT_SIZE)) for v in keyframe.cameras]
        )
        cameras = Cameras.of(torch.from_numpy(intrinsics), torch.from_numpy(cam_from_grid), STUDENT_SIZE)
        returns = [NuScenes().read_sweep(sweep.path) for sweep in keyframe.sweeps]
        for spec in specs:
            n = spec.num_sweeps
            some = replace(keyframe, sweeps=keyframe.sweeps[:n])
            occupied = grid.unpack_volume(lidar_arrays(some, returns[:n], spec, grid_from_ego[None])["occupancy"][0])
            flat = np.flatnonzero(occupied)
            true = truly_hidden(some, returns[:n], flat, grid, grid_from_ego, cam_from_grid, world)
            seen, found = tests(occupied, grid, cam_from_grid, cameras)
            for test, hidden in found.items():
                key = f"{n} sweeps, {spec.dynamic}" if n > 1 else "1 sweep", test
                counts[key] = counts.get(key, np.zeros(NUM_COUNTS, np.int64)) + count(seen, hidden, true)
        number += 1
    echo(f"\nSIMULATED: a synthetic city. {number} keyframes of {scenes} scenes, grid {specs[0].grid}. In percent:\n")
    print_table(counts, has_truth=True)


def measure_cache(path: Path, keyframes: int) -> None:
    reader = CacheReader(path)
    grid, counts = reader.cache.spec.grid, {}
    chosen = np.flatnonzero(reader.is_valid)[:keyframes]
    for keyframe in chosen.tolist():
        names = ("intrinsics", "cam_from_ego", "grid_from_ego", "occupancy", "image_area")
        intrinsics, cam_from_ego, frames, packed, area = (reader.read(name, keyframe) for name in names)
        cam_from_grid = cam_from_ego.astype(np.float64) @ inverse_rigid(frames[0].astype(np.float64))
        tensors = (torch.from_numpy(array) for array in (intrinsics, cam_from_grid))
        cameras = Cameras.of(*tensors, reader.cache.spec.image_size, torch.from_numpy(area))
        seen, found = tests(grid.unpack_volume(packed[0]), grid, cam_from_grid, cameras)
        for test, hidden in found.items():
            key = path.name, test
            counts[key] = counts.get(key, np.zeros(NUM_COUNTS, np.int64)) + count(seen, hidden, None)
    echo(f"\n{len(chosen)} keyframes of {path}, grid {grid}. In percent:\n")
    print_table(counts, has_truth=False)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the city.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="A finished cache, CACHE/SPLIT.zarr, instead of the city."
)
@click.option("--scenes", default=2)
@click.option(
    "--keyframes", default=3, help="Of each scene, the first of which is left out; with --cache, of the cache."
)
@click.option("--sweeps", default=10, help="Largest number of sweeps.")
@click.option("--seed", default=0)
@reports_errors("targets,train")
def main(out: Path | None, cache: Path | None, scenes: int, keyframes: int, sweeps: int, seed: int) -> None:
    if (out is None) == (cache is None):
        raise click.UsageError("pass --out for the city, or --cache")
    if cache is not None:
        measure_cache(cache, keyframes)
    else:
        assert out is not None
        measure_city(out, scenes, keyframes, sweeps, seed)


if __name__ == "__main__":
    main()
