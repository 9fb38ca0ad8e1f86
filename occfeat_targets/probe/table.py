"""The result of a probe as lines of text: a Markdown table and a sentence."""

from __future__ import annotations

from occfeat_targets.common.plural import count
from occfeat_targets.probe.inputs import INPUTS, TEACHER
from occfeat_targets.probe.probe import LEVEL, MIN_SCENES
from occfeat_targets.probe.result import ClassResult, ProbeResult


def describe_result(result: ProbeResult) -> list[str]:
    """The table, the reasons for its gaps, and what it says."""
    header = ["area under the ROC curve", "voxels, training", "voxels, test", *INPUTS]
    rows = [_row(found) for found in result.classes]
    if result.mean:
        rows.append(["mean", "", "", *(f"{result.mean[name]:.2f}" for name in INPUTS)])
    lines = [
        *result.warnings,
        f"teacher {result.teacher} ({result.digest}), grid in frame {result.frame}",
        *(
            f"{name}: {count(half.voxels, 'voxel')} of {count(half.keyframes, 'keyframe')} of {count(half.scenes, 'scene')}"
            for name, half in (("training", result.train), ("test", result.test))
        ),
        "",
        *_markdown([header, *rows]),
        "",
        *(f"{found.name}: {found.reason}" for found in result.classes if found.reason is not None),
        f"strengths of the ridge regressions: cross-validated over {result.folds} of the training half",
    ]
    if any(found.interval for found in result.classes):
        lines.append(f"in brackets: {LEVEL:.0%} intervals, from a bootstrap over the {result.test.scenes} test scenes")
    return [*lines, conclusion(result)]


def conclusion(result: ProbeResult) -> str:
    """Whether the features separate the classes better than the best input without a teacher."""
    if result.difference is None:
        return "No class can be probed: sample more keyframes, or choose another --test-split."
    what = f"the teacher's features separate these classes {'better' if result.difference > 0 else 'no better'} than {result.baseline}"
    means = f"mean area {result.mean[TEACHER]:.3f} against {result.mean[result.baseline or '']:.3f}, difference {result.difference:+.3f}"
    if result.difference_interval is None:
        return (
            f"In this sample, {what}: {means}. It has no interval, which takes voxels of a class in {MIN_SCENES} test scenes, "
            "so other scenes may give another result."
        )
    low, high = result.difference_interval
    means += f", {LEVEL:.0%} interval {low:+.3f} to {high:+.3f}"
    if low <= 0 <= high:
        return f"In this sample, {what}: {means}. The interval contains 0, so other scenes may give another result."
    return f"{what[0].upper()}{what[1:]}: {means}."


def _row(found: ClassResult) -> list[str]:
    counts = [f"{positives:,} of {total:,}" for positives, total in (found.train, found.test)]
    return [found.name, *counts, *(_cell(found, name) for name in INPUTS)]


def _cell(found: ClassResult, name: str) -> str:
    if name not in found.auc:
        return "-"
    low, high = found.interval.get(name, (None, None))
    return f"{found.auc[name]:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def _markdown(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
