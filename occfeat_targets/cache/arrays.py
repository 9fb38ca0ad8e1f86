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


def camera_arrays(cams: int, frames: int, image_size: tuple[int, int]) -> list[ArraySpec]:
    """Validity, calibration and student images of a keyframe."""
    height, width = image_size
    small = {"per_keyframe": False}
    return [
        ArraySpec("is_valid", (), (), "bool", "false: the keyframe was skipped and holds zeros", **small),
        ArraySpec(
            "camera_valid", (cams,), ("camera",), "bool",
            "false: the camera was masked, its image is black, its features and calibration are zero", **small,
        ),
        ArraySpec(
            "image_area", (cams, 4), ("camera", "side"), "int32",
            "(top, left, bottom, right) of the part of the cached image that the camera fills [px]; the rest is black", **small,
        ),
        ArraySpec(
            "intrinsics", (cams, 3, 3), ("camera", "k_row", "k_col"), "float32",
            "pinhole intrinsics of the cached image [px]; pixel i covers [i, i+1)", **small,
        ),
        ArraySpec(
            "cam_from_ego", (cams, 4, 4), ("camera", "row", "col"), "float32",
            "camera axes at its own timestamp from the ego frame at LiDAR time [m]", **small,
        ),
        ArraySpec(
            "grid_from_ego", (frames, 4, 4), ("frame", "row", "col"), "float32",
            "(right, forward, up) of each reference frame's grid from the ego frame at LiDAR time [m]", **small,
        ),
        ArraySpec(
            "images", (cams, height, width, 3), ("camera", "image_y", "image_x", "rgb"), "uint8",
            "student images, RGB",
        ),
    ]  # fmt: skip


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


def volume_arrays(num_frames: int, grid: VoxelGrid, *, with_rays: bool) -> tuple[ArraySpec, ...]:
    """Occupied voxels, and with rays also observed and free ones, and where the rays start."""
    occupancy = ArraySpec(
        "occupancy", (num_frames, grid.packed_bytes), ("frame", "packed_voxel"), "uint8",
        "bits of the (up, forward, right) volume, C order, little-endian within a byte", compress=True,
    )  # fmt: skip
    rays = ArraySpec(
        "rays", (num_frames, 2, grid.packed_bytes), ("frame", "observed_free", "packed_voxel"), "uint8",
        "bits as in occupancy. observed: a LiDAR ray passes the voxel, or it is occupied; free: observed and not occupied",
        compress=True, ratio=7,
    )  # fmt: skip
    origin = ArraySpec(
        "ray_origin", (num_frames, 3), ("frame", "right_forward_up"), "float32",
        "sensor of the keyframe's own sweep in each reference frame's grid [m]", per_keyframe=False,
    )  # fmt: skip
    return (occupancy, rays, origin) if with_rays else (occupancy,)
