"""From a sweep in the page cache to bit-packed occupancy, against NumPy, torch and the time of reading the file; walking its rays.

python pipelines/benchmarks/voxelizer.py [--sweep file.pcd.bin] [--dataroot nuscenes]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from _inputs import find_dataroot, find_sweep
from _timing import compare, machine, table
from threadpoolctl import threadpool_limits

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, Matrix, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import EGO_BOX
from occfeat_targets.sources.sweeps import read_sweep
from occfeat_targets.targets.occupancy import voxelize
from occfeat_targets.targets.rays import walk_rays


def numpy_as_written(path: Path, grid_from_lidar: Matrix, grid: VoxelGrid) -> np.ndarray:
    """Straightforward NumPy: homogeneous float64 coordinates and one mask after the other."""
    points = np.fromfile(path, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    points = points[~((np.abs(points[:, 0]) < EGO_BOX) & (np.abs(points[:, 1]) < EGO_BOX))]
    points = (grid_from_lidar @ np.hstack([points, np.ones((len(points), 1))]).T).T[:, :3]
    index = np.floor((points - grid.lower[::-1]) / grid.cell_size[::-1]).astype(np.int64)
    index = index[((index >= 0) & (index < grid.shape[::-1])).all(axis=1)]
    volume = np.zeros(grid.shape, np.bool_)
    volume[index[:, 2], index[:, 1], index[:, 0]] = True
    return grid.pack_volume(volume)


def numpy_float32(path: Path, grid_from_lidar: Matrix, grid: VoxelGrid) -> np.ndarray:
    """float32, one transform from metres to cells, one mask, one flat index."""
    points = np.fromfile(path, np.float32).reshape(-1, 5)[:, :3]
    cells_from_lidar = (grid.cells_from_grid @ grid_from_lidar).astype(np.float32)
    points = points[np.maximum(np.abs(points[:, 0]), np.abs(points[:, 1])) >= np.float32(EGO_BOX)]
    cells = points @ cells_from_lidar[:3, :3].T + cells_from_lidar[:3, 3]
    cells = cells[((cells >= 0) & (cells < np.array(grid.shape[::-1], np.float32))).all(axis=1)].astype(np.int32)
    volume = np.zeros(grid.num_voxels, np.bool_)
    volume[(cells[:, 2] * grid.shape[1] + cells[:, 1]) * grid.shape[2] + cells[:, 0]] = True
    return np.packbits(volume, bitorder="little")


class TunedNumpy:
    """`numpy_float32` with separate coordinates and reused buffers. Outside returns set a spare cell instead of a mask."""

    def __init__(self, path: Path, grid_from_lidar: Matrix, grid: VoxelGrid) -> None:
        self.path, self.grid = path, grid
        cells = (grid.cells_from_grid @ grid_from_lidar).astype(np.float32)
        self.rotation, self.offset = np.ascontiguousarray(cells[:3, :3]), cells[:3, 3:]
        self.limits = np.array(grid.shape[::-1], np.float32)[:, None]
        self.volume = np.empty(grid.num_voxels + 1, np.bool_)

    def __call__(self) -> np.ndarray:
        grid = self.grid
        points = np.fromfile(self.path, np.float32).reshape(-1, 5)
        xyz = np.ascontiguousarray(points[:, :3].T)
        cells = self.rotation @ xyz
        cells += self.offset
        keep = ((cells >= 0) & (cells < self.limits)).all(axis=0)
        keep &= np.maximum(np.abs(xyz[0]), np.abs(xyz[1])) >= np.float32(EGO_BOX)
        w, h, z = cells.astype(np.int32)
        z *= grid.shape[1]
        z += h
        z *= grid.shape[2]
        z += w
        self.volume.fill(False)
        self.volume[np.where(keep, z, grid.num_voxels)] = True
        return np.packbits(self.volume[:-1].view(np.uint8), bitorder="little")


def with_torch(path: Path, grid_from_lidar: Matrix, grid: VoxelGrid) -> np.ndarray:
    points = torch.from_numpy(np.fromfile(path, np.float32).reshape(-1, 5))[:, :3]
    cells_from_lidar = torch.from_numpy((grid.cells_from_grid @ grid_from_lidar).astype(np.float32))
    cells = torch.addmm(cells_from_lidar[:3, 3], points, cells_from_lidar[:3, :3].T)
    limits = torch.tensor(grid.shape[::-1], dtype=torch.float32)
    keep = ((cells >= 0) & (cells < limits)).all(dim=1) & (points[:, :2].abs().amax(dim=1) >= EGO_BOX)
    w, h, z = cells[keep].long().unbind(1)
    volume = torch.zeros(grid.num_voxels, dtype=torch.bool)
    volume[(z * grid.shape[1] + h) * grid.shape[2] + w] = True
    return np.packbits(volume.numpy(), bitorder="little")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="a nuScenes .pcd.bin")
    parser.add_argument("--dataroot", type=Path, help="a nuScenes dataroot; its first sweep is used")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each table")
    options = parser.parse_args()
    path, what = find_sweep(options.sweep, find_dataroot(options.dataroot))
    torch.set_num_threads(1)
    threadpool_limits(1)  # a second BLAS thread slows such small products down
    grid = VoxelGrid()
    ego_from_lidar = rigid((0.7077955, -0.0064922, 0.0106462, -0.7063073), (0.9437130, 0.0, 1.8402300))
    grid_from_lidar = GRID_FROM_EGO_AXES @ ego_from_lidar
    frames = np.stack([grid_from_lidar] * 7)
    points = read_sweep(path)
    buffer = bytearray(path.stat().st_size)

    def read_only() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.readv(descriptor, [buffer])
        os.close(descriptor)

    tuned = TunedNumpy(path, grid_from_lidar, grid)
    contenders = {
        "limit: reading the file into a reused buffer": read_only,
        "ours: read_sweep with its checks, and voxelize": lambda: voxelize(read_sweep(path), grid_from_lidar, grid),
        "NumPy, float32": lambda: numpy_float32(path, grid_from_lidar, grid),
        "NumPy, float32, tuned as much as we could": tuned,
        "torch, one thread": lambda: with_torch(path, grid_from_lidar, grid),
        "NumPy, straightforward": lambda: numpy_as_written(path, grid_from_lidar, grid),
    }
    limit, ours, *peers = contenders
    bits = [np.unpackbits(contenders[name]()) for name in (ours, *peers)]
    print(f"{machine()}\n{what}: {len(points):,} returns, {bits[0].sum():,} of {grid.num_voxels:,} voxels occupied")
    print(
        f"voxels that differ from ours: {', '.join(f'{(b != bits[0]).sum()} ({n})' for n, b in zip(peers, bits[1:], strict=True))}"
    )
    print("\nFile (in the page cache) to packed bits, one reference frame\n")
    print(table(compare(contenders, ours=ours, limit=limit, seconds=options.seconds)))
    print("\nSweep in memory to packed bits\n")
    several = {
        "one reference frame": lambda: voxelize(points, grid_from_lidar, grid),
        "seven, in one call": lambda: voxelize(points, frames, grid),
        "seven, in seven calls": lambda: [voxelize(points, frame, grid) for frame in frames],
    }
    print(table(compare(several, ours="one reference frame", seconds=options.seconds / 3)))
    passed = np.unpackbits(walk_rays(points, grid_from_lidar, grid)).sum()
    print(f"\nVoxels on the rays of the sweep ({passed:,} of them), exactly\n")
    walks = {
        "voxelize, one reference frame": several["one reference frame"],
        "read_sweep and voxelize": lambda: voxelize(read_sweep(path), grid_from_lidar, grid),
        "walk_rays, one reference frame": lambda: walk_rays(points, grid_from_lidar, grid),
        "walk_rays, seven": lambda: walk_rays(points, frames, grid),
    }
    print(table(compare(walks, ours="voxelize, one reference frame", seconds=options.seconds)))


if __name__ == "__main__":
    main()
