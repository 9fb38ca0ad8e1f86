"""Area under the ROC curve, exact and with ties, and its bootstrap over groups of samples such as scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ranking:
    """How the scores of positive and negative samples in G groups compare.

    won: (G, G) in how many pairs the positive sample, of group g, has a higher score than the negative one, of group h. A tie
    counts one half. positives, negatives: (G,) numbers of samples.
    """

    won: NDArray[np.float64]
    positives: NDArray[np.intp]
    negatives: NDArray[np.intp]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.floating[Any]],
        is_positive: NDArray[np.bool_],
        group: NDArray[np.integer[Any]],
        num_groups: int,
    ) -> Ranking:
        """scores, is_positive: (n,). group: (n,) numbers below num_groups. Raises ValueError on scores that are NaN."""
        if np.isnan(scores).any():
            raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN, which have no order")
        order = np.argsort(scores, kind="stable")  # sorted queries are several times faster
        scores, is_positive, group = scores[order], is_positive[order], group[order]
        won = np.zeros((num_groups, num_groups))
        for h in range(num_groups):
            others = scores[~is_positive & (group == h)]
            below = sum(np.searchsorted(others, scores[is_positive], side) for side in ("left", "right"))
            won[:, h] = np.bincount(group[is_positive], weights=below / 2, minlength=num_groups)
        positives, negatives = (np.bincount(group[rows], minlength=num_groups) for rows in (is_positive, ~is_positive))
        return cls(won, positives, negatives)

    @property
    def area(self) -> float:
        """Area under the ROC curve: the share of pairs that the positive sample wins. NaN without positives or negatives."""
        return float(self.resample(np.ones((1, len(self.won)), np.intp))[0])

    def resample(self, draws: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """(B,) areas of B sets of groups. draws: (B, G) how often a set contains each group. NaN as in `area`."""
        won = np.einsum("bg,gh,bh->b", draws, self.won, draws, optimize=True)
        pairs = (draws @ self.positives) * (draws @ self.negatives)
        return np.divide(won, pairs, out=np.full(len(draws), np.nan), where=pairs > 0)


def area_under_curve(scores: NDArray[np.floating[Any]], is_positive: NDArray[np.bool_]) -> float:
    """`Ranking.area` of one group. scores, is_positive: (n,)."""
    return Ranking.of(scores, is_positive, np.zeros(len(scores), np.intp), 1).area
