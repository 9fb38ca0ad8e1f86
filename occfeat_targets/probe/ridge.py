"""Ridge regression to +1 and -1 in closed form, with its strength chosen by cross-validation over groups of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.probe.ranking import area_under_curve

# Relative to the variance of a standardised channel; the strongest first.
STRENGTHS = np.array([1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
UNTESTED = 1.0  # strength where no fold can be scored
MAX_FOLDS = 5
_ROUNDING = 1e-6  # a float32 channel that varies less, relative to its mean, is constant
_ROWS = 8192  # converted to float64 at a time


@dataclass(frozen=True)
class Moments:
    """Sums over samples that determine a regression. count; x: (C,), y: (K,), xx: (C, C), xy: (C, K)."""

    count: float
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    xx: NDArray[np.float64]
    xy: NDArray[np.float64]

    @classmethod
    def of(cls, x: NDArray[np.float64], y: NDArray[np.float64]) -> Moments:
        """x: (n, C). y: (n, K)."""
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy
        )

    def solve(self, strengths: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (S, C, K) and intercepts (S, K) that minimise mean((y - x @ w - b)^2) + strength * |w|^2, for S strengths."""
        x, y = self.x / self.count, self.y / self.count
        values, vectors = np.linalg.eigh(self.xx / self.count - np.outer(x, x))
        projected = vectors.T @ (self.xy / self.count - np.outer(x, y))
        weights = vectors @ (projected / (np.maximum(values, 0)[:, None] + strengths[:, None, None]))
        return weights, y - x @ weights


@dataclass(frozen=True)
class Ridge:
    """A fitted regression of K classes. mean, scale: (C,) of the inputs. weights: (C, K) of standardised inputs, intercepts: (K,).

    strengths: (K,) chosen for each class.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    intercepts: NDArray[np.float64]
    strengths: NDArray[np.float64]

    @classmethod
    def fit(
        cls,
        inputs: NDArray[Any],
        is_positive: NDArray[np.bool_],
        group: NDArray[Any],
        strengths: NDArray[Any] = STRENGTHS,
    ) -> Ridge:
        """inputs: (n, C). is_positive: (n, K). group: (n,) samples of one group are never on both sides of a fold.

        Classes are not weighted: class weights move the threshold of a linear rule more than its direction, and the area
        under the ROC curve depends on the direction only. The strength of a class is the one with the largest mean area over
        the folds.
        """
        mean, scale = inputs.mean(0, dtype=np.float64), inputs.std(0, dtype=np.float64)
        scale[scale <= _ROUNDING * np.abs(mean)] = np.inf  # constant channels become exactly 0
        fold = fold_of(group)
        chosen = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
        parts = [
            reduce(Moments.__add__, (Moments.of(x, 2.0 * is_positive[rows] - 1) for rows, x in _blocks(inputs, c, mean, scale)))
            for c in chosen
        ]  # fmt: skip
        areas = np.full((len(parts), len(strengths), is_positive.shape[1]), np.nan)
        for f, rows in enumerate(chosen if len(parts) > 1 else []):
            others = reduce(Moments.__add__, (part for g, part in enumerate(parts) if g != f))
            weights, _ = others.solve(strengths)
            scores = np.concatenate(
                [x @ weights for _, x in _blocks(inputs, rows, mean, scale)], axis=1
            )  # (S, rows, K)
            for s, k in np.ndindex(areas.shape[1:]):
                areas[f, s, k] = area_under_curve(scores[s, :, k], is_positive[rows, k])
        best = best_strengths(areas, strengths)
        weights, intercepts = reduce(Moments.__add__, parts).solve(best)
        classes = np.arange(is_positive.shape[1])
        return cls(mean, scale, weights[classes, :, classes].T, intercepts[classes, classes], best)

    def predict(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """(n, C) -> (n, K) scores."""
        blocks = _blocks(inputs, np.arange(len(inputs)), self.mean, self.scale)
        return np.concatenate([x @ self.weights + self.intercepts for _, x in blocks])


def fold_of(group: NDArray[Any]) -> NDArray[np.intp]:
    """(n,) groups -> (n,) numbers of at most MAX_FOLDS folds, whole groups each."""
    return np.unique(group, return_inverse=True)[1].reshape(-1) % MAX_FOLDS


def best_strengths(areas: NDArray[np.float64], strengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Areas (F, S, K) under the curves of held-out folds -> (K,) strengths; the strongest of equals.

    A fold without positives or negatives of a class has NaN and does not count. UNTESTED where no fold counts.
    """
    counted = ~np.isnan(areas)
    mean = np.where(counted, areas, 0).sum(0) / np.maximum(counted.sum(0), 1)  # (S, K)
    return np.where(counted.any((0, 1)), strengths[mean.argmax(0)], UNTESTED)


def _blocks(
    inputs: NDArray[Any], rows: NDArray[np.intp], mean: NDArray[np.float64], scale: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """(rows, standardised inputs) of some rows, a block at a time."""
    for part in np.array_split(rows, -(-max(len(rows), 1) // _ROWS)):
        yield part, (inputs[part] - mean) / scale
