"""Natural gradients of families of distributions, and their fit to all rows at once, in plain NumPy.

The natural gradient is the gradient of the loss multiplied by the inverse of the metric that the loss induces: the
Fisher information for the log score, 2 times the integral of dF dF' for the CRPS (Duan et al. 2020). Everything is
vectorized NumPy, since boosting calls it once a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpyro.distributions import Distribution

from bayeslens.core.quantiles import backend

LOG_DF = (np.log(1.1), np.log(300.0))  # a Student t beyond this range is Cauchy-like, or normal
LOG_MEAN = (-20.0, 20.0)  # of counts
LOG_CONCENTRATION = (-5.0, 7.0)  # of a negative binomial; beyond, it is as good as a Poisson


def columns(*values: np.ndarray) -> np.ndarray:
    """Columns side by side, each in one piece of memory, as LightGBM takes them."""
    return np.stack(values).T


def bounded_exp(t: Any) -> Any:
    """The exponential of parameters, NumPy's or traced, kept finite."""
    xp = backend(t)
    return xp.exp(xp.clip(t, -60.0, 60.0))


class Family(NamedTuple):
    """One family under one score.

    Attributes:
        start: a rough marginal fit, from targets and weights, shape (parameters,).
        loss: loss of every row from targets, parameters and the mask of censored rows.
        gradient: from the same, the gradient of the loss, shape (rows, parameters), and the metric: its diagonal,
            shape (rows, parameters), or in full, (rows, parameters, parameters).
        distribution: the NumPyro distribution of parameters.
        check: raises on targets outside the support.
        rate: index of the parameter that a log exposure is added to, or None.
        censoring: whether right-censored rows are understood.
        spread: whether the parameters after the first say how far the target spreads.
    """

    start: Callable[[np.ndarray, np.ndarray], np.ndarray]
    loss: Callable[[np.ndarray, np.ndarray, Any], np.ndarray]
    gradient: Callable[[np.ndarray, np.ndarray, Any], tuple[np.ndarray, np.ndarray]]
    distribution: Callable[[np.ndarray], Distribution]
    check: Callable[[np.ndarray], None] = lambda y: None
    rate: int | None = None
    censoring: bool = False
    spread: bool = True


def natural_gradient(
    family: Family,
    y: Any,
    theta: Float[np.ndarray, "rows parameters"],
    censored: Bool[np.ndarray, " rows"] | None = None,
) -> Float[np.ndarray, "rows parameters"]:
    """The metric's inverse times the gradient of the loss.

    >>> from bayeslens.learners.ngboost_families import family_of
    >>> family = family_of("normal")
    >>> natural_gradient(family, np.array([3.0]), np.array([[1.0, 0.0]])).tolist()
    [[-2.0, -1.5]]
    """
    gradient, metric = family.gradient(y, theta, censored)
    if metric.ndim == 2:
        return gradient / metric
    ridge = 1e-9 * np.trace(metric, axis1=1, axis2=2)[:, None, None] * np.eye(metric.shape[-1])
    return np.linalg.solve(metric + ridge, gradient[..., None])[..., 0]


def marginal_parameters(family: Family, y: Any, weights: Any, censored: Any = None) -> Float[np.ndarray, " parameters"]:
    """Maximum likelihood (or least CRPS) of one distribution for all rows, by damped Fisher scoring.

    >>> from bayeslens.learners.ngboost_families import family_of
    >>> marginal_parameters(family_of("poisson"), np.array([1.0, 3.0]), np.ones(2)).round(4).tolist()
    [0.6931]
    """
    keep = np.linspace(0, len(y) - 1, min(len(y), 20_000)).round().astype(int)
    y, weights = y[keep], weights[keep]
    start = family.start(y, weights)
    nothing = np.zeros((len(y), len(start)))
    return best_shift(family, y, nothing, weights, None if censored is None else censored[keep], start)


def best_shift(
    family: Family,
    y: Any,
    theta: Float[np.ndarray, "rows parameters"],
    weights: Any,
    censored: Any,
    start: Float[np.ndarray, " parameters"],
    prior_rows: float = 0.0,
) -> Float[np.ndarray, " parameters"]:
    """The constant that, added to every row's parameters, minimizes the mean loss, by damped Fisher scoring.

    Args:
        family: the family.
        y: targets.
        theta: parameters of every row.
        weights: row weights.
        censored: mask of censored rows, or None.
        start: where to begin.
        prior_rows: rows' worth of belief in no shift at all.
    """
    total = weights.sum()

    def loss(shift: np.ndarray) -> float:
        rows = family.loss(y, theta + shift, censored)
        return float(weights @ rows + 0.5 * prior_rows * (shift**2).sum()) / total

    shift, best, size = start, loss(start), 1.0
    for _ in range(100):
        step = weights @ natural_gradient(family, y, theta + shift, censored) + prior_rows * shift
        step = np.clip(step / (total + prior_rows), -2, 2)
        trial = loss(shift - size * step)
        while size > 1e-4 and not trial <= best:
            size /= 2
            trial = loss(shift - size * step)
        if size <= 1e-4:
            break
        change, best, shift = best - trial, trial, shift - size * step
        if change < 1e-9 * (1 + abs(best)):
            break
        size = min(1.0, 2 * size)
    return shift
