"""Arms of a report: runs that differ only in their seeds, beside the runs from scratch with the same config and labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from occfeat_train.config import Config
from occfeat_train.presets import finetuning, preset
from occfeat_train.report.comparison import (
    arms_table,
    config_differences,
    curves_by_labels,
    find_arms,
    gain,
    starting_point,
)
from occfeat_train.report.runs import Run
from occfeat_train.training.checkpoint import RunInfo
from tests.train.runs import GRID

PRETRAINING = preset("small/occfeat")


@dataclass(frozen=True)
class Finished:
    info: RunInfo
    is_finished: bool = True

    def describe_step(self) -> str:
        return "step 1 of 9, unfinished"


def info_of(config: Config, *, scenes: str = "a", parent: RunInfo | None = None, start: str = "") -> RunInfo:
    initial = start or "backbone weights: none"
    return RunInfo(config, GRID, 8, "cache", 10, initial, keyframes="k", scenes=scenes, parent=parent)


def run_of(name: str, iou: float | None, info: RunInfo, *, is_finished: bool = True) -> Run:
    checkpoint: Any = Finished(info, is_finished)
    return Run(name, "#000000", checkpoint, [], None, {"iou": iou}, "", [])  # type: ignore[arg-type]


def runs_of(labels: float, start: str, ious: dict[int, float], *, lambda_: float = 0.01) -> list[Run]:
    """One finished run for each seed, from scratch or from a pretraining of the same seed."""
    runs = []
    for seed, iou in ious.items():
        config = replace(finetuning("vehicles", labels, PRETRAINING.network), seed=seed)
        pretraining = replace(PRETRAINING, seed=seed, loss=replace(PRETRAINING.loss, feat=lambda_))
        parent = None if start == "scratch" else info_of(pretraining)
        initial = "" if parent is None else f"/runs/pre-{seed}/checkpoints/step-00000005 (occfeat)"
        info = info_of(config, scenes=f"{labels:g}", parent=parent, start=initial)
        runs.append(run_of(f"{start}-{labels:g}-{seed}", iou, info))
    return runs


def test_an_arm_is_the_mean_and_spread_over_seeds_and_its_gain_is_over_the_same_labels_from_scratch():
    runs = [
        *runs_of(100, "scratch", {0: 40.0, 1: 42.0, 2: 44.0}),
        *runs_of(1, "pre", {0: 20.0, 1: 22.0}),
        *runs_of(1, "scratch", {0: 10.0}),
    ]
    arms = find_arms(runs)
    assert [(arm.mean, arm.spread, gain(arm, arms)) for arm in arms] == [
        (21.0, pytest.approx(2**0.5), 11.0),
        (10.0, None, None),
        (42.0, 2.0, None),
    ]
    header, rows = arms_table(arms)
    assert header == ["initial weights", "labels", "runs", "IoU at 0.5 [%]", "gain over from scratch"]
    assert rows[0][1:] == ["1 % (10 keyframes)", "2: pre-1-0, pre-1-1", "21.0 ± 1.4", "+11.0"]
    assert rows[1] == ["none (random)", "1 % (10 keyframes)", "1: scratch-1-0", "10.0", "-"]
    assert curves_by_labels(arms) == {
        arms[0].start: [(1, 21.0, pytest.approx(2**0.5))],
        "none (random)": [(1, 10.0, 0.0), (100, 42.0, 2.0)],
    }


def test_pretrainings_that_differ_in_more_than_their_seed_are_different_arms():
    runs = runs_of(1, "pre", {0: 1.0}) + runs_of(1, "pre", {1: 2.0}, lambda_=0.1)
    assert [arm.mean for arm in find_arms(runs)] == [1.0, 2.0]


def test_another_recipe_other_scenes_or_another_network_is_no_baseline():
    (pretrained,) = runs_of(1, "pre", {0: 20.0})
    info = replace(pretrained.checkpoint.info, parent=None, initial="backbone weights: none")
    longer = replace(info.config, optim=replace(info.config.optim, epochs=7.0))
    wider = replace(info.config, network=replace(info.config.network, channels=64))
    for other in (replace(info, config=longer), replace(info, scenes="others"), replace(info, config=wider)):
        arms = find_arms([pretrained, run_of("scratch", 10.0, other)])
        assert len(arms) == 2 and gain(arms[0], arms) is None
    same = replace(info, config=replace(info.config, seed=5, precision="float32"))
    arms = find_arms([pretrained, run_of("scratch", 10.0, same)])
    assert gain(arms[0], arms) == 10.0


def test_runs_that_are_unfinished_or_have_no_iou_are_in_no_arm():
    (run,) = runs_of(1, "scratch", {0: 1.0})
    unfinished = run_of("stopped", 2.0, run.checkpoint.info, is_finished=False)
    empty = run_of("empty", None, run.checkpoint.info)
    (arm,) = find_arms([unfinished, run, empty])
    assert arm.runs == (run,)


def test_arms_of_several_networks_name_theirs():
    (run,) = runs_of(1, "scratch", {0: 1.0})
    lss = replace(run.config, network=replace(run.config.network, lifting="lss"))
    arms = find_arms([run, run_of("lss", 2.0, replace(run.checkpoint.info, config=lss))])
    assert [arm.start for arm in arms] == [
        "simplebev efficientnet-b0, none (random)",
        "lss efficientnet-b0, none (random)",
    ]


def test_differences_of_configs_list_only_the_fields_that_differ():
    (run,) = runs_of(1, "scratch", {0: 1.0})
    changed = replace(run.config, seed=3, network=replace(run.config.network, image_size=(32, 48)))
    other = run_of("other", 2.0, replace(run.checkpoint.info, config=changed))
    assert config_differences([run, other]) == [["network.image_size", "64x112", "32x48"], ["seed", "0", "3"]]
    assert config_differences([run, run]) == []


def test_initial_weights_are_named_without_directories():
    parent = replace(info_of(PRETRAINING), num_samples=10)
    step, steps = "/a/b/runs/pre/checkpoints/step-{:08d} (occfeat)", parent.num_steps
    finished = info_of(PRETRAINING, parent=parent, start=step.format(steps))
    assert starting_point(finished) == f"pretrained: pre, step {steps}"
    assert (
        starting_point(replace(finished, initial=step.format(1))) == f"pretrained: pre, step 1 of {steps}, unfinished"
    )
    assert starting_point(info_of(PRETRAINING)) == "none (random)"
    hub = replace(info_of(PRETRAINING), initial="backbone weights: google/efficientnet-b0")
    assert starting_point(hub) == "backbone weights: google/efficientnet-b0"
