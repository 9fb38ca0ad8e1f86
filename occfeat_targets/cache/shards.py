"""The files of shards: their names, and the checksums of their chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from occfeat_targets.cache.arrays import ArraySpec

ABSENT = np.uint64(2**64 - 1)  # a chunk's size in a shard's index, where there is none


def shard_file(path: Path, array: ArraySpec, shard: int) -> Path:
    """The one file that holds a shard of an array."""
    return path / shard_name(array, shard)


def shard_name(array: ArraySpec, shard: int) -> str:
    """The same relative to the cache, as in records."""
    return "/".join([array.name, "c", str(shard)] + ["0"] * len(array.shape))


def chunk_checksums(file: Path, keyframes_per_shard: int) -> list[int]:
    """CRC-32C of each keyframe's chunk in a shard, in order: the last four bytes of a chunk, found by the shard's index."""
    data = np.memmap(file, np.uint8, "r")
    index = data[-16 * keyframes_per_shard - 4 : -4].view("<u8").reshape(-1, 2)
    ends = (int(offset + size) if size != ABSENT else 0 for offset, size in index)
    return [int.from_bytes(data[end - 4 : end].tobytes(), "little") if end else 0 for end in ends]
