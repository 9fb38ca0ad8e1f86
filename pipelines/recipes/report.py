"""The paper's tables and figures from finished runs: report.md, report.html and a CSV for each table."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.pictures.html import render
from occfeat_train.report.figures import LINE_COLORS
from pipelines.recipes.bars import Bars, draw_bars
from pipelines.recipes.data import Settings
from pipelines.recipes.graph import pictures_step
from pipelines.recipes.results import Result, read_cell
from pipelines.recipes.tables import NONE, OCCFEAT, RECIPES, Recipe
from pipelines.study.report import markdown

Rows = list[list[str]]
LEGEND = (
    "IoU at 0.5 on val [%]: ours, mean ± standard deviation over seeds (the paper's). *: simulated. -: the paper has no number, or "
    "its text could not be read without doubt."
)


@dataclass(frozen=True)
class Section:
    """A table or figure of the report. charts: {caption: PNG}. links: {text: path relative to the report}."""

    title: str
    rows: Rows
    charts: dict[str, bytes]
    links: dict[str, str]
    notes: list[str]


def write_report(settings: Settings, print_line: Callable[[str], None]) -> None:
    """Write OUT/report.md, report.html and report/*.csv, and print the tables."""
    results = {name: read_recipe(recipe, settings) for name, recipe in RECIPES.items()}
    every = [result for found in results.values() for result in found]
    sections = [section(RECIPES[name], found, settings) for name, found in results.items()]
    simulated = list(dict.fromkeys(text for result in every for text in result.simulated))
    changed = difference_rows(every)
    text = ["# The paper's tables and figures", "", *(f"**{line}**" for line in simulated), "", LEGEND]
    for each in sections:
        text += ["", f"## {each.title}", ""]
        text += [markdown(each.rows)] if each.rows else []
        text += [f"- [{name}]({path})" for name, path in each.links.items()]
        text += ["", *(f"- {note}" for note in each.notes)] if each.notes else []
    text += ["", "## Differences of the runs from the paper", "", markdown(changed)] if len(changed) > 1 else []
    page = render(
        Path(__file__).with_name("report.html"), title="OccFeat: the paper's tables and figures", warnings=simulated,
        legend=LEGEND, sections=sections, changed=changed,
    )  # fmt: skip
    for name, found in results.items():
        if found:
            (settings.out / "report").mkdir(exist_ok=True)
            write_file(settings.out / "report" / f"{name}.csv", csv_of(RECIPES[name], found).encode())
    write_file(settings.out / "report.md", ("\n".join(text) + "\n").encode())
    write_file(settings.out / "report.html", page.encode())
    print_line("\n".join(text))
    print_line(f"\nwritten to {settings.out / 'report.html'}, report.md and report/*.csv")


def read_recipe(recipe: Recipe, settings: Settings) -> list[Result]:
    return [read_cell(cell, settings.out, settings.seeds) for cell in recipe.cells]


def section(recipe: Recipe, found: Sequence[Result], settings: Settings) -> Section:
    charts = charts_of(recipe, found) if recipe.name == "fig1" else {}
    links, notes = {}, missing_notes(found)
    for each in recipe.drawn:
        step = pictures_step(each, settings)
        if step.is_finished:
            links[f"pictures of {each.name}"] = str(step.done.relative_to(settings.out))
        else:
            notes.append(f"missing: pictures of {each.name}, 'python -m pipelines run {recipe.name}' draws them")
    return Section(recipe.title, table_rows(recipe, found), charts, links, notes)


def table_rows(recipe: Recipe, found: Sequence[Result]) -> Rows:
    """Header and rows of texts; nothing without cells."""
    if not found:
        return []
    texts = {(result.cell.row, result.cell.column): result.text for result in found}
    rows = [[row, *(texts.get((row, column), "") for column in recipe.columns)] for row in recipe.rows]
    return [["", *recipe.columns], *rows]


def missing_notes(found: Sequence[Result]) -> list[str]:
    """A line for each reason why cells have no number for a seed, with these cells."""
    reasons: dict[str, list[str]] = {}
    for result in found:
        for seed, reason in result.missing.items():
            reasons.setdefault(f"seed {seed}, {reason}", []).append(f"{result.cell.row} / {result.cell.column}")
    return [
        f"missing: {reason}: " + (f"all {len(found)} cells" if len(cells) == len(found) else "; ".join(cells))
        for reason, cells in reasons.items()
    ]


def charts_of(recipe: Recipe, found: Sequence[Result]) -> dict[str, bytes]:
    """A bar chart for each column: networks without and with OccFeat, ours beside the paper's."""
    charts = {}
    for column in recipe.columns:
        cells = {result.cell.row: result for result in found if result.cell.column == column}
        groups = list(dict.fromkeys(row.rpartition(", ")[0] for row in cells))
        bars = []
        for how, color in ((NONE, LINE_COLORS[0]), (OCCFEAT, LINE_COLORS[1])):
            of_how = [cells[f"{group}, {how}"] for group in groups]
            mark = "*" * any(result.simulated for result in of_how)
            bars += [
                Bars(f"{how}, ours{mark}", color, [r.mean for r in of_how], [r.spread for r in of_how]),
                Bars(f"{how}, paper", color, [r.cell.paper for r in of_how], [None] * len(of_how), hatched=True),
            ]
        charts[column] = draw_bars(column, groups, bars)
    return charts


def difference_rows(found: Sequence[Result]) -> Rows:
    """Header and rows: in what the runs differ from the paper's row that is nearest to them, and in how many of them."""
    runs = {
        result.cell.training.run_name(seed): each.differences for result in found for seed, each in result.found.items()
    }
    numbers = Counter(text for texts in runs.values() for text in texts)
    return [["difference", "runs"], *([text, f"{n} of {count(len(runs), 'run')}"] for text, n in numbers.most_common())]


def csv_of(recipe: Recipe, found: Sequence[Result]) -> str:
    """One line for each cell and seed, and for each cell without any."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["recipe", "row", "column", "paper", "seed", "iou", "simulated", "missing", "run"])
    for result in found:
        cell, paper = result.cell, "" if result.cell.paper is None else result.cell.paper
        for seed in sorted({*result.found, *result.missing}):
            each = result.found.get(seed)
            writer.writerow([
                recipe.name, cell.row, cell.column, paper, seed, "" if each is None else each.iou,
                "" if each is None else "; ".join(each.simulated), result.missing.get(seed, ""), cell.training.run_name(seed),
            ])  # fmt: skip
    return file.getvalue()
