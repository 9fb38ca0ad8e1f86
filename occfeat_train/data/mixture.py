"""The keyframes of several caches as one stream of samples, for a pretraining on all of them.

The rule is that of one cache (dataset.py): one permutation of all keyframes per epoch, so each cache contributes in proportion
to its keyframes, and a batch may hold samples of several caches. The caches must have the same grid and, if features are
read, the same teacher. Cameras may differ in number and name, and images in size.

All batches have the largest number of cameras and the largest images. A sample with fewer cameras gets masked ones, and a
sample with smaller images has them in the top left, from where the augmentation resizes them (augment.py). Neither changes
a sample's loss, except through BatchNorm's statistics, in which every image of a batch counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import TeacherSpec
from occfeat_train.config import Config
from occfeat_train.data.batch import Batch, Layout, assemble
from occfeat_train.data.dataset import KeyframeDataset, permutation
from occfeat_train.data.frames import resolve_frame

# Fields in which teachers of the same features may differ.
_TEACHER_MAY_DIFFER = ("name", "dtype", "input_size")


class MixedDataset:
    """Samples of several caches for training. It has what the training loop uses of a `KeyframeDataset`.

    parts: the data set of each cache. keyframes: (N,) their numbers, which count on from cache to cache.
    """

    def __init__(self, readers: Sequence[CacheReader], config: Config) -> None:
        """Raises CacheError or ValueError if a cache does not fit the config or the first cache."""
        parts: list[KeyframeDataset] = []
        for reader in readers:
            parts.append(KeyframeDataset(reader, config, training=True, first=sum(len(p.reader) for p in parts)))
            _require_same_targets(parts[0], parts[-1])
        self.parts, self.config, self.grid = tuple(parts), config, parts[0].grid
        self.keyframes = np.concatenate([part.first + part.keyframes for part in parts])
        layouts = [part.layout for part in parts]
        cameras = max(layout.num_cameras for layout in layouts)
        height, width = (max(layout.image_size[axis] for layout in layouts) for axis in (0, 1))
        self.layout = Layout(
            num_cameras=cameras,
            num_used=config.augment.num_cameras or cameras,
            image_size=(height, width),
            has_area=any(layout.has_area for layout in layouts),
            has_source_size=any(layout.image_size != (height, width) for layout in layouts),
        )

    def __len__(self) -> int:
        return len(self.keyframes)

    @property
    def digest(self) -> str:
        """Hash of the keyframes in use, in the order of the caches."""
        return hashlib.sha256("\n".join(part.digest for part in self.parts).encode()).hexdigest()[:16]

    def stream(self, position: int) -> tuple[int, int]:
        """Position in the run's stream of samples -> (epoch, number of the keyframe)."""
        epoch, offset = divmod(position, len(self))
        return epoch, int(self.keyframes[permutation(self.config.seed, epoch, len(self))[offset]])

    def batch(self, samples: Sequence[tuple[int, int]], *, pinned: bool = False) -> Batch:
        """Read (epoch, number of the keyframe) pairs, as `KeyframeDataset.batch`."""
        images, loaded = self.layout.empty_images(len(samples), pinned=pinned), []
        for index, (epoch, number) in enumerate(samples):
            part = next(part for part in self.parts[::-1] if number >= part.first)
            loaded.append(part.load(index, epoch, number - part.first, images[index].numpy()))
        return assemble(loaded, images, self.layout, self.config.task_class.ragged, pinned=pinned)


Samples = KeyframeDataset | MixedDataset


def parts_of(dataset: Samples) -> tuple[KeyframeDataset, ...]:
    """The data set of each cache."""
    return dataset.parts if isinstance(dataset, MixedDataset) else (dataset,)


def resolve_common_frame(readers: Sequence[CacheReader], config: Config) -> Config:
    """The config with `frame` resolved for these caches. Raises CacheError if ``auto`` is not the same for all."""
    found = [resolve_frame(reader.cache.spec.frames, config.frame) for reader in readers]
    if len(set(found)) > 1:
        shown = ", ".join(f"{r.cache.path} {frame}" for r, frame in zip(readers, found, strict=True))
        raise CacheError(f"frame=auto is not the same for all caches ({shown}): choose one, such as --set frame=ego")
    return replace(config, frame=found[0])


def _require_same_targets(first: KeyframeDataset, other: KeyframeDataset) -> None:
    """Raises CacheError unless both caches have the same grid and, if features are read, features of the same teacher."""
    ours, theirs = (dataset.reader.cache for dataset in (first, other))
    if first.grid != other.grid:
        raise CacheError(
            f"{ours.path} has the grid {first.grid}, {theirs.path} has {other.grid}: caches of one pretraining must "
            "have the same, so build one of them again with --grid and --range"
        )
    if "features" not in first.arrays:
        return
    here, there = (_features_of(cache.spec.teacher) for cache in (ours, theirs))
    if here != there:
        differing = [f"{name}: {here[name]} != {there[name]}" for name in here if here[name] != there[name]]
        raise CacheError(
            f"{ours.path} and {theirs.path} have features of different teachers ({'; '.join(differing)}): build one of them "
            "again with the other's teacher, or pretrain with --occ-only"
        )


def _features_of(teacher: TeacherSpec | None) -> dict[str, object]:
    """What determines the features of a teacher, other than the size and precision of its input."""
    assert teacher is not None  # otherwise the cache has no features
    return {name: value for name, value in asdict(teacher).items() if name not in _TEACHER_MAY_DIFFER}
