"""Samples and batches: what the loader's threads read and compute, and what is copied to the device.

The device augments and normalises the images and unpacks bits, so that little data is copied. At the default sizes, 2.3 MB
of images and 0.04 MB of occupancy are copied per sample, and 768 bytes per voxel with target features: 3.2 MB for the
4,150 such voxels of a nuScenes keyframe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.augment import resample, transform_area, transform_intrinsics
from occfeat_train.ops.views import Views


@dataclass(frozen=True)
class Sample:
    """One keyframe with V cameras on the host, from which a task computes its targets (`Task.targets`).

    index: the sample's position in its batch. grid: of the packed arrays. image_size: (height, width) of the images [px].
    intrinsics: of these images [px].
    cam_from_grid: [m], for the grid in the sampled reference frame; zeros for a masked camera.
    area: (top, left, bottom, right) [px] of the part of each image that shows the scene; None for whole images.
    arrays: the task's arrays (`Task.arrays`), as in the cache's spec; arrays with a frame axis are those of that frame.
    rng: for targets that are drawn at random; in evaluation it depends only on the keyframe.
    """

    index: int
    grid: VoxelGrid
    image_size: tuple[int, int]
    images: UInt8[NDArray[Any], "V h w 3"]
    intrinsics: Float64[NDArray[Any], "V 3 3"]
    cam_from_grid: Float64[NDArray[Any], "V 4 4"]
    arrays: Mapping[str, NDArray[Any]]
    rng: np.random.Generator
    area: Float64[NDArray[Any], "V 4"] | None = None


@dataclass(frozen=True)
class Batch:
    """B samples with V cameras, in the cache's camera order.

    tokens: sample tokens, for error messages. grid: the grid of the packed arrays.
    intrinsics: of these images [px].
    cam_from_grid: [m], for the grid in the sampled reference frame; zeros for a masked camera.
    area: (top, left, bottom, right) [px] of the part of each image that shows the scene; None for whole images.
    resized, crop, mirror, cameras, bev_flip: see augment.Draw.
    arrays: the task's targets (`Task.targets`), with a leading batch axis, or concatenated if they are `Task.ragged`.
    """

    tokens: tuple[str, ...]
    grid: VoxelGrid
    images: UInt8[Tensor, "B V h w 3"]
    intrinsics: Float64[Tensor, "B V 3 3"]
    cam_from_grid: Float64[Tensor, "B V 4 4"]
    resized: Int64[Tensor, "B V 2"]
    crop: Int64[Tensor, "B V 2"]
    mirror: Bool[Tensor, "B V"]
    cameras: Int64[Tensor, "B n"]
    bev_flip: Bool[Tensor, "B 2"]
    arrays: Mapping[str, Tensor]
    area: Float64[Tensor, "B V 4"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def to(self, device: torch.device) -> Batch:
        """A copy on the device; asynchronous if this one is pinned."""
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self.map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors, which another stream copied."""
        for tensor in self.tensors():
            tensor.record_stream(stream)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with change(tensor) for every tensor."""
        values: dict[str, Any] = {name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        arrays = {name: change(value) for name, value in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays, **values)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, in the same order for all batches of a task."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))
        yield from self.arrays.values()

    def views(self, size: tuple[int, int]) -> Views:
        """The augmented input of the network. size: (height, width) of its images [px]."""
        first = torch.arange(len(self), device=self.images.device)[:, None] * self.images.shape[1]
        chosen = (first + self.cameras).flatten()
        images, intrinsics, cam_from_grid, resized, crop, mirror, *areas = (
            t.flatten(0, 1).index_select(0, chosen).unflatten(0, self.cameras.shape)
            for t in (self.images, self.intrinsics, self.cam_from_grid, self.resized, self.crop, self.mirror, self.area)
            if t is not None
        )
        source_size = (self.images.shape[2], self.images.shape[3])
        return Views(
            images=resample(images, resized, crop, mirror, size),
            intrinsics=transform_intrinsics(intrinsics, source_size, resized, crop, mirror, size),
            cam_from_grid=cam_from_grid,
            area=transform_area(areas[0], source_size, resized, crop, mirror, size) if areas else None,
        )

    def volume(self, name: str) -> Bool[Tensor, "B Z H W"]:
        """A packed volume of `arrays`, unpacked."""
        return unpack_bits(self.arrays[name])[..., : self.grid.num_voxels].unflatten(-1, self.grid.shape)

    def maps(self, name: str) -> Bool[Tensor, "B K H W"]:
        """Packed maps of `arrays`, unpacked."""
        return unpack_bits(self.arrays[name])[..., : self.grid.shape[2]]


def collate(
    targets: Sequence[Mapping[str, NDArray[Any]]], ragged: Collection[str], *, pinned: bool = False
) -> dict[str, Tensor]:
    """Targets of single samples -> `Batch.arrays`. ragged: names of the arrays that are concatenated; others are stacked.

    pinned: in page-locked memory, from which a GPU copies without the host.
    """
    out = {}
    for name, first in targets[0].items():
        arrays = [each[name] for each in targets]
        shape = (sum(map(len, arrays)), *first.shape[1:]) if name in ragged else (len(arrays), *first.shape)
        out[name] = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, first.dtype)).dtype, pin_memory=pinned)
        (np.concatenate if name in ragged else np.stack)(arrays, out=out[name].numpy())
    return out


def unpack_bits(packed: UInt8[Tensor, "*shape n"]) -> Bool[Tensor, "*shape 8*n"]:
    """(..., n) uint8 -> (..., 8 n) bool, the lowest bit of a byte first; on the host, VoxelGrid unpacks."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2).bool()
