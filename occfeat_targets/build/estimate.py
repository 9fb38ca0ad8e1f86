"""Estimates of a build: its size on disk, and its time on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.sources.keyframe import DatasetError

_READ_SECONDS = 0.06  # one core, one keyframe: six JPEGs at 1600x900, a sweep and the labels (BENCHMARKS.md)
# One core, one view: decode, corrupt at 1600x900, JPEG, resize (BENCHMARKS.md). Other protocols read an image and little more.
_CORRUPT_SECONDS = {"brightness": 0.05, "low-light": 0.05, "fog": 0.08, "snow": 0.08, "motion-blur": 0.06}
_REWRITE_SECONDS, _LOAD_SECONDS = 0.02, 0.005
_START_SECONDS = 8.0  # loading a process's libraries, weights and compiled kernels
_TEACHER_EFFICIENCY = 0.55  # of the teacher on a CPU, as a fraction of the measured matmul rate (BENCHMARKS.md)


def check_disk(directory: Path, spec: TargetSpec, num_keyframes: int) -> None:
    """Raises DatasetError if the disk has too little free space for so many keyframes."""
    needed, free = spec.bytes_per_keyframe * num_keyframes, free_bytes(directory)
    if needed > free:
        raise DatasetError(
            f"the cache takes about {format_bytes(needed)}, {directory} has {format_bytes(free)} free: choose another "
            "--cache, a smaller --image-size, --feature-dtype int8, or fewer --frames"
        )


def free_bytes(directory: Path) -> int:
    """Free bytes on the disk of `directory`, which need not exist yet."""
    there = next(p for p in [directory.absolute(), *directory.absolute().parents] if p.exists())
    return shutil.disk_usage(there).free


def format_bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if n < 100 else f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def format_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate_seconds(
    spec: TargetSpec,
    num_keyframes: int,
    *,
    devices: tuple[str, ...],
    processes: int,
    cores: int,
    keyframes_per_batch: int,
) -> float:
    """Estimated seconds for these keyframes on this machine, from the start of the workers on.

    devices: of the teacher. On GPUs the teacher itself is timed on the first one, and on a CPU a matrix product is timed.
    processes: those that read keyframes, at least 1. cores: of this machine; on a CPU, each process gets an equal whole number.
    Raises TeacherError if the teacher does not run on the GPU.
    """
    read = _seconds_to_read(spec) / min(processes, cores)
    if spec.teacher is None:
        return _START_SECONDS + num_keyframes * read
    from occfeat_targets.targets.teacher import flops_per_image, seconds_per_image
    from occfeat_targets.targets.teacher_devices import matmul_flops

    cameras = len(spec.cameras)
    if devices == ("cpu",):
        used = min(processes * max(1, cores // processes), cores) / cores
        flops = _TEACHER_EFFICIENCY * used * matmul_flops(spec.teacher.dtype)
        return _START_SECONDS + num_keyframes * (cameras * flops_per_image(spec.teacher) / flops + read)
    teacher = cameras * seconds_per_image(spec.teacher, devices[0], keyframes_per_batch * cameras) / len(devices)
    return _START_SECONDS + num_keyframes * max(teacher, read)


def _seconds_to_read(spec: TargetSpec) -> float:
    """One core, one keyframe, without the teacher."""
    if spec.corruption is None:
        return _READ_SECONDS
    is_native = spec.corruption.protocol == "native"
    view = _CORRUPT_SECONDS.get(spec.corruption.name, _REWRITE_SECONDS) if is_native else _LOAD_SECONDS
    return len(spec.cameras) * view
