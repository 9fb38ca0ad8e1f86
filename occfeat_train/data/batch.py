"""Samples and batches: what the loader's threads read and compute, and what is copied to the device.

The device augments and normalises the images and unpacks bits, so that little data is copied. At the default sizes, 2.3 MB
of images and 0.04 MB of occupancy are copied per sample, and 768 bytes per voxel with target features: 3.2 MB for the
4,150 such voxels of a nuScenes keyframe.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.augment import Draw, resample, transform_area, transform_intrinsics
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
class Loaded:
    """A sample, its augmentation, and its targets; token: for error messages."""

    token: str
    sample: Sample
    drawn: Draw
    targets: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """What all batches of a run have in common.

    num_cameras, image_size: V and (h, w) [px] of a batch; samples may have fewer cameras and smaller images. num_used: cameras
    of a sample that the network gets. has_area, has_source_size: whether batches have these fields.
    """

    num_cameras: int
    num_used: int
    image_size: tuple[int, int]
    has_area: bool
    has_source_size: bool = False

    def empty_images(self, number: int, *, pinned: bool) -> UInt8[Tensor, "B V h w 3"]:
        return torch.empty((number, self.num_cameras, *self.image_size, 3), dtype=torch.uint8, pin_memory=pinned)


@dataclass(frozen=True)
class Batch:
    """B samples with V cameras, in the cache's camera order; of a mixture of caches, masked cameras may follow.

    tokens: sample tokens, for error messages. grid: the grid of the packed arrays.
    intrinsics: of these images [px].
    cam_from_grid: [m], for the grid in the sampled reference frame; zeros for a masked camera.
    area: (top, left, bottom, right) [px] of the part of each image that shows the scene; None for whole images.
    resized, crop, mirror, cameras, bev_flip: see augment.Draw.
    arrays: the task's targets (`Task.targets`), with a leading batch axis, or concatenated if they are `Task.ragged`.
    source_size: (height, width) [px] of each image, in the top left of `images`; None if all fill it.
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
    source_size: Int64[Tensor, "B V 2"] | None = None

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
        names = ("images", "intrinsics", "cam_from_grid", "resized", "crop", "mirror", "area", "source_size")
        of = {
            name: t.flatten(0, 1).index_select(0, chosen).unflatten(0, self.cameras.shape)
            for name in names
            if (t := getattr(self, name)) is not None
        }
        draws = of["resized"], of["crop"], of["mirror"], size
        source_size = of.get("source_size", (self.images.shape[2], self.images.shape[3]))
        return Views(
            images=resample(of["images"], *draws, of.get("source_size")),
            intrinsics=transform_intrinsics(of["intrinsics"], source_size, *draws),
            cam_from_grid=of["cam_from_grid"],
            area=transform_area(of["area"], source_size, *draws) if "area" in of else None,
        )

    def volume(self, name: str) -> Bool[Tensor, "B Z H W"]:
        """A packed volume of `arrays`, unpacked."""
        return unpack_bits(self.arrays[name])[..., : self.grid.num_voxels].unflatten(-1, self.grid.shape)

    def maps(self, name: str) -> Bool[Tensor, "B K H W"]:
        """Packed maps of `arrays`, unpacked."""
        return unpack_bits(self.arrays[name])[..., : self.grid.shape[2]]


def assemble(
    loaded: Sequence[Loaded],
    images: UInt8[Tensor, "B V h w 3"],
    layout: Layout,
    ragged: Collection[str],
    *,
    pinned: bool = False,
) -> Batch:
    """Samples -> batch. images: of all samples, already filled. ragged, pinned: see `collate`.

    A sample with fewer cameras than the layout gets masked ones, which no loss depends on. They repeat the sample's cameras,
    so that BatchNorm sees only real images.
    """
    columns: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for each in loaded:
        sample, drawn = each.sample, each.drawn
        number = len(sample.intrinsics)
        repeated = np.arange(layout.num_cameras) % number
        of_cameras = {name: getattr(drawn, name) for name in ("resized", "crop", "mirror")}
        of_cameras["intrinsics"] = sample.intrinsics
        if layout.has_area:
            whole = np.tile(np.array([0.0, 0.0, *sample.image_size]), (number, 1))
            of_cameras["area"] = whole if sample.area is None else sample.area
        if layout.has_source_size:
            of_cameras["source_size"] = np.tile(np.array(sample.image_size, np.int64), (number, 1))
        for name, values in of_cameras.items():
            columns[name].append(values[repeated])
        columns["cam_from_grid"].append(np.zeros((layout.num_cameras, 4, 4)))
        columns["cam_from_grid"][-1][:number] = sample.cam_from_grid
        masked = np.arange(number, layout.num_cameras)
        columns["cameras"].append(np.concatenate([drawn.cameras, masked])[: layout.num_used])
        columns["bev_flip"].append(drawn.bev_flip)
    return Batch(
        tokens=tuple(each.token for each in loaded),
        grid=loaded[0].sample.grid,
        images=images,
        arrays=collate([each.targets for each in loaded], ragged, pinned=pinned),
        **{name: torch.from_numpy(np.stack(values)) for name, values in columns.items()},
    )


def place_images(images: UInt8[NDArray[Any], "v h w 3"], out: UInt8[NDArray[Any], "V H W 3"]) -> None:
    """Copy a sample's images to the top left of those of a batch; cameras beyond v repeat them."""
    height, width = images.shape[1:3]
    out[...] = 0
    out[:, :height, :width] = images[np.arange(len(out)) % len(images)]


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
