"""Runs of recipes in miniature, and the report of their results."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from occfeat_targets.cache.corruption import CORRUPTIONS
from pipelines.__main__ import read_settings
from pipelines.recipes import results
from pipelines.recipes.data import RANDOM_TEACHER, Settings, sizes
from pipelines.recipes.graph import evaluation_file
from pipelines.recipes.report import difference_rows, missing_notes
from pipelines.recipes.results import (
    Measured,
    Result,
    evaluated_seeds,
    read_cell,
    read_corruptions,
    read_run,
    read_values,
)
from pipelines.recipes.tables import RECIPES
from pipelines.recipes.trainings import run_directory, training
from tests.test_recipes import TABLES, called, full


def measured(iou: float, *simulated: str) -> Measured:
    return Measured(iou, simulated, ("seed: 1 (paper: 0)",))


def test_a_cell_shows_mean_and_spread_over_seeds_beside_the_papers_number():
    cell = RECIPES["table4"].cells[0]
    assert Result(cell, {0: measured(20.0), 2: measured(24.0)}).text == "22.0 ± 2.8 (22.8)"
    assert (
        Result(cell, {0: measured(20.0), 1: measured(22.0, "SIMULATED: x")}, {2: "not begun"}).text
        == "21.0 ± 1.4* (22.8)"
    )
    assert Result(cell, {1: measured(0.04)}).text == "0.0 (22.8)"
    assert Result(replace(cell, paper=None), {}, {0: "not begun"}).text == "missing (-)"


def test_missing_cells_are_named_with_their_reason():
    first, second, *_ = RECIPES["table4"].cells
    found = [
        Result(first, {0: measured(1)}, {1: "step 3 of 60, unfinished"}),
        Result(second, {}, {0: "not begun", 1: "not begun"}),
    ]
    assert missing_notes(found) == [
        "missing: seed 1, step 3 of 60, unfinished: vehicles 1 % / lambda 0",
        "missing: seed 0, not begun: vehicles 1 % / lambda 0.0001",
        "missing: seed 1, not begun: vehicles 1 % / lambda 0.0001",
    ]
    assert difference_rows(found) == [["difference", "runs"], ["seed: 1 (paper: 0)", "1 of 1 run"]]


def test_a_long_list_of_missing_cells_is_cut_short():
    first, *others = RECIPES["table1"].cells
    notes = missing_notes(
        [Result(first, {0: measured(1)}, {}), *(Result(cell, {}, {0: "not begun"}) for cell in others)]
    )
    assert len(notes) == 1 and notes[0].count(";") == 6 and notes[0].endswith(f"; and {len(others) - 6} others")


def test_runs_of_other_seeds_are_found(tmp_path):
    each = training("table1/simplebev-enb0/vehicles-1", "table1/simplebev-enb0/occfeat")
    for name in (each.run_name(7), f"{each.name}-100ep-seed-3", f"x-{each.run_name(4)}"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    settings = Settings(tmp_path, tmp_path)
    assert evaluated_seeds(each, settings) == [0, 7]
    cell = next(cell for cell in RECIPES["table1"].cells if cell.training == each)
    assert read_cell(cell, settings).missing[0] == "not begun"
    assert "no checkpoint in" in read_cell(cell, settings).missing[7]


def test_results_under_corruptions_are_read_with_their_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "read_run", lambda run: measured(20.0))
    monkeypatch.setattr(results, "finished_checkpoint", lambda run: SimpleNamespace(weights_digest="w"))
    settings = full(tmp_path)
    base, other = RECIPES["fig4"].cells
    summary = {
        "evaluations": {"clean": {"weights": "w"}}, "mean": {name: 10.0 + k for k, name in enumerate(CORRUPTIONS)},
        "mRR": 67.5, "mCE": 99.0, "simulated": ["SIMULATED: x"],
    }  # fmt: skip
    for cell in (base, other):
        file = run_directory(settings.out, cell.training, 0) / "corruptions.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(summary))
    found = {(r.cell.row, r.cell.column): r for r in read_corruptions([base, other], settings)}
    assert found[base.row, "fog"].text == "12.0* (-)"
    assert found[other.row, "mRR"].text == "67.5* (-)"
    assert found[other.row, "mCE"].text == "99.0* (-)"
    assert (base.row, "mCE") not in found  # 100 by definition

    del summary["mean"]["snow"]
    file.write_text(json.dumps({**summary, "mRR": None}))
    found = {r.cell.column: r for r in read_corruptions([base, other], settings) if r.cell.row == other.row}
    assert {c for c, r in found.items() if r.missing == {0: "not evaluated on all corrupted caches"}} == {"snow", "mRR"}
    file.write_text(json.dumps({**summary, "evaluations": {"clean": {"weights": "of others"}}}))
    assert "is of other weights" in str(read_values(file.parent))


@pytest.mark.slow
def test_every_recipe_runs_in_miniature(tmp_path):
    """All tables and figures from an empty directory. Their 3.6 GB are removed."""
    out = tmp_path / "out"
    called("run", *RECIPES, "--miniature", "--out", out, "--jobs", 2)
    text = called("report", "--out", out)
    shutil.rmtree(out)
    assert "missing" not in text
    assert text.count("* (") == sum(len(recipe.cells) for recipe in TABLES) + 2 * len(CORRUPTIONS) + 3  # mRR, mRR, mCE


def test_a_small_recipe_runs_from_an_empty_directory_and_resumes(tmp_path, monkeypatch):
    demo = RECIPES["demo"]
    monkeypatch.setitem(RECIPES, "demo", replace(demo, cells=demo.cells[::3], drawn=()))
    out = tmp_path / "out"
    text = called("run", "demo", "--miniature", "--out", out)
    assert "SIMULATED: a synthetic city, a teacher of random weights" in text
    settings = read_settings(out)
    assert settings == Settings(out, out / "cache", None, RANDOM_TEACHER, 1, True)
    for cell in demo.cells[::3]:
        assert evaluation_file(run_directory(out, cell.training, 0)).is_file()
    assert len(list((out / "runs").iterdir())) == 3

    text = called("report", "--out", out)
    page = (out / "report.html").read_text()
    for each in (text, (out / "report.md").read_text()):
        assert "**SIMULATED: the data set is a synthetic city and the teacher's weights are random**" in each
        assert re.search(r"\n\| none \| \d+\.\d\* \(-\) \|  \|\n\| OccFeat \|  \| \d+\.\d\* \(-\) \|\n", each)
        assert "| SimpleBEV EN-B0, none | missing (13.7) | missing (20.1) |" in each
        assert "- missing: seed 0, not begun: all 6 cells" in each  # of Table 4
        assert "| network.channels: 8 (paper: 128) | 2 of 2 runs |" in each
    assert '<p class="simulated">SIMULATED: the data set is a synthetic city' in page
    assert page.count("data:image/png;base64,") == 3  # Figures 1 and 4
    assert len((out / "report" / "demo.csv").read_text().splitlines()) == 3

    logs = {file: file.stat().st_size for file in (out / "logs").iterdir()}
    assert "8 of 8 steps finished" in called("run", "demo", "--miniature", "--out", out)
    assert "8 of 8 steps finished" in called("status", "demo", "--out", out)
    assert logs == {file: file.stat().st_size for file in (out / "logs").iterdir()}
    assert "miniature: True there, False here" in called("run", "demo", "--dataroot", tmp_path, "--out", out, code=1)
    assert sizes(settings).samples(1) == 1

    file = evaluation_file(run_directory(out, demo.cells[0].training, 0))
    file.write_text(json.dumps({**json.loads(file.read_text()), "weights": "of an earlier training"}))
    assert "is of other weights" in str(read_run(file.parent.parent))
    file.unlink()
    assert read_run(file.parent.parent) == "not evaluated"
