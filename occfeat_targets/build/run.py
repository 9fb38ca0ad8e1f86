"""Running a plan: choose the executor, show progress, stop cleanly after the first failure, and collect the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from occfeat_targets.build.cluster import run_on_dask, run_serially
from occfeat_targets.build.plan import Plan
from occfeat_targets.build.shard import ShardReport, ShardTask, stage_seconds
from occfeat_targets.build.workers import Workers, count_cores
from occfeat_targets.common.progress import progress_bar


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
    def lacks_expected(self) -> list[tuple[str, str]]:
        """(kind of labels, scene) whose keyframes built here have no cell of the kind's expected class."""
        found = {key for r in self.reports for key, is_there in r.has_expected.items() if is_there}
        return list(dict.fromkeys(key for r in self.reports for key in r.has_expected if key not in found))

    @property
    def num_keyframes(self) -> int:
        """Number of keyframes that were built, without those that were skipped."""
        return sum(r.num_keyframes - len(r.skipped) for r in self.reports if r.error is None)

    @property
    def seconds(self) -> dict[str, float]:
        return stage_seconds([r for r in self.reports if r.error is None])


def run(plan: Plan, workers: Workers, *, print_line: Callable[[str], None], progress: bool = True) -> Outcome:
    """Build the plan's shards.

    After the first failed shard no further shard is started; running ones are finished, recorded and reported.
    """
    outcome = Outcome()
    if not plan.shards:
        return outcome
    device = plan.options.device if workers.scheduler is not None else workers.devices[0]
    num_threads = max(1, count_cores() // workers.processes) if workers.processes else None

    def make_task(shard: int) -> ShardTask:
        return plan.task(shard, device=device, keyframes_per_batch=workers.keyframes_per_batch, num_threads=num_threads)

    def keep_going() -> bool:
        return not outcome.failed

    bar = progress_bar(plan.num_keyframes, unit="keyframe", disable=not progress)

    def print_above(line: str) -> None:
        with bar.external_write_mode():
            print_line(line)

    reports: Iterator[ShardReport]
    if workers.scheduler is None and workers.processes == 0:
        reports = run_serially(plan.shards, make_task, keep_going)
    else:
        reports = run_on_dask(
            plan.shards, make_task, keep_going,
            workers=workers.processes, devices=workers.devices, scheduler=workers.scheduler,
            print_line=print_above,
        )  # fmt: skip
    with bar:
        for report in reports:
            outcome.reports.append(report)
            if report.error is not None:
                print_above(f"shard {report.shard} failed: {report.error}")
            for why in report.skipped.values():
                print_above(f"skipped: {why}")
            for token, cameras in report.masked.items():
                for camera, why in cameras.items():
                    print_above(f"masked: {camera} of sample {token}: {why}")
            bar.update(report.num_keyframes if report.error is None else 0)
    return outcome
