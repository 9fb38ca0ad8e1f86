"""Scaling of a pretraining step's time and memory with cameras, grid, image size and batch.

    python pipelines/benchmarks/growth.py [--network simplebev --backbone efficientnet-b0] [--device cuda --precision bfloat16]

One setting is changed at a time, and each runs in a separate process. "Relative" is the growth of the time divided by the
growth of the size. 1 is linear, less is better.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from dataclasses import replace

import torch
from _inputs import find_dataroot
from _step import OurStep, Setting, peak_megabytes
from _timing import machine

from occfeat_targets.cache.grid import VoxelGrid

GRIDS = ((4, 100, 100), (8, 200, 200), (8, 400, 400), (16, 400, 400))
SIZES = ((112, 208), (224, 400), (448, 800))


def series(base: Setting) -> list[tuple[str, str, float, Setting]]:
    """(what is changed, its value, its size relative to the base, the setting) of each measurement."""
    pixels, voxels = base.image_size[0] * base.image_size[1], base.grid.num_voxels
    found = [("cameras", str(n), n / 6, replace(base, cameras=n)) for n in (1, 2, 4, 6, 8, 12)]
    for up, forward, right in GRIDS:
        grid = VoxelGrid((up, forward, right))
        found.append(("grid", f"{forward}x{up}x{right}", grid.num_voxels / voxels, replace(base, grid=grid)))
    for height, width in SIZES:
        found.append(("image", f"{height}x{width}", height * width / pixels, replace(base, image_size=(height, width))))
    found += [("batch", str(n), float(n), replace(base, batch=n)) for n in (1, 2, 4, 8)]
    return found


def seconds_of(setting: Setting, steps: int, cpu_seconds: bool) -> float:
    """Median of `steps` steps after a first one, in a new process. cpu_seconds: of all its threads, instead of elapsed time."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_seconds, (setting, steps, cpu_seconds))


def _seconds(setting: Setting, steps: int, cpu_seconds: bool) -> float:
    torch.set_num_threads(setting.threads)
    step, times = OurStep(setting), []
    clock = time.process_time if cpu_seconds else time.perf_counter
    for _ in range(steps + 1):
        start = clock()
        step()
        times.append(clock() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="simplebev")
    parser.add_argument("--backbone", default="efficientnet-b0")
    parser.add_argument("--only", nargs="+", choices=("cameras", "grid", "image", "batch"), help="measure only these")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cpu-seconds", action="store_true", help="count CPU time, which another load changes little")
    options = parser.parse_args()
    if options.device == "cuda" and options.cpu_seconds:
        parser.error("--cpu-seconds: only with --device cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    dataroot = find_dataroot(None)
    base = Setting(
        network=options.network, backbone=options.backbone, precision=options.precision, device=options.device,
        threads=options.threads, dataroot=dataroot,
    )  # fmt: skip
    rig = "a SYNTHETIC rig: no nuScenes dataroot found" if dataroot is None else "a real keyframe's rig"
    print(f"{machine()}\n{options.threads} threads" if options.device == "cpu" else torch.cuda.get_device_name())
    print(f"{rig}; {base.network} {base.backbone}, {base.precision}\n")
    start, memory = seconds_of(base, options.steps, options.cpu_seconds), peak_megabytes(OurStep, base)[1]
    unit = "CPU s" if options.cpu_seconds else "s"
    print(f"| | | size, relative | {unit} per step | time, relative | relative | MB of a step | memory, relative |")
    print("|---|---|---|---|---|---|---|---|")
    for what, value, share, setting in series(base):
        if options.only and what not in options.only:
            continue
        seconds, peak = (
            (start, memory)
            if setting == base
            else (seconds_of(setting, options.steps, options.cpu_seconds), peak_megabytes(OurStep, setting)[1])
        )
        ratio = seconds / start
        print(
            f"| {what} | {value} | {share:.3g} | {seconds:.2f} | {ratio:.2f} | {ratio / share:.2f} "
            f"| {peak:,.0f} | {peak / memory:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
