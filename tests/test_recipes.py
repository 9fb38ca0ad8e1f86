"""The recipes of the paper's tables: their cells, their steps, a dry run, and every recipe in miniature."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_targets.cache.corruption import CORRUPTIONS
from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import CAMERAS, TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Identity
from occfeat_train.presets import preset
from pipelines.__main__ import main, read_settings, run_steps
from pipelines.recipes.data import Settings, build_options, check_caches
from pipelines.recipes.graph import evaluation_file, num_steps, steps_of, trainings_of
from pipelines.recipes.robustness import check_corrupted_caches
from pipelines.recipes.tables import LONGER, RECIPES
from pipelines.recipes.trainings import Training, run_directory, training
from pipelines.steps import Step

SMALL = TargetSpec(grid=VoxelGrid((2, 4, 4)), image_size=(16, 16))
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
    configs = {each: each.config(0, miniature=True) for each in recipe.trainings}
    assert max(num_steps(config, settings) for config in configs.values()) <= 8
    assert len({(config, each.start) for each, config in configs.items()}) == len(configs)  # also 50 and 100 epochs


def test_runs_are_evaluated_on_corruptions_after_all_24_are_built_and_after_their_baseline(tmp_path):
    steps = {step.name: step for step in steps_of([RECIPES["fig4"]], full(tmp_path, seeds=2))}
    base, *others = (cell.training for cell in RECIPES["fig4"].cells)
    builds = [name for name, step in steps.items() if "--corruption" in step.commands[0]]
    assert len(builds) == 24
    assert steps["build-fog-2"].commands[0][-4:] == ("--corruption", "fog", "--severity", "2")
    assert steps["build-fog-2"].after == ("build-val",)
    first = steps[f"{base.run_name(1)}-corruptions"]
    assert {*builds, base.run_name(1)} <= set(first.after)
    assert "--baseline" not in first.commands[0]
    assert len(others) == 1
    for each in others:
        step = steps[f"{each.run_name(1)}-corruptions"]
        assert {*builds, each.run_name(1), first.name} <= set(step.after)
        assert step.commands[0][-2:] == ("--baseline", str(run_directory(tmp_path / "out", base, 1)))


def test_corrupted_caches_that_are_expected_are_listed_if_they_are_not_there(tmp_path):
    settings = full(tmp_path, dataroot=None)
    assert not [step for step in steps_of([RECIPES["fig4"]], settings) if step.kind == "build"]
    spec, identity = replace(SMALL, teacher=None, labels=()), Identity(("a",), ("scene-0003",), (1,))
    for name in CORRUPTIONS:
        for severity in (1, 2, 3):
            path = settings.cache / "corruptions" / f"{name}-{severity}" / "val.zarr"
            cache = create_cache(path, spec, identity, keyframes_per_shard=1, provenance={})
            if (name, severity) != ("fog", 1):
                arrays = {array.name: np.zeros((1, *array.shape), array.dtype) for array in spec.arrays()}
                cache.write_shard(0, arrays, {"cosine": None})
    shutil.rmtree(settings.cache / "corruptions" / "snow-3")
    with pytest.raises(
        ValueError,
        match=r"2 corrupted caches not there or not finished \(.*fog-1, .*snow-3\): .*(?s:.)*--corruption all",
    ):
        check_corrupted_caches(settings)


def test_the_recipe_of_table_2_is_the_papers():
    rows = {cell.row: cell.training for cell in RECIPES["table2"].cells if cell.column == "vehicles 100 %"}
    assert rows[f"448x800, {LONGER} with 224x400"] == Training(
        "table2/simplebev-enb0-448x800/vehicles-100", "table1/simplebev-enb0/occfeat-100ep"
    )


def test_a_dry_run_of_table_1_at_full_size_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("NUSCENES_ROOT", "OCCFEAT_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    text = called("run", "table1", "--dry-run")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()}
    assert lines["build-train"] == "build to do 28,130 - 5.0 h 134 GB"
    # 50 epochs of 28,130 keyframes at 255 samples/s, 30 of them in steps of 8 x 5, and 100 epochs of 281 keyframes
    assert lines["table1-simplebev-enb0-occfeat-seed-0"] == "train to do 1,406,496 87,906 1.5 h 144 MB"
    assert lines["table1-bevformer-enb0-map-100-scratch-seed-0"] == "train to do 843,880 21,097 ~3.6 h 414 MB"
    assert lines["table1-simplebev-enb0-vehicles-1-scratch-seed-0"] == "train to do 28,098 4,683 ~2 min 144 MB"
    assert "to do: 129 of 129 steps," in text
    assert not any(tmp_path.iterdir())


def test_expected_caches_are_checked_before_the_first_step(tmp_path):
    text = called("run", "table2", "--cache", tmp_path, "--out", tmp_path / "out", code=1)
    assert f"no cache at {tmp_path / 'train.zarr'}" in text
    assert (
        f"occfeat-targets build --cache {tmp_path / 'large'} --version v1.0-trainval --split train --frames cameras"
        in text
    )
    assert "--image-size 540x960" in text
    assert not (tmp_path / "out").exists()


def test_caches_that_have_all_that_the_trainings_read_are_accepted(tmp_path):
    """Train has features and LiDAR returns; val has no features, which only pictures of predicted features read."""
    spec = TargetSpec(frames=CAMERAS, teacher=TeacherSpec("facebook/dinov2-small", "", (224, 392), 14, 384))
    for split, of_split in (("train", replace(spec, max_points=10)), ("val", replace(spec, teacher=None))):
        identity = Identity(("a", "b"), ("scene-0061", "scene-0103"), (0, 1))
        cache = create_cache(tmp_path / f"{split}.zarr", of_split, identity, keyframes_per_shard=2, provenance={})
        arrays = {array.name: np.zeros((2, *array.shape), array.dtype) for array in of_split.arrays()}
        if "num_points" in arrays:
            arrays["num_points"][:] = 1
        arrays["is_valid"][:] = arrays["camera_valid"][:] = True
        arrays["image_area"][:] = (0, 0, *of_split.image_size)
        cache.write_shard(0, arrays, {"cosine": None})
    settings = full(tmp_path, cache=tmp_path, dataroot=None)
    trainings = trainings_of([RECIPES["table1"], RECIPES["table3"]])
    check_caches(settings, trainings, [])
    drawn = training("table1/simplebev-enb0/occfeat")
    with pytest.raises(ValueError, match=r"val.zarr.*features(?s:.)*build --cache .* --split val"):
        check_caches(settings, trainings, [drawn])


def test_a_miniature_leaves_the_data_that_the_environment_names_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OCCFEAT_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("NUSCENES_ROOT", str(tmp_path))
    monkeypatch.setattr("pipelines.__main__.run_steps", lambda *_: None)
    called("run", "table4", "--miniature", "--out", tmp_path / "out")
    settings = read_settings(tmp_path / "out")
    assert (settings.cache, settings.dataroot) == (tmp_path / "out" / "cache", None)
    called("run", "table4", "--miniature", "--cache", tmp_path / "other", "--out", tmp_path / "out2")
    assert read_settings(tmp_path / "out2").cache == tmp_path / "other"


def test_ctrl_c_says_that_the_same_command_continues(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.__main__.run_steps", stopped)
    assert "the same command continues" in called("run", "table4", "--miniature", "--out", tmp_path, code=130)


def test_a_step_whose_result_cannot_be_read_is_not_finished(tmp_path):
    step = Step("a", (), tmp_path / "val.json", "evaluate")
    assert not step.is_finished
    step.done.write_text('{"iou": 1}')
    assert step.is_finished
    step.done.write_text('{"iou": ')
    assert not step.is_finished


def test_a_data_set_without_the_large_version_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "data" / "v1.0-mini").mkdir(parents=True)
    (tmp_path / "data" / "v1.0-mini" / "sample.json").write_text("[]")
    refused = called("run", "fig5", "--out", tmp_path / "out", "--dataroot", tmp_path / "data", code=1)
    assert "holds no v1.0-trainval, of which caches are built: pass another one, or finished caches" in refused
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
        run_steps(steps, tmp_path, 1, 1, "recipe")
    assert [each.name for each in steps if each.is_finished] == ["b", "d"]
    before = (tmp_path / "logs" / "b.log").read_text()
    run_steps([step("a", "list"), *steps[1:]], tmp_path, 1, 1, "recipe")
    assert all(each.is_finished for each in steps)
    assert (tmp_path / "logs" / "b.log").read_text() == before
