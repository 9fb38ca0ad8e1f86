"""Runs of a task beside each other: gain over training from scratch, mean and spread over seeds, differences of their configs.

Runs that differ only in their seeds, and start from runs that do, are one arm. The baseline of an arm is the arm with the same config and
label scenes that starts from no other run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occfeat_targets.common.plural import count
from occfeat_train.config import PRETEXTS
from occfeat_train.report.runs import Run
from occfeat_train.tasks.metrics import as_text
from occfeat_train.training.checkpoint import RunInfo
from occfeat_train.training.paper import NOT_COMPARED


@dataclass(frozen=True)
class Arm:
    """Finished runs that differ only in their seeds. key: what they have in common; start: their network, if others are compared, and initial weights."""

    key: str
    start: str
    runs: tuple[Run, ...]
    scores: tuple[float, ...]

    @property
    def info(self) -> RunInfo:
        return self.runs[0].checkpoint.info

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def find_arms(runs: Sequence[Run]) -> list[Arm]:
    """The arms of a task's finished runs, ordered by their share of labels. Runs without a score are left out."""
    scored: dict[str, list[tuple[Run, float]]] = {}
    for run in runs:
        score = run.config.task_class.score(run.results)
        if run.checkpoint.is_finished and score is not None:
            scored.setdefault(_key(run.checkpoint.info), []).append((run, score))
    networks = {_network(run.checkpoint.info) for run in runs}
    arms = []
    for key, found in scored.items():
        of_arm = tuple(run for run, _ in found)
        network = f"{_network(of_arm[0].checkpoint.info)}, " if len(networks) > 1 else ""
        starts = dict.fromkeys(starting_point(run.checkpoint.info) for run in of_arm)
        arms.append(Arm(key, network + "; ".join(starts), of_arm, tuple(score for _, score in found)))
    return sorted(arms, key=lambda arm: arm.info.config.labels)


def gain(arm: Arm, arms: Sequence[Arm]) -> float | None:
    """Mean of an arm minus that of its baseline; None for a baseline, and if there is none among the arms."""
    if arm.info.parent is None:
        return None
    wanted = _key(arm.info, parent=None)
    return next((arm.mean - other.mean for other in arms if other.key == wanted), None)


def arms_table(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of mean, spread and gain of each arm."""
    rows = []
    for arm in arms:
        spread, difference = arm.spread, gain(arm, arms)
        rows.append([
            arm.start,
            label_share(arm.info),
            f"{len(arm.runs)}: {', '.join(run.name for run in arm.runs)}",
            as_text(arm.mean) + ("" if spread is None else f" ± {as_text(spread)}"),
            "-" if difference is None else f"{difference:+.1f}",
        ])  # fmt: skip
    return ["initial weights", "labels", "runs", "IoU at 0.5 [%]", "gain over from scratch"], rows


def curves_by_labels(arms: Sequence[Arm]) -> dict[str, list[tuple[float, float, float]]]:
    """{line: (share of labels [%], mean, spread) of its arms}. A line's arms differ only in their labels and recipe."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for arm in arms:
        lines.setdefault(arm.start, []).append((arm.info.config.labels, arm.mean, arm.spread or 0.0))
    return lines


def label_share(info: RunInfo) -> str:
    return f"{info.config.labels:g} % ({count(info.num_samples, 'keyframe')})"


def starting_point(info: RunInfo) -> str:
    """RunInfo.initial without directories: ``pretrained: r1, step 42``, with how far that run has got, or the backbone weights."""
    text, _, kind = info.initial.rpartition(" (")
    if kind.removesuffix(")") in PRETEXTS:
        path, num_steps = Path(text), 0 if info.parent is None else info.parent.num_steps
        step = int(path.name.removeprefix("step-"))
        unfinished = f" of {num_steps}, unfinished" if step < num_steps else ""
        return f"pretrained: {path.parent.parent.name}, step {step}{unfinished}"
    return info.initial.replace("backbone weights: none", "none (random)")


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of (field, value of each run) for the fields of the config in which runs of a task differ."""
    configs = [run.config.flat() for run in runs]
    return [
        [name, *(_text(config[name]) for config in configs)]
        for name in configs[0]
        if len({json.dumps(config[name]) for config in configs}) > 1
    ]


def _key(info: RunInfo, **changes: Any) -> str:
    """What runs of an arm have in common."""
    return json.dumps({**_identity(info), **changes}, sort_keys=True)


def _identity(info: RunInfo) -> dict[str, Any]:
    config = {name: value for name, value in info.config.flat().items() if name not in NOT_COMPARED}
    return {
        "config": config,
        "cache": info.cache,
        "keyframes": info.keyframes,
        "scenes": info.scenes,
        "parent": None if info.parent is None else _identity(info.parent),
    }


def _network(info: RunInfo) -> str:
    return f"{info.config.network.lifting} {info.config.network.backbone}"


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
