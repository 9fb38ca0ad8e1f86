"""Queries of Img-ALSO (paper 4.2): positions on the rays of a keyframe's LiDAR returns, and the BEV cells that explain them.

The space just behind a return is occupied, and the space between sensor and return is free. The numbers are ALSO's
(github.com/valeoai/ALSO).

The host only decimates the returns. The device draws: all shapes are fixed, so that it never waits for the host, and a step can
be recorded as a CUDA graph. Its random numbers are a hash of a sample's seed and a counter, so that a keyframe's queries depend
neither on the device nor on the rest of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid

NUM_QUERIES = 4096
DECIMATION = 0.1  # edge of the cells of which one return each is kept [m]
DELTA = 0.1  # largest distance between a return and a query next to it [m]
RADIUS = 1.0  # horizontal distance within which a cell explains a query [m]
NO_INTENSITY = -1.0
_LARGEST_INTENSITY = 255.0  # of nuScenes' sensor
_SORTED_BITS = 40  # of a random number by which returns are shuffled; equal ones keep their order


@dataclass(frozen=True)
class Queries:
    """q queries of each of B samples.

    xyz: positions in the grid's frame [m]. occupied: whether they lie behind their return, seen from the sensor. intensity: of the
    return next to a query, 0 to 1; NO_INTENSITY on lines of sight, and where the return has none. exists: False for the missing
    queries of a sample with few returns; their other values are arbitrary.
    """

    xyz: Float[Tensor, "B q 3"]
    occupied: Bool[Tensor, "B q"]
    intensity: Float[Tensor, "B q"]
    exists: Bool[Tensor, "B q"]


def decimate(xyz: Float64[NDArray[Any], "n 3"], size: float = DECIMATION) -> Int64[NDArray[Any], " m"]:
    """Ascending indices of the first return in each cubic cell of edge `size` [m].

    ALSO rounds coordinates towards zero, so that its cells next to the sensor's planes are twice as large. These are equal.
    """
    if not len(xyz):
        return np.empty(0, np.int64)
    cells = np.floor(xyz / size).astype(np.int64)
    cells -= cells.min(axis=0)
    _, first = np.unique(np.ravel_multi_index(tuple(cells.T), tuple(cells.max(axis=0) + 1)), return_index=True)
    return np.sort(first)


def scale_intensity(intensity: Float32[NDArray[Any], " n"]) -> Float32[NDArray[Any], " n"]:
    """0 to 255 -> 0 to 1; NO_INTENSITY where it is not finite."""
    return np.where(np.isfinite(intensity), intensity / np.float32(_LARGEST_INTENSITY), np.float32(NO_INTENSITY))


def draw_queries(
    returns: Float[Tensor, "r 4"], sample: Int[Tensor, " r"], sensor: Float[Tensor, "B 3"], seed: Int64[Tensor, " B"], number: int
) -> Queries:  # fmt: skip
    """`number` queries of each sample: a third up to DELTA in front of a return, a third anywhere on a line of sight, the rest up to DELTA behind.

    returns: decimated (x, y, z, intensity) of all samples [m; 0 to 1], in the frame of sensor [m]. sample: whose return it is,
    ascending; rows of -1, which do not count, may follow. A return is drawn at most once in each third, so n returns give at most 3 n queries.
    """
    third = number // 3
    returns, sample = F.pad(returns, (0, 0, 0, 1)), F.pad(sample.long(), (0, 1), value=-1)  # so that there is a row
    size = (sample == torch.arange(len(sensor), device=sample.device)[:, None]).sum(1)
    first = size.cumsum(0) - size
    group = torch.where(sample < 0, len(sensor), sample)  # rows that do not count are sorted last
    index = torch.arange(len(sample), device=sample.device) - first[sample]
    chosen, exists = [], []
    for stream, count in enumerate((third, third, number - 2 * third)):
        noise = random_bits(seed[sample], index, stream, _SORTED_BITS)
        shuffled = torch.argsort((group << _SORTED_BITS) + noise, stable=True)
        place = torch.arange(count, device=sample.device)
        chosen.append(shuffled[(first[:, None] + place).clamp(max=len(shuffled) - 1)])
        exists.append(place < size[:, None])
    xyz, intensity = returns[torch.cat(chosen, dim=1)].split([3, 1], dim=2)
    query = torch.arange(number, device=sample.device)
    is_sight, occupied = (query >= third) & (query < 2 * third), query >= 2 * third
    fraction = random_bits(seed[:, None], query, 3, 24).to(xyz) / 2**24
    ray = xyz - sensor[:, None]
    # Distance from the sensor, as a fraction of the return's.
    beside = DELTA * fraction / torch.linalg.vector_norm(ray, dim=2).clamp(min=1e-6)
    along = torch.where(is_sight, fraction, torch.where(occupied, 1 + beside, 1 - beside))
    return Queries(
        sensor[:, None] + along[..., None] * ray,
        occupied.expand(along.shape),
        torch.where(is_sight, NO_INTENSITY, intensity[..., 0]),
        torch.cat(exists, dim=1),
    )


def random_bits(seed: Int64[Tensor, "*s"], index: Int64[Tensor, "*i"], stream: int, bits: int) -> Int64[Tensor, "*n"]:
    """Uniform integers below 2^bits (at most 63): numbers `index` (0 to 2^32 - 1) of a seed's stream, broadcast.

    This is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), which computes any
    of its numbers without those before it. int64 wraps around as uint64 does.
    """
    state = seed + (index + ((stream << 32) + 1)) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return _shift(state ^ _shift(state, 31), 64 - bits)


def _shift(value: Int64[Tensor, "*n"], by: int) -> Int64[Tensor, "*n"]:
    """value >> by, as of an unsigned integer."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - (value >> 63 << 64)


def window(grid: VoxelGrid, radius: float = RADIUS) -> Int64[Tensor, "w 2"]:
    """(rows forward, columns right) from the cell of a position to all cells whose centre can be within `radius` [m] of it."""
    reach = [math.floor(radius / size + 0.5) for size in grid.cell_size[1:]]
    steps = torch.cartesian_prod(*(torch.arange(-n, n + 1) for n in reach)).reshape(-1, 2)
    gap = (steps.abs() - 0.5).clamp(min=0) * torch.tensor(grid.cell_size[1:], dtype=torch.float64)
    return steps[gap.square().sum(1) <= radius**2]


def cells_near(
    xy: Float[Tensor, "B q 2"], steps: Int64[Tensor, "w 2"], grid: VoxelGrid, radius: float = RADIUS
) -> tuple[Int64[Tensor, "B q w"], Bool[Tensor, "B q w"]]:
    """Cells around positions, and whether they are cells of the grid's plane whose centre is at most `radius` [m] away.

    xy: (right, forward) [m]. steps: of `window`. Cells are flat indices into (H, W), and arbitrary indices into it if they are not near.
    """
    index, near = [], torch.zeros((), dtype=xy.dtype, device=xy.device)
    is_inside = torch.ones((), dtype=torch.bool, device=xy.device)
    for axis in (0, 1):  # of steps: forward, right
        position, lower, size, number = (
            xy[..., 1 - axis, None],
            grid.lower[1 + axis],
            grid.cell_size[1 + axis],
            grid.shape[1 + axis],
        )
        cell = ((position - lower) / size).floor().long() + steps[:, axis]
        near = near + (lower + (cell + 0.5) * size - position).square()
        is_inside = is_inside & (cell >= 0) & (cell < number)
        index.append(cell.clamp(0, number - 1))
    return index[0] * grid.shape[2] + index[1], is_inside & (near <= radius**2)
