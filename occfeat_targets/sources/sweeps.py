"""Reading a nuScenes LiDAR sweep, with checks of its values.

The files have no header, so any bytes can be read as numbers. Every number is therefore checked against the sensor's range.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.spec import EGO_BOX
from occfeat_targets.common.compiled import compiled
from occfeat_targets.common.files import read_file

COLUMNS = 5  # x, y, z [m], intensity, ring of each return in a nuScenes .pcd.bin
MAX_RANGE = 150.0  # [m] along an axis; the HDL-32E's 16 bits of 2 mm end at 131
MAX_INTENSITY = 255.0
RINGS = 32

# Returns are stored in one turn around the sensor, so all of these overlapping quarter turns contain returns unless the
# file was truncated. Axis-aligned quarters alone would accept half a sweep, because its ends overlap by a few degrees.
SECTORS = ("x>0 y>0", "x<0 y>0", "x>0 y<0", "x<0 y<0", "x>|y|", "x<-|y|", "y>|x|", "y<-|x|")
_ALL_SECTORS = (1 << len(SECTORS)) - 1
_STEP = 61  # prime, so that every 61st return covers all rings

_RETURNS_PER_BLOCK = 64  # checked at a time, with the limits repeated for each
_CENTER = np.tile(np.array([0, 0, 0, MAX_INTENSITY / 2, (RINGS - 1) / 2], np.float32), _RETURNS_PER_BLOCK)
_REACH = np.tile(np.array([*[MAX_RANGE] * 3, MAX_INTENSITY / 2, (RINGS - 1) / 2], np.float32), _RETURNS_PER_BLOCK)
_IS_RING = np.tile(np.array([0, 0, 0, 0, 1], np.int32), _RETURNS_PER_BLOCK)

_MOST_BYTES = 1 << 26  # 3.4 million returns; nuScenes' sweeps have 35,000
_FARTHEST = 30.0  # [m] that the farthest return of any street scene surpasses
_XYZIR = [0, 1, 2, 3, 4]
# Layouts of other data sets and tools: (name, type, columns, indices of x, y, z, intensity and ring, metres per unit).
# They are named in errors but never read.
_OTHER_LAYOUTS = (
    ("float32 x, y, z, intensity, as KITTI's", "<f4", 4, _XYZIR[:4], 1.0),
    ("float32 x, y, z, intensity, ring and a sixth column", "<f4", 6, _XYZIR, 1.0),
    ("float64 x, y, z, intensity, ring", "<f8", 5, _XYZIR, 1.0),
    ("float64 x, y, z, intensity", "<f8", 4, _XYZIR[:4], 1.0),
    ("float16 x, y, z, intensity, ring", "<f2", 5, _XYZIR, 1.0),
    ("big-endian float32 x, y, z, intensity, ring", ">f4", 5, _XYZIR, 1.0),
    ("float32 x, y, z, intensity, ring in millimetres", "<f4", 5, _XYZIR, 1e-3),
    ("float32 x, y, z, ring, intensity", "<f4", 5, [0, 1, 2, 4, 3], 1.0),
)


@compiled()
def _all_finite(bits: NDArray[np.int32]) -> bool:
    """Whether all float32 values, given as bits, are finite. Uses a maximum, because that vectorises."""
    top = np.int32(0)
    for i in range(bits.shape[0]):
        top = np.int32(max(top, np.int32(bits[i] & np.int32(0x7FFFFFFF))))
    return bool(top < np.int32(0x7F800000))


@compiled()
def _exceeds_limits(
    blocks: NDArray[np.float32],  # (n, whole returns)
    center: NDArray[np.float32],
    reach: NDArray[np.float32],
    is_ring: NDArray[np.int32],
) -> bool:
    """Whether a finite value is outside center +- reach or a ring is not whole. Without branches, so that it vectorises."""
    bad = np.int32(0)
    for i in range(blocks.shape[0]):
        for j in range(blocks.shape[1]):
            value = blocks[i, j]
            bad |= np.int32(abs(value - center[j]) > reach[j])
            bad |= np.int32(np.float32(np.int32(value)) != value) & is_ring[j]
    return bool(bad != 0)


@compiled()
def _sectors_of(points: NDArray[np.float32], step: int) -> int:
    """Bits, in the order of SECTORS, of the sectors with one of every step-th return; borders belong to both sides.

    Returns near the sensor are ignored: they are from the ego vehicle, or shots without a return.
    """
    mask = 0
    for i in range(0, points.shape[0], step):
        x, y = points[i, 0], points[i, 1]
        if abs(x) < EGO_BOX and abs(y) < EGO_BOX:
            continue
        mask |= (x >= 0 and y >= 0) | ((x <= 0 and y >= 0) << 1)
        mask |= ((x >= 0 and y <= 0) << 2) | ((x <= 0 and y <= 0) << 3)
        mask |= ((x >= abs(y)) << 4) | ((x <= -abs(y)) << 5) | ((y >= abs(x)) << 6) | ((y <= -abs(x)) << 7)
    return mask


def read_sweep(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Read a nuScenes LiDAR sweep: (n, 5) float32 rows of x, y, z [m], intensity, ring, in the sensor's frame.

    Raises ValueError that names the file and the remedy if the file is missing, empty, of another layout (named if it is
    known), truncated inside a return, or has values that the sensor cannot send. A file that is truncated between two
    returns is refused if a quarter turn around the sensor has no returns; a later truncation shows only in a checksum.
    """
    try:
        content = read_file(path, _MOST_BYTES)
    except FileNotFoundError as err:
        raise ValueError(f"sweep {path} is missing: check the dataroot, or download its blob again") from err
    except OSError as err:
        raise ValueError(
            f"sweep {path} cannot be read ({err.strerror}): check the dataroot's files and permissions"
        ) from err
    size = len(content)
    points = np.frombuffer(content, np.float32, size // (4 * COLUMNS) * COLUMNS).reshape(-1, COLUMNS)
    if size == 0 or size % (4 * COLUMNS) or _is_doubtful(points):
        _require_sweep(path, points, np.frombuffer(content, np.uint8))
    mask = _sectors_of(points, _STEP)
    if mask != _ALL_SECTORS:  # exact check, only if the quick check failed
        mask = _sectors_of(points, 1)
    if mask != _ALL_SECTORS:
        covered = [name for bit, name in enumerate(SECTORS) if mask >> bit & 1]
        missing = [name for bit, name in enumerate(SECTORS) if not mask >> bit & 1]
        raise ValueError(
            f"sweep {path} ends early: its {len(points)} returns cover the quadrants [{', '.join(covered)}] around the "
            f"sensor and not [{', '.join(missing)}]; expected returns in all of them: the copy is truncated, restore the file"
        )
    return points


def _is_doubtful(points: NDArray[np.float32]) -> bool:
    """Quick check of (n, 5) returns: whether a value may be invalid."""
    values, block = points.reshape(-1), len(_CENTER)
    whole = len(values) // block * block
    parts = values[:whole].reshape(-1, block), values[whole:].reshape(1, -1)
    return not _all_finite(values.view(np.int32)) or any(_exceeds_limits(p, _CENTER, _REACH, _IS_RING) for p in parts)


def _fits(points: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) bool: whether a return, (n, 5) or without ring (n, 4), can be from a nuScenes sweep."""
    fits: NDArray[np.bool_] = (np.abs(points[:, :3]) <= MAX_RANGE).all(axis=1)
    fits &= ~((points[:, 3] < 0) | (points[:, 3] > MAX_INTENSITY))  # a NaN intensity is accepted
    return fits & np.isin(points[:, 4], np.arange(RINGS)) if points.shape[1] == COLUMNS else fits


def _require_sweep(path: str | os.PathLike[str], points: NDArray[np.float32], data: NDArray[np.uint8]) -> None:
    """Raise a ValueError that describes the problem of a file. points: its complete returns; data: all its bytes."""
    is_whole = len(data) == points.nbytes > 0
    fits = _fits(points)
    if is_whole and fits.all():
        return
    layout = _other_layout(data)
    if layout is not None:
        raise ValueError(
            f"sweep {path} holds {layout}; expected nuScenes' layout (float32 x, y, z in metres, intensity 0 to "
            f"{MAX_INTENSITY:.0f}, ring 0 to {RINGS - 1}): convert it, or restore the file"
        )
    if not is_whole:
        seen = (
            "is empty" if not len(data) else f"has {len(data)} bytes, {len(data) - points.nbytes} past a whole return"
        )
        raise ValueError(
            f"sweep {path} {seen}; expected a multiple of {4 * COLUMNS} bytes (float32 x, y, z, intensity, ring): "
            "the copy is truncated, restore the file"
        )
    is_finite = np.isfinite(points[:, :3]).all(axis=1)
    if not is_finite.all():
        bad = np.flatnonzero(~is_finite)
        raise ValueError(
            f"sweep {path}: {len(bad)} of {len(points)} returns have a NaN or infinite coordinate (first: return "
            f"{bad[0]}, {points[bad[0], :3].tolist()}); expected finite metres: the file is damaged, restore it"
        )
    bad = np.flatnonzero(~fits)
    raise ValueError(
        f"sweep {path}: {len(bad)} of {len(points)} returns cannot be a nuScenes LiDAR's (first: return {bad[0]}, "
        f"{points[bad[0]].tolist()}); expected x, y, z within {MAX_RANGE:.0f} m, intensity 0 to {MAX_INTENSITY:.0f} and a "
        f"whole ring 0 to {RINGS - 1}: the file is damaged or has an unknown layout, restore it"
    )


def _other_layout(data: NDArray[np.uint8]) -> str | None:
    """Name of another layout in which these bytes are returns all around the sensor, or None."""
    with np.errstate(all="ignore"):  # most layouts give meaningless numbers
        for name, dtype, columns, order, metres in _OTHER_LAYOUTS:
            if len(data) % (columns * np.dtype(dtype).itemsize):
                continue
            points = data.view(dtype).reshape(-1, columns)[:, order].astype(np.float64)
            points[:, :3] *= metres
            if metres != 1 and np.abs(points[:, :3]).max(initial=0) < _FARTHEST:  # of another unit still
                continue
            if _fits(points).all() and _sectors_of(points.astype(np.float32), 1) == _ALL_SECTORS:
                return name
    return None
