"""Runs command lines of this project in long-lived worker processes, a few at a time, each with a log file.

Starting Python and importing torch takes longer than the shortest runs of a study, so a worker process runs many.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pkgutil
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import click

from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.common.terminal import echo

STOPPED = 3  # exit code, as of a training that the same command continues


@dataclass(frozen=True)
class Job:
    """commands: command lines, each a package and its arguments as after `python -m`, run one after the other. after: names of the jobs that
    must be finished before. done: a file that is created when the job has succeeded, or None."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path
    after: tuple[str, ...] = ()
    done: Path | None = None


def run_jobs(
    jobs: Sequence[Job], workers: int, *, title: str = "", unit: str = "job", weight: Callable[[Job], int] = lambda _: 1,
    deadline: float | None = None, threads: int = 1,
) -> None:  # fmt: skip
    """Run jobs in their order, at most `workers` at a time, each after those that it needs.

    weight: units of a job on the progress bar. deadline: value of time.monotonic() after which no job begins. threads: of each worker.
    A failed job does not stop the others, except those that need it. Raises click.ClickException that names the failed jobs, or
    if a worker was killed. On Ctrl-C and SIGTERM, workers save their trainings and end.
    """
    if not jobs:
        return
    os.environ |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}  # of the workers
    known = {job.name for job in jobs}
    waiting, finished, failed = list(jobs), set[str](), dict[str, str]()
    running: dict[Future[None], Job] = {}
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn"))
    bar = progress_bar(sum(map(weight, jobs)), desc=title or jobs[0].name, unit=unit)
    with pool, bar, ending_workers():
        while waiting or running:
            if deadline is not None and time.monotonic() > deadline and waiting:
                echo(f"{count(len(waiting), 'job')} not begun, because the time is over; the same command continues")
                waiting = []
            for job in list(waiting):
                if lost := [name for name in job.after if name in failed]:
                    waiting.remove(job)
                    failed[job.name] = f"needs {lost[0]}"
            ready = [j for j in waiting if all(name in finished or name not in known for name in j.after)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job)] = job
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                bar.update(weight(job))
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error is None:
                    finished.add(job.name)
                else:
                    failed[job.name] = f"{error}; see {job.log}"
    if failed:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise click.ClickException(
            f"{len(failed)} of {len(jobs)} jobs failed; the same command repeats only these:{lines}"
        )


@contextlib.contextmanager
def ending_workers() -> Iterator[None]:
    """End the worker processes if this one is stopped: they would finish their jobs alone, which takes minutes."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    try:
        yield
    except BrokenProcessPool as err:
        raise click.ClickException(
            "a worker process was killed, for example for lack of memory: the same command continues; use fewer --jobs"
        ) from err
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def run_job(job: Job) -> None:
    """Run a job's commands in this process, with all output in its log. Raises RuntimeError if one fails."""
    for package, *arguments in job.commands:
        with job.log.open("a") as log:
            print(f"$ python -m {package} {shlex.join(arguments)}", file=log, flush=True)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                code = call(package, arguments)
        if code:
            raise RuntimeError(f"{package} {arguments[0]} exited with {code}")
    if job.done is not None:
        job.done.parent.mkdir(parents=True, exist_ok=True)
        job.done.touch()


def call(package: str, arguments: list[str]) -> int:
    """Run a command line of this project in this process. Returns its exit code."""
    try:
        pkgutil.resolve_name(f"{package}.cli:main").main(arguments, prog_name=package)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return 1
    return 0
