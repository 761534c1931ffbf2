"""Predictions made elsewhere, as predictives: scikit-learn estimators and plain arrays, of draws too."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution, constraints

from bayeslens.core.distribution import register_family
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Predictive
from bayeslens.core.quantiles import backend
from bayeslens.core.table import Table
from bayeslens.core.transformed import QuantileDistribution

_CROSSING = 1e-6  # of the row's range: quantiles that cross by less do so by rounding


@register_family
class Empirical(Distribution):
    """The empirical distribution of draws: each is as probable as any other, and there is no density.

    Args:
        values: draws, shape (*batch, draws), at least two.

    >>> d = Empirical(np.array([[3.0, 1.0, 2.0, 4.0]]))
    >>> d.cdf(np.array([2.0])).tolist(), d.quantile(np.array([0.5])).tolist()
    ([0.5], [2.0])

    Raises:
        InputError: fewer than two draws, or draws that are not finite.
    """

    arg_constraints = {"values": constraints.real_vector}
    support = constraints.real

    def __init__(self, values: Any, *, validate_args: bool | None = None):
        if np.ndim(values) < 1 or np.shape(values)[-1] < 2:
            raise InputError(f"need at least two draws of every row, got {np.shape(values)}: draw more")
        self.values = backend(values).sort(values, -1)
        super().__init__(np.shape(values)[:-1], (), validate_args=validate_args)

    def parts(self) -> tuple:
        """See `register_family`."""
        return {"values": (self.values, 1)}, (), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> Empirical:
        """Rebuild from parts."""
        return cls(**arrays)

    def log_prob(self, value: Any) -> Any:
        """Refused: draws have no density."""
        raise InputError(
            "draws have no density, so that there is no log score: use the CRPS (crps_loss), "
            "or give the distribution that the draws are from"
        )

    def cdf(self, value: Any) -> Any:
        """Share of the draws that are at most `value`."""
        xp = backend(value, self.values)
        return (self.values <= xp.asarray(value)[..., None]).mean(-1)

    def quantile(self, q: Any) -> Any:
        """The smallest draw at which the cdf reaches `q`."""
        xp, draws = backend(q, self.values), np.shape(self.values)[-1]
        # The tolerance undoes the rounding of q x draws.
        index = xp.clip(xp.ceil(xp.asarray(q) * draws * (1 - 1e-6)).astype(int) - 1, 0, draws - 1)
        shape = np.broadcast_shapes(index.shape, self.batch_shape)
        values = xp.broadcast_to(self.values, (*shape, draws))
        return xp.take_along_axis(values, xp.broadcast_to(index, shape)[..., None], -1)[..., 0]

    def icdf(self, q: Any) -> Any:
        return self.quantile(q)

    def moments(self) -> tuple[Any, Any]:
        """Mean and variance; the variance is the unbiased one."""
        return self.values.mean(-1), self.values.var(-1, ddof=1)

    @property
    def mean(self) -> Any:
        return self.moments()[0]

    @property
    def variance(self) -> Any:
        return self.moments()[1]

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        import jax
        import jax.numpy as jnp

        draws = np.shape(self.values)[-1]
        index = jax.random.randint(key, (*sample_shape, *self.batch_shape), 0, draws)
        values = jnp.broadcast_to(self.values, (*index.shape, draws))
        return jnp.take_along_axis(values, index[..., None], -1)[..., 0]


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
    samples: bool = False,
    classes: tuple | None = None,
) -> Predictive:
    """Anything that predicts with probabilities, as a `Predictive`.

    Args:
        source: a `Predictive` (returned as it is), a fitted scikit-learn classifier or a regressor whose `predict`
            takes `return_std`, a NumPyro distribution with one row per batch entry, or an array: class
            probabilities of shape (rows, classes), quantiles of shape (rows, levels) with `quantile_levels`, or
            draws of shape (draws, rows) with `samples`.
        quantile_levels: probabilities of the quantiles, increasing.
        samples: the array holds draws of every row.
        classes: labels of the columns of class probabilities; 0, 1, … by default.

    Raises:
        InputError: something without probabilities, probabilities that do not sum to one, quantiles that cross, or
            values that are not finite; the message names the row.

    >>> p = as_predictive(np.array([[0.2, 0.8], [0.5, 0.5]]))
    >>> p(None).probs.tolist()
    [[0.2, 0.8], [0.5, 0.5]]
    >>> as_predictive(np.array([[0.0, 5.0], [2.0, 7.0]]), samples=True)(None).mean.tolist()
    [1.0, 6.0]
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
        raise InputError(
            "predictions must have shape (rows, classes), (rows, levels) or, with samples=True, (draws, rows); "
            f"got {array.shape}"
        )
    if samples and quantile_levels is not None:
        raise InputError("an array holds draws or quantiles: give samples or quantile_levels, not both")
    rows = array.T if samples else array
    _refuse_row(~np.isfinite(rows).all(1), rows, "holds values that are not finite: drop the row or mend its forecast")
    if samples:
        return FixedPredictive(Empirical(rows))
    if quantile_levels is not None:
        return FixedPredictive(_from_quantiles(array, np.asarray(quantile_levels, np.float64)))
    wrong = (array < 0).any(1) | (np.abs(array.sum(1) - 1) > 1e-4)
    _refuse_row(
        wrong,
        array,
        "holds no class probabilities: they must be at least 0 and sum to 1 in every row (divide each row by its sum); "
        "for quantiles give quantile_levels, for draws samples=True",
    )
    return FixedPredictive(dist.CategoricalProbs(array), classes=classes or tuple(range(array.shape[1])))


def _from_quantiles(values: np.ndarray, levels: np.ndarray) -> QuantileDistribution:
    if levels.shape != values.shape[1:] or not ((levels > 0) & (levels < 1)).all() or (np.diff(levels) <= 0).any():
        raise InputError(
            f"quantile_levels must be {values.shape[1]} increasing probabilities strictly between 0 and 1, one for "
            f"each column, got {levels.tolist()}"
        )
    room = _CROSSING * (1 + np.abs(values).max(1, keepdims=True))
    crossing = (np.diff(values, axis=1) < -room).any(1)
    _refuse_row(crossing, values, "has quantiles that cross: sort them within each row (numpy.sort(quantiles, axis=1))")
    # Equal quantiles would be an infinite density: keep them a rounding error apart.
    gap = 1e-6 * (1 + np.abs(values).max()) * np.arange(values.shape[1])
    return QuantileDistribution(levels, np.sort(values, 1) + gap)


def _refuse_row(wrong: np.ndarray, rows: np.ndarray, what: str) -> None:
    """Refuse the first row that is wrong, by its number and values."""
    if wrong.any():
        row = int(wrong.argmax())
        shown = ", ".join(f"{v:.6g}" for v in rows[row][:8]) + (", …" if rows.shape[1] > 8 else "")
        raise InputError(f"row {row} ({shown}) {what}")
