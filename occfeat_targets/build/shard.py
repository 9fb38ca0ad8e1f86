"""One shard: compute the targets of its keyframes and write them. The same function runs serially and on any cluster.

While the teacher runs on some keyframes, a thread reads and labels the next ones. Both release the GIL, so a shard takes as
long as the slower of the two, usually the teacher. The times in the report show which one it was.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.build.assemble import KeyframeError, KeyframeTargets, Seconds, build_keyframe, timed
from occfeat_targets.build.corrupted import CorruptionInput, corrupted_shard
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache
from occfeat_targets.common.memory import describe_shortage
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.targets.quantize import quantization_cosine, quantize

logger = logging.getLogger(__name__)

# An H100 computes 882 images/s in batches of one keyframe (6 images) and 2,602 in batches of eight (BENCHMARKS.md).
KEYFRAMES_PER_GPU_BATCH = 8


@dataclass(frozen=True)
class ShardTask:
    """Message to a worker: one shard, its keyframes, and the nearby parts of the maps.

    rows: keyframes to build; the others are kept from the finished shard. teacher: its name is where the weights are now.
    keyframes_per_batch: keyframes per teacher batch; None for one on a CPU, KEYFRAMES_PER_GPU_BATCH on a GPU.
    num_threads: torch threads, None to keep their number.
    on_error: if a keyframe cannot be built, ``fail`` the shard, or ``skip`` the keyframe (recorded, masked in `is_valid`, zeros).
    ``mask-camera``: mask only its cameras that cannot be used (recorded, masked in `camera_valid`, zeros); skip it without any.
    corruption: what a corrupted cache is made from; then `rows` are all keyframes, and maps and teacher are not needed.
    """

    cache: Path
    shard: int
    keyframes: tuple[Keyframe, ...]
    rows: tuple[int, ...]
    maps: Mapping[str, MapGeometry]
    teacher: TeacherSpec | None = None
    on_error: str = "fail"
    device: str = "auto"
    keyframes_per_batch: int | None = None
    num_threads: int | None = None
    corruption: CorruptionInput | None = None


@dataclass
class ShardReport:
    """Result of a task. error: why nothing was written, or None. skipped: {sample token: reason}.

    masked: {sample token: {camera: reason}}.
    num_keyframes: number of keyframes to build.
    seconds: time by stage. ``wait`` is the time the teacher waited for keyframes. ``images``, ``occupancy`` and ``labels``
    run in parallel, so ``total`` is less than the sum.
    has_expected: {(kind of labels, scene and location): whether a keyframe built here has a cell of the kind's expected class}.
    cosine: (mean, minimum) over tokens of the cosine between int8 and float16 features, if they are int8.
    """

    shard: int
    num_keyframes: int
    error: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    masked: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    has_expected: dict[tuple[str, str], bool] = field(default_factory=dict)
    cosine: tuple[float, float] | None = None


def build_shard(task: ShardTask) -> ShardReport:
    """Build, write and record one shard. Problems of the input do not raise; they are in the report."""
    report = ShardReport(task.shard, len(task.rows))
    cache = None
    try:
        with timed(report.seconds, "total"):
            cache = open_cache(task.cache)
            if task.corruption is not None:
                with timed(report.seconds, "images"):
                    corrupted = corrupted_shard(cache, task.corruption, task.shard, task.keyframes)
                arrays, report.skipped, report.masked = corrupted.arrays, corrupted.skipped, corrupted.masked
            else:
                arrays = _shard_arrays(task, cache.spec, report)
                report.has_expected = _has_expected(task, cache.spec, arrays)
            with timed(report.seconds, "write"):
                cosine = _cosine_of_all(task, cache, report)
                notes = {"skipped": report.skipped, "masked": report.masked, "cosine": cosine}
                cache.write_shard(task.shard, arrays, notes)
    except (ValueError, OSError) as err:
        report.error = str(err)
    except Exception as err:
        shortage = describe_shortage(err)
        # The traceback of an unexpected error is reported, and the build stops cleanly.
        report.error = traceback.format_exc() if shortage is None else f"{shortage}: use fewer --workers"
    if report.error is not None and cache is not None:
        try:
            cache.record_failure(task.shard, report.error)
        except ValueError as err:  # the disk is full or read-only, as the error above already says
            logger.debug("%s", err)
    return report


def _shard_arrays(task: ShardTask, spec: TargetSpec, report: ShardReport) -> dict[str, NDArray[Any]]:
    if len(task.rows) < len(task.keyframes):
        arrays = open_cache(task.cache).read_shard(task.shard)
    else:
        arrays = {a.name: np.zeros((len(task.keyframes), *a.shape), a.dtype) for a in spec.arrays()}
    teacher = _teacher(task)
    on_gpu = teacher is not None and teacher.device.type == "cuda"
    size = task.keyframes_per_batch or (KEYFRAMES_PER_GPU_BATCH if on_gpu else 1)
    cosines = []
    for batch in _batches_ahead(task, spec, report, size):
        for i, targets in batch:
            for name, value in targets.arrays.items():
                arrays[name][i] = value
        if teacher is not None and batch:
            with timed(report.seconds, "teacher"):
                images = np.concatenate([targets.teacher_images for _, targets in batch])
                features = teacher(images).reshape(len(batch), len(spec.cameras), *teacher.spec.map_size, -1)
            rows = [i for i, _ in batch]
            is_seen = arrays["camera_valid"][rows]
            features[~is_seen] = 0
            if spec.feature_dtype == "float16":
                with np.errstate(over="ignore"):
                    arrays["features"][rows] = features
                if not np.isfinite(arrays["features"][rows]).all():
                    raise ValueError("teacher features do not fit float16: build with --feature-dtype int8")
            else:
                quantized, scale = quantize(features)
                scale[~is_seen] = 0
                arrays["features"][rows], arrays["feature_scale"][rows] = quantized, scale
                cosines.append(quantization_cosine(features[is_seen], quantized[is_seen]))
    if cosines:
        mean, low = np.array(cosines).T
        report.cosine = (float(mean.mean()), float(low.min()))
    return arrays


def _has_expected(task: ShardTask, spec: TargetSpec, arrays: Mapping[str, NDArray[Any]]) -> dict[tuple[str, str], bool]:
    found: dict[tuple[str, str], bool] = {}
    for kind in (LABEL_KINDS[name] for name in spec.labels):
        if kind.expected is None:
            continue
        masks = arrays[kind.array]
        if kind.class_shape:
            masks = masks[:, :, kind.classes.index(kind.expected)]
        for row in task.rows:
            if arrays["is_valid"][row]:
                key = kind.name, f"{task.keyframes[row].scene} at {task.keyframes[row].location}"
                found[key] = found.get(key, False) or bool(masks[row].any())
    return found


def _cosine_of_all(task: ShardTask, cache: Cache, report: ShardReport) -> tuple[float, float] | None:
    """(mean, minimum) over the whole shard, also if this task built only some of its rows."""
    kept = len(task.keyframes) - len(task.rows)
    before = cache.finished_shards()[task.shard]["cosine"] if kept else None
    if before is None or report.cosine is None:
        return report.cosine or before
    built = len(task.rows) - len(report.skipped)
    mean = (kept * before[0] + built * report.cosine[0]) / (kept + built)
    return mean, min(before[1], report.cosine[1])


def _teacher(task: ShardTask) -> Any:
    if task.teacher is None:
        return None
    from occfeat_targets.targets.teacher import load_teacher

    return load_teacher(task.teacher, task.device, task.num_threads)


def _batches_ahead(
    task: ShardTask, spec: TargetSpec, report: ShardReport, size: int
) -> Iterator[list[tuple[int, KeyframeTargets]]]:
    """Batches of up to `size` (row in the shard, targets); the next is read while the caller processes the current one."""
    starts = range(0, len(task.rows), size)

    def read(start: int) -> list[tuple[int, KeyframeTargets]]:
        rows = task.rows[start : start + size]
        built = ((row, _build_or_skip(task.keyframes[row], task, spec, report)) for row in rows)
        return [(row, targets) for row, targets in built if targets is not None]

    with ThreadPoolExecutor(1, thread_name_prefix="occfeat-read") as reader:
        ahead: Future[list[tuple[int, KeyframeTargets]]] = reader.submit(read, starts[0])
        for start in [*starts[1:], None]:
            with timed(report.seconds, "wait"):
                batch = ahead.result()
            if start is not None:
                ahead = reader.submit(read, start)
            yield batch


def _build_or_skip(
    keyframe: Keyframe, task: ShardTask, spec: TargetSpec, report: ShardReport
) -> KeyframeTargets | None:
    seconds: Seconds = report.seconds
    try:
        targets = build_keyframe(keyframe, spec, task.maps, seconds, mask_cameras=task.on_error == "mask-camera")
    except KeyframeError as err:
        if task.on_error == "fail":
            raise
        report.skipped[keyframe.token] = str(err)
        return None
    if targets.masked:
        report.masked[keyframe.token] = dict(targets.masked)
    return targets


def stage_seconds(reports: Sequence[ShardReport]) -> dict[str, float]:
    """Time by stage, summed over shards."""
    total: dict[str, float] = {}
    for report in reports:
        for stage, seconds in report.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total
