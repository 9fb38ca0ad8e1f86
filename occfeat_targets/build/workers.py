"""How a build uses this machine: the number of worker processes, their devices, and the size of teacher batches."""

from __future__ import annotations

import os
from dataclasses import dataclass

from occfeat_targets.build.estimate import format_bytes
from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build.plan import Plan
from occfeat_targets.build.shard import KEYFRAMES_PER_GPU_BATCH
from occfeat_targets.cache.spec import TeacherSpec
from occfeat_targets.common.plural import count

# Modelled, not measured: sixteen processes read 270 keyframes/s at 60 ms each; an H100 computes a ViT-S for 430 (BENCHMARKS.md).
_MOST_PER_GPU = 16
_USED_MEMORY = 0.9  # of a GPU's free memory


@dataclass(frozen=True)
class Workers:
    """What builds the shards.

    processes: number of local worker processes; 0 to build in this process.
    devices: local worker k runs the teacher on devices[k % len(devices)].
    keyframes_per_batch: keyframes per teacher batch, None to let each worker decide.
    scheduler: address of an existing Dask cluster, which is used instead of local workers.
    """

    processes: int = 0
    devices: tuple[str, ...] = ("cpu",)
    keyframes_per_batch: int | None = None
    scheduler: str | None = None

    @property
    def on_gpus(self) -> bool:
        return self.devices != ("cpu",)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def find_build_devices(options: BuildOptions, scheduler: str | None) -> tuple[str, ...]:
    """Devices of this machine for the teacher. Raises ValueError if --device names none.

    If the teacher runs elsewhere, it is not asked for: each worker of an existing cluster looks for its own device.
    """
    if options.teacher is None or scheduler is not None or options.plan_only:
        return ("cpu",)
    from occfeat_targets.targets.teacher_devices import find_devices

    return find_devices(options.device)


def choose_workers(
    plan: Plan, devices: tuple[str, ...], *, workers: int | None = None, scheduler: str | None = None
) -> Workers:
    """The workers of a build.

    devices: of `find_build_devices`. workers: number of local processes that the user asked for, None for the default: one a
    core, and on GPUs at most 16 a GPU and no more than fit into its free memory.
    Raises ValueError if a GPU has too little free memory.
    """
    options, cores = plan.options, count_cores()
    if scheduler is not None:
        return Workers(0, devices, options.keyframes_per_batch, scheduler)
    if options.shard is not None:
        k, workers = options.shard[0], 0
        devices = (devices[k % len(devices)],)  # array tasks on one machine use different GPUs
    default = cores if cores > 1 else 0  # several processes are faster than one with several threads
    if plan.teacher is None or devices == ("cpu",) or not plan.shards:
        processes = min(default if workers is None else workers, len(plan.shards))
        return Workers(processes, devices[:1], options.keyframes_per_batch or 1)
    return _choose_gpu_workers(plan, plan.teacher, devices, workers, default)


def _choose_gpu_workers(
    plan: Plan, teacher: TeacherSpec, devices: tuple[str, ...], workers: int | None, default: int
) -> Workers:
    from occfeat_targets.targets.teacher import gpu_bytes
    from occfeat_targets.targets.teacher_devices import free_memory

    free = {device: free_memory(device) for device in devices}
    fullest = min(free, key=lambda device: free[device])
    usable, cameras = _USED_MEMORY * free[fullest], len(plan.cache.spec.cameras)
    batch = plan.options.keyframes_per_batch or KEYFRAMES_PER_GPU_BATCH
    if workers is None:
        fitting = int(usable / gpu_bytes(teacher, batch * cameras))
        workers = min(default, len(devices) * max(1, min(fitting, _MOST_PER_GPU)))
    workers = min(workers, len(plan.shards))
    devices = devices[: max(workers, 1)]
    sharing = -(-max(workers, 1) // len(devices))
    if plan.options.keyframes_per_batch is None:
        while batch > 1 and sharing * gpu_bytes(teacher, batch * cameras) > usable:
            batch -= 1
    least = gpu_bytes(teacher, cameras)
    if sharing * least > free[fullest]:
        raise ValueError(
            f"teacher {teacher.name} needs about {format_bytes(least)} of GPU memory per worker, {format_bytes(sharing * least)} for "
            f"{count(sharing, 'worker')} on a GPU, and {fullest} has {format_bytes(free[fullest])} free: use fewer --workers, end other "
            "programs on it, or choose a smaller --teacher or another --device"
        )
    return Workers(workers, devices, batch)
