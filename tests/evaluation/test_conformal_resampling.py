"""CV+, jackknife+ and full conformal prediction: their theorems hold for every table, so they are checked on tables."""

from __future__ import annotations

import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.evaluation.conformal_resampling import (
    cross_conformal_guarantee,
    cross_conformal_intervals,
    cross_conformal_sets,
    full_conformal_classes,
    full_conformal_ridge,
)


def by_definition(predictions, residuals, folds, coverage):
    """Order statistics of the table of all rows by all new rows."""
    n = len(residuals)
    low, high = predictions[folds].T - residuals, predictions[folds].T + residuals
    up = int(np.ceil((n + 1) * coverage - 1e-9))
    if up > n:
        return np.full(len(low), -np.inf), np.full(len(low), np.inf)
    return np.sort(low, 1)[:, n - up], np.sort(high, 1)[:, up - 1]


@pytest.mark.parametrize("rows,num_folds", [(7, 7), (30, 30), (40, 3), (200, 10), (201, 4), (1000, 5)])
@pytest.mark.parametrize("coverage", [0.2, 0.5, 0.9, 0.99])
def test_intervals_are_the_order_statistics(rows, num_folds, coverage):
    rng = np.random.default_rng(rows)
    folds = rng.permutation(np.arange(rows) % num_folds)
    predictions = 3 * rng.standard_t(2, size=(num_folds, 50))
    for residuals in (rng.exponential(size=rows), rng.integers(0, 4, rows).astype(float)):  # the second with ties
        found = cross_conformal_intervals(predictions, residuals, folds, coverage)
        for ours, exact in zip(found, by_definition(predictions, residuals, folds, coverage), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12)


def test_guarantee_holds_on_every_table():
    """Averaged over which of the n + 1 points is new, coverage of jackknife+ is at least 1 - 2 alpha for any points."""
    rng = np.random.default_rng(0)
    n, coverage = 10, 0.8
    for _ in range(40):
        y = rng.standard_cauchy(n + 1)
        x = rng.standard_cauchy((n + 1, 2))
        covered = []
        for new in range(n + 1):
            rest = np.delete(np.arange(n + 1), new)
            at_new, residuals = np.empty(n), np.empty(n)
            for k in range(n):
                train, held = np.delete(rest, k), rest[k]
                coefficients = np.linalg.lstsq(x[train], y[train], rcond=None)[0]
                at_new[k] = x[new] @ coefficients
                residuals[k] = np.abs(y[held] - x[held] @ coefficients)
            low, high = cross_conformal_intervals(at_new[:, None], residuals, np.arange(n), coverage)
            covered.append(low[0] <= y[new] <= high[0])
        assert np.mean(covered) >= cross_conformal_guarantee(n, n, coverage) - 1e-12


def test_class_sets_are_by_definition():
    rng = np.random.default_rng(1)
    scores, new, folds = rng.random(30), rng.random((3, 20, 4)), rng.permutation(np.arange(30) % 3)
    found = cross_conformal_sets(scores, new, folds, 0.8)
    count = (scores[None, :, None] < new[folds].transpose(1, 0, 2)).sum(1)
    assert (found == (count < 0.8 * 31 - 1e-9)).all()


def ridge_p_value(X, y, x, candidate, penalty):
    """By fitting ridge regression to all rows and the candidate."""
    design = np.column_stack([np.ones(len(X) + 1), np.vstack([X, x])])
    outcomes = np.append(y, candidate)
    gram = design.T @ design + penalty * np.diag([0.0] + [1.0] * X.shape[1])
    residual = np.abs(outcomes - design @ np.linalg.solve(gram, design.T @ outcomes))
    return (residual >= residual[-1] - 1e-12).mean()


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_ridge_intervals_hold_the_conforming_values(penalty):
    rng = np.random.default_rng(2)
    X, X_new = rng.normal(size=(19, 3)), rng.normal(size=(6, 3))
    y = X[:, 0] + rng.standard_t(2, 19)
    low, high = full_conformal_ridge(X, y, X_new, 0.8, penalty=penalty)
    for x, a, b in zip(X_new, low, high, strict=True):
        width = b - a
        inside, outside = (a + 1e-6 * width, b - 1e-6 * width), (a - 1e-6 * width, b + 1e-6 * width)
        assert all(ridge_p_value(X, y, x, c, penalty) > 0.2 + 1e-9 for c in (*inside, (a + b) / 2))
        assert all(ridge_p_value(X, y, x, c, penalty) <= 0.2 + 1e-9 for c in outside)


def test_rows_of_great_leverage_get_no_interval_that_is_too_short():
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(12, 1)), rng.normal(size=12)
    X[0] = 3.0
    far = np.array([[40.0]])
    low, high = full_conformal_ridge(X, y, far, 0.5, penalty=0.01)
    for candidate in np.linspace(-500, 500, 201):
        if ridge_p_value(X, y, far[0], candidate, 0.01) > 0.5 + 1e-9:
            assert low[0] <= candidate <= high[0]


def test_full_conformal_covers_on_every_table():
    """Averaged over which point is new, coverage is at least 1 - alpha for any points: exact, no chance."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        X, y = rng.normal(size=(10, 2)), rng.standard_cauchy(10)
        covered = []
        for new in range(10):
            rest = np.arange(10) != new
            low, high = full_conformal_ridge(X[rest], y[rest], X[[new]], 0.7, penalty=0.5)
            covered.append(low[0] <= y[new] <= high[0])
        assert 0.7 - 1e-12 <= np.mean(covered) <= 0.7 + 0.1 + 1e-12


def nearest_mean(X, labels):
    means = np.array([X[labels == c].mean(0) if (labels == c).any() else np.full(2, 9.0) for c in range(3)])
    return np.linalg.norm(X - means[labels], axis=1)


def test_full_class_sets_cover_on_every_table():
    rng = np.random.default_rng(4)
    for _ in range(10):
        X, labels = rng.normal(size=(10, 2)), rng.integers(0, 3, 10)
        covered = []
        for new in range(10):
            rest = np.arange(10) != new
            sets = full_conformal_classes(nearest_mean, X[rest], labels[rest], X[[new]], 3, 0.7)
            covered.append(sets[0, labels[new]])
        assert np.mean(covered) >= 0.7 - 1e-12


def test_too_few_rows_give_infinite_intervals():
    low, high = cross_conformal_intervals(np.zeros((2, 1)), np.ones(4), [0, 1, 0, 1], 0.9)
    assert np.isneginf(low).all() and np.isposinf(high).all()
    low, high = full_conformal_ridge(np.arange(4.0)[:, None], np.arange(4.0), np.ones((1, 1)), 0.9)
    assert np.isneginf(low).all() and np.isposinf(high).all()


def test_bad_input_is_named():
    with pytest.raises(InputError, match="row 1 is -1"):
        cross_conformal_intervals(np.zeros((1, 1)), [1.0, -1.0], [0, 0], 0.5)
    with pytest.raises(InputError, match="numbered from 0 to 0"):
        cross_conformal_intervals(np.zeros((1, 1)), [1.0, 1.0], [0, 1], 0.5)
    with pytest.raises(InputError, match="a fold for each of 2 rows"):
        cross_conformal_sets([1.0, 1.0], np.zeros((1, 1, 2)), [0], 0.5)
    with pytest.raises(InputError, match="linearly dependent"):
        full_conformal_ridge(np.ones((5, 2)), np.ones(5), np.ones((1, 2)), 0.5, penalty=0.0)
    with pytest.raises(InputError, match="do not fit together"):
        full_conformal_ridge(np.ones((5, 2)), np.ones(5), np.ones((1, 3)), 0.5)
