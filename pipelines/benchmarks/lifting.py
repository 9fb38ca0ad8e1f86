"""Lifting of six feature maps to the grid, forward and backward: time and peak memory against other implementations.

python pipelines/benchmarks/lifting.py [--dataroot nuscenes --split mini_train] [--device cuda]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _inputs import find_dataroot
from _memory import forget_peak, megabytes
from _timing import compare, machine, table
from sampling import SIZE as SAMPLED_SIZE
from sampling import real_scene, synthetic_scene

sys.path.insert(0, str(Path(__file__).parents[2]))  # for the dense reference of the tests

from occfeat_targets.cache.geometry import project, scale_intrinsics, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.mean_over_views import lift, lift_torch, lift_triton
from occfeat_train.ops.views import Views
from tests.train.lifting_twin import lift_dense

SIZE = (224, 400)
MAPS = (1, 6, 128, 28, 50)
GRID = VoxelGrid()
LIMIT = "limit: writing the volume once, reading its gradient once"


def views_of(rig: tuple[np.ndarray, np.ndarray], device: str = "cpu") -> Views:
    """(cam_from_grid, intrinsics) -> Views with a batch size of one."""
    cam_from_grid, intrinsics = (torch.from_numpy(matrices)[None].to(device) for matrices in rig)
    return Views(torch.zeros(1, 6, 3, *SIZE, device=device), intrinsics, cam_from_grid)


def csr_of(views: Views) -> torch.Tensor:
    """The lifting as a sparse matrix (voxels in order h, w, z) x (tokens)."""
    h, w = MAPS[-2:]
    centers = GRID.voxel_centers().transpose(1, 2, 0, 3).reshape(-1, 3).astype(np.float64)
    voxels, columns, weights = [], [], []
    for cam, (camera, pinhole) in enumerate(zip(views.cam_from_grid[0], views.intrinsics[0], strict=True)):
        pixels, _, is_valid = project(pinhole.numpy(), transform(camera.numpy(), centers), SIZE)
        x = np.clip(pixels[is_valid, 0] * (w / SIZE[1]) - 0.5, 0, w - 1)
        y = np.clip(pixels[is_valid, 1] * (h / SIZE[0]) - 0.5, 0, h - 1)
        x0, y0 = x.astype(np.int64), y.astype(np.int64)
        for row, down in ((y0, 1 - (y - y0)), (np.minimum(y0 + 1, h - 1), y - y0)):
            for column, across in ((x0, 1 - (x - x0)), (np.minimum(x0 + 1, w - 1), x - x0)):
                voxels.append(np.flatnonzero(is_valid))
                columns.append((cam * h + row) * w + column)
                weights.append((down * across).astype(np.float32))
    voxel, column, weight = (torch.from_numpy(np.concatenate(parts)) for parts in (voxels, columns, weights))
    weight /= torch.zeros(len(centers)).index_add_(0, voxel, weight)[voxel]  # the weights of a view sum to one
    shape = (len(centers), MAPS[1] * h * w)
    return torch.sparse_coo_tensor(torch.stack([voxel, column]), weight, shape, check_invariants=False).to_sparse_csr()


def lift_csr(features: torch.Tensor, views: Views, grid: VoxelGrid) -> torch.Tensor:
    """One sparse product, including the construction of its matrix."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    tokens = features.permute(0, 1, 3, 4, 2).reshape(-1, features.shape[2])
    volume = csr_of(views) @ tokens
    return volume.view(1, *grid.map_shape, -1).permute(0, 3, 1, 2)


DENSE = "dense: every camera sampled at every voxel, then averaged"
WAYS: dict[str, dict[str, Callable[..., torch.Tensor]]] = {  # by device, ours first
    "cpu": {
        "ours": lift,
        "ours, bfloat16": lift,
        "one sparse CSR product, including its construction": lift_csr,
        DENSE: lift_dense,
    },
    "cuda": {
        "ours: Triton": lift_triton,
        "ours: Triton, bfloat16": lift_triton,
        "ours: plain torch": lift_torch,
        DENSE: lift_dense,
    },
}


def step_of(name: str, rig: tuple[np.ndarray, np.ndarray], device: str) -> Callable[[], Any]:
    """One forward and backward. The volume's gradient exists before, in the volume's memory format."""
    views, way = views_of(rig, device), WAYS[device].get(name)
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    features = torch.randn(MAPS, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    # The encoder's memory format is channels_last. Only the dense lifting needs channels first.
    leaf = (
        features.clone() if way is lift_dense else features.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    )
    leaf.requires_grad_()
    shape = (1, *GRID.map_shape, GRID.shape[0] * MAPS[2])
    grad = torch.ones(shape, dtype=dtype, device=device).permute(0, 3, 1, 2)
    if way is lift_dense:
        grad = grad.contiguous()

    def touch() -> None:
        torch.empty(shape, dtype=dtype, device=device).fill_(1)
        grad.sum()

    def step() -> torch.Tensor:
        leaf.grad = None
        assert way is not None
        volume = way(leaf, views, GRID)
        volume.backward(grad)
        return volume.detach()

    def finished() -> Any:
        result = (touch if name == LIMIT else step)()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return finished


def peak_megabytes_cuda(name: str, rig: tuple[np.ndarray, np.ndarray]) -> float:
    """Increase of the GPU memory during a step, without its inputs [MB]."""
    step = step_of(name, rig, "cuda")
    step()  # compile and fill caches before the measurement
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_megabytes(name: str, rig: tuple[np.ndarray, np.ndarray], threads: int) -> float:
    """Increase of the process's memory during a step, without its inputs [MB]. Call it in a new process."""
    torch.set_num_threads(threads)
    step, way = step_of(name, rig, "cpu"), WAYS["cpu"].get(name)
    small = VoxelGrid((1, 4, 4))
    if way is not None and way is not lift_csr:  # load and compile before the measurement
        way(torch.ones(MAPS, requires_grad=True), views_of(rig), small).sum().backward()
    if not forget_peak():
        return float("nan")
    before = megabytes("VmHWM")
    step()
    return megabytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", type=Path, help="a nuScenes dataroot")
    parser.add_argument("--split", default="mini_train", help="split whose first keyframe is used")
    parser.add_argument("--device", choices=list(WAYS), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the measurement")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out to measure the CPU")
    torch.set_num_threads(options.threads)
    dataroot = find_dataroot(options.dataroot)
    cameras, pinholes, _ = synthetic_scene() if dataroot is None else real_scene(dataroot, options.split)
    rig = cameras, scale_intrinsics(pinholes, SIZE[1] / SAMPLED_SIZE[1], SIZE[0] / SAMPLED_SIZE[0])
    source = (
        "SYNTHETIC ring of cameras: no nuScenes dataroot found" if dataroot is None else "a real keyframe's cameras"
    )
    runner = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"{machine()}\n{runner}, {source}; {'x'.join(map(str, MAPS[1:]))} float32 maps, grid {GRID}")
    first, *others = WAYS[options.device]
    contenders = {name: step_of(name, rig, options.device) for name in (LIMIT, first, *others)}
    ours = contenders[first]()
    for name in others:
        print(f"largest difference from ours: {(contenders[name]() - ours).abs().max():.1e} ({name})")
    del ours
    if options.device == "cuda":
        peaks = {name: f"{peak_megabytes_cuda(name, rig):,.0f}" for name in contenders}
    else:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = {name: f"{pool.apply(peak_megabytes, (name, rig, options.threads)):,.0f}" for name in contenders}
    rows = compare(contenders, ours=first, limit=LIMIT, seconds=options.seconds)
    print("\n" + table(rows, peaks, "peak MB"))


if __name__ == "__main__":
    main()
