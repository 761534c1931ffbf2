"""Predictions made elsewhere, as predictives: scikit-learn estimators and plain arrays."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.learner import Predictive
from bayeslens.core.table import Table
from bayeslens.core.transformed import QuantileDistribution


class FixedPredictive(Predictive):
    """Distributions already made for the rows of one table: the argument of a call is not looked at."""

    distribution: Distribution
    table: Table | None = None
    classes: tuple | None = None

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One member: the distributions as they are."""
        import jax

        from bayeslens.core.distribution import put_together, take_apart

        rows = None if x is None else len(x)
        if rows is not None and rows != self.distribution.batch_shape[0]:
            raise InputError(f"predictions were given for {self.distribution.batch_shape[0]} rows, not for {rows}")
        return put_together(jax.tree.map(lambda a: np.asarray(a)[None], take_apart(self.distribution))), np.ones(1)


class EstimatorPredictive(Predictive):
    """A fitted scikit-learn estimator as a predictive.

    Classifiers give their `predict_proba`; regressors that return standard deviations give a Normal; other
    regressors have no uncertainty of their own and are refused.
    """

    estimator: Any
    table: Table | None = None
    classes: tuple | None = None

    not_savable: ClassVar[str] = "it wraps an estimator of another library: save that with its own tools"

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One member."""
        if self.classes is not None:
            probs = np.asarray(self.estimator.predict_proba(x), np.float32)
            return dist.CategoricalProbs(probs[None]), np.ones(1)
        mean, std = self.estimator.predict(x, return_std=True)
        return dist.Normal(np.asarray(mean)[None], np.asarray(std)[None]), np.ones(1)


def as_predictive(
    source: Any,
    *,
    quantile_levels: Float[np.ndarray, " levels"] | None = None,
    classes: tuple | None = None,
) -> Predictive:
    """Anything that predicts with probabilities, as a `Predictive`.

    Args:
        source: a `Predictive` (returned as it is), a fitted scikit-learn classifier or a regressor whose `predict`
            takes `return_std`, a NumPyro distribution with one row per batch entry, or an array: class
            probabilities of shape (rows, classes), or quantiles of shape (rows, levels) with `quantile_levels`.
        quantile_levels: probabilities of the quantiles, increasing.
        classes: labels of the columns of class probabilities; 0, 1, … by default.

    Raises:
        InputError: something without probabilities, or probabilities that do not sum to one.

    >>> p = as_predictive(np.array([[0.2, 0.8], [0.5, 0.5]]))
    >>> p(None).probs.tolist()
    [[0.2, 0.8], [0.5, 0.5]]
    """
    if isinstance(source, Predictive):
        return source
    if isinstance(source, Distribution):
        known = None
        if isinstance(source, dist.CategoricalProbs | dist.CategoricalLogits):
            known = classes or tuple(range(source.probs.shape[-1]))
        return FixedPredictive(source, classes=known)
    if hasattr(source, "predict_proba"):
        return EstimatorPredictive(source, classes=tuple(np.asarray(source.classes_).tolist()))
    if hasattr(source, "predict"):
        import inspect

        if "return_std" not in inspect.signature(source.predict).parameters:
            raise InputError(
                f"{type(source).__name__} predicts numbers without uncertainty: use a learner of this library, "
                "or a regressor whose predict takes return_std"
            )
        return EstimatorPredictive(source)
    array = np.asarray(source, np.float64)
    if array.ndim != 2:
        raise InputError(f"predictions must have shape (rows, classes) or (rows, levels), got {array.shape}")
    if quantile_levels is not None:
        # Equal quantiles would be an infinite density: keep them a rounding error apart.
        gap = 1e-6 * (1 + np.abs(array).max()) * np.arange(array.shape[1])
        return FixedPredictive(QuantileDistribution(np.asarray(quantile_levels), np.sort(array, 1) + gap))
    if (array < 0).any() or not np.allclose(array.sum(1), 1, atol=1e-4):
        raise InputError(
            "class probabilities must be at least 0 and sum to 1 in every row; for quantiles give quantile_levels"
        )
    return FixedPredictive(dist.CategoricalProbs(array), classes=classes or tuple(range(array.shape[1])))
