"""Calibration: how far predicted probabilities agree with frequencies, and how to mend them."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.optimize import isotonic_regression

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.core.transformed import Recalibrated
from bayeslens.evaluation.decision_curves import checked_events

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
    # Rows of equal probability share their outcomes: else bins would depend on the order of the table.
    _, index, counts = np.unique(probability, return_inverse=True, return_counts=True)
    outcome = (np.bincount(index, outcome) / counts)[index]
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


class DebiasedError(NamedTuple):
    """A root mean square calibration error whose square is estimated without bias.

    `squared` may be negative by chance; `value` is its root, 0 where it is negative. The standard error of `value` is
    half the width that one standard error of the square has after taking roots, which stays finite at 0.
    """

    value: float
    standard_error: float
    squared: float
    squared_standard_error: float


def _root(squared: float, error: float) -> DebiasedError:
    kept = max(squared, 0.0)
    low, middle, high = np.sqrt(np.maximum([kept - error, kept, kept + error], 0.0))
    return DebiasedError(float(middle), float((high - low) / 2), float(squared), float(error))


def debiased_calibration_error(
    probs: Float[np.ndarray, "rows classes"], labels: Any, *, bins: int = 15
) -> DebiasedError:
    """Top-label root mean square calibration error, without the bias that makes calibrated predictions look wrong.

    In a bin, the square of the mean of `outcome - probability` is estimated from pairs of unlike rows, whose
    products have the right expectation; for calibrated predictions it is 0 exactly. Where all predictions of a bin
    are equal this is the estimator of Broecker and of Kumar et al. The standard error is that of this U-statistic.

    Args:
        probs: class probabilities.
        labels: class codes, shape (rows,).
        bins: of about equal numbers of rows; 15 as in the literature, fewer where a bin would have fewer than two.

    Sources: J. Broecker, "Estimating reliability and resolution of probability forecasts through decomposition of
    the empirical score" (2012); A. Kumar, P. Liang, T. Ma, "Verified uncertainty calibration" (2019).

    >>> e = debiased_calibration_error(np.array([[0.8, 0.2]] * 10), np.array([0] * 8 + [1] * 2), bins=1)
    >>> e.value, round(e.squared, 4)
    (0.0, -0.0178)
    """
    probs, labels = checked_probabilities(probs, labels)
    squared, error = _unbiased_square(probs.max(1), probs.argmax(1) == labels, bins)
    return _root(squared, error)


def _unbiased_square(probability: np.ndarray, outcome: np.ndarray, bins: int) -> tuple[float, float]:
    """Mean over bins of the squared mean residual, from pairs of unlike rows, and its standard error."""
    if len(probability) < 2:
        raise InputError("a debiased calibration error needs at least two rows")
    # Rows of equal probability share a bin: in which one a row is must not depend on the order of the table.
    _, group, counts = np.unique(probability, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    bin_of = (middle * min(bins, len(probability) // 2) / len(probability)).astype(int)[group]
    residual = np.asarray(outcome, np.float64) - probability
    rows = np.bincount(bin_of)
    total, squares = (np.bincount(bin_of, a)[rows > 1] for a in (residual, residual**2))
    rows = rows[rows > 1]  # a row alone has no partner
    if not len(rows):
        raise InputError("no bin holds two rows: take fewer bins")
    pairs = (total**2 - squares) / (rows * (rows - 1))
    variance, share = np.maximum(squares / rows - pairs, 0.0), rows / rows.sum()
    by_mean, by_pairs = share**2 @ (4 * pairs * variance / rows), share**2 @ (2 * variance**2 / (rows * (rows - 1)))
    return float(share @ pairs), float(np.sqrt(max(by_mean, 0.0) + by_pairs))


class ClasswiseError(NamedTuple):
    """Root mean square over classes of their debiased calibration errors, and each class's own."""

    value: float
    standard_error: float
    squared: float
    squared_standard_error: float
    by_class: tuple[DebiasedError, ...]


def classwise_calibration_error(
    probs: Float[np.ndarray, "rows classes"], labels: Any, *, bins: int = 15
) -> ClasswiseError:
    """Classwise (marginal) calibration error, debiased: is each class as frequent as its probability says?

    The mean over classes of the squared errors is unbiased. Its standard error takes the classes' errors as fully
    correlated, as those of two classes are, and is an upper bound for more.

    Sources: A. Kumar, P. Liang, T. Ma (2019); M. Kull et al., "Beyond temperature scaling" (2019).

    >>> probs = np.array([[0.9, 0.1]] * 100)
    >>> round(classwise_calibration_error(probs, np.arange(100) % 2, bins=1).value, 2)
    0.4
    """
    probs, labels = checked_probabilities(probs, labels)
    each = [_unbiased_square(probs[:, k], labels == k, bins) for k in range(probs.shape[1])]
    squared, error = np.mean(each, axis=0)
    return ClasswiseError(*_root(squared, error), tuple(_root(*e) for e in each))


class KolmogorovSmirnovError(NamedTuple):
    """A Kolmogorov-Smirnov calibration error, its standard error, and its p-value under perfect calibration."""

    value: float
    standard_error: float
    p_value: float


def kolmogorov_smirnov_calibration_error(
    probs: Float[np.ndarray, "rows classes"], labels: Any
) -> KolmogorovSmirnovError:
    """Largest gap between the cumulated top-label probabilities and the cumulated hits, in order of probability.

    Needs no bins. Under calibration the gap is a random walk with known variances, so that its largest value has
    the distribution of the maximum of a Brownian motion: this gives the p-value (two-sided, asymptotic).

    Source: K. Gupta et al., "Calibration of neural networks using splines" (2021).

    >>> probs = np.array([[0.9, 0.1]] * 100)
    >>> e = kolmogorov_smirnov_calibration_error(probs, np.arange(100) % 2)
    >>> round(e.value, 6), e.p_value < 1e-6
    (0.4, True)
    """
    probs, labels = checked_probabilities(probs, labels)
    return _kolmogorov_smirnov(probs.max(1), probs.argmax(1) == labels)


def _kolmogorov_smirnov(probability: np.ndarray, outcome: np.ndarray) -> KolmogorovSmirnovError:
    values, group = np.unique(probability, return_inverse=True)  # rows of equal probability have no order
    gap = np.cumsum(np.bincount(group, outcome - probability)) / len(group)
    largest = np.abs(gap).argmax()
    up_to = probability <= values[largest]
    error = np.sqrt(np.sum((outcome - probability)[up_to] ** 2)) / len(group)
    spread = np.sqrt(np.sum(probability * (1 - probability))) / len(group)
    if spread == 0:
        return KolmogorovSmirnovError(float(np.abs(gap).max()), float(error), float(np.abs(gap).max() == 0))
    odd = 2 * np.arange(50) + 1
    ratio = max(np.abs(gap).max() / spread, 0.05)  # below, the p-value is 1 to all digits
    below = 4 / np.pi * np.sum((-1.0) ** np.arange(50) / odd * np.exp(-((odd * np.pi) ** 2) / (8 * ratio**2)))
    return KolmogorovSmirnovError(float(np.abs(gap).max()), float(error), float(np.clip(1 - below, 0.0, 1.0)))


class SmoothError(NamedTuple):
    """A smooth calibration error, its standard error, and the bandwidth that it chose for itself."""

    value: float
    standard_error: float
    bandwidth: float


def smooth_calibration_error(probs: Float[np.ndarray, "rows classes"], labels: Any) -> SmoothError:
    """SmoothECE: the top-label residuals, smoothed over the probability by a kernel, in absolute value.

    The kernel is a Gaussian reflected at 0 and 1; the bandwidth is the one that equals the error itself, so there is
    nothing to choose, and small changes of the predictions change the error little.

    Source: J. Blasiok, P. Nakkiran, "Smooth ECE: principled reliability diagrams via kernel smoothing" (2023).

    >>> probs = np.array([[0.9, 0.1]] * 1000)
    >>> round(smooth_calibration_error(probs, np.arange(1000) % 2).value, 2)
    0.4
    """
    from scipy.ndimage import gaussian_filter1d

    probs, labels = checked_probabilities(probs, labels)
    top, hit = probs.max(1), probs.argmax(1) == labels
    cells, rows = 1000, len(top)
    cell = np.minimum((top * cells).astype(int), cells - 1)
    residual = np.bincount(cell, hit - top, minlength=cells) / rows

    def smoothed(bandwidth: float) -> np.ndarray:
        return gaussian_filter1d(residual, bandwidth * cells, mode="reflect", truncate=6.0)

    low, high = 1.0 / cells, 1.0  # the error falls and the bandwidth rises: bisection finds where they meet
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(smoothed(middle)).sum() > middle else (low, middle)
    curve = smoothed(high)
    weight = gaussian_filter1d(np.sign(curve), high * cells, mode="reflect", truncate=6.0)[cell]
    error = np.sqrt(np.sum((weight * (hit - top)) ** 2)) / rows
    return SmoothError(float(np.abs(curve).sum()), float(error), float(high))


class ConfidenceBand(NamedTuple):
    """Where the frequency at each distinct predicted probability lies."""

    predicted: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def confidence_band(
    probability: Any, outcome: Any, *, key: Any, coverage: float = 0.9, resamples: int = 200
) -> ConfidenceBand:
    """Pointwise confidence band of a CORP reliability curve (see `reliability_diagram`).

    Outcomes are drawn from the curve itself and fitted again. Drawn from steps at 0 and 1 they would not vary: half a
    row of the other outcome stands beyond each end.

    Args:
        probability: predicted probabilities of an event, shape (rows,).
        outcome: whether it happened, shape (rows,).
        key: a `jax.random.key`.
        coverage: at each probability.
        resamples: 200 put ten beyond each edge of a 90% band.

    Raises:
        InputError: a probability outside [0, 1] or an outcome other than 0 and 1.

    Source: T. Dimitriadis, T. Gneiting, A. Jordan, "Stable reliability diagrams for probabilistic classifiers" (2021).

    >>> import jax
    >>> band = confidence_band([0.1] * 50 + [0.9] * 50, [0] * 40 + [1] * 60, key=jax.random.key(0))
    >>> bool(band.lower[0] < 0.2 < band.upper[0]), band.predicted.tolist()
    (True, [0.1, 0.9])
    """
    from bayeslens.core.randomness import host_generator

    probability, outcome = checked_events(probability, outcome)
    values, curve = smoothed_isotonic(probability, outcome)
    rows = np.unique(probability, return_counts=True)[1]
    rng, tail = host_generator(key), (1 - coverage) / 2
    drawn = [isotonic_regression(rng.binomial(rows, curve) / rows, weights=rows).x for _ in range(resamples)]
    return ConfidenceBand(values, *np.quantile(drawn, [tail, 1 - tail], axis=0))


def smoothed_isotonic(probability: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct probabilities and their frequencies by isotonic regression, none of which is 0 or 1.

    Half a row with the event counts below all others, and half a row without it above all.

    >>> smoothed_isotonic(np.array([0.2, 0.7]), np.array([0.0, 1.0]))[1].round(3).tolist()
    [0.333, 0.667]
    """
    values, group, rows = np.unique(probability, return_inverse=True, return_counts=True)
    weights = np.concatenate([[0.5], rows, [0.5]])
    frequency = np.concatenate([[1.0], np.bincount(group, outcome) / rows, [0.0]])
    return values, isotonic_regression(frequency, weights=weights).x[1:-1]


def checked_probabilities(probs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities as float64 and class codes as integers, or an `InputError` that names the first wrong row.

    >>> checked_probabilities([[0.5, 0.6]], [0])
    Traceback (most recent call last):
    bayeslens.core.errors.InputError: the probabilities of row 0, [0.5, 0.6], sum to 1.1: they must sum to 1
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or probs.shape[1] < 2 or not len(probs):
        raise InputError(
            f"need probabilities of shape (rows, classes) and one label per row, got {probs.shape} and {labels.shape}"
        )
    total = probs.sum(1)
    for wrong, cure in (
        (~(probs >= 0).all(1), "they must be numbers of at least 0"),
        (~(np.abs(total - 1) < 1e-4), "they must sum to 1"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            shown = [round(float(p), 6) for p in probs[row, :5]]
            said = f", sum to {total[row]:.6g}" if cure.endswith("1") else ""
            raise InputError(f"the probabilities of row {row}, {shown}{said}: {cure}")
    wrong = ~np.isin(labels, np.arange(probs.shape[1]))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"the label of row {row} is {labels[row].item()!r}: give class codes from 0 to {probs.shape[1] - 1}, "
            "in the order of the columns"
        )
    return probs / total[:, None], labels.astype(int)
