"""`occfeat-train figures`: pictures of the features that pretraining runs predict (paper, Figures 5 and 6), and a page with them.

The colours of a run are fitted once, to its predictions for one scene, and used for all keyframes and for the targets. A
correlation map compares all keyframes with one feature of the first keyframe. So both show what is consistent across scenes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.pictures.canvas import png
from occfeat_targets.pictures.colors import FeatureColors
from occfeat_targets.pictures.html import render
from occfeat_train.distributed import Process
from occfeat_train.report.correlation import (
    DEFAULT_CLASSES,
    Query,
    check_class,
    classes_of,
    cosines,
    pick_class,
    pick_voxel,
)
from occfeat_train.report.feature_recording import Recorder, recording
from occfeat_train.report.feature_runs import FeatureRun, FigureOptions, choose_keyframes, fit_keyframes, open_runs
from occfeat_train.report.feature_sheets import FeatureSheets
from occfeat_train.report.voxel_predictions import VoxelPredictions, predict_voxels
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training.compatibility import changes_of_meaning, notes_on_data
from occfeat_train.training.initial import restore
from occfeat_train.training.precision import note_on_precision
from occfeat_train.training.saving import saving
from occfeat_train.training.stages import open_reader

SECONDS_PER_SHEET = 6  # on one core of a desktop computer


@dataclass(frozen=True)
class Picture:
    """A sheet of the page. keyframe: its name. file: relative to the page. text: what it shows."""

    keyframe: str
    file: str
    text: str


def write_figures(
    paths: Sequence[Path],
    cache: Path,
    out: Path,
    options: FigureOptions,
    process: Process,
    print_line: Callable[[str], None],
) -> Path:
    """Write PNGs and an index.html that shows them offline. Returns the path of the page.

    A run that predicts no features, is broken, or does not fit the cache is left out, and listed. Raises ValueError if no run
    is left, or if a keyframe, scene, voxel or class is not there.
    """
    reader = open_reader(cache, options.split)
    fit_split = options.fit_split or options.split
    fit_reader = reader if fit_split == options.split else open_reader(cache, fit_split)
    for each in (reader, fit_reader):
        for label in options.classes:
            check_class(label, each.cache.spec)
    runs, notes = open_runs(paths, reader, fit_reader, print_line)
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
    sections, warnings = [], dict.fromkeys([*reader.cache.warnings, *fit_reader.cache.warnings])
    with recording(options.rerun) as recorder:
        for run in runs:
            print_line(f"{run.name}: {run.checkpoint.describe_step()}")
            warnings |= dict.fromkeys(run.checkpoint.info.warnings())
            sections.append((run, list(draw_run(run, out, options, process, print_line, recorder))))
    page = render(
        Path(__file__).with_name("features.html"),
        title=f"Predicted features of {count(len(runs), 'run')} on {options.split}",
        warnings=warnings,
        notes=notes,
        sections=sections,
    )
    with saving(out / "index.html"):
        (out / "index.html").write_text(page, encoding="utf-8")
    print_line(f"written to {out / 'index.html'}")
    if options.rerun is not None:
        print_line(f"recording written to {options.rerun}: rerun {options.rerun}")
    return out / "index.html"


def draw_run(
    run: FeatureRun,
    out: Path,
    options: FigureOptions,
    process: Process,
    print_line: Callable[[str], None],
    recorder: Recorder | None,
) -> Iterator[Picture]:
    """Draw and write all sheets of a run, and record what they show."""
    dataset, fit_dataset = run.dataset, run.fit_dataset
    precision = note_on_precision(run.checkpoint.info.config.precision, process.device)
    for line in dict.fromkeys([*changes_of_meaning(dataset, run.checkpoint), *notes_on_data(dataset), *precision]):
        print_line(line)
    chosen = choose_keyframes(dataset, options)
    fitted = fit_keyframes(fit_dataset, options, chosen)
    task = restore(run.checkpoint)
    assert isinstance(task, Pretraining)
    fits = [predict_voxels(task, fit_dataset, keyframe, process) for keyframe in fitted]
    colors = fit_colors(fits)
    fitted_to = f"the run's predictions for {fits[0].scene} ({fits[0].split}, {count(len(fits), 'keyframe')})"
    found = [predict_voxels(task, dataset, keyframe, process) for keyframe in chosen]
    if not any((each.scene, each.split) == (fits[0].scene, fits[0].split) for each in found):
        found.insert(0, fits[0])
    queries = pick(options, found, print_line)
    number = len(found) * (1 + len(queries))
    print_line(f"{count(number, 'sheet')} of {count(len(found), 'keyframe')}, about {number * SECONDS_PER_SHEET} s")
    warnings = list(dict.fromkeys([*dataset.reader.cache.warnings, *run.checkpoint.info.warnings()]))
    if recorder is not None:
        recorder.write_notes(run.name, [*warnings, f"colours fitted to {fitted_to}"])
    with progress_bar(number, desc="figures", unit="sheet", disable=not options.progress) as bar:
        for each in found:
            if recorder is not None:
                recorder.write_keyframe(run.name, each, colors, queries)
            sheets = FeatureSheets(run.name, each, warnings)
            for kind, text, sheet in draw_keyframe(sheets, colors, fitted_to, queries):
                file = f"{run.name}-{each.split}-{each.keyframe:06d}-{kind}.png"
                with saving(out / file):
                    (out / file).write_bytes(png(sheet))
                bar.update()
                yield Picture(each.name, file, text)


def draw_keyframe(
    sheets: FeatureSheets, colors: FeatureColors, fitted_to: str, queries: Sequence[tuple[Query, float]]
) -> Iterator[tuple[str, str, Figure]]:
    """(kind, for the file's name; text; sheet) of every sheet of a keyframe."""
    yield "features", "features as colours, and occupancy", sheets.features(colors, fitted_to)
    for query, lowest in queries:
        kind = "correlation-" + re.sub(r"[^\w.,-]+", "-", query.name)
        yield kind, f"correlation with {query.name}", sheets.correlation(query, lowest)


def fit_colors(found: Sequence[VoxelPredictions]) -> FeatureColors:
    """Principal components of the predicted features. Raises ValueError if there are fewer than two."""
    features = np.concatenate([each.predicted.features for each in found])
    if len(features) < 2:
        raise ValueError(
            f"{found[0].name} has {len(features)} occupied voxels in view: choose another scene with --fit-on"
        )
    return FeatureColors.fit(features)


def pick(
    options: FigureOptions, found: Sequence[VoxelPredictions], print_line: Callable[[str], None]
) -> list[tuple[Query, float]]:
    """The features for correlation maps, each with the lowest cosine that its colours show.

    Raises ValueError if a voxel or class that was asked for is not there.
    """
    queries = [pick_voxel(point, found[0]) for point in options.voxels]
    queries += [pick_class(label, found) for label in options.classes]
    if not queries:
        for label in DEFAULT_CLASSES:
            if all(label in classes_of(each.reader.cache.spec) for each in found):
                try:
                    queries.append(pick_class(label, found))
                except ValueError as err:
                    print_line(f"no correlation map: {err}")
    return [(query, lowest_shown(query, found[0])) for query in queries]


def lowest_shown(query: Query, found: VoxelPredictions) -> float:
    """The fifth percentile of the cosines of predictions or targets, whichever is lower, rounded down to a tenth."""
    of_both = (cosines(found.predicted.features, query.predicted), cosines(found.target.features, query.target))
    low = min(float(np.percentile(cosine, 5)) for cosine in of_both)
    return min(float(np.floor(10 * low)) / 10, 0.9)
