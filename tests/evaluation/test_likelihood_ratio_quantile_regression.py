"""LR-QR: its minimizer against linear programming and first-order conditions, and coverage under a shift."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.evaluation.likelihood_ratio_quantile_regression import LikelihoodRatioQuantileRegression


def tables(rows, seed):
    """Noise grows along the first of three features; the target has r = 1 + 0.8 x, which is linear, on [-1, 1]."""
    rng = np.random.default_rng(seed)
    source = rng.uniform(-1, 1, size=(rows, 3))
    target = rng.uniform(-1, 1, size=(4 * rows, 3))
    target = target[rng.random(4 * rows) < (1 + 0.8 * target[:, 0]) / 1.8]
    scores = [np.exp(1.2 * x[:, 0]) * np.abs(rng.normal(size=len(x))) for x in (source, target)]
    return source, scores[0], target, scores[1]


def test_without_penalty_it_is_quantile_regression():
    source, scores, target, _ = tables(150, 0)
    fitted = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.8, regularization=0.0)
    design, n = np.column_stack([np.ones(150), source]), 150
    cost = np.r_[np.zeros(8), np.full(n, 0.8), np.full(n, 0.2)]
    exact = linprog(cost, A_eq=np.hstack([design, -design, np.eye(n), -np.eye(n)]), b_eq=scores)

    def loss(threshold):
        error = scores - threshold
        return (error * (0.8 - (error < 0))).sum()

    assert loss(fitted(source)) <= 1.003 * exact.fun  # the loss is smoothed over a hundredth of the scores' quantile
    np.testing.assert_allclose(loss(fitted(source)), exact.fun, rtol=3e-3)


@pytest.mark.parametrize("regularization", [0.05, 0.5])
def test_both_minimizers_are_stationary(regularization):
    """The objective, written down anew, does not fall in any direction of the coefficients nor of beta."""
    source, scores, target, _ = tables(300, 1)
    fitted = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.8, regularization=regularization)
    unit = np.quantile(scores, 0.8)

    def objective(shift, factor):
        moved = [(fitted(x) + np.column_stack([np.ones(len(x)), x]) @ shift) / unit for x in (source, target)]
        error, beta = scores / unit - moved[0], fitted.beta * unit * factor
        pinball = (error * (0.8 - (error < 0))).mean()
        return pinball + regularization * ((beta * moved[0]) ** 2).mean() - 2 * regularization * beta * moved[1].mean()

    least = objective(np.zeros(4), 1.0)
    rng = np.random.default_rng(2)
    for _ in range(50):
        assert objective(0.05 * rng.normal(size=4) * unit, 1.0) > least - 1e-4
        assert objective(np.zeros(4), np.exp(0.1 * rng.normal())) > least - 1e-5


def test_large_penalty_aligns_with_the_likelihood_ratio():
    source, scores, target, _ = tables(4000, 3)
    fitted = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.9, regularization=20.0)
    # A regression of the ratio on 4,000 rows: its root mean squared error is about sqrt(4 / 4000) = 0.03.
    assert np.sqrt(np.mean((fitted.likelihood_ratio(source) - 1 - 0.8 * source[:, 0]) ** 2)) < 0.15


def test_target_is_covered():
    """Of 8,000 target rows, given 2,000 labelled rows: split conformal is short by far more than LR-QR."""
    source, scores, target, _ = tables(2000, 4)
    fitted = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.9)
    _, _, new, outcome = tables(8000, 5)
    share = (outcome <= fitted(new)).mean()
    assert abs(share - 0.9) < 0.02 < 0.9 - (outcome <= np.quantile(scores, 0.9)).mean()


def test_redundant_features_and_units_do_not_matter():
    source, scores, target, _ = tables(200, 6)
    plain = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.9, regularization=0.1)
    doubled = LikelihoodRatioQuantileRegression.fit(
        np.hstack([source, source]), 100 * scores, np.hstack([target, target]), 0.9, regularization=0.1
    )
    np.testing.assert_allclose(doubled(np.hstack([target, target])), 100 * plain(target), rtol=1e-2, atol=0.05)


def test_round_trip(tmp_path):
    source, scores, target, _ = tables(60, 7)
    fitted = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.9, regularization=0.1)
    save(fitted, tmp_path / "f.bayes")
    assert (load(tmp_path / "f.bayes")(target) == fitted(target)).all()


def test_bad_input():
    source, scores, target, _ = tables(60, 8)
    fit = LikelihoodRatioQuantileRegression.fit
    with pytest.raises(InputError, match="row 1 of target_features"):
        fit(source, scores, np.array([[0.0, 0, 0], [np.nan, 0, 0]]), 0.9)
    with pytest.raises(InputError, match="source rows have 3 features, target rows 2"):
        fit(source, scores, target[:, :2], 0.9)
    with pytest.raises(InputError, match="ten rows or more"):
        fit(source[:5], scores[:5], target, 0.9)
    with pytest.raises(InputError, match="at least 0"):
        fit(source, scores, target, 0.9, regularization=-1.0)
