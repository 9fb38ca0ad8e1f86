"""Does pretraining help? The paper's Tables 1, 3 and 4 in small, on the synthetic city, with means, intervals and learning curves.

    python -m pipelines.study --size cpu --teacher facebook/dinov2-small --out study

makes the city and its caches, pretrains, finetunes and evaluates every arm with every seed, and writes report.md and
report.html. Finished work is never repeated: the same command continues a study, and --stop-after ends it early with whole runs.
`--search` instead tries the candidate settings of search.py on the tune split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from occfeat_targets.build.estimate import format_seconds
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from pipelines.processes import Job, run_jobs
from pipelines.study.data import RANDOM, make_data
from pipelines.study.design import Run, Size, reads_features, runs_of, teachers_of
from pipelines.study.report import markdown, write_report
from pipelines.study.results import read_results
from pipelines.study.search import search_runs, search_table
from pipelines.study.sizes import SIZES


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--size", "size_name", type=click.Choice(list(SIZES)), default="cpu", help="How much is trained.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("study"), help="Directory of everything.")
@click.option("--teacher", help="Hub id or folder of a trained teacher; without it, only the random teacher is used.")
@click.option("--teacher-name", help="What the report calls the teacher.  [default: --teacher]")
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds.  [default: the size's]")
@click.option(
    "--only-seed",
    type=click.IntRange(0),
    metavar="N",
    help="Run only this seed, for example on another machine; the results of several are copied into one OUT/runs.",
)
@click.option("--jobs", type=click.IntRange(1), help="Trainings at a time, one thread each.  [default: the size's]")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--search", is_flag=True, help="Try the candidate settings instead.")
@click.option("--stop-after", type=float, metavar="MINUTES", help="Begin no run after this time.  [default: none]")
@click.option("--report-only", is_flag=True, help="Write the report of what is finished.")
def main(
    size_name: str, out: Path, teacher: str | None, teacher_name: str | None, seeds: int | None, only_seed: int | None, jobs: int | None,
    device: str, search: bool, stop_after: float | None, report_only: bool,
) -> None:  # fmt: skip
    """Does pretraining help? A study on the synthetic city."""
    chosen = SIZES[size_name]
    chosen = replace(chosen, seeds=seeds or chosen.seeds, jobs=jobs or chosen.jobs)
    teachers = {"random": RANDOM} if teacher is None else {"trained": teacher, "random": RANDOM}
    teachers = {name: model for name, model in teachers.items() if name in teachers_of(chosen)} or teachers
    runs = search_runs(chosen) if search else runs_of(chosen, set(teachers))
    mine = [run for run in runs if only_seed in (None, run.seed)]
    out = out.resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        if not report_only:
            for line in describe(chosen, mine, out, teachers):
                echo(line)
            make_data(out, chosen.city, teachers, device=device, tasks=chosen.tasks)
            echo(f"data: {format_seconds(time.monotonic() - started)}")
            train(mine, out, chosen, list(teachers), device, None if stop_after is None else started + 60 * stop_after)
    finally:  # also after failed runs
        if search:
            echo(markdown(search_table(runs, out)))
        else:
            write_report(out, chosen, teachers, teacher_name or teacher or "")
    echo(f"{format_seconds(time.monotonic() - started)} in total")


def describe(size: Size, runs: Sequence[Run], out: Path, teachers: dict[str, str]) -> list[str]:
    """What will be done, and how long each stage takes."""
    city = size.city
    keyframes = sum(city.scenes.values()) * city.keyframes
    lines = [
        "SIMULATED: the data set is a synthetic city"
        + (", and the teacher has random weights" if "trained" not in teachers else ""),
        f"data: {keyframes} keyframes, {format_seconds(keyframes * (city.seconds + len(teachers) * city.teacher_seconds))} on two cores",
    ]
    missing = [arm.name for arm in size.arms if arm.teacher not in teachers and reads_features(arm)]
    if missing:
        lines.append(f"left out, because they need --teacher: {', '.join(missing)}")
    stages = {"pretraining": [r for r in runs if not r.task], "finetuning and evaluation": [r for r in runs if r.task]}
    for stage, of_stage in stages.items():
        left = [run for run in of_stage if read_results(run, out) is None]
        samples = sum(run.samples for run in left)
        lines.append(
            f"{stage}: {count(len(of_stage), 'run')}, {len(of_stage) - len(left)} finished; {samples:,} samples to train, "
            f"{format_seconds(samples / size.rate)} at {size.rate:g} samples/s, as on {size.machine}, with {count(size.jobs, 'job')}"
        )
    return lines


def train(
    runs: Sequence[Run], out: Path, size: Size, teachers: Sequence[str], device: str, deadline: float | None
) -> None:
    """Train and evaluate all runs that have no results. Runs of earlier seeds come first."""
    cache = out / "cache"
    jobs = []
    for run in runs:
        if read_results(run, out) is not None:
            continue
        directory = out / "runs" / run.name
        teacher = run.arm.teacher if run.arm.teacher in teachers else teachers[0]  # of an arm that reads no features
        shared = ("--cache", str(cache / teacher), "--device", device, "--loader-threads", "2", "--no-progress")
        start = ("--from", str(out / "runs" / run.after)) if run.after else ()
        curve = (
            ("--validate", "tune", "--save-every", str(-(-run.steps // size.curve)))
            if run.task
            else ("--save-every", str(run.steps))
        )
        command = "finetune" if run.task else "pretrain"
        commands = (
            ("occfeat_train", command, *run.options, *start, *curve, *shared, "--no-tensorboard", "--out", str(directory)),
            ("occfeat_train", "evaluate", str(directory), *shared, "--split", run.split),
        )  # fmt: skip
        after = (run.after,) if run.after else ()
        jobs.append(Job(run.name, commands, out / "logs" / f"{run.name}.log", after))
    samples = {run.name: run.samples for run in runs}
    run_jobs(jobs, size.jobs, title="study", unit="sample", weight=lambda job: samples[job.name], deadline=deadline)


if __name__ == "__main__":
    main()
