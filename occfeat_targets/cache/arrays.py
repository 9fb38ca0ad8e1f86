"""Descriptions of the arrays of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LabelKind


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of N keyframes. shape, dims: of one keyframe. compress: use zstd, for bits that are mostly zero and for
    padded arrays, which then take about 1 / ratio of their size.

    per_keyframe: one inner chunk per keyframe (random reads); otherwise one chunk per shard (small arrays).
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    description: str
    compress: bool = False
    ratio: int = 10
    per_keyframe: bool = True

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of one keyframe."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def bytes_on_disk(self) -> int:
        """Estimated bytes of one keyframe on disk."""
        return self.nbytes // self.ratio if self.compress else self.nbytes


def label_arrays(kind: LabelKind, num_frames: int, grid: VoxelGrid) -> list[ArraySpec]:
    dims, shape = ("grid_forward", "packed_right"), (grid.map_shape[0], grid.map_row_bytes)
    class_dims = (f"{kind.name}_class",) if kind.class_shape else ()
    arrays = [(kind.array, kind.class_shape, class_dims, kind.description)]
    if kind.valid_array is not None:
        arrays.append((kind.valid_array, (), (), f"0: {kind.invalid}, not scored"))
    return [
        ArraySpec(name, (num_frames, *classes, *shape), ("frame", *named, *dims), "uint8", text, compress=True)
        for name, classes, named, text in arrays
    ]


def instance_arrays(kind: LabelKind, num_frames: int, grid: VoxelGrid) -> tuple[ArraySpec, ...]:
    """The arrays of `targets.instances.Instances`. Most cells hold 255 and 0."""
    dims = ("grid_forward", "grid_right")
    return (
        ArraySpec(
            kind.center_array, (num_frames, *grid.map_shape), ("frame", *dims), "uint8",
            "squared distance to the nearest rounded centre of an object [cells^2]; 255: that or more", compress=True, ratio=10,
        ),
        ArraySpec(
            kind.offset_array, (num_frames, 2, *grid.map_shape), ("frame", "right_forward", *dims), "int16",
            "from the rounded centre of a cell's own object to the cell [cells]; 0 in cells without one", compress=True, ratio=70,
        ),
    )  # fmt: skip


def point_arrays(max_points: int, num_sweeps: int) -> tuple[ArraySpec, ...]:
    """The arrays of `cache.points.Points`: all float32, in the ego frame at LiDAR time."""
    small = {"per_keyframe": False}
    return (
        ArraySpec(
            "points", (max_points, 4), ("point", "xyz_intensity"), "float32",
            "LiDAR returns [m] and their intensity, one sweep after the other, then zeros", compress=True, ratio=2,
        ),
        ArraySpec("num_points", (num_sweeps,), ("sweep",), "int32", "number of returns of each sweep", **small),
        ArraySpec("sweep_origins", (num_sweeps, 3), ("sweep", "xyz"), "float32", "sensor during each sweep [m]", **small),
        ArraySpec("sweep_times", (num_sweeps,), ("sweep",), "float32", "time of each sweep from the keyframe's [s]", **small),
    )  # fmt: skip


def ray_arrays(num_frames: int, grid: VoxelGrid) -> tuple[ArraySpec, ...]:
    """Observed and free voxels, and where their rays start."""
    return (
        ArraySpec(
            "rays", (num_frames, 2, grid.packed_bytes), ("frame", "observed_free", "packed_voxel"), "uint8",
            "bits as in occupancy. observed: a LiDAR ray passes the voxel, or it is occupied; free: observed and not occupied",
            compress=True, ratio=7,
        ),
        ArraySpec(
            "ray_origin", (num_frames, 3), ("frame", "right_forward_up"), "float32",
            "sensor of the keyframe's own sweep in each reference frame's grid [m]", per_keyframe=False,
        ),
    )  # fmt: skip
