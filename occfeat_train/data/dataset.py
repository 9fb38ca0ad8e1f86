"""From a cache to batches: the samples of a run, their order, and prefetching.

The samples of a run are one stream: one permutation of the split per epoch, concatenated and cut into batches. The position
in the stream determines all following samples, independently of the number of ranks, and no sample is dropped to fill a
batch.
"""

from __future__ import annotations

import collections
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import EGO_FRAME
from occfeat_train.config import NO_AUGMENTATION, Config
from occfeat_train.data.augment import draw
from occfeat_train.data.batch import Batch

EVALUATION_CAMERA = "CAM_FRONT"  # reference frame in evaluation (Simple-BEV)
NEVER_REFERENCE = "CAM_FRONT_LEFT"  # Simple-BEV samples the reference camera from the other five
CLASSES = {"vehicles": ("vehicles",), "map": MAP_CLASSES}


class KeyframeDataset:
    """Samples of one cache for one task, with or without augmentation.

    keyframes: (N,) indices into the cache, without skipped keyframes. arrays: names of the arrays read for each sample.
    """

    def __init__(
        self, reader: CacheReader, config: Config, *, training: bool, scenes: Iterable[str] | None = None
    ) -> None:
        """scenes: use only their keyframes. Raises CacheError or ValueError if the cache does not fit the task or the frame."""
        self.reader, self.config, self.training = reader, config, training
        spec = reader.cache.spec
        self.grid = spec.grid
        self._augment = config.augment if training else NO_AUGMENTATION
        self._frames = reference_frames(spec.frames, config.frame, training=training and config.augment.random_frame)
        self._require_large_images()
        self.arrays = ["images"]
        if config.task == "pretrain":
            self.arrays.append("occupancy")
            if config.loss.feat:
                if spec.teacher is None:
                    raise CacheError(
                        f"{reader.cache.path} has no teacher features, which lambda={config.loss.feat:g} needs: build it "
                        "with --teacher, or pretrain with --occ-only"
                    )
                self.arrays += ["features"] + ["feature_scale"] * (spec.feature_dtype == "int8")
        elif config.task not in spec.labels:
            raise CacheError(
                f"{reader.cache.path} has no {config.task} labels (it has: {', '.join(spec.labels) or 'none'}): build it "
                f"with --labels {config.task}, from a data set that has them"
            )
        labels = {"pretrain": [], "vehicles": ["labels/vehicles", "labels/vehicles_valid"], "map": ["labels/map"]}
        read = [*self.arrays, *labels[config.task], "intrinsics", "cam_from_ego", "grid_from_ego"]
        reader.cache.require_files(read)  # before training, not hours into the first epoch
        cameras = len(spec.cameras)
        if training and config.augment.num_cameras > cameras:
            raise ValueError(f"augment.num_cameras={config.augment.num_cameras}: the cache has {cameras}")
        usable = reader.is_valid.copy()
        if scenes is not None:
            wanted = set(scenes)
            usable &= np.array([scene in wanted for scene in reader.cache.identity.scenes])
        self.keyframes = np.flatnonzero(usable)
        if not len(self.keyframes):
            raise ValueError(f"{reader.cache.path}: no valid keyframe among the {len(reader)} of the chosen scenes")

    def __len__(self) -> int:
        return len(self.keyframes)

    @property
    def digest(self) -> str:
        """Hash of the keyframes in use: caches of one spec may hold others, or have skipped others."""
        tokens = self.reader.cache.identity.tokens
        return hashlib.sha256("\n".join(tokens[k] for k in self.keyframes).encode()).hexdigest()[:16]

    @property
    def frames(self) -> tuple[str, ...]:
        """Possible reference frames of a sample's grid; only one in evaluation."""
        return tuple(self.reader.cache.spec.frames[index] for index in self._frames)

    @property
    def enlarges(self) -> bool:
        """Whether images are resized to more pixels than the cached images have, on either axis."""
        largest = self._augment.largest(self.config.network.image_size)
        return any(n > given for n, given in zip(largest, self.reader.cache.spec.image_size, strict=True))

    def _require_large_images(self) -> None:
        if self.config.allow_upsampling or not self.enlarges:
            return
        network, cached = self.config.network.image_size, self.reader.cache.spec.image_size
        largest = self._augment.largest(network)
        needed = replace(self.config, augment=self._augment).smallest_cache(like=cached)
        allowed = ", or allow it with --set allow_upsampling=true" if self.training else ""
        raise CacheError(
            f"{self.reader.cache.path} has images of {cached[0]}x{cached[1]}, network.image_size={network[0]}x{network[1]} "
            f"needs up to {largest[0]}x{largest[1]}, and enlarged images are not as sharp as real ones: build it "
            f"with --image-size {needed[0]}x{needed[1]}{allowed}"
        )

    def stream(self, position: int) -> tuple[int, int]:
        """Position in the run's stream of samples -> (epoch, keyframe)."""
        epoch, offset = divmod(position, len(self))
        return epoch, int(self.keyframes[_permutation(self.config.seed, epoch, len(self))[offset]])

    def batch(self, samples: Sequence[tuple[int, int]]) -> Batch:
        """Read (epoch, keyframe) pairs. Raises CacheError naming the sample if a chunk is damaged."""
        spec, reader = self.reader.cache.spec, self.reader
        cameras = len(spec.cameras)
        columns: dict[str, list[Any]] = collections.defaultdict(list)
        read = {a.name: np.empty((len(samples), *a.shape), a.dtype) for a in spec.arrays() if a.name in self.arrays}
        for row, (epoch, keyframe) in enumerate(samples):
            rng = np.random.default_rng((self.config.seed, epoch, keyframe))
            drawn = draw(rng, self._augment, self.config.network.image_size, cameras, self._frames)
            for name in ("resized", "crop", "mirror", "cameras", "bev_flip"):
                columns[name].append(getattr(drawn, name))
            for name, array in read.items():
                reader.read(name, keyframe, out=array[row])
            grid_from_ego = reader.read("grid_from_ego", keyframe)[drawn.frame].astype(np.float64)
            columns["cam_from_grid"].append(reader.read("cam_from_ego", keyframe) @ inverse_rigid(grid_from_ego))
            columns["intrinsics"].append(reader.read("intrinsics", keyframe).astype(np.float64))
            columns["frame"].append(drawn.frame)
            if self.config.task == "vehicles":
                columns["labels"].append(reader.read("labels/vehicles", keyframe)[drawn.frame][None])
                columns["valid"].append(reader.read("labels/vehicles_valid", keyframe)[drawn.frame][None])
            elif self.config.task == "map":
                columns["labels"].append(reader.read("labels/map", keyframe)[drawn.frame])
        if "occupancy" in read:
            read["occupancy"] = read["occupancy"][np.arange(len(samples)), columns["frame"]]
        columns.pop("frame")
        tensors = {name: torch.from_numpy(array) for name, array in read.items()}
        tensors |= {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}
        tokens = tuple(reader.cache.identity.tokens[keyframe] for _, keyframe in samples)
        return Batch(tokens=tokens, grid=self.grid, **tensors)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(length)


def resolve_frame(available: Sequence[str], wanted: str) -> str:
    """Resolve ``auto`` for a cache with these frames; other values are returned unchanged."""
    if wanted != "auto":
        return wanted
    return EGO_FRAME if set(available) <= {EGO_FRAME} else "cameras"


def reference_frames(available: Sequence[str], wanted: str, *, training: bool) -> list[int]:
    """Indices of a sample's possible reference frames: one in evaluation, several cameras in training.

    wanted: ``auto`` (cameras where the cache has them), ``ego``, ``cameras``, or a camera's name.
    Raises ValueError if the cache has no such frame.
    """
    cameras = [name for name in available if name != EGO_FRAME]
    wanted = resolve_frame(available, wanted)
    if wanted == "cameras":
        if training:
            names = [name for name in cameras if name != NEVER_REFERENCE] or cameras
        else:
            names = [EVALUATION_CAMERA] if EVALUATION_CAMERA in cameras or not cameras else cameras[:1]
    else:
        names = [wanted]
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise ValueError(
            f"frame={wanted}: this cache has grids in {', '.join(available)}: choose one of them, or build it with --frames both"
        )
    return [list(available).index(name) for name in names]


def label_scenes(scenes: Sequence[str], percent: float) -> list[str]:
    """Every (100 / percent)-th scene of the split, in its order, at least one (paper 4.1 leaves the choice open).

    scenes: scene name of each valid keyframe, in the split's order, so that every chosen scene has valid keyframes.
    """
    names = list(dict.fromkeys(scenes))
    count = max(round(len(names) * percent / 100), 1)
    return [names[i * len(names) // count] for i in range(count)]


class Prefetcher:
    """Iterates over batches that a pool of threads prefetches; reading releases the GIL.

    For a GPU, batches are pinned and copied on a separate stream. `waited` is the time the loop waited for data [s].
    """

    def __init__(
        self,
        dataset: KeyframeDataset,
        batches: Iterable[Sequence[tuple[int, int]]],
        device: torch.device,
        *,
        workers: int = 2,
        ahead: int = 4,
    ) -> None:
        self._dataset, self._batches, self._device = dataset, iter(batches), device
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._ahead = max(ahead, workers)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0

    def _load(self, samples: Sequence[tuple[int, int]]) -> tuple[Batch, torch.cuda.Event | None]:
        batch = self._dataset.batch(samples)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            batch = batch.pin_memory().to(self._device)
            return batch, self._stream.record_event()

    def __iter__(self) -> Iterator[Batch]:
        pending: collections.deque[Future[tuple[Batch, torch.cuda.Event | None]]] = collections.deque()
        try:
            while True:
                while len(pending) < self._ahead and (samples := next(self._batches, None)) is not None:
                    pending.append(self._pool.submit(self._load, samples))
                if not pending:
                    return
                start = time.perf_counter()
                batch, event = pending.popleft().result()
                self.waited += time.perf_counter() - start
                if event is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(event)
                    batch.record_stream(stream)
                yield batch
        finally:
            for future in pending:
                future.cancel()
            self._pool.shutdown(cancel_futures=True)
