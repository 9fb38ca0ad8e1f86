"""`occfeat-train report`: one self-contained HTML file about some runs.

It first lists simulated data and differences from the paper, then training curves, metrics over a whole split, and
predictions for a few keyframes. All numbers come from the modules that training and evaluation use.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import PRETEXTS
from occfeat_train.distributed import Process
from occfeat_train.report import figures
from occfeat_train.report.markup import STYLE, height_key, key, number, percent, picture, row_of, swatch, table
from occfeat_train.report.runs import Prediction, Run, load_runs
from occfeat_train.training.paper import describe_data, differences, evaluation_differences, nearest_row
from occfeat_train.training.stages import open_reader

CURVES = {
    "loss": "loss", "occupancy": "occupancy loss (eq. 2)", "features": "feature loss (eq. 3)", "lr": "learning rate",
    "occupancy_iou": "validation: occupancy IoU [%]", "cosine": "validation: mean cosine",
    "iou": "validation: IoU at 0.5 [%]", "iou_best": "validation: IoU at the best threshold [%]",
}  # fmt: skip


def write_report(
    paths: Sequence[Path],
    cache: Path,
    split: str,
    out: Path,
    process: Process,
    print_line: Callable[[str], None],
    samples: int,
) -> None:
    """Raises ValueError if a run is absent, has no log, or does not fit the cache; then nothing is written."""
    reader = open_reader(cache, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs, chosen = load_runs(paths, reader, split, samples, process, print_line)
    page = "\n".join(build_page(runs, reader, split, chosen))
    out.write_text(page, encoding="utf-8")
    print_line(f"written to {out} ({len(page) / 1e6:.1f} MB)")


def build_page(runs: Sequence[Run], reader: CacheReader, split: str, chosen: Sequence[int]) -> Iterable[str]:
    cache, identity = reader.cache, reader.cache.identity
    warnings = dict.fromkeys([*cache.warnings, *(w for run in runs for w in run.checkpoint.info.warnings())])
    title = html.escape(f"OccFeat: {len(runs)} run{'s' * (len(runs) > 1)} on {split}")
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n<body>'
    yield f"<h1>{title}</h1>"
    yield from (f'<p class="simulated">{html.escape(text)}</p>' for text in warnings)
    yield (
        "<p>Runs of <code>occfeat-train</code>, evaluated on all "
        f"{len(runs[0].dataset)} keyframes of the split, with predictions for {len(chosen)} of them.</p>"
    )
    yield from paper_section(runs, describe_data(cache.provenance, int(reader.is_valid.sum())))
    for task in (*PRETEXTS, *LABEL_KINDS):
        group = [run for run in runs if run.task == task]
        if group:
            yield from results_section(task, group)
    yield "<h2>Training</h2>"
    for task in (*PRETEXTS, *LABEL_KINDS):
        group = [run for run in runs if run.task == task]
        if group:
            yield from curves_section(task, group)
    colors = [feature_colors(run) for run in runs]
    for row, keyframe in enumerate(chosen):
        yield f"<h2>Keyframe {keyframe} <small>{identity.tokens[keyframe]}, {identity.scenes[keyframe]}</small></h2>"
        png = figures.draw_cameras(reader.read("images", keyframe))
        yield f'<div class="row">{picture(png, ", ".join(cache.spec.cameras), "wide")}</div>'
        for run, fitted in zip(runs, colors, strict=True):
            if run.config.is_pretext:
                yield from pretraining_section(run, run.predictions[row], fitted)
        for task in LABEL_KINDS:
            group = [run for run in runs if run.task == task]
            if group:
                yield from segmentation_section(task, group, row)
    yield "</body>\n</html>\n"


def paper_section(runs: Sequence[Run], measured_on: Mapping[str, Any]) -> Iterable[str]:
    """A table of the differences of the runs and the evaluation data from the paper; nothing if there are none."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}  # difference: names of the runs
    for run in runs:
        info = run.checkpoint.info
        row = nearest_row(info)
        for d in (*differences(info), *evaluation_differences(measured_on)):
            rows.setdefault((d.field, d.here, d.paper, row), []).append(run.name)
    if rows:
        yield '<div class="scaled"><p><b>Not what the paper did</b>, so do not compare with its tables:</p>'
        cells = [
            [html.escape(text) for text in (", ".join(names), field, here, paper, row)]
            for (field, here, paper, row), names in rows.items()
        ]
        yield table(["run", "field", "this run", "the paper", "its row"], cells) + "</div>"


def results_section(task: str, runs: Sequence[Run]) -> Iterable[str]:
    """A table of metrics over the whole split."""
    yield f"<h2>{heading(runs[0])}: the whole split</h2>"
    columns = [run.config.task_class.columns(run.results) for run in runs]
    names = [name for name in columns[0] if any(found[name] != "-" for found in columns)]
    header, rows = ["run", *names, "source"], []
    for run, found in zip(runs, columns, strict=True):
        first, *others = (found[name] for name in names)
        rows.append([run_name(run), f"<b>{first}</b>", *others, run.source])
    if task not in PRETEXTS:
        header[1:1] = ["labels", "initial weights"]
        for run, row in zip(runs, rows, strict=True):
            info = run.checkpoint.info
            labels = f"{info.config.labels:g} % ({info.num_samples} keyframes)"
            row[1:1] = [labels, initial_weights(info.initial)]
    yield table(header, rows)


def heading(run: Run) -> str:
    return html.escape(run.config.task_class.heading(run.config))


def initial_weights(initial: str) -> str:
    """RunInfo.initial without directories: ``r1, step 42`` for a pretraining, or the backbone weights."""
    text, _, kind = initial.rpartition(" (")
    if kind.removesuffix(")") in PRETEXTS:
        path = Path(text)
        return html.escape(f"pretrained: {path.parent.parent.name}, step {int(path.name.removeprefix('step-'))}")
    return html.escape(initial.replace("backbone weights: none", "none (random)"))


def curves_section(task: str, runs: Sequence[Run]) -> Iterable[str]:
    """One figure per quantity of the logs with one line per run, and a table of the runs' speeds."""
    yield f"<h3>{heading(runs[0])}</h3>"
    pictures = []
    for quantity, name in CURVES.items():
        lines = {run.name: curve(run.log, quantity) for run in runs}
        lines = {run: points for run, points in lines.items() if points[0]}
        if lines:
            png = figures.draw_curves(name, lines, [color(run) for run in runs if run.name in lines])
            pictures.append(picture(png, f"{name} of {', '.join(lines)} by step"))
    yield f'<figure class="row">{"".join(pictures)}<figcaption>Pale: every step. Full colour: running mean over a tenth of the run. '
    yield " ".join(f"{swatch(color(run))}&nbsp;{html.escape(run.name)}" for run in runs) + "</figcaption></figure>"
    rows = []
    for run in runs:
        steps = [record for record in run.log if "loss" in record]
        # The time of a step is the inverse of its rate, so these are fractions of the whole run's time.
        seconds = np.array([1 / record["samples_per_s"] for record in steps])
        wait = float(np.dot(seconds, [record["data_wait"] for record in steps]) / seconds.sum())
        info = run.checkpoint.info
        rows.append([
            run_name(run), f"{len(steps):,}", f"{steps[-1]['epoch']:.3g}", f"{info.num_samples:,}",
            f"{len(steps) / seconds.sum():.3g}", f"{wait:.1%}",
        ])  # fmt: skip
    yield table(["run", "steps", "epochs", "training keyframes", "samples/s", "waiting for data"], rows)


def curve(log: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity; ``iou`` and ``cosine`` are in the validation records."""
    points = [(record["step"], record.get("validation", record).get(key)) for record in log]
    points = [(step, value) for step, value in points if value is not None]
    return [step for step, _ in points], [value for _, value in points]


def feature_colors(run: Run) -> figures.FeatureColors | None:
    """One mapping for the targets and predictions of all drawn keyframes."""
    targets = [each.target for each in run.predictions if each.target is not None]
    return figures.FeatureColors.fit(np.concatenate(targets)) if sum(map(len, targets)) > 1 else None


def pretraining_section(run: Run, prediction: Prediction, colors: figures.FeatureColors | None) -> Iterable[str]:
    grid, pose, true, predicted = run.dataset.grid, prediction.grid_from_ego, prediction.true, prediction.predicted
    merits = {
        "occupancy IoU [%]": percent(prediction.results["occupancy_iou"]),
        "mean cosine": number(prediction.results["cosine"], 3),
    }
    text = ", ".join(f"{name} {value}" for name, value in merits.items())
    yield f"<h3>{heading(run)}: {run_name(run)} <small>{text}, on this keyframe</small></h3>"
    maps = {"true occupancy, highest cell": figures.highest_colors(true)}
    if predicted is not None:
        maps["predicted occupancy, highest cell"] = figures.highest_colors(predicted)
        outcomes = figures.outcome_colors(predicted.any(0), true.any(0))
        maps["columns with an occupied cell: hit, false alarm, missed"] = outcomes
    if colors is not None and prediction.voxels is not None:
        for features, caption in ((prediction.target, "target features"), (prediction.features, "predicted features")):
            assert features is not None
            maps[f"{caption}, topmost seen voxel"] = figures.topmost(prediction.voxels, colors(features), grid)
    pictures = [(figures.draw_map(cells, grid, pose), caption) for caption, cells in maps.items()]
    if predicted is not None:
        mixed = figures.outcome_shares(predicted, true, axis=1)
        pictures.append((figures.draw_from_behind(mixed, grid, pose), "all cells from behind, outcomes averaged"))
    yield row_of(pictures, f"{key(figures.OUTCOMES)}. {height_key(grid)} Features: three principal components of the targets of all "
        "keyframes shown, as red, green and blue, the same for targets and predictions.")  # fmt: skip


def segmentation_section(task: str, runs: Sequence[Run], row: int) -> Iterable[str]:
    """Predictions of all runs of a task for a keyframe, with the ground truth."""
    yield f"<h3>{heading(runs[0])}</h3>"
    legend = key(figures.OUTCOMES)
    if any(not run.predictions[row].all_scored for run in runs):
        legend += " " + key({"hardly visible, not scored": figures.UNSCORED})
    if task == "map":
        legend += "<br>" + key({name.replace("_", " "): color for name, color in figures.MAP_COLORS.items()})
    for group in [runs] if task == "vehicles" else [[run] for run in runs]:
        ious = ", ".join(f"{run_name(run)} {percent(run.predictions[row].results['iou'])} %" for run in group)
        yield f"<h4>{ious} <small>IoU on this keyframe</small></h4>"
        yield row_of([picture for run in group for picture in segmentation_pictures(run, run.predictions[row])], legend)


def segmentation_pictures(run: Run, prediction: Prediction) -> Iterable[tuple[bytes, str]]:
    """PNGs with captions."""
    grid, pose, true = run.dataset.grid, prediction.grid_from_ego, prediction.true
    predicted, probability, valid = prediction.predicted, prediction.probability, prediction.valid
    assert predicted is not None and probability is not None and valid is not None
    if run.task == "map":
        for masks, what in ((true, "ground truth"), (predicted, "predicted")):
            yield figures.draw_map(figures.map_colors(masks), grid, pose), f"{run.name}: {what}"
    else:
        blue = figures.probability_colors(probability[0])
        caption = f"{run.name}: probability in blue, ground truth outlined"
        yield figures.draw_map(blue, grid, pose, outlined=true[0]), caption
    for k, name in enumerate(LABEL_KINDS[run.task].classes):
        colors = figures.outcome_colors(predicted[k], true[k], valid)
        caption = f"{run.name}: {name.replace('_', ' ')}, right or wrong"
        yield figures.draw_map(colors, grid, pose, hatched=~valid), caption


def color(run: Run) -> str:
    return figures.RUN_COLORS[run.number % len(figures.RUN_COLORS)]


def run_name(run: Run) -> str:
    return f"{swatch(color(run))}&nbsp;{html.escape(run.name)}"
