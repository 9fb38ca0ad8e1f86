"""What the steps of a recipe take: samples, optimiser steps, GPU hours and disk.

The rates are those of a pretraining step of batch 16 on one H200 (BENCHMARKS.md, "On a GPU", commit 7c4d901, not compiled). A rate
of anything else is a guess: that of the same network's pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from occfeat_targets.build.estimate import format_bytes, format_seconds
from occfeat_train.presets import preset
from pipelines.recipes.data import Settings, build_bytes
from pipelines.recipes.graph import num_steps, trainings_of
from pipelines.recipes.robustness import SUFFIX
from pipelines.recipes.tables import Recipe
from pipelines.recipes.trainings import Training
from pipelines.steps import Step

# (lifting, backbone, image height) -> samples/s, and MB of a checkpoint of a pretraining
_MEASURED = {
    ("simplebev", "efficientnet-b0", 224): (255.0, 72),
    ("simplebev", "resnet-50", 224): (202.0, 281),
    ("simplebev", "efficientnet-b0", 448): (107.0, 72),
    ("bevformer", "efficientnet-b0", 224): (64.5, 207),
}
_BUILD_RATE = 1.57  # keyframes/s of a build on two CPU cores without a GPU (README, "Costs")
# Of a corrupted cache, README, "Corrupted images": 11 core hours, estimated, and 338 GB for 24 of 6,019 keyframes
_CORRUPT_RATE = 2 * 24 * 6_019 / (11 * 3600)  # on two CPU cores
_CORRUPTED_BYTES = 338 * 10**9 // (24 * 6_019)
SOURCE = "one H200, by samples/s of pretraining steps in BENCHMARKS.md, 'On a GPU', commit 7c4d901; ~: a guess, the rate of the same network's pretraining"


@dataclass(frozen=True)
class Estimate:
    """Of one step. steps: of the optimiser. hours: of one GPU, or of two CPU cores for a build."""

    step: Step
    steps: int | None
    hours: float | None
    is_guess: bool
    disk: int

    @property
    def cells(self) -> list[str]:
        hours = "-" if self.hours is None else "~" * self.is_guess + format_seconds(3600 * self.hours)
        return [
            self.step.name, self.step.kind, "finished" if self.step.is_finished else "to do", f"{self.step.samples:,}",
            "-" if self.steps is None else f"{self.steps:,}", hours, format_bytes(self.disk) if self.disk else "-",
        ]  # fmt: skip


def estimates(steps: Sequence[Step], recipes: Sequence[Recipe], settings: Settings) -> list[Estimate]:
    runs = {t.run_name(seed): (t, seed) for t in trainings_of(recipes) for seed in range(settings.seeds)}
    return [_estimate(step, runs, settings) for step in steps]


def _estimate(step: Step, runs: dict[str, tuple[Training, int]], settings: Settings) -> Estimate:
    if "--corruption" in step.commands[0]:
        return Estimate(step, None, step.samples / _CORRUPT_RATE / 3600, True, step.samples * _CORRUPTED_BYTES)
    if step.kind == "build":
        large, split = "-large-" in step.name, step.name.rpartition("-")[2]
        return Estimate(
            step, None, step.samples / _BUILD_RATE / 3600, False, step.samples * build_bytes(split, large=large)
        )
    run = runs.get(step.name.removesuffix("-evaluation").removesuffix(SUFFIX))
    if run is None:
        return Estimate(step, None, None, False, 0)
    each, seed = run
    config = preset(each.preset)
    network = config.network
    key = (network.lifting, network.backbone, network.image_size[0])
    rate, megabytes = _MEASURED.get(key, _MEASURED["simplebev", "efficientnet-b0", 224])
    is_guess = key not in _MEASURED or config.task != "occfeat"
    hours = step.samples / rate / 3600
    if step.kind == "evaluate":
        return Estimate(step, None, hours, True, 0)
    return Estimate(
        step,
        num_steps(each.config(seed, miniature=settings.miniature), settings),
        hours,
        is_guess,
        2 * megabytes * 10**6,
    )


def describe(found: Sequence[Estimate], *, miniature: bool) -> list[str]:
    """A table of all steps and their sum. The times and bytes of a miniature are not known."""
    header = ["step", "kind", "state", "keyframes", "steps", "time", "disk"]
    rows = [header, *(each.cells for each in found)]
    if miniature:
        rows = [row[:5] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if miniature:
        return lines
    left = [each for each in found if not each.step.is_finished]
    gpu = sum(each.hours or 0 for each in left if each.step.kind != "build")
    cpu = sum(each.hours or 0 for each in left if each.step.kind == "build")
    disk = sum(each.disk for each in left)
    return [
        *lines,
        f"to do: {len(left)} of {len(found)} steps, {gpu:.1f} GPU hours, {format_bytes(disk)} of disk"
        + (f", {cpu:.1f} hours of builds on two CPU cores without a GPU" if cpu else ""),
        f"times of trainings and evaluations: {SOURCE}",
    ]
