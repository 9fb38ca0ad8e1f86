"""The samples of a run, in their order, read from a cache.

The samples of a run are one stream: one permutation of the split per epoch, concatenated and cut into batches. The position
in the stream determines all following samples, independently of the number of ranks, and no sample is dropped to fill a
batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_train.config import NO_AUGMENTATION, Config
from occfeat_train.data.augment import draw
from occfeat_train.data.batch import Batch, Layout, Loaded, Sample, assemble, place_images
from occfeat_train.data.frames import has_grid, none_left, reference_frames

# Arrays of a cache that say where its cameras and grids are, and which parts of the images show the scene.
CALIBRATION = ("camera_valid", "image_area", "intrinsics", "cam_from_ego", "grid_from_ego")


class KeyframeDataset:
    """Samples of one cache for one task, with or without augmentation.

    keyframes: (N,) indices into the cache, without skipped keyframes, and without those whose every possible reference frame
    is a masked camera's (num_without_frame) or that have no targets of the task (num_without_targets). arrays: names of the
    arrays read for each sample.
    """

    def __init__(
        self,
        reader: CacheReader,
        config: Config,
        *,
        training: bool,
        scenes: Iterable[str] | None = None,
        first: int = 0,
    ) -> None:
        """scenes: use only their keyframes. first: keyframes of the caches before this one in a mixture (mixture.py).

        Raises CacheError or ValueError if the cache does not fit the task or the frame.
        """
        self.reader, self.config, self.training, self.first = reader, config, training, first
        spec = reader.cache.spec
        self.grid = spec.grid
        self._specs = {array.name: array for array in spec.arrays()}
        self._augment = config.augment if training else NO_AUGMENTATION
        self.arrays = ("images", *self._task_arrays())
        try:
            self._frames = reference_frames(
                spec.frames, config.frame, training=training and config.augment.random_frame
            )
        except ValueError as err:
            raise CacheError(f"{reader.cache.path}: {err}") from err
        self._require_large_images()
        # Before training, not hours into the first epoch.
        reader.cache.require_files([*self.arrays, *CALIBRATION])
        cameras = len(spec.cameras)
        if training and config.augment.num_cameras > cameras:
            raise ValueError(
                f"{reader.cache.path}: augment.num_cameras={config.augment.num_cameras}: the cache has {cameras}"
            )
        self._has_grid = has_grid(reader)[:, self._frames]
        # Without letterboxes, no area is copied to a GPU and augmented there.
        self.layout = Layout(
            cameras, self._augment.num_cameras or cameras, spec.image_size, has_area=reader.is_letterboxed
        )
        chosen = np.ones(len(reader), np.bool_)
        if scenes is not None:
            wanted = set(scenes)
            chosen = np.array([scene in wanted for scene in reader.cache.identity.scenes])
        is_placed, has_targets = chosen & self._has_grid.any(axis=1), config.task_class.has_targets(reader)
        self.num_without_frame = int((chosen & reader.is_valid & ~is_placed).sum())
        self.num_without_targets = int((is_placed & ~has_targets).sum())
        self.keyframes = np.flatnonzero(is_placed & has_targets)
        if not len(self.keyframes):
            of = "" if scenes is None else " of the chosen scenes"
            if self.num_without_targets:
                raise ValueError(
                    f"{reader.cache.path}: none of the {self.num_without_targets} valid keyframes{of} can be used: "
                    f"{config.task_class.without_targets}: train another task, or build the cache again from intact files"
                )
            if self.num_without_frame:
                raise ValueError(
                    f"{reader.cache.path}: none of the {self.num_without_frame} valid keyframes{of} can be used: "
                    f"{none_left(spec.frames, self.frames)}"
                )
            raise ValueError(f"{reader.cache.path}: no valid keyframe among the {chosen.sum()}{of}")

    def __len__(self) -> int:
        return len(self.keyframes)

    @property
    def digest(self) -> str:
        """Hash of the keyframes in use: caches of one spec may hold others, or have skipped others."""
        tokens = self.reader.cache.identity.tokens
        return hashlib.sha256("\n".join(tokens[k] for k in self.keyframes).encode()).hexdigest()[:16]

    @property
    def bytes_per_sample(self) -> int:
        """Bytes read of a keyframe, uncompressed, besides its calibration."""
        return sum(self._specs[name].nbytes for name in self.arrays)

    @property
    def frames(self) -> tuple[str, ...]:
        """Possible reference frames of a sample's grid; only one in evaluation."""
        return tuple(self.reader.cache.spec.frames[index] for index in self._frames)

    @property
    def largest_images(self) -> tuple[int, int]:
        """Largest (height, width) [px] to which images are resized."""
        return self._augment.largest(self.config.network.image_size)

    @property
    def enlarges(self) -> bool:
        """Whether images are resized to more pixels than the cached images have, on either axis."""
        return any(n > given for n, given in zip(self.largest_images, self.reader.cache.spec.image_size, strict=True))

    def _require_large_images(self) -> None:
        if self.config.allow_upsampling or not self.enlarges:
            return
        network, cached = self.config.network.image_size, self.reader.cache.spec.image_size
        largest = self.largest_images
        needed = replace(self.config, augment=self._augment).smallest_cache(like=cached)
        allowed = "allow it with" if self.training else "evaluate with"
        raise CacheError(
            f"{self.reader.cache.path} has images of {cached[0]}x{cached[1]}, network.image_size={network[0]}x{network[1]} "
            f"needs up to {largest[0]}x{largest[1]}, and enlarged images are not as sharp as real ones: build it "
            f"with --image-size {needed[0]}x{needed[1]}, or {allowed} --allow-upsampling"
        )

    def _task_arrays(self) -> list[str]:
        cache, task = self.reader.cache, self.config.task
        try:
            names: list[str] = self.config.task_class.arrays(self.config, cache.spec)
        except ValueError as err:
            raise CacheError(f"{cache.path} has {err}") from err
        if not self.training:
            names += [
                name for name in self.config.task_class.evaluation_arrays(self.config, cache.spec) if name not in names
            ]
        missing = [name for name in names if name not in self._specs]
        if missing:
            raise CacheError(f"{cache.path} has no {', '.join(missing)}, which {task} reads: build a cache with it")
        return names

    def stream(self, position: int) -> tuple[int, int]:
        """Position in the run's stream of samples -> (epoch, keyframe)."""
        epoch, offset = divmod(position, len(self))
        return epoch, int(self.keyframes[permutation(self.config.seed, epoch, len(self))[offset]])

    def batch(self, samples: Sequence[tuple[int, int]], *, pinned: bool = False) -> Batch:
        """Read (epoch, keyframe) pairs and compute the task's targets. Raises CacheError naming the sample if a chunk is damaged.

        pinned: images and targets in page-locked memory, from which a GPU copies without the host.
        """
        images = self.layout.empty_images(len(samples), pinned=pinned)
        loaded = [self.load(i, *sample, images[i].numpy()) for i, sample in enumerate(samples)]
        return assemble(loaded, images, self.layout, self.config.task_class.ragged, pinned=pinned)

    def load(self, index: int, epoch: int, keyframe: int, images: NDArray[np.uint8]) -> Loaded:
        """Read a keyframe and compute the task's targets. index: its position in the batch.

        images: where the batch has its images, (V, h, w, 3); of a mixture they may be larger than the cache's.
        """
        rng = np.random.default_rng((self.config.seed if self.training else 0, epoch, self.first + keyframe))
        frames = [frame for frame, there in zip(self._frames, self._has_grid[keyframe], strict=True) if there]
        shape = self._specs["images"].shape
        drawn = draw(rng, self._augment, self.config.network.image_size, shape[0], frames)
        own = images if images.shape == shape else np.empty(shape, np.uint8)
        sample = self._read(index, keyframe, drawn.frame, own, rng)
        if own is not images:
            place_images(own, images)
        targets = self.config.task_class.targets(sample, self.config)
        return Loaded(self.reader.cache.identity.tokens[keyframe], sample, drawn, targets)

    def _read(
        self, index: int, keyframe: int, frame: int, images: NDArray[np.uint8], rng: np.random.Generator
    ) -> Sample:
        """One keyframe with its grid in reference frame number `frame`. images: where to read them to."""

        def read(name: str) -> NDArray[Any]:
            array = self.reader.read(name, keyframe)
            return array[frame] if self._specs[name].dims[:1] == ("frame",) else array

        grid_from_ego = read("grid_from_ego").astype(np.float64)
        cam_from_grid = read("cam_from_ego") @ inverse_rigid(grid_from_ego)
        cam_from_grid[~read("camera_valid")] = 0
        return Sample(
            index=index,
            grid=self.grid,
            image_size=self.reader.cache.spec.image_size,
            images=self.reader.read("images", keyframe, out=images),
            intrinsics=read("intrinsics").astype(np.float64),
            cam_from_grid=cam_from_grid,
            arrays={name: read(name) for name in self.arrays if name != "images"},
            rng=rng,
            area=read("image_area").astype(np.float64) if self.layout.has_area else None,
        )


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(length)
