"""Cross-validated fits: each learner on its own, and NGBoost with rounds that the folds choose for each other."""

from __future__ import annotations

import jax
import numpy as np

from bayeslens.core.table import Target
from bayeslens.learners.linear import BayesianLinearRegression
from bayeslens.learners.ngboost import NGBoost
from bayeslens.learners.splits import folds

KEY = jax.random.key(0)


def test_by_default_every_fold_is_fitted_by_itself():
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(60, 2)), rng.uniform(0.5, 2, 60)
    y = x[:, 0] + 0.1 * rng.normal(size=60)
    target = Target.from_values(y)
    splits = folds(target, num_folds=3, seed=0)
    fitted, refit = BayesianLinearRegression().fit_folds(x, target, splits, key=KEY, weights=weights)
    for (train, _), predictive in zip(splits, fitted, strict=True):
        alone = BayesianLinearRegression().fit(x[train], y[train], key=KEY, weights=weights[train])
        np.testing.assert_allclose(predictive(x).loc, alone(x).loc, rtol=1e-6)
    whole = BayesianLinearRegression().fit(x, y, key=KEY, weights=weights)
    np.testing.assert_allclose(refit(KEY)(x).loc, whole(x).loc, rtol=1e-6)


def test_rounds_of_a_fold_are_chosen_on_the_other_folds():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(200, 2))
    y = x[:, 0] + 0.3 * rng.normal(size=200)
    target = Target.from_values(y)
    splits = folds(target, num_folds=4, seed=0)
    learner = NGBoost(num_trees=120)
    fitted, refit = learner.fit_folds(x, target, splits, key=KEY)
    for (train, _), predictive in zip(splits, fitted, strict=True):
        rounds = predictive.trees[0].values.shape[0] // 2
        alone = NGBoost(num_trees=rounds, early_stopping_rounds=0).fit(x[train], y[train], key=KEY)
        np.testing.assert_allclose(predictive(x).loc, alone(x).loc, rtol=1e-6)
        # The spread alone is shifted, by the same factor everywhere.
        factor = np.asarray(predictive(x).scale) / np.asarray(alone(x).scale)
        np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
    assert np.corrcoef(refit(KEY)(x).loc, x[:, 0])[0, 1] > 0.95


def test_spread_falls_although_no_tree_can_split_it():
    """Once all rows ask for the same step of the scale, trees find nothing to split, and the constant has to move."""
    x = np.repeat([-1.0, 1.0], 300)[:, None]
    y = 10 * (x[:, 0] > 0) + 1e-3 * np.random.default_rng(9).normal(size=600)
    found = NGBoost(num_trees=400, row_fraction=1.0).fit(x, y, key=KEY)(x)
    assert np.asarray(found.scale).max() < 0.05
