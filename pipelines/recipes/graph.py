"""From recipes to steps: caches, trainings, evaluations, pictures; each once, after those that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from occfeat_train.config import Config
from occfeat_train.presets import preset
from pipelines.recipes import robustness
from pipelines.recipes.data import Settings, build_name, cache_folder, data_steps, sizes
from pipelines.recipes.tables import Recipe
from pipelines.recipes.trainings import Training, run_directory
from pipelines.steps import Step


def steps_of(recipes: Sequence[Recipe], settings: Settings) -> list[Step]:
    """The steps of all recipes and seeds, one seed after the other. What several recipes need occurs once."""
    trainings = trainings_of(recipes)
    steps = {step.name: step for step in data_steps(settings, large=(each.large for each in trainings))}
    for seed in range(settings.seeds):
        for each in trainings:
            found = [training_step(each, seed, settings)]
            if not preset(each.preset).is_pretext:
                found.append(evaluation_step(each, seed, settings))
            steps |= {step.name: step for step in found}
    if corrupted := list(
        dict.fromkeys(cell.training for recipe in recipes if recipe.corrupted for cell in recipe.cells)
    ):
        found = robustness.builds(settings)
        for seed in range(settings.seeds):
            found += robustness.evaluation_steps(corrupted, seed, settings)
        steps |= {step.name: step for step in found}
    for drawn in dict.fromkeys(each for recipe in recipes for each in recipe.drawn):
        step = pictures_step(drawn, settings)
        steps[step.name] = step
    return [_without_absent(step, steps) for step in steps.values()]


def trainings_of(recipes: Sequence[Recipe]) -> list[Training]:
    return list(dict.fromkeys(each for recipe in recipes for each in recipe.trainings))


def training_step(each: Training, seed: int, settings: Settings) -> Step:
    config = each.config(seed, miniature=settings.miniature)
    start = each.pretraining
    folder, out = cache_folder(settings, large=each.large), run_directory(settings.out, each, seed)
    command = (
        "occfeat_train", "pretrain" if config.is_pretext else "finetune", "--preset", each.preset, "--cache", str(folder),
        "--split", "train", "--out", str(out), "--no-progress",
        *(part for value in each.overrides(seed, miniature=settings.miniature) for part in ("--set", value)),
        *(("--from", str(run_directory(settings.out, start, seed))) if start else ()),
        *(("--save-every", "1000000") if settings.miniature else ()),  # only at the end
    )  # fmt: skip
    after = (build_name("train", large=each.large), *((start.run_name(seed),) if start else ()))
    samples = num_steps(config, settings) * config.optim.samples_per_step
    return Step(each.run_name(seed), (command,), out / "finished", "train", after, samples)


def num_steps(config: Config, settings: Settings) -> int:
    """Optimiser steps of a training."""
    return config.optim.num_steps(sizes(settings).samples(config.labels))


def evaluation_step(each: Training, seed: int, settings: Settings) -> Step:
    """IoU on val: RUN/evaluation/val.json."""
    folder, run = cache_folder(settings, large=each.large), run_directory(settings.out, each, seed)
    command = ("occfeat_train", "evaluate", str(run), "--cache", str(folder), "--split", "val", "--no-progress")
    after = (each.run_name(seed), build_name("val", large=each.large))
    name = f"{each.run_name(seed)}-evaluation"
    return Step(name, (command,), evaluation_file(run), "evaluate", after, sizes(settings).val)


def evaluation_file(run: Path) -> Path:
    return run / "evaluation" / "val.json"


def pictures_step(each: Training, settings: Settings) -> Step:
    """Predicted features of a pretraining as colours and correlation maps: Figures 5 and 6."""
    out = settings.out / "figures" / each.name
    folder = cache_folder(settings, large=each.large)
    command = (
        "occfeat_train", "figures", str(run_directory(settings.out, each, 0)), "--cache", str(folder), "--split", "val",
        "--out", str(out), "--no-progress",
    )  # fmt: skip
    after = (each.run_name(0), build_name("val", large=each.large))
    return Step(f"figures-{each.name}", (command,), out / "index.html", "evaluate", after)


def _without_absent(step: Step, steps: dict[str, Step]) -> Step:
    """The step without builds that are not steps, because the caches are expected to be there."""
    return replace(step, after=tuple(name for name in step.after if name in steps))
