"""Running a plan: choose the executor, show progress, stop cleanly after the first failure, and collect the results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from occfeat_targets.build.cluster import run_on_dask, run_serially
from occfeat_targets.build.plan import Plan
from occfeat_targets.build.shard import ShardReport, ShardTask, stage_seconds


@dataclass
class Outcome:
    """Results of a build. failed: {shard: error}. skipped: {sample token: reason}. masked: {sample token: {camera: reason}}."""

    reports: list[ShardReport] = field(default_factory=list)

    @property
    def failed(self) -> dict[int, str]:
        return {r.shard: r.error for r in self.reports if r.error is not None}

    @property
    def skipped(self) -> dict[str, str]:
        return {token: why for r in self.reports for token, why in r.skipped.items()}

    @property
    def masked(self) -> dict[str, dict[str, str]]:
        return {token: cameras for r in self.reports for token, cameras in r.masked.items()}

    @property
    def num_keyframes(self) -> int:
        return sum(r.num_keyframes for r in self.reports if r.error is None)

    @property
    def seconds(self) -> dict[str, float]:
        return stage_seconds([r for r in self.reports if r.error is None])


def default_workers() -> int:
    """One process per core if there are several, which is faster than one process with several threads; else 0 (serial)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return cores if cores > 1 else 0


def run(
    plan: Plan, *, workers: int, scheduler: str | None, print_line: Callable[[str], None], progress: bool = True
) -> Outcome:
    """Build the plan's shards on `workers` local processes (0: in this one) or on the cluster at `scheduler`.

    After the first failed shard no further shard is started; running ones are finished, recorded and reported.
    """
    outcome = Outcome()
    if not plan.shards:
        return outcome
    cores = max(default_workers(), 1)
    local = min(workers, len(plan.shards))
    num_threads = None if scheduler is not None or local == 0 else max(1, cores // local)

    def make_task(shard: int) -> ShardTask:
        return plan.task(shard, num_threads=num_threads)

    def keep_going() -> bool:
        return not outcome.failed

    reports: Iterator[ShardReport]
    if scheduler is None and local == 0:
        reports = run_serially(plan.shards, make_task, keep_going)
    else:
        reports = run_on_dask(plan.shards, make_task, keep_going, workers=local, scheduler=scheduler)
    bar = tqdm(total=plan.num_keyframes, unit="keyframe", disable=not progress, dynamic_ncols=True)
    with bar:
        for report in reports:
            outcome.reports.append(report)
            with bar.external_write_mode():
                if report.error is not None:
                    print_line(f"shard {report.shard} failed: {report.error}")
                for why in report.skipped.values():
                    print_line(f"skipped: {why}")
                for token, cameras in report.masked.items():
                    for camera, why in cameras.items():
                        print_line(f"masked: {camera} of sample {token}: {why}")
            bar.update(report.num_keyframes if report.error is None else 0)
    return outcome
