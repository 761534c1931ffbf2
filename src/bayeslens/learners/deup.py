"""Direct epistemic uncertainty prediction: learn the error of a predictor, and take away what nobody could know."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive, fit_rows
from bayeslens.core.quantiles import mean_and_variance
from bayeslens.core.table import Table, Target, take
from bayeslens.evaluation.familiarity import Familiarity
from bayeslens.evaluation.scores import log_score
from bayeslens.evaluation.uncertainty import entropy_split, variance_split
from bayeslens.learners.linear import check_weights
from bayeslens.learners.ngboost import NGBoost
from bayeslens.learners.splits import folds, seed_from

_LEAST_SHARE = 1e-2  # of the mean loss: added before the logarithm, so that lucky hits do not rule the fit
_LEAST_DISTANCE = 1e-2  # standard deviations: rows nearer than this are all near


class DEUP(Learner):
    """Direct epistemic uncertainty prediction (Lahlou et al. 2023) for any learner.

    The excess risk of a prediction is its expected loss minus that of the best possible prediction. It is large
    where data are few and also where the model cannot follow the data, which the spread of a posterior misses. An
    error learner is trained on the losses of held-out rows, from their features, the distance to the training rows
    and the base learner's own uncertainties; the excess risk is the predicted loss minus the noise, at least 0. The
    loss is the squared error of the mean, or minus the log probability of the class.

    Args:
        base: the learner whose predictions are kept and whose errors are learned.
        error: a regression learner for the logarithm of the loss; None (default) is NGBoost. With under about 50
            rows a Gaussian process, as in the paper, follows the loss more smoothly.
        noise: loss of the best possible prediction: the noise variance (the entropy of the classes), or a regression
            predictive whose mean it is. None (default) takes nothing away, which gives an upper bound.
        num_folds: of each round of cross-validation; (2, 5) shows the error learner every row at two distances.

    >>> from bayeslens.learners.linear import BayesianLinearRegression
    >>> X = np.linspace(-1, 1, 60)[:, None]
    >>> predictive = DEUP(BayesianLinearRegression()).fit(X, np.abs(X[:, 0]) ** 3, key=jax.random.key(0))
    >>> bool(predictive.excess_risk(np.array([[1.0]])) > predictive.excess_risk(np.array([[0.6]])))
    True
    """

    base: Learner
    error: Learner | None = None
    noise: float | Predictive | None = None
    num_folds: tuple[int, ...] = (2, 5)

    @property
    def tasks(self) -> frozenset[str]:
        """Tasks of the base learner."""
        return frozenset(self.base.tasks)

    @property
    def takes(self) -> frozenset[str]:
        """Weights, where both learners take them."""
        return frozenset(self.base.takes) & frozenset((self.error or NGBoost()).takes) & {"weights"}

    def fit(self, X: Any, y: Any, *, key: Any, weights: Any = None) -> DEUPPredictive:
        """See `Learner.fit`; weights count in both learners and in the mean loss.

        Raises:
            InputError: an error learner that cannot do regression, noise below 0, too few rows for the folds, or
                weights that do not fit.
        """
        error_learner = self.error or NGBoost()
        if "regression" not in error_learner.tasks:
            raise InputError(f"the error learner has to predict numbers, {type(error_learner).__name__} does not")
        if isinstance(self.noise, int | float) and not self.noise >= 0:
            raise InputError(f"noise is an expected loss: it must be at least 0, got {self.noise}")
        target = Target.from_values(y, next(iter(self.tasks)) if len(self.tasks) == 1 else "auto")
        if weights is not None:
            weights = check_weights(weights, len(target.values))
            used = np.flatnonzero(weights > 0)  # a row that counts for nothing is not there
            X, target, weights = take(X, used), target.rows(used), weights[used]
        table = Table.from_data(X, weights)
        rows, features, losses = self._held_out(table, X, target, key, weights)
        counted = None if weights is None else weights[rows]
        least = _LEAST_SHARE * np.average(losses, weights=counted) + 1e-300
        error = fit_rows(
            error_learner,
            features,
            Target(np.log(losses + least)),
            None,
            jax.random.fold_in(key, 1),
            counted,
        )
        fitted = np.exp(mean_and_variance(error(features))[0])
        return DEUPPredictive(
            table=table,
            base=fit_rows(self.base, X, target, None, jax.random.fold_in(key, 0), weights),
            error=error,
            familiarity=Familiarity.fit(X, weights=weights),
            noise=self.noise,
            factor=float(np.average(losses, weights=counted) / np.average(fitted, weights=counted)),
            classes=target.classes,
        )

    def _held_out(self, table: Table, X: Any, target: Target, key: Any, weights: Any) -> tuple[np.ndarray, ...]:
        """Row numbers, features and losses of every row that some fold held out."""
        rows, features, losses = [], [], []
        for round_, count in enumerate(self.num_folds):
            round_key = jax.random.fold_in(key, 2 + round_)
            seed = seed_from(round_key)
            for number, (train, test) in enumerate(folds(target, num_folds=count, seed=seed)):
                fitted = fit_rows(self.base, X, target, train, jax.random.fold_in(round_key, number), weights)
                counted = None if weights is None else weights[train]
                seen, held_out = Familiarity.fit(take(X, train), weights=counted), take(X, test)
                features.append(_features(table, fitted, seen, held_out))
                losses.append(_loss(fitted(held_out), target.rows(test)))
                rows.append(test)
        return np.concatenate(rows), np.concatenate(features), np.concatenate(losses)


def _loss(distribution: Distribution, target: Target) -> Float[np.ndarray, " rows"]:
    """Squared error of the mean, or minus the log probability of the class."""
    if target.classes is None:
        return np.square(mean_and_variance(distribution)[0] - target.values)
    return -np.maximum(log_score(distribution, target.values), -100.0)


def _features(table: Table, base: Predictive, seen: Familiarity, x: Any) -> Float[np.ndarray, "rows features"]:
    """What the error is learned from: the row, its distance to training rows, epistemic and total uncertainty."""
    members, weights = base.members(x)
    split = variance_split(members, weights) if base.classes is None else entropy_split(members.probs, weights)
    total = np.maximum(split.total, 1e-300)
    epistemic = np.maximum(split.epistemic, 1e-6 * total)  # members that agree leave rounding errors
    distance = np.log(seen.distance(x) + _LEAST_DISTANCE)
    return np.column_stack([np.asarray(table.dense(x), np.float64), distance, np.log(epistemic), np.log(total)])


class DEUPPredictive(Predictive):
    """The base's predictions, with the excess risk of each.

    `error` predicts the logarithm of the loss from features, and `factor` turns its exponential into a mean loss.
    """

    table: Table
    base: Predictive
    error: Predictive
    familiarity: Familiarity
    noise: float | Predictive | None
    factor: float
    classes: tuple | None = None

    def __call__(self, x: Any) -> Distribution:
        """The base's distribution."""
        return self.base(x)

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """The base's members."""
        return self.base.members(x)

    def expected_loss(self, x: Any) -> Float[np.ndarray, " rows"]:
        """Predicted loss of the base's prediction for new outcomes."""
        features = _features(self.table, self.base, self.familiarity, x)
        return self.factor * np.exp(mean_and_variance(self.error(features))[0])

    def excess_risk(self, x: Any) -> Float[np.ndarray, " rows"]:
        """Epistemic uncertainty: the predicted loss beyond that of the best possible prediction, at least 0."""
        noise = mean_and_variance(self.noise(x))[0] if isinstance(self.noise, Predictive) else self.noise or 0.0
        return np.maximum(self.expected_loss(x) - noise, 0.0)
