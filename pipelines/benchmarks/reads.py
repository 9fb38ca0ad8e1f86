"""Random reads of one keyframe's features from a sharded cache, against a memory-mapped file with the same bytes.

    python pipelines/benchmarks/reads.py [--keyframes 256] [--directory DIR]

Target: at most twice the time of np.memmap. Contents are random, because only their size matters.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import zarr
from _timing import compare, machine, table

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Identity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keyframes", type=int, default=256)
    parser.add_argument("--directory", type=Path, default=None, help="folder for temporary 0.5 GB")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    n = arguments.keyframes
    spec = TargetSpec(
        teacher=TeacherSpec("random bytes", "none", (224, 392), 14, 384), image_size=(16, 16), labels=()
    )  # small images, because they are not read and would only fill the page cache
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        identity = Identity(tuple(map(str, range(n))), ("scene",) * n, tuple(range(n)))
        cache = create_cache(
            Path(directory) / "t.zarr", spec, identity, keyframes_per_shard=16, provenance={"simulated": ["all of it"]}
        )
        rng = np.random.default_rng(0)
        flat = Path(directory) / "features.bin"
        with flat.open("wb") as file:
            for shard in range(cache.num_shards):
                k = len(cache.shard_range(shard))
                arrays = {a.name: np.ones((k, *a.shape), a.dtype) for a in spec.arrays()}
                arrays["features"] = rng.integers(0, 2**14, arrays["features"].shape, np.uint16).view(np.float16)
                cache.write_shard(shard, arrays, {"skipped": {}})
                file.write(arrays["features"].tobytes())
        shape = (6, 16, 28, 384)
        mapped = np.memmap(flat, np.float16, mode="r", shape=(n, *shape))
        reader, strict = CacheReader(cache), CacheReader(cache, check="always")
        array = zarr.open_array(cache.path / "features", mode="r")
        in_memory = np.ones((4, *shape), np.float16)
        out = np.empty(shape, np.float16)
        order = itertools.cycle(rng.permutation(n).tolist())
        for keyframe in range(n):  # warms the page cache for all readers
            assert np.array_equal(reader.read("features", keyframe), mapped[keyframe])

        def from_zarr() -> None:
            out[...] = array[next(order)]

        rows = compare(
            {
                "limit: copy from memory": lambda: np.copyto(out, in_memory[next(order) % 4]),
                "np.memmap": lambda: np.copyto(out, mapped[next(order)]),
                "ours: CacheReader, from the second epoch on": lambda: reader.read("features", next(order), out=out),
                "ours: first epoch, or check='always'": lambda: strict.read("features", next(order), out=out),
                "zarr-python": from_zarr,
            },
            ours="np.memmap",
            limit="limit: copy from memory",
            seconds=arguments.seconds,
            max_rounds=2000,
        )
    print(machine())
    print(f"\n{n} keyframes, {2.06:.2f} MB of float16 features each, random order, page cache warm\n")
    print(table(rows).replace("to ours", "to np.memmap"))


if __name__ == "__main__":
    main()
