"""The report of a study: report.md and report.html, with the picture and the table that matter first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.common.plural import count
from occfeat_targets.common.terminal import echo
from occfeat_targets.pictures.html import render
from occfeat_train.distributed import processes
from occfeat_train.report import figures
from occfeat_train.report.figures import LINE_COLORS
from occfeat_train.report.pretraining import cosine_of_mean
from occfeat_train.report.runs import draw_predictions, open_run
from occfeat_train.training.initial import restore
from pipelines.study.design import NONE, OCCFEAT, OCCFEAT_RANDOM, TASKS, Run, Size, runs_of
from pipelines.study.results import judge, pretraining_table, read_curve, read_results, read_scores, table

Rows = list[list[str]]
PICTURES = {
    "vehicles": "probability in blue, ground truth outlined",
    "map": "predicted",
}  # captions of report.segmentation


def write_report(out: Path, size: Size, teachers: Mapping[str, str], teacher_name: str) -> None:
    """Write the report of all finished runs. teachers: {name: model}; teacher_name: what the trained one is called."""
    runs = [run for run in runs_of(size, set(teachers)) if read_results(run, out) is not None]
    if not any(run.task for run in runs):
        echo("no finetuning is finished: there is nothing to report")
        return
    arms, labels = [arm.name for arm in size.arms], list(size.finetune)
    scores = read_scores(runs, out)
    tables = {
        "IoU at 0.5 [%], mean ± standard deviation over seeds": table(scores, arms, labels),
        "Difference to none, paired by seed, with its 95 % interval (Student's t)": table(scores, arms, labels, NONE),
        "IoU at the best of seven thresholds [%]": table(read_scores(runs, out, "iou_best"), arms, labels),
        "Pretrainings on the test split": pretraining_table(runs, out, baselines(runs, out)),
    }
    sentences = judge(scores, labels)
    facts = describe_study(runs, size, teachers, teacher_name)
    text = [*facts, "", *(f"- {sentence}" for sentence in sentences)]
    for title, rows in tables.items():
        text += ["", f"{title}:", "", markdown(rows)]
    (out / "report.md").write_text("\n".join(text) + "\n")
    shown = list(dict.fromkeys(run.arm.name for run in runs))
    colors = {name: LINE_COLORS[k % len(LINE_COLORS)] for k, name in enumerate(shown)}
    page = render(
        Path(__file__).with_name("report.html"), title="OccFeat: does pretraining help?", warnings=facts[:1], facts=facts[1:],
        sentences=sentences, tables=tables, curves=draw_curves(runs, out, colors), legend=colors, picture=draw_picture(runs, out),
    )  # fmt: skip
    (out / "report.html").write_text(page)
    echo("\n".join(text))
    echo(f"\nwritten to {out / 'report.html'} and report.md")


def describe_study(runs: Sequence[Run], size: Size, teachers: Mapping[str, str], teacher_name: str) -> list[str]:
    """What the numbers are of. The first line says what is simulated."""
    city = size.city
    seeds = len({run.seed for run in runs})
    trained = f"teacher: {teacher_name}" if "trained" in teachers else "the teacher has random weights"
    steps = ", ".join(f"{n} with {share:g} %" for share, n in size.finetune.items())
    few = [f"{share:g} % is {count(city.samples(share), 'keyframe')}" for share in size.finetune]
    return [
        f"SIMULATED: a synthetic city; {trained}",
        f"{count(len(runs), 'finished run')} of {count(seeds, 'seed')}; {count(city.train, 'scene')} of {count(city.keyframes, 'keyframe')} to train on, "
        f"{city.test} in another town to test on; {', '.join(few)} of the labels",
        f"{size.pretrain} steps of pretraining, then {steps} of the labels, in batches of {size.batch}; settings: "
        + ", ".join(f"{name}={value}" for name, value in {**size.network, **size.recipe}.items()),
    ]


def baselines(runs: Sequence[Run], out: Path) -> dict[str, float]:
    """{teacher: mean cosine between its features of the test split and the best single vector}: what predicting a constant reaches."""
    file = out / "baselines.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for run in runs:
        teacher = run.arm.teacher
        if run.task or teacher in found or (read_results(run, out) or {}).get("cosine") is None:
            continue
        dataset = open_run(out / "runs" / run.name, CacheReader(out / "cache" / teacher / f"{run.split}.zarr")).dataset
        features = [dataset.batch([(0, k)]).arrays["features"].float().numpy() for k in dataset.keyframes.tolist()]
        found[teacher] = cosine_of_mean(np.concatenate(features))
    file.write_text(json.dumps(found))
    return found


def draw_curves(runs: Sequence[Run], out: Path, colors: Mapping[str, str]) -> dict[str, bytes]:
    """{title: PNG} of each task and label share: IoU on the tune split by step, averaged over seeds, one line for each arm."""
    pictures = {}
    for task, labels in dict.fromkeys((run.task, run.labels) for run in runs if run.task):
        lines = {}
        for arm in colors:
            found = [read_curve(r, out) for r in runs if (r.arm.name, r.task, r.labels) == (arm, task, labels)]
            if found and min(map(len, found)):
                steps = [step for step, _ in found[0]]
                lines[arm] = (steps, [float(np.mean([curve[k][1] for curve in found])) for k in range(len(steps))])
        if lines:
            pictures[f"{task}, {labels:g} % of the labels"] = figures.draw_curves(
                "IoU at 0.5 on tune [%]", lines, colors
            )
    return pictures


def draw_picture(runs: Sequence[Run], out: Path) -> dict[str, Any] | None:
    """One keyframe of the test split, with the predictions of none and of OccFeat: the cameras, and {caption: PNG}."""
    found = [run for run in runs if run.task and run.seed == 0]
    compared = [name for name in (OCCFEAT, OCCFEAT_RANDOM) if any(run.arm.name == name for run in found)][:1]
    finished = [run for run in found if run.arm.name in (NONE, *compared)]
    if not finished:
        return None
    labels = max(run.labels for run in finished)
    reader = CacheReader(next((out / "cache").iterdir()) / "held_out.zarr")
    vehicles = [int(np.unpackbits(reader.read("labels/vehicles", k)).sum()) for k in range(len(reader))]
    keyframe = int(np.argmax(vehicles))
    pictures = {}
    with processes("auto") as process:
        for task in TASKS:
            for run in (r for r in finished if r.task == task and r.labels == labels):
                opened = open_run(out / "runs" / run.name, reader)
                shown = draw_predictions(restore(opened.checkpoint), opened.dataset, [keyframe], process)[0]
                if task == "map" and "map: ground truth" not in pictures:
                    pictures["map: ground truth"] = shown.pictures["ground truth"]
                pictures[f"{task}, pretraining: {run.arm.name}"] = shown.pictures[PICTURES[task]]
    return {
        "cameras": figures.draw_cameras(reader, keyframe),
        "maps": pictures,
        "text": f"Keyframe {keyframe} of the test split, which no network has seen; {labels:g} % of the labels, seed 0. "
        "Vehicles: probability in blue, ground truth outlined. Map: the predicted classes.",
    }


def markdown(rows: Rows) -> str:
    """A Markdown table; the first row is its header."""
    return "\n".join(
        [
            "| " + " | ".join(rows[0]) + " |",
            "|---" * len(rows[0]) + "|",
            *("| " + " | ".join(r) + " |" for r in rows[1:]),
        ]
    )
