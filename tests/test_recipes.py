"""The recipes of the paper's tables: their cells, their steps, a dry run, and every recipe in miniature."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from occfeat_train.presets import preset
from pipelines.__main__ import main, read_settings, run_steps
from pipelines.recipes.data import RANDOM_TEACHER, Settings, build_options, sizes
from pipelines.recipes.graph import evaluation_file, steps_of, training_steps
from pipelines.recipes.report import difference_rows, missing_notes
from pipelines.recipes.results import Measured, Result, read_cell, read_run, seeds_of
from pipelines.recipes.tables import LONGER, RECIPES
from pipelines.recipes.trainings import Training, run_directory, training
from pipelines.steps import Step

TABLES = [recipe for recipe in RECIPES.values() if recipe.cells]


def full(tmp_path: Path, **changes: object) -> Settings:
    return replace(Settings(tmp_path / "out", tmp_path / "cache", tmp_path), **changes)  # type: ignore[arg-type]


def called(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("miniature", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_steps_have_one_name_each_and_follow_those_that_they_need(name, miniature, tmp_path):
    settings = full(tmp_path, seeds=2, miniature=miniature)
    steps = steps_of([RECIPES[name]], settings)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert len({step.done for step in steps}) == len(steps)
    for k, step in enumerate(steps):
        assert set(step.after) <= set(names[:k])
    assert ("city" in names) == miniature


@pytest.mark.parametrize("recipe", TABLES, ids=lambda recipe: recipe.name)
def test_every_cell_is_filled_by_an_evaluation_of_every_seed(recipe, tmp_path):
    settings = full(tmp_path, seeds=2)
    done = {step.done: step for step in steps_of([recipe], settings) if step.kind == "evaluate"}
    for cell in recipe.cells:
        for seed in range(2):
            step = done[evaluation_file(run_directory(settings.out, cell.training, seed))]
            assert cell.training.run_name(seed) in step.after
    assert len({(cell.row, cell.column) for cell in recipe.cells}) == len(recipe.cells)


def test_a_finetuning_starts_from_the_pretraining_of_its_seed(tmp_path):
    each = training("table1/simplebev-rn50/map-10", "table1/simplebev-rn50/img-also")
    steps = {step.name: step for step in steps_of([RECIPES["table1"]], full(tmp_path, seeds=2))}
    step = steps[each.run_name(1)]
    assert step.after == ("build-train", "table1-simplebev-rn50-img-also-seed-1")
    assert step.commands[0][-2:] == ("--from", str(tmp_path / "out" / "runs" / "table1-simplebev-rn50-img-also-seed-1"))
    assert "seed=1" in step.commands[0]


def test_the_same_training_has_the_same_number_in_every_table():
    numbers: dict[Training, set[float]] = {}
    for recipe in TABLES:
        for cell in recipe.cells:
            if cell.paper is not None:
                numbers.setdefault(cell.training, set()).add(cell.paper)
    assert {len(found) for found in numbers.values()} == {1}


def test_trainings_of_several_tables_are_run_once(tmp_path):
    settings = full(tmp_path)
    apart = [step.name for name in ("table1", "table3", "table4") for step in steps_of([RECIPES[name]], settings)]
    together = [step.name for step in steps_of([RECIPES[n] for n in ("table1", "table3", "table4")], settings)]
    assert sorted(together) == sorted(set(apart))
    assert (
        training("table4/lambda-0.01")
        == training("table3/simplebev/occfeat")
        == Training("table1/simplebev-enb0/occfeat")
    )
    assert training("table4/lambda-0") == training("table3/simplebev/occ-only")
    assert {step.name for step in steps_of([RECIPES["fig1"]], settings)} <= set(together)


def test_numbers_of_trainings():
    assert {name: len(recipe.trainings) for name, recipe in RECIPES.items()} == {
        "fig1": 15, "table1": 67, "table2": 21, "table3": 19, "table4": 12, "fig4": 3, "fig5": 1, "fig6": 1, "demo": 5
    }  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_caches_have_what_every_training_needs(recipe, tmp_path):
    for each in recipe.trainings:
        options = " ".join(build_options(full(tmp_path), "train", large=each.large))
        assert [option for option in preset(each.preset).build_options if option not in options] == []


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_miniature_takes_a_few_steps_and_keeps_the_differences_of_its_trainings(recipe, tmp_path):
    settings = full(tmp_path, miniature=True)
    assert max(training_steps(each, 0, settings) for each in recipe.trainings) <= 8
    configs = {each: each.config(0, miniature=True) for each in recipe.trainings}
    assert len({(config, each.start) for each, config in configs.items()}) == len(configs)  # also 50 and 100 epochs


def test_the_recipe_of_table_2_is_the_papers():
    rows = {cell.row: cell.training for cell in RECIPES["table2"].cells if cell.column == "vehicles 100 %"}
    assert rows[f"448x800, {LONGER} with 224x400"] == Training(
        "table2/simplebev-enb0-448x800/vehicles-100", "table1/simplebev-enb0/occfeat-100ep"
    )


def test_a_dry_run_of_table_1_at_full_size_needs_no_data(tmp_path):
    text = called("run", "table1", "--dataroot", tmp_path, "--out", tmp_path / "out", "--dry-run")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()}
    assert lines["build-train"] == "build to do 28,130 - 5.0 h 134 GB"
    # 50 epochs of 28,130 keyframes at 255 samples/s, 30 of them in steps of 8 x 5, and 100 epochs of 281 keyframes
    assert lines["table1-simplebev-enb0-occfeat-seed-0"] == "train to do 1,406,496 87,906 1.5 h 144 MB"
    assert lines["table1-bevformer-enb0-map-100-scratch-seed-0"] == "train to do 843,880 21,097 ~3.6 h 414 MB"
    assert lines["table1-simplebev-enb0-vehicles-1-scratch-seed-0"] == "train to do 28,098 4,683 ~2 min 144 MB"
    assert "to do: 129 of 129 steps," in text
    assert not (tmp_path / "out").exists()


def test_expected_caches_are_checked_before_the_first_step(tmp_path):
    text = called("run", "table2", "--cache", tmp_path, "--out", tmp_path / "out", code=1)
    assert f"no cache at {tmp_path / 'train.zarr'}" in text
    assert (
        f"occfeat-targets build --cache {tmp_path / 'large'} --version v1.0-trainval --split train --frames cameras"
        in text
    )
    assert "--image-size 540x960" in text
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense_are_refused(tmp_path):
    assert "pass --cache DIR" in called("run", "fig5", "--out", tmp_path, code=2)
    assert "leave --dataroot out" in called(
        "run", "fig5", "--out", tmp_path, "--dataroot", tmp_path, "--miniature", code=2
    )
    assert "nothing was run there" in called("status", "fig5", "--out", tmp_path, code=1)


def test_a_failed_step_stops_only_those_that_need_it_and_the_next_run_continues(tmp_path):
    def step(name: str, *command: str, after: tuple[str, ...] = ()) -> Step:
        return Step(name, (("occfeat_train", "config", *command),), tmp_path / name, "cpu", after)

    steps = [
        step("a", "show", "no-such-preset"), step("b", "list"), step("c", "list", after=("a", "b")),
        step("d", "list", after=("b",)),
    ]  # fmt: skip
    with pytest.raises(click.ClickException, match=r"2 of 4 jobs failed(?s:.)*c: needs a"):
        run_steps(steps, tmp_path, 1, "recipe")
    assert [each.name for each in steps if each.is_finished] == ["b", "d"]
    before = (tmp_path / "logs" / "b.log").read_text()
    run_steps([step("a", "list"), *steps[1:]], tmp_path, 1, "recipe")
    assert all(each.is_finished for each in steps)
    assert (tmp_path / "logs" / "b.log").read_text() == before


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


def test_runs_of_other_seeds_are_found(tmp_path):
    each = training("table1/simplebev-enb0/vehicles-1", "table1/simplebev-enb0/occfeat")
    for name in (each.run_name(7), f"{each.name}-100ep-seed-3", f"x-{each.run_name(4)}"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert seeds_of(each, tmp_path) == [7]
    cell = next(cell for cell in RECIPES["table1"].cells if cell.training == each)
    assert set(read_cell(cell, tmp_path, 1).missing) == {0, 7}
    assert "no checkpoint in" in read_cell(cell, tmp_path, 1).missing[7]


@pytest.mark.slow
def test_every_recipe_runs_in_miniature(tmp_path):
    """All tables and figures from an empty directory. Their 3.6 GB are removed."""
    out = tmp_path / "out"
    called("run", *RECIPES, "--miniature", "--out", out, "--jobs", 2)
    text = called("report", "--out", out)
    shutil.rmtree(out)
    assert "missing" not in text
    assert text.count("* (") == sum(len(recipe.cells) for recipe in TABLES)


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
    assert page.count("data:image/png;base64,") == 2  # Figure 1
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
