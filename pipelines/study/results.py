"""Results of a study's runs: means and spreads over seeds, paired differences with intervals, and the paper's claims judged by them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occfeat_train.training.log import read_log
from pipelines.study.design import (
    FEATURES,
    IMG_ALSO,
    LONGER,
    NONE,
    OCCFEAT,
    OCCFEAT_LONGER,
    OCCFEAT_RANDOM,
    OCCUPANCY,
    TASKS,
    Run,
)

# 97.5 % quantiles of Student's t by degrees of freedom, from 1 on
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Scores = dict[tuple[str, str, float], dict[int, float]]  # (arm, task, labels) -> {seed: IoU}


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its 95 % interval, which is None for a single pair."""

    mean: float
    pairs: int
    half_width: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference is above 0: shown, contradicted (below 0), or not shown (the interval contains 0)."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return "not shown"
        return "shown" if self.mean > 0 else "contradicted"

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.mean - self.half_width:+.1f}, {self.mean + self.half_width:+.1f}]"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: arm `better` has a higher IoU than arm `worse`. source: its table."""

    text: str
    better: str
    worse: str
    source: str


CLAIMS = (
    Claim("Pretraining with OccFeat helps", OCCFEAT, NONE, "Table 1"),
    Claim("Pretraining with OccFeat helps, also with a random teacher", OCCFEAT_RANDOM, NONE, "not in the paper"),
    Claim("Pretraining with OccFeat helps more than 3 times the steps of finetuning", OCCFEAT, LONGER, "not in the paper"),
    Claim("Pretraining with OccFeat helps, also after 3 times the steps of finetuning", OCCFEAT_LONGER, LONGER, "not in the paper"),
    Claim("OccFeat is better than Img-ALSO", OCCFEAT, IMG_ALSO, "Table 1"),
    Claim("Occupancy alone helps", OCCUPANCY, NONE, "Table 3"),
    Claim("Features alone help", FEATURES, NONE, "Table 3"),
    Claim("Both losses are better than occupancy alone", OCCFEAT, OCCUPANCY, "Table 3"),
    Claim("Both losses are better than features alone", OCCFEAT, FEATURES, "Table 3"),
    Claim("lambda 0.01 is better than 0.1", OCCFEAT, f"{OCCFEAT}, lambda 0.1", "Table 4"),
    Claim("lambda 0.01 is better than 1", OCCFEAT, f"{OCCFEAT}, lambda 1", "Table 4"),
    Claim("A trained teacher is better than a random one, lambda 0.01", OCCFEAT, OCCFEAT_RANDOM, "3.3"),
    Claim("A trained teacher is better than a random one, lambda 1", f"{OCCFEAT}, lambda 1", f"{OCCFEAT}, lambda 1, random teacher", "3.3"),
    Claim("A trained teacher is better than a random one, features only", FEATURES, f"{FEATURES}, random teacher", "3.3"),
)  # fmt: skip


def paired(better: dict[int, float], worse: dict[int, float]) -> Difference | None:
    """better - worse over the seeds that both have; None if there is none. The interval is Student's t for few pairs."""
    found = [better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())]
    if not found:
        return None
    if len(found) == 1:
        return Difference(found[0], 1, None)
    quantile = _T[min(len(found) - 2, len(_T) - 1)]  # of more than ten pairs, that of ten: a little too wide
    return Difference(statistics.fmean(found), len(found), quantile * statistics.stdev(found) / math.sqrt(len(found)))


def gain_shrinks(scores: Scores, arm: str, base: str, task: str, few: float, many: float) -> Difference | None:
    """How much more `arm` gains over `base` with few labels than with many, paired by seed."""
    cells = [scores.get((name, task, labels), {}) for labels in (few, many) for name in (arm, base)]
    seeds = set.intersection(*(set(cell) for cell in cells))
    gains = [{seed: cells[k][seed] - cells[k + 1][seed] for seed in seeds} for k in (0, 2)]
    return paired(*gains)


def read_scores(runs: Sequence[Run], out: Path, key: str = "iou") -> Scores:
    """The finished finetunings' results. key: iou (at 0.5) or iou_best."""
    scores: Scores = {}
    for run in runs:
        if run.task and (results := read_results(run, out)) is not None:
            scores.setdefault((run.arm.name, run.task, run.labels), {})[run.seed] = results[key] or 0.0
    return scores


def read_results(run: Run, out: Path) -> dict[str, Any] | None:
    """What `occfeat-train evaluate` wrote; None if the run is not finished."""
    file = out / "runs" / run.name / "evaluation" / f"{run.split}.json"
    return json.loads(file.read_text()) if file.exists() else None


def read_curve(run: Run, out: Path) -> list[tuple[int, float]]:
    """(step, IoU at 0.5 [%] on the tune split) of a finetuning's validations."""
    records = read_log(out / "runs" / run.name)
    return [(record["step"] + 1, record["validation"]["iou"] or 0.0) for record in records if "validation" in record]


def table(scores: Scores, arms: Sequence[str], labels: Sequence[float], against: str = "") -> list[list[str]]:
    """Header and rows: mean ± standard deviation over seeds, or the paired difference to the arm `against` with its 95 % interval."""
    columns = [(task, share) for task in TASKS for share in labels]
    rows = [["pretraining", *(f"{task} {share:g} %" for task, share in columns)]]
    for arm in arms:
        cells = [scores.get((arm, *column), {}) for column in columns]
        if not any(cells) or arm == against:
            continue
        if against:
            shown = [
                paired(cell, scores.get((against, *column), {})) for cell, column in zip(cells, columns, strict=True)
            ]
            rows.append([arm, *(str(d or "-") for d in shown)])
        else:
            rows.append([arm, *map(mean_and_spread, cells)])
    return rows


def mean_and_spread(cell: dict[int, float], digits: int = 1) -> str:
    """``12.3 ± 0.4`` of {seed: value}; - without a value."""
    if not cell:
        return "-"
    spread = f" ± {statistics.stdev(cell.values()):.{digits}f}" if len(cell) > 1 else ""
    return f"{statistics.fmean(cell.values()):.{digits}f}{spread}"


def pretraining_table(runs: Sequence[Run], out: Path, baselines: dict[str, float]) -> list[list[str]]:
    """Header and rows: occupancy IoU and cosine on test of each pretraining. baselines: cosine of the mean feature of each teacher."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    teachers: dict[str, str] = {}
    for run in runs:
        if not run.task and (results := read_results(run, out)) is not None:
            teachers[run.arm.name] = run.arm.teacher
            for key in ("occupancy_iou", "cosine"):
                if results.get(key) is not None:
                    found.setdefault(run.arm.name, {}).setdefault(key, {})[run.seed] = results[key]
    rows = [["pretraining", "occupancy IoU [%]", "cosine to the teacher", "cosine of the mean feature"]]
    for arm, values in found.items():
        baseline = f"{baselines[teachers[arm]]:.3f}" if "cosine" in values and teachers[arm] in baselines else "-"
        rows.append([
            arm, mean_and_spread(values.get("occupancy_iou", {})), mean_and_spread(values.get("cosine", {}), 3), baseline,
        ])  # fmt: skip
    return rows


def judge(scores: Scores, labels: Sequence[float]) -> list[str]:
    """A sentence for each claim of the paper whose arms have results."""
    sentences = []
    for claim in CLAIMS:
        verdicts: dict[str, list[str]] = {}
        for task in TASKS:
            for share in labels:
                difference = paired(
                    scores.get((claim.better, task, share), {}), scores.get((claim.worse, task, share), {})
                )
                if difference is not None:
                    verdicts.setdefault(difference.verdict, []).append(f"{task} {share:g} % ({difference})")
        if verdicts:
            parts = [f"{verdict} for {', '.join(verdicts[verdict])}" for verdict in ("shown", "not shown", "contradicted") if verdict in verdicts]  # fmt: skip
            sentences.append(f"{claim.text} ({claim.source}): {'; '.join(parts)}.")
    for arm, base, steps in ((OCCFEAT, NONE, ""), (OCCFEAT_LONGER, LONGER, ", after 3 times the steps")):
        for task in TASKS if len(labels) > 1 else ():
            few, many = labels[0], labels[-1]
            if (difference := gain_shrinks(scores, arm, base, task, few, many)) is not None:
                sentences.append(
                    f"OccFeat helps more with {few:g} % of the labels than with {many:g} %{steps} (Table 1): "
                    f"{difference.verdict} for {task} ({difference})."
                )
    return sentences
