"""`occfeat-train report`: one self-contained HTML file about some runs.

It first lists simulated data and differences from the paper, then metrics over a split, training curves, and
predictions for a few keyframes. All numbers come from the modules that training and evaluation use. What it shows of a task
is up to `Task.heading`, `columns` and `pictures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.common.plural import count
from occfeat_targets.pictures.html import render
from occfeat_train.config import PRETEXTS
from occfeat_train.distributed import Process
from occfeat_train.report import figures
from occfeat_train.report.comparison import arms_table, config_differences, curves_by_labels, find_arms
from occfeat_train.report.runs import Run, load_runs
from occfeat_train.report.tables import origin_table, results_table, speed_table
from occfeat_train.training.compatibility import left_out
from occfeat_train.training.paper import describe_data, differences, evaluation_differences, nearest_row
from occfeat_train.training.saving import saving
from occfeat_train.training.stages import open_reader

# Titles of quantities in logs; others are shown under their own names.
TITLES = {
    "occupancy": "occupancy loss (eq. 2)", "features": "feature loss (eq. 3)", "lr": "learning rate",
    "reconstruction": "occupancy loss of queries", "intensity": "intensity loss of queries",
    "query_iou": "occupancy IoU of queries [%]", "query_accuracy": "accuracy of queries [%]", "intensity_error": "error of intensities",
    "occupancy_iou": "occupancy IoU at 0.5 [%]", "occupancy_iou_observed": "IoU over observed voxels [%]",
    "ray_iou": "RayIoU, mean over thresholds [%]", **{f"ray_iou_{limit}m": f"RayIoU at {limit} m [%]" for limit in (1, 2, 4)}, "cosine": "mean cosine",
    "iou": "IoU at 0.5 [%]", "iou_best": "IoU at the best threshold [%]",
}  # fmt: skip
NOT_PLOTTED = {"step", "epoch", "samples_per_s", "data_wait", "grad_norm", "samples", "queries", "threshold_best"}
Curve = tuple[list[float], list[float]]  # steps, values


def write_report(
    paths: Sequence[Path],
    cache: Path,
    split: str,
    out: Path,
    process: Process,
    print_line: Callable[[str], None],
    samples: int,
) -> None:
    """Raises ValueError if no run can be reported; then nothing is written. A run that cannot is left out and listed."""
    reader = open_reader(cache, split)
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    runs, chosen, notes = load_runs(paths, reader, split, samples, process, print_line)
    page = build_page(runs, reader, split, chosen, notes)
    with saving(out):
        out.write_text(page, encoding="utf-8")
    for note in notes:
        print_line(note)
    print_line(f"written to {out} ({len(page) / 1e6:.1f} MB)")


def build_page(
    runs: Sequence[Run], reader: CacheReader, split: str, chosen: Sequence[int], notes: Sequence[str]
) -> str:
    """The page as HTML, without links to other files. notes: runs and lines of logs that are left out."""
    cache, identity = reader.cache, reader.cache.identity
    groups = [[run for run in runs if run.config.task == name] for name in (*PRETEXTS, *LABEL_KINDS)]
    names = [f"{identity.tokens[keyframe]}, {identity.scenes[keyframe]}" for keyframe in chosen]
    cameras = [figures.draw_cameras(reader, keyframe) for keyframe in chosen]
    return render(
        Path(__file__).with_name("report.html"),
        title=f"OccFeat: {count(len(runs), 'run')} on {split}",
        warnings=dict.fromkeys([*cache.warnings, *(w for run in runs for w in run.checkpoint.info.warnings())]),
        evaluated=evaluated(runs),
        notes=notes,
        left_out={line: None for run in runs for line in left_out(run.dataset)},
        rows_of_paper=rows_of_paper(runs),
        differences=paper_differences(runs, describe_data(cache.provenance, int(reader.is_valid.sum()))),
        tasks=[task_values(group) for group in groups if group],
        keyframes=list(zip(chosen, names, cameras, strict=True)),
        camera_names=", ".join(cache.spec.cameras),
    )


def evaluated(runs: Sequence[Run]) -> str:
    """How many of the split's keyframes the runs are evaluated on. Runs of different frames may differ."""
    counts = dict.fromkeys((len(run.dataset), len(run.dataset.reader)) for run in runs)
    return " or ".join(f"all {n}" if used == n else f"{used} of {n}" for used, n in counts) + " keyframes of the split"


def task_values(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows of the runs of one task."""
    config, over = runs[0].config, evaluated(runs)
    is_whole = all(len(run.dataset) == len(run.dataset.reader) for run in runs)
    return {
        "heading": config.task_class.heading(config),
        "over": "the whole split" if is_whole else over,
        "runs": runs,
        "results": results_table(runs),
        "comparison": compare(runs),
        "differences": config_differences(runs),
        "curves": draw_curves(runs),
        "note": config.task_class.note,
        "speeds": speed_table(runs),
        "origins": origin_table(runs),
    }


def compare(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What the page shows of the arms of a segmentation's runs; None if there is nothing to compare."""
    arms = [] if runs[0].config.is_pretext else find_arms(runs)
    if not arms or len(arms) == len(arms[0].runs) == 1:
        return None
    shares = {arm.info.config.labels for arm in arms}
    picture = figures.draw_scores(curves_by_labels(arms)) if len(shares) > 1 else None
    return {"arms": arms_table(arms), "picture": picture, "unfinished": [run.name for run in runs if run.mark]}


def rows_of_paper(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{row of the paper: names of the runs that are compared with it}."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        rows.setdefault(nearest_row(run.checkpoint.info), []).append(run.name)
    return rows


def paper_differences(runs: Sequence[Run], measured_on: Mapping[str, Any]) -> list[list[str]]:
    """Rows of (field, value here, the paper's, names of runs): differences of runs and of the evaluation data from the paper."""
    rows: dict[tuple[str, str, str], list[str]] = {}  # difference: names of the runs
    for run in runs:
        for d in (*differences(run.checkpoint.info), *evaluation_differences(measured_on)):
            rows.setdefault((d.field, d.here, d.paper), []).append(run.name)
    return [
        [*difference, "all" if len(names) == len(runs) > 1 else ", ".join(names)] for difference, names in rows.items()
    ]


def draw_curves(runs: Sequence[Run]) -> dict[str, bytes]:
    """{alternative text: PNG}, one for each quantity of the logs, with one line per run."""
    of_runs = {run.name: curves(run.log) for run in runs}
    pictures = {}
    for title in dict.fromkeys(title for found in of_runs.values() for title in found):
        lines = {run: found[title] for run, found in of_runs.items() if title in found}
        png = figures.draw_curves(title, lines, {run.name: run.color for run in runs})
        pictures[f"{title} of {', '.join(lines)} by step"] = png
    return pictures


def curves(log: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """{title: steps and values} of every quantity of the training steps and of the validations."""
    found: dict[str, Curve] = {}
    for record in log:
        prefix = "validation: " if "validation" in record else ""
        for name, value in record.get("validation", record).items():
            if isinstance(value, int | float) and name not in NOT_PLOTTED:
                steps, values = found.setdefault(prefix + TITLES.get(name, name), ([], []))
                steps.append(record["step"])
                values.append(value)
    return found
