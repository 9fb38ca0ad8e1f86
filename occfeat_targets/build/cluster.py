"""Executors of shards: this process, a local Dask cluster, or an existing Dask cluster.

This is the only module that imports Dask. A task is a whole shard, so the scheduler's overhead is negligible. Only a few more
tasks are submitted than there are workers, so that the scheduler never holds many.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from occfeat_targets.build.semaphores import remove_semaphores
from occfeat_targets.build.shard import ShardReport, ShardTask, build_shard
from occfeat_targets.common.plural import count

MakeTask = Callable[[int], ShardTask]

# By default Dask makes glibc return freed memory immediately, so that every tensor is mapped anew and the teacher takes
# 45 % longer (BENCHMARKS.md). Spilling to disk would only slow a shard down.
WORKER_SETTINGS = {
    "distributed.nanny.pre-spawn-environ": {
        "OMP_NUM_THREADS": 1,
        "MALLOC_TRIM_THRESHOLD_": 2**30,
        "MALLOC_MMAP_THRESHOLD_": 2**25,
    },
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
}
_CONNECT_TIMEOUT = "20s"
_TOP_UP_SECONDS = 2.0  # between looks for new workers
_NOTICE_SECONDS = 60.0  # without workers, before the user is told
_AHEAD = 16  # tasks beyond two a thread on an existing cluster; an adaptive one starts workers only for tasks that wait


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
    print_line: Callable[[str], None] = print,
) -> Iterator[ShardReport]:
    """Build shards on `workers` local processes, or on the cluster at `scheduler`; yields reports in order of completion.

    devices: local worker k runs the teacher on devices[k % len(devices)], instead of the device of its task.
    Workers may join and leave at any time; without any, the build waits and says so. If a worker dies, its shard is retried on
    another worker, at most three times. When `keep_going` returns false, no more shards are sent to workers, and those that
    they have are still reported.
    Raises ValueError if local workers do not start, or if the scheduler is not reached or lost.
    """
    import dask
    import distributed  # noqa: F401, its own settings: imported below `set`, they would be gone when that ends

    with dask.config.set(WORKER_SETTINGS):
        if scheduler is None:
            build = partial(_build_on_worker, devices=devices)
            with _local_client(min(workers, len(shards))) as client:
                yield from _build_all(
                    client, build, shards, make_task, keep_going, print_line, lambda threads: threads + 1
                )
        else:
            with _connect(scheduler) as client:
                yield from _build_all(
                    client, build_shard, shards, make_task, keep_going, print_line, lambda threads: 2 * threads + _AHEAD
                )


def ask_worker(scheduler: str, function: Callable[..., str], *arguments: Any) -> str:
    """The value of a function on a worker of the cluster at `scheduler`. Waits until there is one."""
    with _connect(scheduler) as client, _explain_lost(scheduler):
        answer: str = client.submit(function, *arguments, pure=False).result()
        return answer


def read_scheduler_file(file: Path) -> str:
    """The address in a file that 'dask scheduler --scheduler-file' wrote. Raises ValueError if there is none."""
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(
            f"--scheduler-file {file} cannot be used ({type(err).__name__}: {err}): expected the file that "
            f"'dask scheduler --scheduler-file {file}' writes when it starts"
        ) from err


@contextmanager
def _local_client(workers: int) -> Iterator[Any]:
    """A client of a new local cluster, whose temporary TLS credentials exist only in memory and in its workers.

    Without them, every user of this machine could connect to the scheduler and run code as the user of the build.
    """
    from distributed import Client, LocalCluster

    remove_semaphores()
    try:
        with _interrupts_ignored():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                security=True,
            )
    except ImportError as err:
        raise ValueError(
            f"local workers use TLS, which needs the package cryptography ({err}): install it with pip install -e '.[targets]' in the repository, "
            "or use --workers 0"
        ) from err
    except RuntimeError as err:
        raise ValueError(
            f"{count(workers, 'local worker')} did not start ({err}): run the same command again, "
            "with fewer --workers if memory is short, or with --workers 0"
        ) from err
    with cluster, Client(cluster, set_as_default=False) as client:
        yield client


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let processes that are started ignore Ctrl-C, which a terminal sends to all of them. This one ends them.

    Only the main thread can change that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _connect(scheduler: str) -> Iterator[Any]:
    """A client of an existing cluster."""
    from distributed import Client

    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as err:  # the last two: only one side has TLS
        raise ValueError(
            f"no Dask scheduler answers at {scheduler} ({err or type(err).__name__}): start one with "
            "'dask scheduler', and workers with 'dask worker', or use --workers"
        ) from err
    # The loss of the connection is one error of ours. Dask would print a traceback of each attempt to connect again, too.
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with client:
            yield client
    finally:
        logger.setLevel(level)


def _build_all(
    client: Any,
    build: Callable[[ShardTask], ShardReport],
    shards: tuple[int, ...],
    make_task: MakeTask,
    keep_going: Callable[[], bool],
    print_line: Callable[[str], None],
    most_tasks: Callable[[int], int],
) -> Iterator[ShardReport]:
    """most_tasks: number of worker threads -> largest number of tasks that the scheduler holds."""
    address = client.scheduler.address
    own = uuid.uuid4().hex  # keys of this build; builds on other machines may have the same process id
    waiting = deque(shards)
    running: dict[Any, int] = {}
    notice_at = time.monotonic() + _NOTICE_SECONDS
    while True:
        with _explain_lost(address):
            threads = sum(client.nthreads().values())
            if not keep_going():
                waiting.clear()
                _withdraw(client, running)
            while waiting and len(running) < most_tasks(threads):
                shard = waiting.popleft()
                future = client.submit(build, make_task(shard), key=f"shard-{shard:05d}-{own}", pure=False)
                running[future] = shard
            if not running:
                return
            now = time.monotonic()
            if threads:
                notice_at = now + _NOTICE_SECONDS
            elif now > notice_at:
                print_line(
                    f"the Dask scheduler at {address} has no workers, and the build waits for some: "
                    f"start them with 'dask worker {address}'"
                )
                notice_at = float("inf")
            reports = [_report(future, running.pop(future)) for future in _wait(client, running)]
        yield from reports


def _wait(client: Any, running: dict[Any, int]) -> list[Any]:
    """The tasks that are finished, after at most a short time."""
    from distributed import wait

    try:
        with client.as_current():
            return list(wait(list(running), timeout=_TOP_UP_SECONDS, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return []


def _report(future: Any, shard: int) -> ShardReport:
    if future.status == "finished":
        report: ShardReport = future.result()
        return report
    return ShardReport(shard, 0, error=_why(future, shard))


def _withdraw(client: Any, running: dict[Any, int]) -> None:
    """Cancel the tasks that no worker has yet."""
    held = {key for keys in client.processing().values() for key in keys}
    queued = [future for future in running if future.status == "pending" and future.key not in held]
    for future in queued:
        del running[future]
    client.cancel(queued)


@contextmanager
def _explain_lost(address: str) -> Iterator[None]:
    from distributed.client import ClosedClientError

    try:
        yield
    except (CancelledError, ClosedClientError, OSError) as err:
        raise ValueError(
            f"the connection to the Dask scheduler at {address} was lost ({type(err).__name__}). Finished shards are kept: start "
            "the scheduler and its workers again, and run the same command to continue the build"
        ) from err


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
