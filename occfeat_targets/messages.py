"""Output of the command line about a plan, a build and a cache, as lines of text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from occfeat_targets.build.corrupted_plan import corrupted_spec
from occfeat_targets.build.estimate import check_disk, estimate_seconds, format_bytes, format_seconds, free_bytes
from occfeat_targets.build.plan import Plan
from occfeat_targets.build.run import Outcome
from occfeat_targets.build.shard import KEYFRAMES_PER_GPU_BATCH
from occfeat_targets.build.workers import Workers, count_cores
from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.records import sizes_of_files
from occfeat_targets.cache.store import Cache, is_whole
from occfeat_targets.common.plural import count
from occfeat_targets.common.provenance import describe_code


def describe_plan(plan: Plan, workers: Workers) -> list[str]:
    """What will be built, where, how large it gets and how long it takes."""
    cache, spec, origin = plan.cache, plan.cache.spec, plan.cache.provenance
    scenes = len(set(cache.identity.scenes))
    lines = [f"{origin['split']} of {origin['version']}: {count(len(cache), 'keyframe')} of {count(scenes, 'scene')}"]
    if missing := origin.get("missing_scenes"):
        lines.append(
            f"  {len(missing)} of the split's {scenes + len(missing)} scenes are not in this data set and are left out "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        )
    if left_out := origin.get("left_out_scenes"):
        lines.append(f"  --scenes: {scenes} of the {scenes + len(left_out)} scenes of the split in this data set")
    if (problems := plan.problems.describe()) is not None:
        lines.append(f"  {problems} cannot be built and are skipped")
    if (masked := plan.problems.describe_masked()) is not None:
        lines.append(f"  {masked} are built with masked cameras")
    lines += [f"  no {name} labels: {why}" for name, why in plan.missing_labels.items()]
    lines += [f"  {line}" for line in spec.describe()]
    lines += cache.warnings
    done = len(cache.recorded_shards())
    lines.append(
        f"{cache.path} [{spec.fingerprint}]: {count(cache.num_shards, 'shard')} of up to {count(cache.keyframes_per_shard, 'keyframe')}, "
        f"{done} finished; to build here: {count(len(plan.shards), 'shard')}, {count(plan.num_keyframes, 'keyframe')}"
    )
    if plan.shards:
        size = spec.bytes_per_keyframe * plan.num_keyframes
        lines.append(
            f"size: {format_bytes(spec.bytes_per_keyframe)} per keyframe, {format_bytes(size)} in total "
            f"({format_bytes(free_bytes(cache.path))} free); time: {_time(plan, workers)}"
        )
    return lines


def describe_corrupted(
    clean: Cache, directory: Path, corruptions: Sequence[CorruptionSpec], workers: int | None
) -> str:
    """Number, size and time of several corrupted caches, of those that are not begun.

    directory: of the clean cache. workers: as --workers. Raises DatasetError if the disk has too little free space for all.
    """
    new = [c for c in corruptions if not (directory / c.folder / clean.path.name).exists()]
    specs = [corrupted_spec(clean.spec, corruption) for corruption in new]
    if specs:
        check_disk(directory, specs[0], len(specs) * len(clean))
    size = sum(spec.bytes_per_keyframe for spec in specs) * len(clean)
    cores = count_cores()
    seconds = sum(
        estimate_seconds(
            spec, len(clean), devices=("cpu",), processes=max(cores if workers is None else workers, 1), cores=cores,
            keyframes_per_batch=1,
        )
        for spec in specs
    )  # fmt: skip
    return (
        f"{count(len(corruptions), 'corrupted cache')} of {clean.path}, {len(new)} of them not yet begun: {format_bytes(size)} "
        f"({format_bytes(free_bytes(directory))} free), about {format_seconds(seconds)} on this machine"
    )


def _time(plan: Plan, workers: Workers) -> str:
    if workers.scheduler:
        return f"depends on the workers of {workers.scheduler}"
    if plan.options.plan_only:
        return "depends on the machines of its tasks"
    seconds = estimate_seconds(
        plan.cache.spec, plan.num_keyframes, devices=workers.devices, processes=max(workers.processes, 1),
        cores=count_cores(), keyframes_per_batch=workers.keyframes_per_batch or KEYFRAMES_PER_GPU_BATCH,
    )  # fmt: skip
    return f"about {format_seconds(seconds)} from now {_where(workers)}"


def _where(workers: Workers) -> str:
    where = f"with {count(workers.processes, 'worker')}" if workers.processes else "in this process"
    if workers.on_gpus:
        gpus = count(len(workers.devices), "GPU") if workers.processes else workers.devices[0]
        where += f" on {gpus}, {count(workers.keyframes_per_batch or 1, 'keyframe')} per teacher batch"
    return where


def describe_tasks(plan: Plan) -> str:
    """What to do after --plan-only."""
    return (
        f"planned: now run the same command with --workers or --scheduler instead of --plan-only, or as n tasks with --shard 0/n to (n-1)/n, "
        f"n up to {plan.cache.num_shards}"
    )


def describe_outcome(plan: Plan, outcome: Outcome, seconds: float) -> list[str]:
    """What was built, the time of each stage, what failed, and how to continue."""
    cache = plan.cache
    lines = []
    if outcome.reports:
        rate = outcome.num_keyframes / seconds
        lines.append(
            f"built {count(outcome.num_keyframes, 'keyframe')} in {format_seconds(seconds)} ({rate:.2f} keyframes/s)"
        )
    if outcome.num_keyframes:
        stages = {stage: s / outcome.num_keyframes * 1e3 for stage, s in outcome.seconds.items()}
        total = stages.pop("total")
        spent = ", ".join(f"{stage} {ms:.1f}" for stage, ms in sorted(stages.items(), key=lambda item: -item[1]))
        lines.append(
            f"  {total:.0f} ms per keyframe and worker: {spent} (images, occupancy and labels are computed while the teacher "
            "runs; wait: the teacher waits for them)"
        )
    cosines = [r.cosine for r in outcome.reports if r.cosine is not None]
    if cosines:
        mean, low = (f(c[i] for c in cosines) for i, f in ((0, lambda v: math.fsum(v) / len(cosines)), (1, min)))
        lines.append(f"  int8 features: cosine to float16 {mean:.6f} on average, {low:.6f} at worst")
    lines += _describe_lacks(plan, outcome)
    is_corrupted = plan.corruption is not None  # then neither --retry-skipped nor --on-error is accepted
    again = "" if is_corrupted else "; --retry-skipped tries again"
    if outcome.skipped:
        lines.append(
            f"  skipped {count(len(outcome.skipped), 'keyframe')}, which the cache holds as zeros and masks in is_valid: "
            f"'occfeat-targets status' lists the reasons{again}"
        )
    if outcome.masked:
        lines.append(
            f"  masked {count(sum(map(len, outcome.masked.values())), 'camera')} of {count(len(outcome.masked), 'keyframe')}: "
            f"'occfeat-targets status' lists the reasons{again}"
        )
    pending = cache.num_shards - len(cache.recorded_shards())
    lines += cache.warnings
    if outcome.failed:
        lines.append(
            f"{count(len(outcome.failed), 'shard')} failed; finished shards are intact. Fix the cause"
            f"{'' if is_corrupted else ', or pass --on-error mask-camera or skip'}, and run the same command again to continue"
        )
    elif pending:
        lines.append(f"{pending} of {cache.num_shards} shards are left to other tasks of this build")
    else:
        without = f", {skipped}" if (skipped := describe_skipped(cache)) else ""
        size = format_bytes(bytes_on_disk(cache))
        lines.append(f"{cache.path} is complete: {count(len(cache), 'keyframe')}{without}, {size}")
    return lines


def _describe_lacks(plan: Plan, outcome: Outcome) -> list[str]:
    lines = []
    for name in plan.cache.spec.labels:
        scenes = [scene for kind, scene in outcome.lacks_expected if kind == name]
        if scenes:
            lines.append(
                f"  warning: no {LABEL_KINDS[name].expected} in the {name} labels of {count(len(scenes), 'scene')} "
                f"({', '.join(scenes[:5])}{', ...' if len(scenes) > 5 else ''}): check that the maps are of this data set and cover "
                "these scenes, or leave the labels out with --label-kinds or --no-labels"
            )
    return lines


def describe_status(cache: Cache) -> list[str]:
    """Finished, failed, skipped, masked and missing parts."""
    finished, failed = cache.finished_shards(), cache.failed_shards()
    keyframes = sum(len(cache.shard_range(shard)) for shard in finished)
    lines = [
        f"{cache.path} [{cache.spec.fingerprint}]",
        *cache.warnings,
        f"finished: {len(finished)} of {cache.num_shards} shards, {keyframes} of {len(cache)} keyframes, "
        f"{format_bytes(bytes_on_disk(cache))}",
    ]
    missing = [shard for shard in range(cache.num_shards) if shard not in finished]
    if missing:
        lines.append(f"missing: {count(len(missing), 'shard')} ({_ranges(missing)}): run the same build command again")
    lines += [f"failed: shard {shard}: {record['error']}" for shard, record in failed.items()]
    lines += [f"skipped: {why}" for record in finished.values() for why in record["skipped"].values()]
    lines += [
        f"masked: {camera} of sample {token}: {why}"
        for record in finished.values()
        for token, cameras in record["masked"].items()
        for camera, why in cameras.items()
    ]
    return lines


def is_complete(cache: Cache) -> bool:
    """Every shard is finished, no keyframe was skipped, and no camera masked."""
    finished = cache.finished_shards()
    return len(finished) == cache.num_shards and all(is_whole(record) for record in finished.values())


def describe_info(cache: Cache) -> list[str]:
    """Contents and source of a cache."""
    spec, origin = cache.spec, cache.provenance
    scenes, left_out = len(set(cache.identity.scenes)), origin.get("left_out_scenes", [])
    lines = [
        f"{cache.path}: format {spec.format_version}, fingerprint {spec.fingerprint}",
        *cache.warnings,
        f"{count(len(cache), 'keyframe')} of {count(scenes, 'scene')}: {origin['split']} of {spec.source} {origin['version']} "
        f"at {origin['dataroot']}" + (f", {count(len(left_out), 'scene')} left out by --scenes" if left_out else ""),
        *spec.describe(),
        f"{count(cache.num_shards, 'shard')} of up to {count(cache.keyframes_per_shard, 'keyframe')}",
    ]
    for array in spec.arrays():
        shape = "x".join(map(str, array.shape)) or "1"
        lines.append(f"  {array.name:22} {shape:>20} {array.dtype:8} {array.description}")
    if (skipped := describe_skipped(cache)) is not None:
        lines.append(skipped)
    cosines = [record["cosine"] for record in cache.finished_shards().values() if record["cosine"]]
    if cosines:
        lines.append(f"int8 features: cosine to float16 {min(c[1] for c in cosines):.6f} at worst")
    if "command" in origin:
        gpus = f", GPUs: {', '.join(origin['gpus'])}" if origin["gpus"] else ""
        lines.append(
            f"begun {origin['date']} on {origin['host']}{gpus}, by {describe_code(origin)}: {origin['command']}"
        )
    if (made_of := origin.get("clean")) is not None:
        downloaded = f"; images of {origin['nuscenes_c']}" if origin["nuscenes_c"] else ""
        lines.append(f"everything but the images is that of {made_of['path']}{downloaded}")
    lines.append("built with " + ", ".join(f"{name} {version}" for name, version in origin["packages"].items()))
    return lines


def describe_skipped(cache: Cache) -> str | None:
    """Numbers of skipped keyframes and of those with masked cameras; None if there are none."""
    records = cache.finished_shards().values()
    skipped, masked = sum(len(r["skipped"]) for r in records), sum(len(r["masked"]) for r in records)
    if not (skipped or masked):
        return None
    return f"{count(skipped, 'keyframe')} skipped, {count(masked, 'keyframe')} with masked cameras"


def info_as_json(cache: Cache) -> str:
    """The same as JSON."""
    data: dict[str, Any] = {
        "path": str(cache.path),
        "fingerprint": cache.spec.fingerprint,
        "num_keyframes": len(cache),
        "finished_shards": sorted(cache.finished_shards()),
        "num_shards": cache.num_shards,
        "spec": cache.spec.to_dict(),
        "provenance": dict(cache.provenance),
    }
    return json.dumps(data, indent=2)


def bytes_on_disk(cache: Cache) -> int:
    return sum(sizes_of_files(cache.path).values())


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> 1-3, 7."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(spans[:8]) + (", ..." if len(spans) > 8 else "")
