"""Candidate settings for learning vehicles and map from scratch with all labels. They are compared on the tune split, which no
reported number uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.study.design import NONE, TASKS, Run, Size, runs_of, slug
from pipelines.study.results import mean_and_spread, read_results

STEPS = 1000
# Each differs from the size's settings in one respect. The longest come first, so that none runs alone at the end.
CANDIDATES: dict[str, dict[str, str]] = {
    "twice the steps": {"optim.epochs": "2"},
    "images of 96x176": {"network.image_size": "96x176"},
    "batch 16": {"optim.batch": "16"},
    "64 channels": {"network.channels": "64"},
    "as it is": {},
    "learning rate 1e-3": {"optim.lr": "1e-3"},
    "learning rate 1e-2": {"optim.lr": "1e-2"},
    "positive cells weigh 1": {"loss.pos_weight": "1"},
    "positive cells weigh 5": {"loss.pos_weight": "5"},
    "images not augmented": {"augment.resize": "[1,1]", "augment.crop": "0", "augment.flip_images": "false"},
    "nothing augmented": {
        "augment.resize": "[1,1]", "augment.crop": "0", "augment.flip_images": "false", "augment.flip_bev": "false",
        "augment.shuffle_cameras": "false",
    },
    "stochastic depth 0.2": {"network.drop_connect": "0.2"},
    "images of 48x80": {"network.image_size": "48x80"},
}  # fmt: skip


def search_runs(size: Size) -> list[Run]:
    """A finetuning from scratch for every candidate and task, evaluated on tune. batch and epochs of a candidate are factors of STEPS."""
    base = replace(size, seeds=1, finetune={100: STEPS}, arms=tuple(a for a in size.arms if a.name == NONE))
    runs = []
    for name, fields in CANDIDATES.items():
        epochs = float(fields.get("optim.epochs", 1))
        batch = int(fields.get("optim.batch", size.batch))
        changed = {key: value for key, value in fields.items() if not key.startswith(("optim.epochs", "optim.batch"))}
        candidate = replace(base, recipe={**size.recipe, **changed}, batch=batch, finetune={100: round(STEPS * epochs)})
        runs += [
            replace(run, name=f"search-{slug(name)}-{run.task}", split="tune") for run in runs_of(candidate, set())
        ]
    return runs


def search_table(runs: Sequence[Run], out: Path) -> list[list[str]]:
    """Header and rows: IoU at 0.5 and at the best threshold on tune."""
    rows = [["setting", "steps", *(f"{task}, {at}" for task in TASKS for at in ("at 0.5", "at the best threshold"))]]
    for name in CANDIDATES:
        found = {run.task: run for run in runs if run.name.startswith(f"search-{slug(name)}-")}
        cells = []
        for task in TASKS:
            results = read_results(found[task], out) or {}
            cells += [
                mean_and_spread({0: results[key] or 0.0} if key in results else {}) for key in ("iou", "iou_best")
            ]
        rows.append([name, f"{found[TASKS[0]].steps} of {found[TASKS[0]].batch}", *cells])
    return rows
