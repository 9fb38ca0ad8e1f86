"""Planning at nuScenes' size: seconds and memory of the plan, of an array task, and of `verify` and `preview`.

    python pipelines/benchmarks/planning.py [--directory DIR] [--teacher random:facebook/dinov2-small] [--tasks 2]

It writes tables with as many records as v1.0-trainval has (2.5 GB, SYNTHETIC) and empty files for the images of the train split. Only
the keyframes of the tasks that are built have contents. Every row is one process: its CPU seconds and its peak memory, by the
operating system.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from _inputs import find_dataroot, find_images, find_sweep
from _tables import LIDAR, Size, keyframe_file, touch_keyframes, write_tables
from _timing import machine

from occfeat_targets.cache.spec import CAMERAS

SHARD = 16


def measure(*arguments: str | Path) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak gigabytes) of one process of occfeat-targets; it must not fail."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "occfeat_targets", *map(str, arguments)]
    started = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    pid = os.posix_spawn(command[0], command, environment, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 3):  # 3: keyframes were skipped, or shards are missing
        raise RuntimeError(f"failed; run it again to see why: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def fill_keyframes(root: Path, size: Size, number: int) -> None:
    """Copy an image and a sweep to the first keyframes."""
    real = find_dataroot(None)
    (image, *_), _ = find_images(real)
    sweep, _ = find_sweep(None, real)
    keyframes = [(scene, keyframe) for scene, n in enumerate(size.keyframes) for keyframe in range(n)]
    for scene, keyframe in keyframes[:number]:
        for channel in (LIDAR, *CAMERAS):
            shutil.copy(sweep if channel == LIDAR else image, root / keyframe_file(channel, scene, keyframe))


def run(directory: Path, size: Size, train_scenes: int, teacher: str, num_measured: int) -> None:
    """Write the data set and print a row for every process."""
    root, cache = directory / "data", directory / "cache"
    write_tables(root, size)
    touch_keyframes(root, 0, train_scenes)
    fill_keyframes(root, size, SHARD * num_measured)
    where = ["--cache", cache, "--split", "train"]
    # Small images, so that the cache passes the check of the disk's free space.
    build = ["build", *where, "--dataroot", root, "--teacher", teacher, "--image-size", "135x240"]
    num_tasks = -(-sum(size.keyframes[:train_scenes]) // SHARD)
    print(machine())
    print("SYNTHETIC tables\n\n|  | wall s | CPU s | peak GB |\n| --- | --- | --- | --- |")

    def row(name: str, *command: str | Path) -> float:
        wall, cpu, peak = measure(*command)
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.2f} |", flush=True)
        return cpu

    planning = row("plan", *build, "--plan-only")
    tasks = [row(f"task {k} of {num_tasks}", *build, "--shard", f"{k}/{num_tasks}") for k in range(num_measured)]
    verify = ["verify", *where, "--samples", "1", "--seed", "0"]
    row("verify --samples 1", *verify)
    row("verify --samples 1 --tables", *verify, "--tables")
    row("preview --points", "preview", *where, "--samples", "1", "--points", "--out", directory / "preview")
    print(f"\n{num_tasks} tasks and the plan: {(planning + num_tasks * min(tasks)) / 3600:.1f} core-hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="folder for temporary 4 GB")
    parser.add_argument("--teacher", default="none")
    parser.add_argument("--tasks", type=int, default=2, help="tasks to measure, of 16 keyframes each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        run(Path(directory), Size(), 700, arguments.teacher, arguments.tasks)


if __name__ == "__main__":
    main()
