"""The voxel grid: bounds, shape, axis order, metres <-> cells, bit packing.

Coordinates and index order are defined only in this module:

* a point in a grid is ``(right, forward, up)`` in metres, relative to the grid's origin;
* a volume is indexed ``[z, h, w]`` = (up, forward, right); index 0 is the lowest, rearmost, leftmost cell;
* cell ``i`` of an axis covers ``[lower + i * size, lower + (i + 1) * size)``;
* bits are packed little-endian along the flattened C-order volume, map masks row by row.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST_ASPECT = 4.0  # of a cell seen from above; its height is free, because one layer of tall cells is a common grid


@dataclass(frozen=True)
class VoxelGrid:
    """Z_B x H_B x W_B cells over a box of metres (paper 3.2); the default is Simple-BEV's.

    shape: cells along (up, forward, right).
    lower, upper: bounds [m] along (up, forward, right), relative to the grid's origin.
    """

    shape: tuple[int, int, int] = (8, 200, 200)
    lower: tuple[float, float, float] = (-5.0, -50.0, -50.0)
    upper: tuple[float, float, float] = (5.0, 50.0, 50.0)

    def __post_init__(self) -> None:
        for cells, low, high in zip(self.shape, self.lower, self.upper, strict=True):
            if int(cells) != cells or cells < 1:
                raise ValueError(f"grid shape {self.shape}: every axis needs a whole number of cells, at least 1")
            if not (np.isfinite(low) and np.isfinite(high) and low < high):
                raise ValueError(
                    f"grid bounds {self.lower} .. {self.upper} [m]: lower must lie below upper on every axis"
                )
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "lower", tuple(float(v) for v in self.lower))
        object.__setattr__(self, "upper", tuple(float(v) for v in self.upper))

    @property
    def cell_size(self) -> tuple[float, float, float]:
        """Edge lengths [m] along (up, forward, right)."""
        up, forward, right = ((u - lo) / n for u, lo, n in zip(self.upper, self.lower, self.shape, strict=True))
        return up, forward, right

    @property
    def shape_warning(self) -> str | None:
        """Why shape and bounds are probably in another order than (up, forward, right); None for usual grids."""
        up, forward, right = (high - low for low, high in zip(self.lower, self.upper, strict=True))
        _, cell_forward, cell_right = self.cell_size
        order = (
            "the order is up, forward, right: the shape is ZxHxW, such as 8x200x200, and the bounds of up come first"
        )
        if max(cell_forward, cell_right) > _LARGEST_ASPECT * min(cell_forward, cell_right):
            return f"cells are {cell_forward:g} m long and {cell_right:g} m wide; {order}"
        if up > min(forward, right):
            return f"the grid is {up:g} m high, {forward:g} m long and {right:g} m wide; {order}"
        return None

    @property
    def num_voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def packed_bytes(self) -> int:
        """Bytes of one bit-packed volume."""
        return (self.num_voxels + 7) // 8

    @property
    def map_shape(self) -> tuple[int, int]:
        """(H, W) of a bird's-eye map on this grid."""
        return self.shape[1:]

    @property
    def map_row_bytes(self) -> int:
        """Bytes of one bit-packed row of a map; rows are padded with zeros to a multiple of 8 cells."""
        return (self.shape[2] + 7) // 8

    @property
    def cells_from_grid(self) -> NDArray[np.float64]:
        """(4, 4) map from (right, forward, up) metres to continuous (w, h, z) cells; its floor is the index."""
        up, forward, right = self.cell_size
        matrix = np.diag([1 / right, 1 / forward, 1 / up, 1.0])
        matrix[:3, 3] = -np.array(self.lower[::-1]) * np.diag(matrix)[:3]
        return matrix

    def voxel_centers(self) -> NDArray[np.float32]:
        """(Z, H, W, 3) float32 cell centres (right, forward, up) [m]."""
        up, forward, right = (
            low + (np.arange(n) + 0.5) * size
            for low, n, size in zip(self.lower, self.shape, self.cell_size, strict=True)
        )
        z, h, w = np.meshgrid(up, forward, right, indexing="ij")
        return np.stack([w, h, z], axis=-1).astype(np.float32)

    def centers_of(self, flat_index: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """(n,) flat C-order voxel indices -> (n, 3) float32 centres (right, forward, up) [m]."""
        z, h, w = np.unravel_index(flat_index, self.shape)
        index = np.stack([w, h, z], axis=-1)
        return (np.array(self.lower[::-1]) + (index + 0.5) * np.array(self.cell_size[::-1])).astype(np.float32)

    def pack_volume(self, volume: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """(..., Z, H, W) bool -> (..., packed_bytes) uint8."""
        if volume.shape[-3:] != self.shape:
            raise ValueError(f"volume of shape {volume.shape} does not end in the grid's {self.shape}")
        return np.packbits(volume.reshape(*volume.shape[:-3], -1), axis=-1, bitorder="little")

    def unpack_volume(self, packed: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(..., packed_bytes) uint8 -> (..., Z, H, W) bool."""
        if packed.shape[-1] != self.packed_bytes:
            raise ValueError(
                f"{packed.shape[-1]} bytes do not hold a volume of {self.shape}: {self.packed_bytes} expected"
            )
        bits = np.unpackbits(packed, axis=-1, count=self.num_voxels, bitorder="little")
        return bits.reshape(*packed.shape[:-1], *self.shape).view(np.bool_)

    def pack_map(self, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """(..., H, W) bool -> (..., H, map_row_bytes) uint8."""
        if mask.shape[-2:] != self.map_shape:
            raise ValueError(f"map of shape {mask.shape} does not end in the grid's {self.map_shape}")
        return np.packbits(mask, axis=-1, bitorder="little")

    def unpack_map(self, packed: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(..., H, map_row_bytes) uint8 -> (..., H, W) bool."""
        if packed.shape[-2:] != (self.shape[1], self.map_row_bytes):
            raise ValueError(f"packed map of shape {packed.shape} does not belong to a grid of {self.shape}")
        return np.unpackbits(packed, axis=-1, count=self.shape[2], bitorder="little").view(np.bool_)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VoxelGrid:
        return cls(tuple(data["shape"]), tuple(data["lower"]), tuple(data["upper"]))

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that identify the grid."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def __str__(self) -> str:
        spans = ", ".join(f"{lo:g}..{hi:g}" for lo, hi in zip(self.lower, self.upper, strict=True))
        return f"{'x'.join(map(str, self.shape))} over ({spans}) m [{self.fingerprint}]"
