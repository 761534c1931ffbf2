"""Bayesian stacking: a mixture of learners whose weights maximize the held-out log score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import concatenate
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.mixture import mix, side_by_side
from bayeslens.core.table import Table, Target, take
from bayeslens.core.transformed import through_rounding_cells
from bayeslens.evaluation.scores import log_score
from bayeslens.learners.splits import folds, seed_from

SCORE_FLOOR = -100.0  # nats: one impossible row must not decide a weight by infinity


def stacking_weights(
    log_scores: Float[np.ndarray, "rows learners"], row_weights: Any = None, *, prior_rows: float = 1.0
) -> Float[np.ndarray, " learners"]:
    """Weights of a mixture that maximize its summed log score: EM, which climbs to the one maximum.

    Args:
        log_scores: held-out log density of each row under each learner.
        row_weights: how much each row counts, shape (rows,).
        prior_rows: rows' worth of belief in equal weights, which keeps small tables from all-or-nothing.

    Source: Yao, Vehtari, Simpson and Gelman 2018, Using stacking to average Bayesian predictive distributions.

    >>> stacking_weights(np.array([[0.0, -5.0]] * 50)).round(2).tolist()
    [0.99, 0.01]
    """
    scores = np.maximum(np.nan_to_num(np.asarray(log_scores, np.float64), nan=SCORE_FLOOR), SCORE_FLOOR)
    rows, count = scores.shape
    row_weights = np.ones(rows) if row_weights is None else np.asarray(row_weights, np.float64)
    likelihood = np.exp(scores - scores.max(1, keepdims=True))
    weights = np.full(count, 1 / count)
    for _ in range(1000):
        share = likelihood * weights
        share *= (row_weights / share.sum(1))[:, None]
        updated = (share.sum(0) + prior_rows / count) / (row_weights.sum() + prior_rows)
        if np.abs(updated - weights).max() < 1e-6:
            break
        weights = updated
    return updated


class OutOfFold(NamedTuple):
    """Predictions for held-out rows.

    Attributes:
        rows: their numbers, split by split.
        distribution: their distributions, in the same order.
        fitted: the predictive of each split.
        refit: a function of a key that fits on all rows.
    """

    rows: np.ndarray
    distribution: Distribution
    fitted: list[Predictive]
    refit: Callable[[Any], Predictive]


def out_of_fold(
    learner: Learner, X: Any, target: Target, splits: Sequence[tuple], key: Any, weights: Any = None
) -> OutOfFold:
    """Fit a learner on the training rows of every split, and predict the held-out ones."""
    fitted, refit = learner.fit_folds(X, target, splits, key=key, weights=weights)
    predicted = []
    for predictive, (_, test) in zip(fitted, splits, strict=True):
        distribution = predictive(take(X, test))
        predicted.append(through_rounding_cells(distribution) if target.classes is None else distribution)
    return OutOfFold(np.concatenate([test for _, test in splits]), concatenate(predicted), fitted, refit)


class Stacking(Learner):
    """A mixture of learners, weighted by cross-validated log score, each refitted on all rows.

    Args:
        learners: at least one, all for the same task.
        num_folds: of the cross-validation; 5.

    >>> import jax
    >>> from bayeslens.learners.linear import BayesianLinearRegression
    >>> X = np.random.default_rng(0).normal(size=(40, 2))
    >>> stack = Stacking((BayesianLinearRegression(), BayesianLinearRegression(prior_precision=1e6)))
    >>> predictive = stack.fit(X, X[:, 0], key=jax.random.key(0))
    >>> bool(predictive.weights[0] > 0.9)
    True
    """

    learners: tuple[Learner, ...]
    num_folds: int = 5

    @property
    def tasks(self) -> frozenset[str]:
        """Tasks that every learner can do."""
        return frozenset.intersection(*[frozenset(learner.tasks) for learner in self.learners])

    @property
    def takes(self) -> frozenset[str]:
        """Optional arguments that every learner accepts."""
        return frozenset.intersection(*[frozenset(learner.takes) for learner in self.learners])

    def fit(self, X: Any, y: Any, *, key: Any, weights: Any = None) -> StackedPredictive:
        """See `Learner.fit`.

        Raises:
            InputError: learners for different tasks.
        """
        if not self.tasks:
            raise InputError("the stacked learners have no task in common: stack regressors or classifiers only")
        target = Target.from_values(y, next(iter(self.tasks)) if len(self.tasks) == 1 else "auto")
        splits = folds(target, num_folds=self.num_folds, seed=seed_from(key))
        found = [out_of_fold(learner, X, target, splits, key, weights) for learner in self.learners]
        rows = found[0].rows
        scores = [log_score(f.distribution, target.values[rows], target.step) for f in found]
        mixed = stacking_weights(np.stack(scores, 1), None if weights is None else weights[rows])
        fitted = tuple(f.refit(key) for f in found)
        return StackedPredictive(fitted[0].table, fitted, mixed, target.classes)


class StackedPredictive(Predictive):
    """A weighted mixture of predictives."""

    table: Table
    predictives: tuple[Predictive, ...]
    weights: Float[np.ndarray, " learners"]
    classes: tuple | None = None

    traceable: ClassVar[bool] = False

    def _spread(self, distribution: Distribution) -> Distribution:
        return through_rounding_cells(distribution) if self.classes is None else distribution

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """The members of every learner, weighted by their learner."""
        each = [p.members(x) for p in self.predictives]
        weights = np.concatenate([w * inner for w, (_, inner) in zip(self.weights, each, strict=True)])
        return side_by_side([self._spread(d) for d, _ in each]), weights

    def __call__(self, x: Any) -> Distribution:
        """The mixture of the learners' own marginals."""
        return mix([self._spread(p(x)) for p in self.predictives], self.weights)
