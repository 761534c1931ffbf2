"""Stacking: weights at the optimum, and a mixture that is what it says."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.optimize import minimize

from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.quantiles import log_prob
from bayeslens.core.table import Table, Target
from bayeslens.learners.linear import BayesianLinearRegression, BayesianLogisticRegression
from bayeslens.learners.splits import folds
from bayeslens.learners.stacking import Stacking, out_of_fold, stacking_weights

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2))
Y = X[:, 0] + RNG.normal(size=60) / 2


class Constant(Learner):
    """Predicts one Normal for every row: what it predicts is known exactly."""

    loc: float = 0.0

    def fit(self, X, y, *, key, **arguments):
        return ConstantPredictive(Table.from_data(X), self.loc)


class ConstantPredictive(Predictive):
    table: Table
    loc: float
    classes: tuple | None = None

    def members(self, x):
        return dist.Normal(np.full((1, len(x)), self.loc), 1.0), np.ones(1)


def summed(weights, scores, rows, prior):
    return (rows * np.log(np.exp(scores) @ weights)).sum() + prior / len(weights) * np.log(weights).sum()


@pytest.mark.parametrize("learners", [2, 3, 5])
@pytest.mark.parametrize("prior", [1.0, 10.0])
def test_weights_are_the_optimum(learners, prior):
    scores = RNG.normal(size=(80, learners)) + np.linspace(0, 0.5, learners)
    rows = RNG.gamma(1, size=80)
    got = stacking_weights(scores, rows, prior_rows=prior)
    assert got.sum() == pytest.approx(1.0)

    def loss(logits):
        weights = np.exp(logits - np.logaddexp.reduce(logits))
        return -summed(weights, scores, rows, prior)

    best = minimize(loss, np.zeros(learners), method="BFGS", options={"gtol": 1e-8})
    weights = np.exp(best.x - np.logaddexp.reduce(best.x))
    np.testing.assert_allclose(got, weights, atol=2e-3)
    assert summed(got, scores, rows, prior) > -best.fun - 1e-3


def test_row_weights_are_repetitions():
    scores, rows = RNG.normal(size=(30, 3)), RNG.integers(0, 4, 30)
    repeated = stacking_weights(np.repeat(scores, rows, 0))
    np.testing.assert_allclose(stacking_weights(scores, rows), repeated, atol=1e-5)


def test_an_impossible_row_does_not_decide():
    scores = np.tile([0.0, -1.0], (100, 1))
    scores[0, 0] = -np.inf
    weights = stacking_weights(scores)
    assert np.isfinite(weights).all() and weights[0] > 0.9
    np.testing.assert_allclose(stacking_weights(np.full((10, 2), np.nan)), 0.5)


def test_equal_learners_share():
    np.testing.assert_allclose(stacking_weights(np.zeros((50, 4))), 0.25)


def test_out_of_fold_never_sees_its_row():
    """A learner that predicts its training mean: each held-out prediction is the mean of the other folds."""

    class Mean(Learner):
        def fit(self, X, y, *, key, **arguments):
            return ConstantPredictive(Table.from_data(X), float(y.values.mean()))

    target = Target.from_values(Y)
    splits = folds(target, num_folds=4, seed=1)
    rows, predicted, fitted, _ = out_of_fold(Mean(), X, target, splits, KEY)
    assert sorted(rows) == list(range(60)) and len(fitted) == 4
    for (train, test), predictive in zip(splits, fitted, strict=True):
        assert predictive.loc == pytest.approx(Y[train].mean())
        np.testing.assert_allclose(np.asarray(predicted.loc)[np.isin(rows, test)], Y[train].mean(), rtol=1e-6)


def test_stack_is_the_mixture_of_its_learners():
    stack = Stacking((Constant(-1.0), Constant(1.0))).fit(X, Y, key=KEY)
    scores = np.stack([log_prob(dist.Normal(np.full(60, m), 1.0), Y) for m in (-1.0, 1.0)], 1)
    np.testing.assert_allclose(stack.weights, stacking_weights(scores), atol=1e-5)  # these do not depend on the fold
    y = RNG.normal(size=5)
    density = np.exp([log_prob(dist.Normal(np.full(5, m), 1.0), y) for m in (-1.0, 1.0)])
    np.testing.assert_allclose(log_prob(stack(X[:5]), y), np.log(stack.weights @ density), rtol=1e-6)
    members, weights = stack.members(X[:5])
    assert members.batch_shape == (2, 5) and weights.sum() == pytest.approx(1.0)


def test_the_better_learner_wins():
    learners = (BayesianLinearRegression(), Constant(5.0))
    assert Stacking(learners).fit(X, Y, key=KEY).weights[0] > 0.95


def test_classes():
    labels = np.where(Y > 0, "up", "down")
    learners = (BayesianLogisticRegression(), BayesianLogisticRegression(prior_precision=1e4))
    stack = Stacking(learners).fit(X, labels, key=KEY)
    assert stack.classes == ("down", "up") and stack.weights[0] > 0.8
    mixed = sum(w * np.asarray(p(X).probs) for w, p in zip(stack.weights, stack.predictives, strict=True))
    np.testing.assert_allclose(stack(X).probs, mixed, rtol=1e-5)
    assert Stacking(learners).tasks == {"classification"} and "weights" in Stacking(learners).takes


def test_weights_reach_the_learners():
    rows = RNG.integers(0, 3, 60).astype(float)
    stack = Stacking((BayesianLinearRegression(), BayesianLinearRegression(prior_precision=10.0))).fit(
        X, Y, key=KEY, weights=rows
    )
    direct = BayesianLinearRegression().fit(X, Y, weights=rows)
    np.testing.assert_allclose(stack.predictives[0].coefficients, direct.coefficients)


def test_refused():
    with pytest.raises(InputError, match="no task in common"):
        Stacking((BayesianLinearRegression(), BayesianLogisticRegression())).fit(X, Y, key=KEY)
    with pytest.raises(InputError, match="does not take weights"):
        Stacking((Constant(),)).fit(X, Y, key=KEY, weights=np.ones(60))
