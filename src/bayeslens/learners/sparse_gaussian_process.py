"""Gaussian process regression on many rows: Titsias's collapsed variational bound with inducing points.

The bound and its gradient are in closed form, on the host in float64. Hyperparameters and inducing points are chosen
on a subset; the posterior then takes in every row, a chunk at a time.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from bayeslens.learners.gaussian_process import LatentFunction
from bayeslens.learners.gaussian_process_evidence import (
    Covariance,
    Observations,
    cholesky,
    covariance_terms,
    repeated_rows,
    unpack,
)
from bayeslens.learners.gaussian_process_hyperparameters import maximize, optimize_hyperparameters

_CHUNK = 8192
_EXACT_ROWS = 1000  # hyperparameters start from the exact evidence of this many rows
_BOUND_ROWS = 6000  # and are finished on the bound of this many
_JITTER = 1e-8


def evidence_bound(
    parameters: Float[np.ndarray, " parameters"],
    observations: Observations,
    points: Float[np.ndarray, "points inputs"],
) -> tuple[float, Float[np.ndarray, " parameters"]]:
    """A lower bound of `log_evidence`, and its gradient in the log hyperparameters; equal when points are the rows.

    Source: Titsias 2009, Variational Learning of Inducing Variables in Sparse Gaussian Processes, equation 9.

    >>> row = np.zeros((1, 1))
    >>> value, _ = evidence_bound(np.zeros(4), Observations(np.zeros(1, int), row, np.zeros(1), np.ones(1)), row)
    >>> round(value, 4)  # a Normal of variance 1 + 1 + 1
    -1.4682
    """
    from scipy.linalg.lapack import dpotri, dpotrs

    groups, x, y, weights = observations.groups, observations.x, observations.y, observations.weights
    covariance, noise = unpack(parameters, groups)
    inside, cross = covariance_terms(covariance, points, points), covariance_terms(covariance, points, x)
    prior = inside.total
    prior[np.diag_indices(len(points))] += _JITTER * np.diag(prior).mean()
    diagonal, precision = covariance.diagonal(x), weights / noise**2
    weighted = cross.total * precision
    gram, moment = weighted @ cross.total.T, weighted @ y
    prior_factor, factor = cholesky(prior), cholesky(prior + gram)
    solved = dpotrs(factor, moment, lower=1)[0]
    prior_inverse, inverse = (_symmetric(dpotri(f, lower=1)[0]) for f in (prior_factor, factor))
    log_ratio = 2 * (np.log(np.diag(factor)).sum() - np.log(np.diag(prior_factor)).sum())
    square, missed = precision @ (y * y), precision @ diagonal - np.vdot(prior_inverse, gram)
    extra, extra_gradient = repeated_rows(noise, weights)
    value = 0.5 * (np.log(precision / (2 * np.pi)).sum() - log_ratio - square + moment @ solved - missed) + extra
    spread = prior_inverse @ gram @ prior_inverse
    by_prior = 0.5 * (prior_inverse - inverse - np.outer(solved, solved) - spread)
    by_cross = (prior_inverse - inverse) @ weighted + np.outer(solved, precision * (y - solved @ cross.total))
    gradient = inside.pull_back(by_prior, groups) + cross.pull_back(by_cross, groups)
    gradient[-2] -= precision.sum() * covariance.smooth**2
    gradient[-1] -= covariance.linear**2 / max(x.shape[1], 1) * (precision @ np.square(x).sum(1))
    by_noise = -len(y) + square + np.vdot(inverse, gram) - 2 * moment @ solved + solved @ gram @ solved + missed
    return float(value), np.append(gradient, by_noise + extra_gradient)


def _symmetric(lower: np.ndarray) -> np.ndarray:
    """A matrix of which LAPACK has written the lower triangle."""
    lower = np.tril(lower)
    return lower + np.tril(lower, -1).T


def inducing_points(
    covariance: Covariance, x: Float[np.ndarray, "rows inputs"], count: int
) -> Float[np.ndarray, "points inputs"]:
    """Rows chosen one after the other where the function is least known from those before.

    Fewer than `count` when the others would add nothing.

    Source: Burt, Rasmussen and van der Wilk 2020, Convergence of Sparse Variational Inference in Gaussian Processes
    Regression, section 4.

    >>> covariance = Covariance(np.ones(1), 1.0, 0.0)
    >>> inducing_points(covariance, np.array([[0.0], [0.0], [3.0], [0.1]]), 2).tolist()
    [[0.0], [3.0]]
    """
    remaining = covariance.diagonal(x)
    smallest = 1e-6 * remaining.max(initial=0.0)
    rooted = np.zeros((min(count, len(x)), len(x)))
    chosen: list[int] = []
    for number, row in enumerate(rooted):
        best = int(np.argmax(remaining))
        if remaining[best] <= smallest:
            break
        row[:] = covariance(x[best : best + 1], x)[0] - rooted[:number, best] @ rooted[:number]
        row /= np.sqrt(remaining[best])
        remaining -= np.square(row)
        remaining[best] = 0.0
        chosen.append(best)
    return x[chosen]


def sparse_posterior(
    parameters: Float[np.ndarray, " parameters"],
    observations: Observations,
    points: Float[np.ndarray, "points inputs"],
) -> tuple[LatentFunction, float]:
    """The variational posterior of the function given all rows, and the evidence bound.

    >>> row = np.zeros((1, 1))
    >>> latent, _ = sparse_posterior(np.zeros(4), Observations(np.zeros(1, int), row, np.ones(1), np.ones(1)), row)
    >>> round(float(latent.moments(row, row)[0][0]), 4)  # 2 / (2 + 1)
    0.6667
    """
    from scipy.linalg import solve_triangular

    x, y, weights = observations.x, observations.y, observations.weights
    covariance, noise = unpack(parameters, observations.groups)
    prior = covariance(points, points)
    factor = cholesky(prior + _JITTER * np.diag(prior).mean() * np.eye(len(points)))
    precision = weights / noise**2
    gram, moment, known = np.zeros_like(prior), np.zeros(len(points)), 0.0
    for start in range(0, len(y), _CHUNK):
        rows = slice(start, start + _CHUNK)
        rooted = solve_triangular(factor, covariance(points, x[rows]), lower=True)
        weighted = rooted * precision[rows]
        gram, moment = gram + weighted @ rooted.T, moment + weighted @ y[rows]
        known += precision[rows] @ covariance.diagonal(x[rows])
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    turned = vectors.T @ moment
    back = solve_triangular(factor, vectors, lower=True, trans="T")
    fit = (turned**2 / (1 + values)).sum() - precision @ (y * y) - (known - values.sum())
    bound = 0.5 * (np.log(precision / (2 * np.pi)).sum() - np.log1p(values).sum() + fit)
    latent = LatentFunction(covariance, back @ (turned / (1 + values)), back * np.sqrt(values / (1 + values)), noise)
    return latent, float(bound + repeated_rows(noise, weights)[0])


def fit_sparse(
    observations: Observations, num_inducing: int
) -> tuple[Float[np.ndarray, "points inputs"], LatentFunction, float]:
    """Inducing points, the posterior of the function, and the evidence bound.

    Hyperparameters start at the optimum of the exact evidence of 1,000 rows, and are finished on the bound of 6,000.

    >>> x = np.linspace(-2, 2, 50)[:, None]
    >>> points, latent, _ = fit_sparse(Observations(np.zeros(1, int), x, np.sin(x[:, 0]), np.ones(50)), 12)
    >>> bool(np.abs(latent.moments(x, points)[0] - np.sin(x[:, 0])).max() < 0.01)
    True
    """
    order = np.random.default_rng(0).permutation(len(observations.y))  # tables are often sorted
    few, some = observations.take(order[:_EXACT_ROWS]), observations.take(order[:_BOUND_ROWS])
    parameters = optimize_hyperparameters(few)
    points = inducing_points(unpack(parameters, some.groups)[0], some.x, num_inducing)
    parameters, _ = maximize(lambda p: evidence_bound(p, some, points), parameters, 15)
    return points, *sparse_posterior(parameters, observations, points)
