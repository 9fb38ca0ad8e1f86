"""Tables of a report: header and rows, without the runs' names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import chain

import numpy as np

from occfeat_targets.common.provenance import describe_code
from occfeat_train.report.comparison import label_share, starting_point
from occfeat_train.report.runs import Run

Table = tuple[list[str], list[list[str]]]


def results_table(runs: Sequence[Run]) -> Table:
    """Metrics over the split."""
    rows = []
    for run in runs:
        info = run.checkpoint.info
        row = {} if run.config.is_pretext else {"labels": label_share(info)}
        row["initial weights"] = starting_point(info)
        rows.append({**row, **run.config.task_class.columns(run.results)})
    header = [name for name in dict.fromkeys(chain(*rows)) if any(row.get(name, "-") != "-" for row in rows)]
    texts = [[row.get(name, "-") for name in header] for row in rows]
    return [*header, "source"], [[*row, run.source] for row, run in zip(texts, runs, strict=True)]


def speed_table(runs: Sequence[Run]) -> Table:
    """Length and speed of the training."""
    rows = []
    for run in runs:
        steps = [record for record in run.log if "loss" in record]
        # The time of a step is the inverse of its rate, so these are fractions of the whole run's time.
        seconds = np.array([1 / record["samples_per_s"] for record in steps])
        wait = float(np.dot(seconds, [record["data_wait"] for record in steps]) / seconds.sum())
        epochs, samples = f"{steps[-1]['epoch']:.3g}", f"{run.checkpoint.info.num_samples:,}"
        in_steps = duration(float(seconds.sum()) * run.config.optim.samples_per_step)
        rate = f"{len(steps) / seconds.sum():.3g}"
        rows.append([f"{len(steps):,}", epochs, samples, rate, f"{wait:.1%}", in_steps, elapsed(run)])
    return [
        "steps",
        "epochs",
        "training keyframes",
        "samples/s",
        "waiting for data",
        "time in steps",
        "from first to last step",
    ], rows


def elapsed(run: Run) -> str:
    """Time from the first to the last record, with validation, saving and interruptions; "-" in a log without times."""
    times = [datetime.fromisoformat(record["time"]) for record in run.log if "time" in record]
    return duration((times[-1] - times[0]).total_seconds()) if times else "-"


def duration(seconds: float) -> str:
    """``1:02:03`` hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def origin_table(runs: Sequence[Run]) -> Table:
    """Where, when and with which code the newest checkpoint was trained."""
    rows = []
    for run in runs:
        origin = run.checkpoint.info.origin
        gpus = origin.get("gpus", [])
        devices = " and ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "CPU"
        torch = origin.get("packages", {}).get("torch", "-")
        began, machine = (
            (origin["date"][:16].replace("T", " "), f"{origin['host']}, {devices}") if origin else ("-", "-")
        )
        rows.append([began, machine, describe_code(origin), torch, origin.get("command", "-")])
    return ["begun or continued (UTC)", "machine", "code", "torch", "command"], rows
