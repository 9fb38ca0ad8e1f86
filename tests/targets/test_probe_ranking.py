"""Area under the ROC curve and its bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occfeat_targets.probe.ranking import Ranking, area_under_curve


def count_pairs(scores, is_positive):
    """The slow reference: every pair."""
    pairs = [(p, n) for p in scores[is_positive] for n in scores[~is_positive]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs) if pairs else np.nan


@pytest.mark.parametrize(
    ("scores", "labels", "area"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([7, 7, 7, 7], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
        ([1, 2], [1, 1], np.nan),
        ([1, 2], [0, 0], np.nan),
        ([], [], np.nan),
    ],
)
def test_area_of_closed_forms(scores, labels, area):
    assert area_under_curve(np.array(scores, float), np.array(labels, bool)) == pytest.approx(area, nan_ok=True)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_area_with_ties_equals_a_count_of_all_pairs(samples):
    scores, is_positive = np.array([s for s, _ in samples], float), np.array([p for _, p in samples])
    expected = count_pairs(scores, is_positive)
    assert area_under_curve(scores, is_positive) == pytest.approx(expected, nan_ok=True)


def test_area_of_drawn_groups_is_that_of_their_samples_together():
    rng = np.random.default_rng(0)
    scores, is_positive = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.3
    group = rng.integers(0, 4, 60)
    is_positive[group == 3] = False
    ranking = Ranking.of(scores, is_positive, group, 4)
    draws = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 4, 0, 0], [0, 0, 0, 4]])
    for areas, draw in zip(ranking.resample(draws), draws, strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(group == g), times) for g, times in enumerate(draw)])
        assert areas == pytest.approx(count_pairs(scores[rows], is_positive[rows]), nan_ok=True)
    assert ranking.area == pytest.approx(count_pairs(scores, is_positive))
    assert np.isnan(ranking.resample(draws)[3])


def test_scores_that_are_nan_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        area_under_curve(np.array([np.nan, 1]), np.array([True, False]))
