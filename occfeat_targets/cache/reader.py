"""Random access to single keyframes of a finished cache, directly from the bytes of a shard.

zarr-python reads the same arrays and returns the same values, but takes about ten times as long for one keyframe of a
sharded array (BENCHMARKS.md), because of its event loop and codec pipeline. This reader finds an uncompressed chunk in the
shard's index and reads it directly; a chunk is its array's bytes and a CRC-32C. Each chunk's checksum is verified at its
first read, so later epochs read at the speed of a memory-mapped file. A missing chunk is an error; zarr-python reads zeros.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from occfeat_targets.cache.arrays import ArraySpec
from occfeat_targets.cache.labels import LabelKind
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.points import Points
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.shards import ABSENT, shard_file, shard_name
from occfeat_targets.cache.store import Cache

Check = Literal["first", "always", "never"]


def frame_index(cache: Cache, frame: str | None) -> int:
    """Index of a reference frame, by default the first. Raises ValueError if the cache has no grid in that frame."""
    frames = cache.spec.frames
    if frame is not None and frame not in frames:
        raise ValueError(f"{cache.path} has no grid in frame {frame!r}: choose one of {', '.join(frames)} with --frame")
    return frames.index(frame) if frame is not None else 0


class CacheReader:
    """Random access to the keyframes of a cache.

    It is cheap to open and holds no open files, so it can be forked and pickled. Small arrays (calibration, validity) are
    loaded whole at first use and verified with the SHA-256 in their shard's record; shard indices are loaded at first use.
    records: {shard: its record} of the shards that were finished when the reader was created; it reads no others.
    """

    def __init__(self, cache: Cache | Path, *, check: Check = "first", allow_incomplete: bool = False) -> None:
        """check: when to verify a large array's chunk against its CRC-32C.

        Raises CacheError if a record does not belong to its shard, or if shards are missing and allow_incomplete is false.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self._check = check
        self._arrays = {array.name: array for array in self.cache.spec.arrays()}
        self._is_checked = {name: np.zeros(len(self.cache), np.bool_) for name in self._arrays}
        self._loaded: dict[str, NDArray[Any]] = {}
        self._indices: dict[tuple[str, int], NDArray[np.uint64]] = {}
        self.records = self.cache.finished_shards()
        pending = self.cache.num_shards - len(self.records)
        if pending and not allow_incomplete:
            raise CacheError(
                f"{self.cache.path} is not finished: {pending} of {self.cache.num_shards} shards are missing "
                "('occfeat-targets status' lists them): run the build again, it continues"
            )

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def is_valid(self) -> NDArray[np.bool_]:
        """(N,) false for keyframes that were skipped after an error or are not built yet."""
        return self._whole("is_valid")

    @property
    def camera_valid(self) -> NDArray[np.bool_]:
        """(N, V) false for masked cameras, and for all cameras of keyframes that were skipped or are not built yet."""
        return self._whole("camera_valid")

    @property
    def grid_from_ego(self) -> NDArray[np.float32]:
        """(N, F, 4, 4) zeros where a keyframe has no grid: it was skipped or is not built yet, or the frame's camera is masked."""
        return self._whole("grid_from_ego")

    @property
    def is_letterboxed(self) -> bool:
        """Whether some camera fills only a part of its image."""
        whole = np.array([0, 0, *self.cache.spec.image_size], np.int32)
        return bool((self._whole("image_area")[self.camera_valid] != whole).any())

    def read(self, name: str, keyframe: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One keyframe of an array, with the shape in its spec; read into `out` if given (C-contiguous, same shape and dtype).

        Raises CacheError if the cache does not have the array, the keyframe is not built yet, or a chunk is damaged (naming
        keyframe and file). Raises IndexError if there is no such keyframe.
        """
        if not 0 <= keyframe < len(self):
            raise IndexError(f"keyframe {keyframe} of a cache of {len(self)}")
        if keyframe // self.cache.keyframes_per_shard not in self.records:
            raise CacheError(
                f"keyframe {keyframe} (sample {self.cache.identity.tokens[keyframe]}) of {self.cache.path} is not built "
                "yet: run the build again, it continues"
            )
        array = self._array(name)
        if out is None:
            out = np.empty(array.shape, array.dtype)
        elif out.shape != array.shape or out.dtype != array.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype}{out.shape}: C-contiguous {array.dtype}{array.shape} expected for {name}"
            )
        if array.per_keyframe:
            self._read_chunk(array, keyframe, out)
        else:
            out[...] = self._whole(name)[keyframe]
        return out

    def read_all(self, names: Sequence[str], keyframe: int) -> dict[str, NDArray[Any]]:
        """{name: one keyframe of that array}."""
        return {name: self.read(name, keyframe) for name in names}

    def read_labels(self, kind: LabelKind, keyframe: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
        """Masks (F, K, H, W) of one kind of labels, and which cells are valid (F, H, W), or None if all are."""
        grid = self.cache.spec.grid
        masks = grid.unpack_map(self.read(kind.array, keyframe))
        is_valid = None if kind.valid_array is None else grid.unpack_map(self.read(kind.valid_array, keyframe))
        return masks.reshape(len(masks), -1, *grid.map_shape), is_valid

    def read_features(self, keyframe: int) -> NDArray[np.float32]:
        """Teacher features (V, h, w, C) of a keyframe; int8 features are multiplied by their scale."""
        features = self.read("features", keyframe).astype(np.float32)
        if self.cache.spec.feature_dtype == "int8":
            features *= self.read("feature_scale", keyframe)[..., None].astype(np.float32)
        return features

    def points(self, keyframe: int) -> Points:
        """The LiDAR returns of a keyframe. Raises CacheError if the cache was built without --points, and as `read`."""
        return Points.from_arrays(self.read_all(("points", "num_points", "sweep_origins", "sweep_times"), keyframe))

    def _array(self, name: str) -> ArraySpec:
        if name not in self._arrays:
            raise CacheError(
                f"{self.cache.path} has no array {name!r} (it has {', '.join(self._arrays)}): build a cache with it"
            )
        return self._arrays[name]

    def _whole(self, name: str) -> NDArray[Any]:
        if name in self._loaded:
            return self._loaded[name]
        array = self._array(name)
        whole = np.zeros((len(self), *array.shape), array.dtype)
        for shard, record in self.records.items():
            rows, file = self.cache.shard_range(shard), shard_file(self.cache.path, array, shard)
            try:
                data = file.read_bytes()
            except OSError as err:
                raise self._damaged(file, rows.start, err.strerror or str(err)) from err
            if hashlib.sha256(data).hexdigest() != record["files"][shard_name(array, shard)]:
                raise self._damaged(file, rows.start, "its SHA-256 is not the one in its shard's record")
            chunk = np.frombuffer(data[:-4], array.dtype)  # K keyframes (also in the last shard) and their CRC-32C
            whole[rows.start : rows.stop] = chunk.reshape(-1, *array.shape)[: len(rows)]
        self._loaded[name] = whole
        return whole

    def _read_chunk(self, array: ArraySpec, keyframe: int, out: NDArray[Any]) -> None:
        shard, row = divmod(keyframe, self.cache.keyframes_per_shard)
        file = shard_file(self.cache.path, array, shard)
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as err:
            raise self._damaged(file, keyframe, err.strerror or str(err)) from err
        try:
            index = self._indices.get((array.name, shard))
            if index is None:
                index = self._indices[array.name, shard] = self._read_index(descriptor, file, keyframe)
            if index[row, 0] == ABSENT:
                raise self._damaged(file, keyframe, "this keyframe was never written")
            offset, size = (int(n) for n in index[row])
            crc = np.empty(4, np.uint8)
            body = np.empty(size - 4, np.uint8) if array.compress else out.reshape(-1).view(np.uint8)
            done = os.preadv(descriptor, [body.data, crc.data], offset) if size == len(body) + 4 else -1
        finally:
            os.close(descriptor)
        if done != size:
            raise self._damaged(file, keyframe, "its chunk is cut short")
        is_checked = self._is_checked[array.name]
        is_due = self._check == "always" or (self._check == "first" and not is_checked[keyframe])
        if is_due and int.from_bytes(crc.tobytes(), "little") != self.records[shard]["chunks"][array.name][row]:
            raise self._damaged(file, keyframe, "its checksum is not the one in its shard's record")
        if is_due and google_crc32c.value(body) != int.from_bytes(crc.tobytes(), "little"):
            raise self._damaged(file, keyframe, "a checksum does not match")
        is_checked[keyframe] = True
        if array.compress:
            try:
                decoded = Zstd().decode(body)
            except RuntimeError as err:
                raise self._damaged(file, keyframe, str(err)) from err
            out[...] = np.frombuffer(decoded, out.dtype).reshape(out.shape)

    def _read_index(self, descriptor: int, file: Path, keyframe: int) -> NDArray[np.uint64]:
        """(K, 2) offset and size of every keyframe's chunk, from the end of a shard, before the index's own CRC-32C."""
        size = 16 * self.cache.keyframes_per_shard
        tail = os.pread(descriptor, size + 4, max(os.fstat(descriptor).st_size - size - 4, 0))
        if len(tail) != size + 4 or google_crc32c.value(tail[:size]) != int.from_bytes(tail[size:], "little"):
            raise self._damaged(file, keyframe, "its index does not match its checksum")
        return np.frombuffer(tail[:size], "<u8").reshape(-1, 2)

    def _damaged(self, file: Path, keyframe: int, what: str) -> CacheError:
        shard = keyframe // self.cache.keyframes_per_shard
        return CacheError(
            f"{file} is damaged at keyframe {keyframe} (sample {self.cache.identity.tokens[keyframe]}): {what}. Delete "
            f"{self.cache.path / 'progress' / f'{shard:05d}.json'} and run the build again: it rebuilds that shard"
        )
