"""Proper scores of predictive distributions. Higher is better for scores; CRPS, Brier and interval losses say loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import ndtr
from jaxtyping import Array, Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import rowwise
from bayeslens.core.errors import InputError
from bayeslens.core.quantile import cumulative, invert_cdf

LEVELS = np.arange(1, 100) / 100  # the 99 quantiles from which a CRPS without closed form is computed
_CELL_NODES, _CELL_WEIGHTS = np.polynomial.legendre.leggauss(5)


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
        return rowwise(_log_prob, distribution, y)
    return rowwise(_log_cell, distribution, y, shared=(np.float32(step),))


def _log_prob(d: Distribution, y: Array) -> Array:
    return d.log_prob(y)


def _log_cell(d: Distribution, y: Array, step: Array) -> Array:
    """Difference of cdfs where it keeps its digits, otherwise quadrature of the density over the cell."""
    nodes = y + step / 2 * _CELL_NODES.astype(np.float32).reshape(-1, *[1] * jnp.ndim(y))
    log_weights = jnp.log(_CELL_WEIGHTS / 2).reshape(-1, *[1] * jnp.ndim(y))
    by_density = jax.scipy.special.logsumexp(d.log_prob(nodes) + log_weights, axis=0) + jnp.log(step)
    mass = cumulative(d, y + step / 2) - cumulative(d, y - step / 2)
    return jnp.where(mass > 0.02, jnp.log(jnp.maximum(mass, 1e-30)), jnp.minimum(by_density, 0.0))


def crps_loss(distribution: Distribution, y: Any) -> Float[np.ndarray, " rows"]:
    """Continuous ranked probability score of each row. A loss: lower is better, in the units of y.

    In closed form for the Normal, LogNormal, Laplace and mixtures of Normals (Gneiting and Raftery 2007; Grimit et
    al. 2006; Jordan et al. 2019), otherwise twice the mean quantile loss at 99 levels.

    >>> round(float(crps_loss(dist.Normal(np.zeros(1), 1.0), np.zeros(1))[0]), 4)
    0.2337
    """
    return rowwise(_crps, distribution, y)


def _crps(d: Distribution, y: Array) -> Array:
    if isinstance(d, dist.Normal):
        z = (y - d.loc) / d.scale
        return d.scale * (z * (2 * ndtr(z) - 1) + 2 * _density(z) - 1 / np.sqrt(np.pi))
    if isinstance(d, dist.LogNormal):
        z = (jnp.log(y) - d.loc) / d.scale
        factor = 2 * jnp.exp(d.loc + d.scale**2 / 2)
        return y * (2 * ndtr(z) - 1) - factor * (ndtr(z - d.scale) + ndtr(d.scale / np.sqrt(2)) - 1)
    if isinstance(d, dist.Laplace):
        z = jnp.abs(y - d.loc) / d.scale
        return d.scale * (z + jnp.exp(-z) - 0.75)
    if isinstance(d, dist.MixtureSameFamily) and isinstance(d.component_distribution, dist.Normal):
        w, c = d.mixing_distribution.probs, d.component_distribution
        first = jnp.sum(w * _absolute_moment(y[..., None] - c.loc, c.scale), -1)
        pairs = _absolute_moment(
            c.loc[..., :, None] - c.loc[..., None, :], jnp.sqrt(c.scale[..., :, None] ** 2 + c.scale[..., None, :] ** 2)
        )
        return first - 0.5 * jnp.sum(w[..., :, None] * w[..., None, :] * pairs, (-2, -1))
    levels = jnp.asarray(LEVELS, y.dtype).reshape(-1, *[1] * y.ndim)
    return _quantile_crps(invert_cdf(d, levels), levels, y)


def _density(z: Array) -> Array:
    return jnp.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def _absolute_moment(mean: Array, scale: Array) -> Array:
    """E|X| of a Normal."""
    z = mean / scale
    return 2 * scale * _density(z) + mean * (2 * ndtr(z) - 1)


def _quantile_crps(quantiles: Any, levels: Any, y: Any) -> Any:
    error = y - quantiles
    return 2 * (error * (levels - (error < 0))).mean(0)


def crps_loss_from_quantiles(
    quantiles: Float[np.ndarray, "rows levels"], levels: Float[np.ndarray, " levels"], y: Any
) -> Float[np.ndarray, " rows"]:
    """Twice the mean quantile loss, which tends to the CRPS as evenly spaced levels grow dense.

    >>> crps_loss_from_quantiles(np.array([[0.0]]), np.array([0.5]), np.array([2.0])).tolist()
    [2.0]
    """
    return _quantile_crps(np.asarray(quantiles).T, np.asarray(levels)[:, None], np.asarray(y))


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
    return rowwise(cumulative, distribution, y)


def coverage(lower: Any, upper: Any, y: Any) -> tuple[float, float]:
    """Share of outcomes inside their interval, and its standard error.

    >>> coverage(np.zeros(4), np.ones(4), np.array([0.5, 0.2, 2.0, 1.0]))
    (0.75, 0.21650635094610965)
    """
    inside = (np.asarray(lower) <= np.asarray(y)) & (np.asarray(y) <= np.asarray(upper))
    share = float(inside.mean())
    return share, float(np.sqrt(share * (1 - share) / len(inside)))
