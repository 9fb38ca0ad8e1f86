"""A whole build: keyframes per second, and the time of each stage.

    python pipelines/benchmarks/build.py [--dataroot DIR --split mini_train] [--workers 0 1 2] [--keyframes 24]

Without --dataroot, a synthetic city at 1600x900 is created first, which the output states. The limit of a build is the
teacher's rate, so the teacher's share of a worker's time shows how close the build is to it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _timing import machine

from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build.plan import make_plan
from occfeat_targets.build.run import run
from occfeat_targets.build.workers import choose_workers, find_build_devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", type=Path, default=None)
    parser.add_argument("--split", default="mini_train")
    parser.add_argument("--keyframes", type=int, default=24, help="keyframes of the synthetic city")
    parser.add_argument("--teacher", default="random:facebook/dinov2-small")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "occfeat_targets"]
    with tempfile.TemporaryDirectory() as directory:
        dataroot = arguments.dataroot
        if dataroot is None:
            dataroot = Path(directory) / "city"
            city = ["--scenes", "2", "--keyframes", str(arguments.keyframes // 2), "--sweeps", "1"]
            subprocess.run([*command, "synth", "--out", str(dataroot), *city], check=True)
        print(machine())
        print("\nSYNTHETIC city at 1600x900\n" if arguments.dataroot is None else f"\n{dataroot}\n")
        print("| workers | keyframes/s with start-up | without start-up | teacher, ms per keyframe and worker "
              "| waiting for input | quantising, writing | reading, labelling (in parallel) | teacher's share |")  # fmt: skip
        print("| --- " * 8 + "|")
        for workers in arguments.workers:
            cache = Path(directory) / f"cache-{workers}"
            start = time.perf_counter()
            options = BuildOptions(
                dataroot=dataroot, split=arguments.split, cache=cache, teacher=arguments.teacher, keyframes_per_shard=4
            )
            plan = make_plan(options)
            chosen = choose_workers(plan, find_build_devices(options, None), workers=workers)
            outcome = run(plan, chosen, print_line=print, progress=False)
            elapsed = time.perf_counter() - start
            assert not outcome.failed
            # a worker's first shard also loads libraries, weights and compiled kernels
            steady = sorted(outcome.reports, key=lambda report: report.seconds["total"])
            steady = steady[: len(steady) - max(workers, 1)]
            n = sum(report.num_keyframes for report in steady)
            stage = {
                name: sum(report.seconds.get(name, 0.0) for report in steady) / n * 1e3
                for name in ("total", "teacher", "wait", "write", "images", "occupancy", "labels")
            }
            meanwhile = stage["images"] + stage["occupancy"] + stage["labels"]
            print(f"| {workers} | {outcome.num_keyframes / elapsed:.2f} | {max(workers, 1) * 1e3 / stage['total']:.2f} "
                  f"| {stage['teacher']:.0f} | {stage['wait']:.1f} | {stage['write']:.1f} | {meanwhile:.1f} "
                  f"| {stage['teacher'] / stage['total']:.1%} |")  # fmt: skip


if __name__ == "__main__":
    main()
