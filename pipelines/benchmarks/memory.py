"""Peak memory of a build for different numbers of keyframes. It must stay flat.

    python pipelines/benchmarks/memory.py [--keyframes 40 400] [--workers 0 2]

The synthetic cities have source images of 270x480, and the teacher input is small, to save time. A shard takes the memory of
a real build except for the features.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _timing import machine


def peak_megabytes(command: list[str]) -> tuple[float, float]:
    """Peak memory [MB] of a command and its children together, with shared pages counted once; and its duration [s]."""
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            for p in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += p.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited {process.returncode}")
    return peak / 1e6, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keyframes", type=int, nargs="+", default=[40, 400])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "occfeat_targets"]
    print(machine())
    print("\n| keyframes | workers | peak MB, all processes | seconds |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        for n in arguments.keyframes:
            city = Path(directory) / f"city-{n}"
            scenes = ["--scenes", "8", "--keyframes", str(n // 8), "--sweeps", "1", "--image-size", "270x480"]
            subprocess.run([*command, "synth", "--out", str(city), *scenes], check=True, stderr=subprocess.DEVNULL)
            for workers in arguments.workers:
                cache = Path(directory) / f"cache-{n}-{workers}"
                peak, seconds = peak_megabytes(
                    [*command, "build", "--dataroot", str(city), "--split", "mini_train", "--cache", str(cache),
                     "--teacher", "random:facebook/dinov2-small", "--feature-size", "56x98", "--workers", str(workers)]
                )  # fmt: skip
                print(f"| {n} | {workers} | {peak:.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
