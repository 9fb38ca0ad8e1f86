"""The paper's tables and figures from finished runs: report.md, report.html and a CSV for each table."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from occfeat_targets.cache.corruption import CORRUPTIONS
from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.pictures.html import render
from occfeat_train.report.figures import LINE_COLORS
from pipelines.recipes.bars import Bars, draw_bars
from pipelines.recipes.data import Settings
from pipelines.recipes.graph import pictures_step
from pipelines.recipes.results import Result, read_cell, read_corruptions
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
    found = [read_cell(cell, settings) for cell in recipe.cells]
    return found + read_corruptions(recipe.cells, settings) if recipe.corrupted else found


def section(recipe: Recipe, found: Sequence[Result], settings: Settings) -> Section:
    charts = {"fig1": bars_by_network, "fig4": bars_by_corruption}.get(recipe.name, lambda _: {})(found)
    links, notes = {}, missing_notes(found)
    for each in recipe.drawn:
        step = pictures_step(each, settings)
        if step.is_finished:
            links[f"pictures of {each.name}"] = str(step.done.relative_to(settings.out))
        else:
            notes.append(f"missing: pictures of {each.name}, 'python -m pipelines run {recipe.name}' draws them")
    return Section(recipe.title, table_rows(found), charts, links, notes)


def table_rows(found: Sequence[Result]) -> Rows:
    """Header and rows of texts; nothing without cells."""
    if not found:
        return []
    texts = {(result.cell.row, result.cell.column): result.text for result in found}
    columns = list(dict.fromkeys(result.cell.column for result in found))
    rows = dict.fromkeys(result.cell.row for result in found)
    return [["", *columns], *([row, *(texts.get((row, column), "") for column in columns)] for row in rows)]


def missing_notes(found: Sequence[Result]) -> list[str]:
    """A line for each reason why cells have no number for a seed, with these cells."""
    reasons: dict[str, list[str]] = {}
    for result in found:
        for seed, reason in result.missing.items():
            reasons.setdefault(f"seed {seed}, {reason}", []).append(f"{result.cell.row} / {result.cell.column}")
    return [
        f"missing: {reason}: " + (f"all {len(found)} cells" if len(cells) == len(found) else _some_of(cells))
        for reason, cells in reasons.items()
    ]


def _some_of(cells: Sequence[str], shown: int = 6) -> str:
    more = len(cells) - shown
    return "; ".join(cells[:shown]) + (f"; and {count(more, 'other')}" if more > 0 else "")


def bars_by_network(found: Sequence[Result]) -> dict[str, bytes]:
    """Figure 1, {column: PNG}: networks without and with OccFeat, ours beside the paper's."""
    charts = {}
    for column in dict.fromkeys(result.cell.column for result in found):
        cells = {result.cell.row: result for result in found if result.cell.column == column}
        groups = list(dict.fromkeys(row.rpartition(", ")[0] for row in cells))
        bars = []
        for how, color in zip((NONE, OCCFEAT), LINE_COLORS, strict=False):
            of_how = [cells[f"{group}, {how}"] for group in groups]
            bars += [our_bars(f"{how}, ours", color, of_how), paper_bars(f"{how}, paper", color, of_how)]
        charts[column] = draw_bars(column, groups, bars)
    return charts


def bars_by_corruption(found: Sequence[Result]) -> dict[str, bytes]:
    """Figure 4, {caption: PNG}: each corruption without and with OccFeat. The paper's text has no numbers of its bars."""
    groups = ["clean", *CORRUPTIONS]
    cells = {(result.cell.row, result.cell.column): result for result in found}
    rows = dict.fromkeys(result.cell.row for result in found)
    bars = [
        our_bars(row, color, [cells[row, group] for group in groups])
        for row, color in zip(rows, LINE_COLORS, strict=False)
    ]
    return {
        "mean of three severities": draw_bars(
            "mean of three severities", [group.replace("-", "\n") for group in groups], bars
        )
    }


def our_bars(name: str, color: str, results: Sequence[Result]) -> Bars:
    mark = "*" * any(result.simulated for result in results)
    return Bars(f"{name}{mark}", color, [r.mean for r in results], [r.spread for r in results])


def paper_bars(name: str, color: str, results: Sequence[Result]) -> Bars:
    return Bars(name, color, [r.cell.paper for r in results], [None] * len(results), hatched=True)


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
    writer.writerow(["recipe", "row", "column", "paper", "seed", "value", "simulated", "missing", "run"])
    for result in found:
        cell, paper = result.cell, "" if result.cell.paper is None else result.cell.paper
        for seed in sorted({*result.found, *result.missing}):
            each = result.found.get(seed)
            writer.writerow([
                recipe.name, cell.row, cell.column, paper, seed, "" if each is None else each.iou,
                "" if each is None else "; ".join(each.simulated), result.missing.get(seed, ""), cell.training.run_name(seed),
            ])  # fmt: skip
    return file.getvalue()
