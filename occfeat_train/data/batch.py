"""A batch: uint8 images, packed bits and augmentation parameters, as read from the cache.

The device unpacks, augments and normalises it, so that little data is copied and the host does little work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.augment import resample, transform_intrinsics
from occfeat_train.ops.mean_over_views import sample_voxel_features, voxel_centers
from occfeat_train.ops.views import Views


@dataclass(frozen=True)
class Batch:
    """B samples with V cameras, as stored in the cache and in its camera order. Arrays that a task does not need are None.

    tokens: sample tokens, for error messages. grid: the grid of the packed arrays.
    images: (B, V, h, w, 3) uint8. intrinsics: (B, V, 3, 3) float64 of these images [px].
    cam_from_grid: (B, V, 4, 4) float64 [m], for the grid in the sampled reference frame.
    resized, crop: (B, V, 2) int64; mirror: (B, V) bool; cameras: (B, n) int64; bev_flip: (B, 2) bool: see augment.Draw.
    occupancy: (B, packed) uint8. features: (B, V, fh, fw, N_y) float16 or int8; feature_scale: (B, V, fh, fw) float16.
    labels, valid: (B, K or 1, H, packed) uint8 map masks; valid is None if every cell is valid.
    """

    tokens: tuple[str, ...]
    grid: VoxelGrid
    images: Tensor
    intrinsics: Tensor
    cam_from_grid: Tensor
    resized: Tensor
    crop: Tensor
    mirror: Tensor
    cameras: Tensor
    bev_flip: Tensor
    occupancy: Tensor | None = None
    features: Tensor | None = None
    feature_scale: Tensor | None = None
    labels: Tensor | None = None
    valid: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors().values())

    def to(self, device: torch.device) -> Batch:
        """A copy on the device; asynchronous if this one is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors, which another stream copied."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def views(self, size: tuple[int, int]) -> Views:
        """The augmented input of the network. size: (height, width) of its images [px]."""
        rows = torch.arange(len(self), device=self.images.device)[:, None]
        images, intrinsics, cam_from_grid, resized, crop, mirror = (
            t[rows, self.cameras]
            for t in (self.images, self.intrinsics, self.cam_from_grid, self.resized, self.crop, self.mirror)
        )
        source_size = (self.images.shape[2], self.images.shape[3])
        return Views(
            images=resample(images, resized, crop, mirror, size),
            intrinsics=transform_intrinsics(intrinsics, source_size, resized, crop, mirror, size),
            cam_from_grid=cam_from_grid,
        )

    def occupied(self) -> Tensor:
        """(B, Z, H, W) bool, O in paper 3.2."""
        assert self.occupancy is not None
        bits = unpack_bits(self.occupancy)[:, : self.grid.num_voxels]
        return bits.unflatten(1, self.grid.shape)

    def map_labels(self) -> tuple[Tensor, Tensor]:
        """Labels (B, K, H, W) and validity (B, 1, H, W), both bool."""
        assert self.labels is not None
        width = self.grid.shape[2]
        labels = unpack_bits(self.labels)[..., :width]
        valid = torch.ones_like(labels[:, :1]) if self.valid is None else unpack_bits(self.valid)[..., :width]
        return labels, valid

    def voxel_targets(self, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Y_v (paper 3.3) of voxels, given as (n,) ascending flat indices into (B, Z, H, W).

        It is sampled from features of the cached images, because only the student's images are augmented.

        Returns (n, N_y) float16 and the number of valid views (n,) uint8.
        """
        assert self.features is not None
        centers = voxel_centers(self.grid, voxels % self.grid.num_voxels)
        image_size = (self.images.shape[2], self.images.shape[3])
        return sample_voxel_features(
            self.features,
            self.feature_scale,
            self.cam_from_grid,
            self.intrinsics,
            image_size,
            centers,
            voxels // self.grid.num_voxels,
        )


def unpack_bits(packed: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 8 n) bool, the lowest bit of a byte first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2).bool()
