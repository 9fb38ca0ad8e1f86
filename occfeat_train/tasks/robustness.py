"""Scores under corruptions, as RoboBEV (arXiv 2304.06719) defines them, with the IoU as the score (paper, Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping

from occfeat_targets.cache.corruption import CORRUPTIONS, SEVERITIES

Scores = Mapping[str, Mapping[int, float]]  # {corruption: {severity: score [%]}}


def means(scores: Scores) -> dict[str, float]:
    """{corruption: mean score over the three severities}, of those that have all three."""
    return {
        name: sum(levels[severity] for severity in SEVERITIES) / len(SEVERITIES)
        for name, levels in scores.items()
        if set(SEVERITIES) <= levels.keys()
    }


def resilience_rates(scores: Scores, clean: float) -> dict[str, float]:
    """RR_i = sum_l S_il / (3 S_clean) [%]. Empty if the clean score is 0."""
    return {name: 100 * mean / clean for name, mean in means(scores).items() if clean > 0}


def corruption_errors(scores: Scores, baseline: Scores) -> dict[str, float]:
    """CE_i = sum_l (1 - S_il) / sum_l (1 - S_il of the baseline) [%]; lower is better, and 100 is as good as the baseline.

    Only of corruptions that both have, and not where the baseline is perfect.
    """
    theirs = means(baseline)
    return {
        name: 100 * (100 - mean) / (100 - theirs[name])
        for name, mean in means(scores).items()
        if name in theirs and theirs[name] < 100
    }


def mean_of_all(values: Mapping[str, float]) -> float | None:
    """mRR or mCE: the mean over all eight corruptions; None if one is missing, because the mean of others is another number."""
    return sum(values[name] for name in CORRUPTIONS) / len(CORRUPTIONS) if set(CORRUPTIONS) <= values.keys() else None
