"""Proper scores of predictive distributions. Higher is better for scores; CRPS, Brier and interval losses say loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.special import ndtr

from bayeslens.core.errors import InputError
from bayeslens.core.quantile import cdf, log_prob, logsumexp, quantile

LEVELS = np.arange(1, 100) / 100  # the 99 quantiles from which a CRPS without closed form is computed
_CELL = tuple(zip(*np.polynomial.legendre.leggauss(5), strict=True))


def log_score(distribution: Distribution, y: Any, step: float | None = None) -> Float[np.ndarray, " rows"]:
    """Log density of each row's outcome, or the log probability of its rounding cell. Higher is better.

    Args:
        distribution: batch shape (rows,).
        y: outcomes (class codes for Categorical), shape (rows,).
        step: spacing of a rounded or integer-valued outcome (see `core.table.rounding_step`); the score is then the
            log probability of the cell [y - step/2, y + step/2], which is comparable between discrete and
            continuous predictions.

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
    al. 2006; Jordan et al. 2019), otherwise twice the mean quantile loss at 99 levels.

    >>> round(float(crps_loss(dist.Normal(np.zeros(1), 1.0), np.zeros(1))[0]), 4)
    0.2337
    """
    d, y = distribution, np.asarray(y, np.float64)
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


def crps_loss_from_samples(samples: Float[np.ndarray, "draws rows"], y: Any) -> Float[np.ndarray, " rows"]:
    """CRPS of draws: E|X - y| - E|X - X'|/2 with the unbiased second term (Gneiting and Raftery 2007).

    >>> crps_loss_from_samples(np.array([[0.0], [2.0]]), np.array([1.0])).tolist()
    [0.0]

    Raises:
        InputError: fewer than two draws.
    """
    ordered = np.sort(np.asarray(samples, np.float64), axis=0)
    draws = len(ordered)
    if draws < 2:
        raise InputError("a CRPS from samples needs at least two draws")
    rank = (2 * np.arange(draws) - draws + 1)[:, None]
    return np.abs(ordered - np.asarray(y)).mean(0) - (rank * ordered).sum(0) / (draws * (draws - 1))


def brier_loss(probs: Float[np.ndarray, "rows classes"], labels: Any) -> Float[np.ndarray, " rows"]:
    """Squared error of the class probabilities, summed over classes. A loss between 0 and 2.

    >>> brier_loss(np.array([[0.8, 0.2]]), np.array([0])).round(2).tolist()
    [0.08]
    """
    probs = np.asarray(probs, np.float64)
    outcome = np.eye(probs.shape[1])[np.asarray(labels, int)]
    return ((probs - outcome) ** 2).sum(1)


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
