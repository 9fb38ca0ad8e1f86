"""Images per second of the teacher, against the machine's matmul rate.

    python pipelines/benchmarks/teacher.py [--threads 2] [--teacher random:facebook/dinov2-small] [--batch 6]

Target: at least 55 % of the bfloat16 matmul rate (of the float32 rate if the hardware has no bfloat16).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from _timing import compare, machine, table

from occfeat_targets.targets.teacher import LoadedTeacher, flops_per_image, teacher_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", default="random:facebook/dinov2-small", help="speed does not depend on the weights"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=6, help="images per batch")
    parser.add_argument("--seconds", type=float, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = teacher_spec(arguments.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = np.random.default_rng(0).integers(0, 256, (arguments.batch, *spec.input_size, 3), dtype=np.uint8)
    flops = flops_per_image(spec)
    dtypes = ["float32"] + (["bfloat16"] if spec.dtype == "bfloat16" else [])
    contenders, work = {}, {}
    for dtype in dtypes:
        square = torch.randn(2048, 2048, device=device).to(getattr(torch, dtype))
        teacher = LoadedTeacher(replace(spec, dtype=dtype), device)
        contenders[f"matmul 2048, {dtype}"] = lambda a=square: float((a @ a)[0, 0])
        contenders[f"teacher, {dtype}"] = lambda t=teacher: t(images)
        work[f"matmul 2048, {dtype}"] = 2 * 2048.0**3
        work[f"teacher, {dtype}"] = flops * arguments.batch
    rows = compare(contenders, seconds=arguments.seconds)
    notes = {}
    rate = {row.name: work[row.name] / row.median for row in rows}
    for row in rows:
        notes[row.name] = f"{rate[row.name] / 1e9:.0f}"
        if row.name.startswith("teacher"):
            dtype = row.name.split(", ")[1]
            share = rate[row.name] / rate[f"matmul 2048, {dtype}"]
            notes[row.name] += f"; {arguments.batch / row.median:.1f} images/s, {share:.0%} of the {dtype} matmul rate"
    print(machine())
    print(f"\n{spec.name} at {spec.input_size[0]}x{spec.input_size[1]}: {flops / 1e9:.1f} GFLOP per image, batches of "
          f"{arguments.batch}, {arguments.threads} threads, {device}\n")  # fmt: skip
    print(table(rows, notes, "GFLOP/s"))


if __name__ == "__main__":
    main()
