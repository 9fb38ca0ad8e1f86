"""Ridge regression against least squares, and the choice of its strength."""

from __future__ import annotations

import numpy as np
import pytest

from occfeat_targets.probe import ridge
from occfeat_targets.probe.ranking import area_under_curve
from occfeat_targets.probe.ridge import STRENGTHS, UNTESTED, Ridge, best_strengths, fold_of


def random_problem(n=200, channels=6, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    inputs = (rng.normal(size=(n, channels)) * rng.uniform(0.1, 9, channels) + rng.normal(size=channels)).astype(
        np.float32
    )
    is_positive = inputs @ rng.normal(size=(channels, classes)) + rng.normal(size=(n, classes)) > 1
    return inputs, is_positive, rng.integers(0, 7, n)


def least_squares(inputs, is_positive, strength):
    """The slow reference: least squares with one more row for each weight, of standardised inputs and centred targets."""
    x = inputs.astype(np.float64)
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    y = np.where(is_positive, 1.0, -1.0)
    rows = np.sqrt(strength * len(x)) * np.eye(x.shape[1])
    weights, *_ = np.linalg.lstsq(np.vstack([x, rows]), np.concatenate([y - y.mean(), np.zeros(len(rows))]), rcond=None)
    return weights, y.mean()


@pytest.mark.parametrize("strength", [1e-3, 1.0, 50.0])
def test_ridge_equals_least_squares_with_augmented_rows(strength):
    inputs, is_positive, group = random_problem()
    found = Ridge.fit(inputs, is_positive, group, np.array([strength]))
    x = (inputs - inputs.mean(0, dtype=float)) / inputs.std(0, dtype=float)
    for k in range(2):
        weights, intercept = least_squares(inputs, is_positive[:, k], strength)
        np.testing.assert_allclose(found.weights[:, k], weights, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.predict(inputs)[:, k], x @ weights + intercept, rtol=1e-9, atol=1e-9)
    assert found.strengths.tolist() == [strength] * 2


def test_the_strength_of_a_class_is_the_best_over_held_out_groups():
    inputs, is_positive, group = random_problem(n=60, channels=12, seed=4)
    found = Ridge.fit(inputs, is_positive, group)
    fold = fold_of(group)
    x = (inputs - inputs.mean(0, dtype=float)) / inputs.std(0, dtype=float)
    for k in range(2):
        areas = np.zeros(len(STRENGTHS))
        for f in range(fold.max() + 1):
            fitted, held_out = fold != f, fold == f
            for s, strength in enumerate(STRENGTHS):
                a, y = x[fitted], 2.0 * is_positive[fitted, k] - 1
                a, y = a - a.mean(0), y - y.mean()
                weights = np.linalg.solve(a.T @ a + strength * len(a) * np.eye(a.shape[1]), a.T @ y)
                areas[s] += area_under_curve(x[held_out] @ weights, is_positive[held_out, k])
        assert found.strengths[k] == STRENGTHS[areas.argmax()]
    assert len(set(found.strengths)) > 1


def test_an_input_equal_to_the_label_is_separated_and_noise_is_not():
    rng = np.random.default_rng(0)
    is_positive, group = rng.random((4000, 1)) < 0.1, np.arange(4000) % 8
    noise = rng.normal(size=(4000, 20)).astype(np.float32)
    exact = np.concatenate([noise, is_positive.astype(np.float32)], 1)
    fitted = group < 4
    areas = {}
    for name, inputs in (("noise", noise), ("exact", exact)):
        scores = Ridge.fit(inputs[fitted], is_positive[fitted], group[fitted]).predict(inputs[~fitted])
        areas[name] = area_under_curve(scores[:, 0], is_positive[~fitted, 0])
    assert areas["exact"] == 1
    assert areas["noise"] == pytest.approx(0.5, abs=0.06)


def test_a_fold_keeps_groups_whole():
    group = np.array(["d", "a", "b", "g", "c", "e", "f", "a", "g", "g"])
    fold = fold_of(group)
    assert set(fold) == set(range(5))
    assert all(len(set(fold[group == name])) == 1 for name in group)


def test_a_fold_without_the_class_does_not_count_and_no_fold_gives_the_default():
    nan = np.nan
    areas = np.array(
        [[[0.6, nan, 0.7], [0.8, nan, 0.7]], [[nan, nan, 0.7], [nan, nan, 0.7]]]
    )  # (folds, strengths, classes)
    assert best_strengths(areas, np.array([10.0, 0.1])).tolist() == [0.1, UNTESTED, 10.0]


def test_one_group_gives_the_default_strength():
    inputs, is_positive, group = random_problem()
    assert Ridge.fit(inputs, is_positive, np.zeros_like(group)).strengths.tolist() == [UNTESTED] * 2


@pytest.mark.parametrize("noise", [0, 4e-7])
def test_a_channel_that_is_constant_except_for_rounding_changes_nothing(noise):
    inputs, is_positive, group = random_problem()
    constant = 7 * (1 + noise * is_positive[:, :1]).astype(np.float32)
    more = np.concatenate([inputs, constant, np.zeros_like(constant)], 1)
    expected, found = (Ridge.fit(x, is_positive, group).predict(x) for x in (inputs, more))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_inputs_are_converted_a_block_at_a_time(monkeypatch):
    inputs, is_positive, group = random_problem()
    expected = Ridge.fit(inputs, is_positive, group).predict(inputs)
    monkeypatch.setattr(ridge, "_ROWS", 7)
    np.testing.assert_allclose(Ridge.fit(inputs, is_positive, group).predict(inputs), expected, rtol=1e-9, atol=1e-9)
