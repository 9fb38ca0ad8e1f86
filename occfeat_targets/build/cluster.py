"""Executors of shards: this process, a local Dask cluster, or an existing Dask cluster.

This is the only module that imports Dask. A task is a whole shard, so the scheduler's overhead is negligible. Tasks are
submitted only when workers are nearly free, so that the scheduler never holds more than a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from occfeat_targets.build.shard import ShardReport, ShardTask, build_shard
from occfeat_targets.cache.plural import count

MakeTask = Callable[[int], ShardTask]
_CONNECT_TIMEOUT = "20s"


def run_serially(shards: tuple[int, ...], make_task: MakeTask, keep_going: Callable[[], bool]) -> Iterator[ShardReport]:
    """Build one shard after another in this process while `keep_going` returns true."""
    for shard in shards:
        if not keep_going():
            return
        yield build_shard(make_task(shard))


def run_on_dask(
    shards: tuple[int, ...],
    make_task: MakeTask,
    keep_going: Callable[[], bool],
    *,
    workers: int = 0,
    devices: tuple[str, ...] = ("cpu",),
    scheduler: str | None = None,
) -> Iterator[ShardReport]:
    """Build shards on `workers` local processes, or on the cluster at `scheduler`; yields reports in order of completion.

    devices: local worker k runs the teacher on devices[k % len(devices)], instead of the device of its task.
    If a worker dies, its shard is retried on another worker, at most three times. When `keep_going` returns false, no more
    shards are started, and running ones are still reported.
    Raises ValueError if local workers do not start, or if the scheduler is not reached or has no workers within a minute.
    """
    import dask
    from distributed import Client, LocalCluster, as_completed

    # By default Dask makes glibc return freed memory immediately, so that every tensor is mapped anew and the teacher takes
    # 45 % longer (BENCHMARKS.md). Spilling to disk would only slow a shard down.
    environment = {"OMP_NUM_THREADS": 1, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_MMAP_THRESHOLD_": 2**25}
    settings = {
        "distributed.nanny.pre-spawn-environ": environment,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
    }
    with dask.config.set(settings), ExitStack() as stack:
        if scheduler is None:
            try:
                cluster = LocalCluster(
                    n_workers=min(workers, len(shards)),
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    memory_limit=0,
                )
            except RuntimeError as err:
                raise ValueError(
                    f"{count(min(workers, len(shards)), 'local worker')} did not start ({err}): run the same command again, "
                    "with fewer --workers if memory is short, or with --workers 0"
                ) from err
            client = Client(stack.enter_context(cluster))
        else:
            try:
                client = Client(scheduler, timeout=_CONNECT_TIMEOUT)
            except (OSError, ValueError) as err:
                raise ValueError(
                    f"no Dask scheduler answers at {scheduler} ({err or type(err).__name__}): start one with "
                    "'dask scheduler', and workers with 'dask worker', or use --workers"
                ) from err
        stack.enter_context(client)
        try:
            client.wait_for_workers(1, timeout=60)
        except TimeoutError as err:
            raise ValueError(
                f"the Dask scheduler at {client.scheduler.address} has had no workers for a minute: "  # type: ignore[union-attr]
                f"start some with 'dask worker {client.scheduler.address}'"  # type: ignore[union-attr]
            ) from err
        build = build_shard if scheduler is not None else partial(_build_on_worker, devices=devices)
        queue = iter(shards)
        running = as_completed()
        shard_of = {}

        def submit_next() -> None:
            shard = next(queue, None) if keep_going() else None
            if shard is not None:
                future = client.submit(build, make_task(shard), key=f"shard-{shard:05d}-{os.getpid()}", pure=False)
                shard_of[future.key] = shard
                running.add(future)

        for _ in range(1 + sum(client.nthreads().values())):
            submit_next()
        for future in running:
            shard = shard_of.pop(future.key)
            if future.status == "finished":
                yield future.result()
            else:
                yield ShardReport(shard, 0, error=_why(future, shard))
            submit_next()


def _build_on_worker(task: ShardTask, devices: tuple[str, ...]) -> ShardReport:
    from distributed import get_worker

    number = int(get_worker().name)  # a local cluster counts its workers from 0; a restarted one keeps its number
    return build_shard(replace(task, device=devices[number % len(devices)]))


def _why(future: object, shard: int) -> str:
    error = future.exception()  # type: ignore[attr-defined]
    return (
        f"shard {shard} was lost: {type(error).__name__}: {error}. If its worker ran out of memory, use fewer "
        "--workers or a smaller --teacher-batch; if modules are missing, install this package on the workers"
    )
