"""Calibration: how far predicted probabilities agree with frequencies, and how to mend them."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.core.transformed import Recalibrated

_LOWER = np.array([0.0, 1e-4, 1e-3, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4])
_KNOTS = np.concatenate([_LOWER, [0.5], 1 - _LOWER[::-1]])


class QuantileMap(eqx.Module):
    """An increasing map of [0, 1] that makes PIT values uniform: apply it to any later prediction.

    `levels[i]` is the calibrated probability at `knots[i]`.
    """

    knots: Float[np.ndarray, " knots"]
    levels: Float[np.ndarray, " knots"]

    @classmethod
    def fit(cls, pit: Any) -> QuantileMap:
        """Learn the map from held-out PIT values: the Dirichlet posterior mean over bins that are finer in the tails.

        A bin begins where at least one row is expected beyond: 16 bins of 100 rows end at 0.01 and 0.99, 20 bins of
        10,000 rows at 0.0001 and 0.9999. How many rows the identity map counts for maximizes the
        Dirichlet-multinomial evidence, so that values that look uniform leave the predictions as they are.

        Args:
            pit: held-out PIT values, shape (rows,).

        Raises:
            InputError: values outside [0, 1].

        >>> m = QuantileMap.fit(np.linspace(0, 1, 1001) ** 2)
        >>> bool(np.interp(0.2, m.knots, m.levels) > 0.3)
        True
        """
        from scipy.special import gammaln

        pit = np.asarray(pit, np.float64)
        if not ((pit >= 0) & (pit <= 1)).all():
            raise InputError("PIT values must lie in [0, 1]: are they probabilities of at most y?")
        beyond = np.minimum(_KNOTS, 1 - _KNOTS)
        knots = _KNOTS[(beyond == 0) | (beyond * len(pit) > 1 - 1e-9)]
        counts, width = np.histogram(pit, knots)[0], np.diff(knots)
        concentration = np.geomspace(10, 1e5, 40)[:, None]
        evidence = gammaln(concentration[:, 0]) - gammaln(concentration[:, 0] + len(pit))
        evidence += (gammaln(counts + concentration * width) - gammaln(concentration * width)).sum(1)
        prior_rows = concentration[evidence.argmax(), 0]
        levels = np.concatenate([[0.0], np.cumsum((counts + prior_rows * width) / (len(pit) + prior_rows))])
        levels[-1] = 1.0
        # Maps of any two tables have the same knots, so that rows that they recalibrate can stand in one table.
        return cls(_KNOTS.astype(np.float32), np.interp(_KNOTS, knots, levels).astype(np.float32))

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated distribution."""
        return Recalibrated(distribution, self.knots, self.levels)


class Temperature(eqx.Module):
    """Class probabilities raised to a power and renormalized (temperature scaling, Guo et al. 2017)."""

    inverse: float

    @classmethod
    def fit(cls, probs: Float[np.ndarray, "rows classes"], labels: Any, *, prior_rows: float = 20.0) -> Temperature:
        """Maximize the held-out log score, with a log-normal prior around no change worth `prior_rows` rows.

        >>> rough = np.tile([[0.99, 0.01]], (100, 1))
        >>> Temperature.fit(rough, np.arange(100) % 4 == 0).inverse < 0.5
        True
        """
        from scipy.optimize import minimize_scalar

        log_probs = np.log(np.clip(np.asarray(probs, np.float64), 1e-12, 1.0))
        labels = np.asarray(labels, int)

        def loss(log_inverse: float) -> float:
            scaled = np.exp(log_inverse) * log_probs
            scaled -= np.logaddexp.reduce(scaled, axis=1, keepdims=True)
            return -scaled[np.arange(len(labels)), labels].sum() + 0.5 * prior_rows * log_inverse**2

        return cls(float(np.exp(minimize_scalar(loss, bounds=(-2.5, 2.5), method="bounded").x)))

    def __call__(self, distribution: Distribution) -> Distribution:
        """The rescaled Categorical."""
        powered = np.asarray(distribution.probs) ** self.inverse
        return build(dist.CategoricalProbs, probs=powered / powered.sum(-1, keepdims=True))


class CalibrationError(NamedTuple):
    """An expected calibration error and its standard error."""

    value: float
    standard_error: float


def pit_calibration_error(pit: Any, *, bins: int = 10) -> CalibrationError:
    """Total variation distance between the PIT histogram and uniform: sum |frequency - 1/bins| / 2.

    The standard error is by the multinomial's delta method.

    >>> pit_calibration_error(np.linspace(0.005, 0.995, 100)).value < 1e-12
    True
    """
    pit = np.asarray(pit)
    frequency = np.histogram(pit, np.linspace(0, 1, bins + 1))[0] / len(pit)
    value = 0.5 * np.abs(frequency - 1 / bins).sum()
    return CalibrationError(float(value), _sign_standard_error(np.sign(frequency - 1 / bins) / 2, frequency, len(pit)))


def _sign_standard_error(gradient: np.ndarray, frequency: np.ndarray, rows: int) -> float:
    variance = (gradient**2 * frequency).sum() - (gradient * frequency).sum() ** 2
    return float(np.sqrt(max(variance, 0.0) / rows))


class Reliability(NamedTuple):
    """A binned reliability curve: mean predicted probability, observed frequency, its standard error, rows per bin."""

    predicted: np.ndarray
    observed: np.ndarray
    standard_error: np.ndarray
    rows: np.ndarray


def reliability(probability: Any, outcome: Any, *, bins: int = 10) -> Reliability:
    """Observed frequency against predicted probability, in bins of equal numbers of rows.

    Args:
        probability: predicted probabilities of an event, shape (rows,).
        outcome: whether it happened, shape (rows,).

    >>> reliability([0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1], bins=2).observed.tolist()
    [0.0, 1.0]
    """
    probability, outcome = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    order = np.argsort(probability, kind="stable")
    groups = [g for g in np.array_split(order, min(bins, len(order))) if len(g)]
    rows = np.array([len(g) for g in groups])
    predicted = np.array([probability[g].mean() for g in groups])
    observed = np.array([outcome[g].mean() for g in groups])
    return Reliability(predicted, observed, np.sqrt(np.maximum(predicted * (1 - predicted), 1e-12) / rows), rows)


def expected_calibration_error(
    probs: Float[np.ndarray, "rows classes"], labels: Any, *, bins: int = 10
) -> CalibrationError:
    """Top-label expected calibration error with its standard error (Guo et al. 2017; bins of equal rows).

    >>> e = expected_calibration_error(np.array([[0.8, 0.2]] * 10), np.array([0] * 8 + [1] * 2), bins=1)
    >>> round(e.value, 6)
    0.0
    """
    probs = np.asarray(probs)
    top = probs.argmax(1)
    correct = top == np.asarray(labels)
    curve = reliability(probs.max(1), correct, bins=bins)
    share = curve.rows / curve.rows.sum()
    value = (share * np.abs(curve.observed - curve.predicted)).sum()
    variance = (share**2 * np.maximum(curve.observed * (1 - curve.observed), 1e-12) / curve.rows).sum()
    return CalibrationError(float(value), float(np.sqrt(variance)))
