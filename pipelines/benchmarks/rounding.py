"""Dependence of a cache's features on the numbers of threads and images per batch. Other arrays depend on neither.

python pipelines/benchmarks/rounding.py [--threads 1 2] [--batches 6 12]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from _inputs import find_dataroot, find_images
from _timing import machine

from occfeat_targets.targets.images import load_image
from occfeat_targets.targets.teacher import LoadedTeacher, teacher_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="random:facebook/dinov2-small")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 12])
    arguments = parser.parse_args()
    files, what = find_images(find_dataroot(None))
    print(machine())
    print(f"\n{arguments.teacher} on {what}, as float16, against {arguments.threads[0]} threads and batches of "
          f"{arguments.batches[0]}\n\n| dtype | threads | batch | equal values | largest difference | worst cosine |\n"
          "| --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        teacher = LoadedTeacher(teacher_spec(arguments.teacher, dtype=dtype), "cpu")
        images = np.stack([load_image(f, [teacher.spec.input_size])[0] for f in (files * 12)[:12]])
        expected = None
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for batch in arguments.batches:
                found = np.concatenate([teacher(images[i : i + batch]) for i in range(0, 12, batch)])
                found = found.astype(np.float16).astype(np.float32)
                if expected is None:
                    expected = found
                norm = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
                cosine = ((found * expected).sum(-1) / norm).min()
                print(f"| {dtype} | {threads} | {batch} | {(found == expected).mean():.2%} "
                      f"| {np.abs(found - expected).max():.1e} | {cosine:.7f} |")  # fmt: skip


if __name__ == "__main__":
    main()
