"""Samples per second that the trainer's threads read and compute targets for, against a memory-mapped file with the same bytes.

    python pipelines/benchmarks/loader.py [--keyframes 64] [--directory DIR]

Sizes are the default ones: 2.3 MB of images and 2.1 MB of features per keyframe. Contents are random, because only their size
matters; as many voxels are occupied as in a nuScenes keyframe. It also measures how long training waits. The training run uses preset small/occfeat on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _timing import compare, machine, table

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache, Identity
from occfeat_train.cli import main as occfeat_train
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.prefetch import Prefetcher
from occfeat_train.training.log import read_log

BATCH = 8
READ = ("images", "features", "occupancy")  # arrays that pretraining reads
PRESET = "small/occfeat"
OCCUPIED = 4400 / 320_000  # of the voxels of a nuScenes keyframe
RETURNS = 25_000  # of a sweep on flat ground


SPEC = TargetSpec(teacher=TeacherSpec("random bytes", "none", (224, 392), 14, 384), labels=())


def write(directory: Path, n: int, spec: TargetSpec = SPEC) -> tuple[Cache, np.memmap]:
    """Write a cache, and a flat file with the bytes of READ, keyframe after keyframe."""
    identity = Identity(tuple(map(str, range(n))), ("scene",) * n, tuple(range(n)))
    cache = create_cache(
        directory / "train.zarr", spec, identity, keyframes_per_shard=16, provenance={"simulated": ["all of it"]}
    )
    rng = np.random.default_rng(0)
    with (directory / "flat.bin").open("wb") as flat:
        for shard in range(cache.num_shards):
            k = len(cache.shard_range(shard))
            arrays = {a.name: np.zeros((k, *a.shape), a.dtype) for a in spec.arrays()}
            arrays["is_valid"][:] = True
            arrays["camera_valid"][:] = True
            arrays["image_area"][:] = (0, 0, *spec.image_size)
            arrays["images"][:] = rng.integers(0, 256, arrays["images"].shape, np.uint8)
            arrays["features"][:] = rng.integers(0, 2**14, arrays["features"].shape, np.uint16).view(np.float16)
            bits = rng.random((*arrays["occupancy"].shape, 8), np.float32) < OCCUPIED
            arrays["occupancy"][:] = np.packbits(bits, axis=-1)[..., 0]
            arrays["grid_from_ego"][:] = np.eye(4)
            arrays["intrinsics"][:] = [[380, 0, 240], [0, 380, 135], [0, 0, 1]]
            for camera in range(len(spec.cameras)):
                half = np.pi * camera / len(spec.cameras)
                turned = rigid((np.cos(half), 0, np.sin(half), 0), (0, 0, 0))
                arrays["cam_from_ego"][:, camera] = turned @ inverse_rigid(GRID_FROM_CAMERA_AXES)
            if spec.max_points:
                angle, distance = rng.uniform(-np.pi, np.pi, (k, RETURNS)), 3 + 47 * rng.random((k, RETURNS)) ** 2
                columns = (distance * np.cos(angle), distance * np.sin(angle), rng.normal(0, 0.02, angle.shape))
                arrays["points"][:, :RETURNS, :3] = np.stack(columns, axis=-1)
                arrays["num_points"][:, 0], arrays["sweep_origins"][:] = RETURNS, (0, 0, 1.8)
            cache.write_shard(shard, arrays, {"skipped": {}})
            for row in range(k):
                flat.writelines(arrays[name][row].tobytes() for name in READ)
    size = (directory / "flat.bin").stat().st_size
    return cache, np.memmap(directory / "flat.bin", np.uint8, mode="r", shape=(n, size // n))


def waiting(cache: Cache, run: Path, steps: int, batch: int, workers: int) -> list[dict[str, float]]:
    """Records of a short training without its first step, whose data cannot be prefetched."""
    epochs = (steps * batch + 0.5) / len(cache)
    arguments = [
        "pretrain",
        "--cache",
        cache.path.parent,
        "--preset",
        PRESET,
        "--out",
        run,
        "--batch",
        batch,
        "--epochs",
        epochs,
    ]
    arguments += ["--loader-threads", workers, "--device", "cpu", "--no-progress", "--no-tensorboard"]
    occfeat_train([str(a) for a in arguments], standalone_mode=False)
    return read_log(run)[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keyframes", type=int, default=64)
    parser.add_argument("--directory", type=Path, default=None, help="folder for temporary 0.6 GB")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps of the training run")
    parser.add_argument("--batch", type=int, default=2, help="batch size of the training run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        cache, mapped = write(Path(directory), arguments.keyframes)
        datasets = {
            "second epoch on": KeyframeDataset(CacheReader(cache), Config(), training=True),
            "first epoch, every checksum": KeyframeDataset(CacheReader(cache, check="always"), Config(), training=True),
        }
        positions = itertools.count()
        stream = datasets["second epoch on"].stream
        batches = ([stream(next(positions)) for _ in range(BATCH)] for _ in itertools.repeat(None))

        def from_file(samples: list[tuple[int, int]]) -> np.ndarray:
            out = np.empty((BATCH, mapped.shape[1]), np.uint8)
            for row, (_, keyframe) in enumerate(samples):
                out[row] = mapped[keyframe]
            return out

        readers: dict[str, Callable[[list[tuple[int, int]]], object]] = {"np.memmap": from_file}
        readers |= {f"ours: {name}": dataset.batch for name, dataset in datasets.items()}
        for samples in itertools.islice(
            batches, 3 * arguments.keyframes // BATCH
        ):  # warm the page cache for all readers
            for read in readers.values():
                read(samples)
        print(f"{machine()}\n\n{arguments.keyframes} keyframes of {mapped.shape[1] / 1e6:.2f} MB, batches of {BATCH}\n")
        for workers in (1, 2):
            with ThreadPoolExecutor(workers) as pool:

                def together(
                    read: Callable[[list[tuple[int, int]]], object],
                    pool: ThreadPoolExecutor = pool,
                    workers: int = workers,
                ) -> None:
                    list(pool.map(read, [next(batches) for _ in range(workers)]))

                contenders = {name: partial(together, read) for name, read in readers.items()}
                rows = compare(contenders, ours="np.memmap", seconds=arguments.seconds / 2, max_rounds=1000)
            notes = {
                r.name: f"{BATCH / r.median:,.0f}, {BATCH * mapped.shape[1] / r.median / 1e9:.2f} GB/s" for r in rows
            }
            print(f"{workers} worker{'s' if workers > 1 else ''} with a batch each:\n")
            print(table(rows, notes, "samples/s per worker").replace("to ours", "to np.memmap") + "\n")

        few = list(itertools.islice(batches, 64))
        start = time.perf_counter()
        for _ in Prefetcher(datasets["second epoch on"], iter(few), torch.device("cpu"), workers=2):
            pass
        rate = len(few) * BATCH / (time.perf_counter() - start)
        print(f"\nPrefetching with 2 workers and no computation between batches: {rate:,.0f} samples/s.\n")
        records = {
            workers: waiting(cache, Path(directory) / str(workers), arguments.steps, arguments.batch, workers)
            for workers in (1, 2)
        }
        print(f"\n{PRESET}, batches of {arguments.batch}, {arguments.steps - 1} steps on the CPU:\n")
        print("| workers | samples/s | waiting for data, mean | maximum |\n|---|---|---|---|")
        for workers, found in records.items():
            waits = [record["data_wait"] for record in found]
            speed = statistics.median(record["samples_per_s"] for record in found)
            print(f"| {workers} | {speed:.2f} | {statistics.mean(waits):.3%} | {max(waits):.3%} |")


if __name__ == "__main__":
    main()
