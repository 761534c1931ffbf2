"""Proper scores of predictive distributions and of what is stated about them: probabilities, quantiles, intervals.

A score or loss is proper when no forecast does better in expectation than the distribution that the outcome is drawn
from (Gneiting and Raftery 2007). Higher is better for scores; losses say loss. Scores of several outcomes at once are
in `multivariate_scores`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.special import ndtr

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import Empirical
from bayeslens.core.quantiles import cdf, log_prob, logsumexp, mean_and_variance, quantile

LEVELS = np.arange(1, 100) / 100  # the 99 quantiles from which a CRPS without closed form is computed
# Levels evenly spaced in normal deviates, which reach far enough into both tails to see what lies beyond a threshold,
# and the probability that each stands for.
_DEVIATES = np.linspace(-4.5, 4.5, 181)
_TAIL_LEVELS = ndtr(_DEVIATES)
_TAIL_WEIGHTS = np.diff(ndtr(np.concatenate([[-np.inf], (_DEVIATES[1:] + _DEVIATES[:-1]) / 2, [np.inf]])))
_CELL = tuple(zip(*np.polynomial.legendre.leggauss(5), strict=True))


def log_score(distribution: Distribution, y: Any, step: float | None = None) -> Float[np.ndarray, " rows"]:
    """Log density of each row's outcome, or the log probability of its rounding cell. Higher is better.

    Args:
        distribution: batch shape (rows,).
        y: outcomes (class codes for Categorical), shape (rows,).
        step: spacing of a rounded or integer-valued outcome (see `core.table.rounding_step`); the score is then the
            log probability of the cell [y - step/2, y + step/2], which is comparable between discrete and
            continuous predictions.

    Raises:
        InputError: draws, which have no density. A kernel density would give one, but its score depends on the
            bandwidth, and the best bandwidth for the score is not that of the best forecast.

    >>> [round(float(s), 4) for s in log_score(dist.Normal(np.zeros(2), 1.0), np.zeros(2))]
    [-0.9189, -0.9189]
    """
    if step is None or distribution.is_discrete:
        return log_prob(distribution, y)
    y = np.asarray(y, np.float64)
    mass = cdf(distribution, y + step / 2) - cdf(distribution, y - step / 2)
    # Where the difference of two cdfs has no digits left, the density is integrated over the cell.
    nodes = [log_prob(distribution, y + step / 2 * node) + np.log(w / 2) for node, w in _CELL]
    by_density = logsumexp(np, np.stack(nodes, -1)) + np.log(step)
    with np.errstate(divide="ignore"):
        return np.where(mass > 1e-3, np.log(mass), np.minimum(by_density, 0.0))


def crps_loss(distribution: Distribution, y: Any) -> Float[np.ndarray, " rows"]:
    """Continuous ranked probability score of each row. A loss: lower is better, in the units of y.

    In closed form for the Normal, LogNormal, Laplace and mixtures of Normals (Gneiting and Raftery 2007; Grimit et
    al. 2006; Jordan et al. 2019), from all pairs of draws for draws, otherwise twice the mean quantile loss at 99
    levels.

    >>> round(float(crps_loss(dist.Normal(np.zeros(1), 1.0), np.zeros(1))[0]), 4)
    0.2337
    """
    d, y = distribution, np.asarray(y, np.float64)
    if isinstance(d, Empirical):
        return crps_loss_from_samples(np.asarray(d.values).T, y)
    if isinstance(d, dist.Normal):
        loc, scale = np.asarray(d.loc), np.asarray(d.scale)
        z = (y - loc) / scale
        return scale * (z * (2 * ndtr(z) - 1) + 2 * _density(z) - 1 / np.sqrt(np.pi))
    if isinstance(d, dist.LogNormal):
        loc, scale = np.asarray(d.loc), np.asarray(d.scale)
        z = (np.log(np.maximum(y, 1e-300)) - loc) / scale  # below the support everything lies above y
        factor = 2 * np.exp(loc + scale**2 / 2)
        return y * (2 * ndtr(z) - 1) - factor * (ndtr(z - scale) + ndtr(scale / np.sqrt(2)) - 1)
    if isinstance(d, dist.Laplace):
        z = np.abs(y - np.asarray(d.loc)) / np.asarray(d.scale)
        return np.asarray(d.scale) * (z + np.exp(-z) - 0.75)
    if isinstance(d, dist.MixtureSameFamily) and isinstance(d.component_distribution, dist.Normal):
        w, c = np.asarray(d.mixing_distribution.probs), d.component_distribution
        loc, scale = np.asarray(c.loc), np.asarray(c.scale)
        first = np.sum(w * _absolute_moment(y[..., None] - loc, scale), -1)
        pairs = _absolute_moment(
            loc[..., :, None] - loc[..., None, :], np.sqrt(scale[..., :, None] ** 2 + scale[..., None, :] ** 2)
        )
        return first - 0.5 * np.sum(w[..., :, None] * w[..., None, :] * pairs, (-2, -1))
    return crps_loss_from_quantiles(quantile(d, LEVELS), LEVELS, y)


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def _absolute_moment(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E|X| of a Normal."""
    z = mean / scale
    return 2 * scale * _density(z) + mean * (2 * ndtr(z) - 1)


def crps_loss_from_quantiles(
    quantiles: Float[np.ndarray, "rows levels"], levels: Float[np.ndarray, " levels"], y: Any
) -> Float[np.ndarray, " rows"]:
    """Twice the mean quantile loss, which tends to the CRPS as evenly spaced levels grow dense.

    >>> crps_loss_from_quantiles(np.array([[0.0]]), np.array([0.5]), np.array([2.0])).tolist()
    [2.0]
    """
    error = np.asarray(y)[:, None] - np.asarray(quantiles)
    return 2 * (error * (np.asarray(levels) - (error < 0))).mean(1)


def crps_loss_from_samples(
    samples: Float[np.ndarray, "draws rows"], y: Any, *, fair: bool = True
) -> Float[np.ndarray, " rows"]:
    """CRPS of draws, E|X - y| - E|X - X'|/2 over all pairs, in O(draws log draws) (Gneiting and Raftery 2007).

    Args:
        samples: draws of every row.
        y: outcomes, shape (rows,).
        fair: leave a draw's distance to itself out of the second term (Ferro 2014): the loss is then unbiased for
            that of the distribution which the draws are from, whatever their number, and may be negative. False
            gives the CRPS of the empirical distribution itself, which favours forecasts with more draws.

    >>> y, draws = np.array([1.0]), np.array([[0.0], [2.0]])
    >>> crps_loss_from_samples(draws, y).tolist(), crps_loss_from_samples(draws, y, fair=False).tolist()
    ([0.0], [0.5])

    Raises:
        InputError: fewer than two draws.
    """
    ordered = np.sort(np.asarray(samples, np.float64), axis=0)
    draws = len(ordered)
    if draws < 2:
        raise InputError(f"a CRPS from samples needs at least two draws of every row, got {draws}: draw more")
    rank = (2 * np.arange(draws) - draws + 1)[:, None]
    pairs = draws * (draws - 1 if fair else draws)
    return np.abs(ordered - np.asarray(y)).mean(0) - (rank * ordered).sum(0) / pairs


def threshold_weighted_crps_loss(
    distribution: Distribution, y: Any, *, lower: float = -np.inf, upper: float = np.inf
) -> Float[np.ndarray, " rows"]:
    """CRPS that counts errors between `lower` and `upper` only: how good is the forecast where it matters.

    It is the integral of (F(z) - 1{y <= z})^2 over that range, and equally the CRPS of clip(X, lower, upper) against
    clip(y, lower, upper), which is how it is computed: in closed form for the Normal, from all pairs for draws,
    otherwise by quantile losses at 181 levels that reach into the tails. Proper, unlike scoring only the rows whose
    outcome was extreme (Gneiting and Ranjan 2011; Lerch et al. 2017).

    Args:
        distribution: batch shape (rows,).
        y: outcomes, shape (rows,).
        lower: where the range begins, in the units of y; only `lower` given looks at the upper tail.
        upper: where the range ends; only `upper` given looks at the lower tail.

    Sources: T. Gneiting, R. Ranjan, "Comparing density forecasts using threshold- and quantile-weighted scoring
    rules" (2011); S. Allen, D. Ginsbourger, J. Ziegel, "Evaluating forecasts for high-impact events using transformed
    kernel scores" (2023), for the chaining function.

    Raises:
        InputError: `lower` is not below `upper`.

    >>> d, y = dist.Normal(np.zeros(1), 1.0), np.array([0.3])
    >>> parts = [threshold_weighted_crps_loss(d, y, upper=1.0), threshold_weighted_crps_loss(d, y, lower=1.0)]
    >>> bool(np.allclose(sum(parts), crps_loss(d, y)))
    True
    """
    if not lower < upper:
        raise InputError(f"lower must be below upper, got {lower} and {upper}: give one of them for a tail")
    d, y = distribution, np.asarray(y, np.float64)
    if isinstance(d, dist.Normal):
        loc, scale = np.asarray(d.loc, np.float64), np.asarray(d.scale, np.float64)
        a, b = (lower - loc) / scale, (upper - loc) / scale
        z = np.clip((y - loc) / scale, a, b)
        integral = _squared_cdf_integral
        return scale * ((integral(z) - integral(a)) + (integral(-z) - integral(-b)))
    clipped = np.clip(y, lower, upper)
    if isinstance(d, Empirical):
        return crps_loss_from_samples(np.clip(np.asarray(d.values).T, lower, upper), clipped)
    error = clipped[:, None] - np.clip(quantile(d, _TAIL_LEVELS), lower, upper)
    return 2 * (error * (_TAIL_LEVELS - (error < 0))) @ _TAIL_WEIGHTS


def _squared_cdf_integral(z: np.ndarray) -> np.ndarray:
    """Integral of the squared standard normal cdf from minus infinity to z, whose limit there is zero."""
    finite = np.where(np.isneginf(z), 0.0, z)
    value = (
        finite * ndtr(finite) ** 2 + 2 * _density(finite) * ndtr(finite) - ndtr(np.sqrt(2) * finite) / np.sqrt(np.pi)
    )
    return np.where(np.isneginf(z), 0.0, value)


def quantile_loss(quantiles: Any, level: float, y: Any) -> Float[np.ndarray, " rows"]:
    """Quantile (pinball) loss of a forecast of one quantile: level x (y - q) above it, (1 - level) x (q - y) below.

    Args:
        quantiles: the predicted quantile of each row, shape (rows,).
        level: its probability, strictly between 0 and 1.
        y: outcomes, shape (rows,).

    Raises:
        InputError: a level outside (0, 1).

    >>> quantile_loss(np.zeros(2), 0.9, np.array([1.0, -1.0])).round(3).tolist()
    [0.9, 0.1]
    """
    if not 0 < level < 1:
        raise InputError(f"a quantile level must lie strictly between 0 and 1, got {level}")
    error = np.asarray(y, np.float64) - np.asarray(quantiles, np.float64)
    return error * (level - (error < 0))


def dawid_sebastiani_loss(distribution: Distribution, y: Any) -> Float[np.ndarray, " rows"]:
    """Loss of the predicted mean and variance alone: ((y - mean) / sd)^2 + 2 log sd (Dawid and Sebastiani 1999).

    Minus twice the log score of a Normal with these moments, up to a constant. It serves where only moments are to
    be trusted, as for draws.

    Raises:
        InputError: a row whose variance is zero or not finite.

    >>> dawid_sebastiani_loss(dist.Normal(np.zeros(1), 1.0), np.array([2.0])).tolist()
    [4.0]
    """
    mean, variance = (np.asarray(m, np.float64) for m in mean_and_variance(distribution))
    wrong = ~((variance > 0) & np.isfinite(variance))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"row {row} has the predicted variance {variance[row]:g}: use the CRPS, which needs no variance"
        )
    return (np.asarray(y, np.float64) - mean) ** 2 / variance + np.log(variance)


def brier_loss(probs: Float[np.ndarray, "rows classes"], labels: Any) -> Float[np.ndarray, " rows"]:
    """Squared error of the class probabilities, summed over classes. A loss between 0 and 2.

    >>> brier_loss(np.array([[0.8, 0.2]]), np.array([0])).round(2).tolist()
    [0.08]
    """
    probs = np.asarray(probs, np.float64)
    outcome = np.eye(probs.shape[1])[np.asarray(labels, int)]
    return ((probs - outcome) ** 2).sum(1)


def spherical_score(probs: Float[np.ndarray, "rows classes"], labels: Any) -> Float[np.ndarray, " rows"]:
    """Probability of the observed class over the Euclidean length of all class probabilities. Between 0 and 1.

    Source: Gneiting and Raftery 2007, section 3.

    >>> spherical_score(np.array([[0.6, 0.8]]), np.array([1])).round(2).tolist()
    [0.8]
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels, int)
    return probs[np.arange(len(labels)), labels] / np.sqrt((probs**2).sum(1))


def ranked_probability_loss(probs: Float[np.ndarray, "rows classes"], labels: Any) -> Float[np.ndarray, " rows"]:
    """Squared errors of the cumulative probabilities of ordered classes, summed: a near miss costs less than a far one.

    With classes one apart it is the CRPS; some authors divide it by the number of classes less one (Epstein 1969).

    >>> ranked_probability_loss(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), np.array([1, 2])).tolist()
    [1.0, 2.0]
    """
    probs = np.asarray(probs, np.float64)
    reached = np.asarray(labels, int)[:, None] <= np.arange(probs.shape[1] - 1)
    return ((np.cumsum(probs, 1)[:, :-1] - reached) ** 2).sum(1)


def interval_loss(lower: Any, upper: Any, y: Any, coverage: float) -> Float[np.ndarray, " rows"]:
    """Interval (Winkler) loss: the width, plus 2/(1-coverage) times the distance by which y is missed.

    >>> interval_loss(np.array([0.0]), np.array([1.0]), np.array([1.5]), 0.9).round(6).tolist()
    [11.0]
    """
    lower, upper, y = (np.asarray(a, np.float64) for a in (lower, upper, y))
    missed = np.maximum(lower - y, 0) + np.maximum(y - upper, 0)
    return upper - lower + 2 / (1 - coverage) * missed


def pit(distribution: Distribution, y: Any) -> Float[np.ndarray, " rows"]:
    """Probability integral transform: the predicted probability of at most y, uniform when calibrated.

    For rounded outcomes y is the middle of its cell.

    >>> pit(dist.Normal(np.zeros(1), 1.0), np.zeros(1)).tolist()
    [0.5]
    """
    return cdf(distribution, y)


def coverage(lower: Any, upper: Any, y: Any) -> tuple[float, float]:
    """Share of outcomes inside their interval, and its standard error.

    >>> coverage(np.zeros(4), np.ones(4), np.array([0.5, 0.2, 2.0, 1.0]))
    (0.75, 0.21650635094610965)
    """
    inside = (np.asarray(lower) <= np.asarray(y)) & (np.asarray(y) <= np.asarray(upper))
    share = float(inside.mean())
    return share, float(np.sqrt(share * (1 - share) / len(inside)))
