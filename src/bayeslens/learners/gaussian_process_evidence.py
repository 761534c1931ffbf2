"""The evidence of Gaussian process regression: its covariance, and gradients in closed form.

Everything runs on the host in float64: a few hundred rows take a fraction of a second and nothing is compiled.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from bayeslens.core.errors import InputError

_CONSTANT = 1.0  # prior variance of the constant, in units of the target's variance


class Observations(eqx.Module):
    """What a Gaussian process learns from: standardized inputs and targets, and how much each row counts.

    Args:
        groups: which length scale each input has, shape (inputs,).
        x: inputs, shape (rows, inputs).
        y: targets, shape (rows,).
        weights: shape (rows,); a row of weight 2 counts as two equal rows.

    >>> Observations(np.array([0, 1, 1]), np.zeros((4, 3)), np.zeros(4), np.ones(4)).num_lengths
    2
    """

    groups: Int[np.ndarray, " inputs"]
    x: Float[np.ndarray, "rows inputs"]
    y: Float[np.ndarray, " rows"]
    weights: Float[np.ndarray, " rows"]

    @property
    def num_lengths(self) -> int:
        """How many length scales there are."""
        return int(self.groups.max(initial=-1)) + 1

    def take(self, rows: Int[np.ndarray, " taken"]) -> Observations:
        """The rows of these numbers."""
        return Observations(self.groups, self.x[rows], self.y[rows], self.weights[rows])


def one_thread() -> Any:
    """A context in which linear algebra runs on one core: many small steps on several wait mostly for each other.

    On two busy cores, factorizing 240 rows took 0.4 s with two threads and 0.0004 s with one.

    >>> with one_thread():
    ...     _ = np.eye(2) @ np.eye(2)
    """
    import scipy.linalg  # noqa: F401 - its library must be loaded before it can be limited
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


class Covariance(eqx.Module):
    """Matern-5/2 with a length scale per input, plus a linear part, plus a constant.

    k(x, z) = smooth^2 (1 + a + a^2/3) exp(-a) + linear^2 x'z / inputs + 1, with a = sqrt(5) |(x - z) / lengths|.

    Args:
        lengths: length scales, shape (inputs,).
        smooth: standard deviation of the Matern part.
        linear: standard deviation of the linear part at a typical standardized row.

    >>> covariance = Covariance(np.ones(2), 1.0, 0.0)
    >>> covariance(np.zeros((1, 2)), np.zeros((3, 2))).tolist()
    [[2.0, 2.0, 2.0]]
    """

    lengths: Float[np.ndarray, " inputs"]
    smooth: float
    linear: float

    def __call__(self, x: Any, z: Any) -> Any:
        """Covariances between rows of `x` and of `z`, shape (rows of x, rows of z)."""
        if not isinstance(x, jax.Array) and not isinstance(z, jax.Array):
            return covariance_terms(self, x, z).total
        xs, zs = x / jnp.asarray(self.lengths), z / jnp.asarray(self.lengths)
        square = jnp.square(xs).sum(1)[:, None] + jnp.square(zs).sum(1) - 2 * xs @ zs.T
        apart = square > 1e-12  # the square root has no derivative at zero, the covariance has
        a = jnp.where(apart, jnp.sqrt(5 * jnp.where(apart, square, 1.0)), 0.0)
        matern = (1 + a + jnp.square(a) / 3) * jnp.exp(-a)
        return self.smooth**2 * matern + self.linear**2 / max(x.shape[1], 1) * (x @ z.T) + _CONSTANT

    def diagonal(self, x: Any) -> Any:
        """Variance of the function at every row, shape (rows,)."""
        return self.smooth**2 + self.linear**2 / max(x.shape[1], 1) * (x * x).sum(1) + _CONSTANT


class CovarianceTerms(eqx.Module):
    """The covariance matrix of two sets of rows, with what its derivatives need."""

    total: Float[np.ndarray, "left right"]
    matern: Float[np.ndarray, "left right"]
    slope: Float[np.ndarray, "left right"]
    covariance: Covariance
    left: Float[np.ndarray, "left inputs"]
    right: Float[np.ndarray, "right inputs"]

    def pull_back(self, weights: Float[np.ndarray, "left right"], groups: Int[np.ndarray, " inputs"]) -> np.ndarray:
        """Gradient of sum(weights * total) in the log length scales, log smooth and log linear."""
        sloped = weights * self.slope
        by_input = np.square(self.left).T @ sloped.sum(1) + np.square(self.right).T @ sloped.sum(0)
        by_input -= 2 * (self.left * (sloped @ self.right)).sum(0)
        by_input /= np.square(self.covariance.lengths)
        lengths = np.bincount(groups, by_input, minlength=int(groups.max(initial=-1)) + 1)
        linear = self.covariance.linear**2 / max(len(groups), 1) * np.vdot(self.left, weights @ self.right)
        return np.append(lengths, [2 * np.vdot(weights, self.matern), 2 * linear])


def covariance_terms(
    covariance: Covariance, x: Float[np.ndarray, "left inputs"], z: Float[np.ndarray, "right inputs"]
) -> CovarianceTerms:
    """Evaluate a covariance with its parts, in float64 on the host.

    >>> terms = covariance_terms(Covariance(np.ones(1), 2.0, 0.0), np.zeros((1, 1)), np.zeros((1, 1)))
    >>> terms.total.item(), terms.pull_back(np.ones((1, 1)), np.zeros(1, int)).tolist()
    (5.0, [0.0, 8.0, 0.0])
    """
    left, right = x / covariance.lengths, z / covariance.lengths
    a = left @ (-2 * right.T)
    a += np.square(left).sum(1)[:, None]
    a += np.square(right).sum(1)
    np.maximum(a, 0.0, out=a)
    a *= 5
    np.sqrt(a, out=a)
    decay = np.negative(a)  # in place from here: fresh memory costs more than the arithmetic
    np.exp(decay, out=decay)
    decay *= covariance.smooth**2
    slope = a + 1
    slope *= decay
    a *= a
    a *= decay
    a /= 3
    a += slope
    slope *= 5 / 3
    total = np.matmul(x * (covariance.linear**2 / max(x.shape[1], 1)), z.T, out=decay)
    total += a
    total += _CONSTANT
    return CovarianceTerms(total, a, slope, covariance, x, z)


def unpack(
    parameters: Float[np.ndarray, " parameters"], groups: Int[np.ndarray, " inputs"]
) -> tuple[Covariance, float]:
    """The covariance and the noise's standard deviation of log length scales, log smooth, log linear and log noise.

    >>> unpack(np.zeros(5), np.array([0, 1]))[0].lengths.tolist()
    [1.0, 1.0]
    """
    *_, smooth, linear, noise = np.exp(parameters)
    return Covariance(np.exp(parameters[:-3])[groups], float(smooth), float(linear)), float(noise)


def cholesky(matrix: Float[np.ndarray, "size size"]) -> Float[np.ndarray, "size size"]:
    """Lower Cholesky factor; a matrix that is not positive definite gets the smallest jitter that helps.

    >>> bool(np.isfinite(cholesky(np.ones((3, 3)))).all())
    True
    """
    from scipy.linalg.lapack import dpotrf

    typical = max(float(np.diag(matrix).mean()), 1e-300) if len(matrix) else 1.0
    for jitter in (0.0, *10.0 ** np.arange(-13, 1)):
        shifted = matrix + jitter * typical * np.eye(len(matrix)) if jitter else matrix
        factor, failed = dpotrf(shifted.T, lower=1, clean=1)
        if not failed and np.isfinite(factor[-1:, -1:]).all():
            return factor
    raise InputError("the covariance matrix is not finite: are there infinite values in the table?")


def log_evidence(
    parameters: Float[np.ndarray, " parameters"], observations: Observations
) -> tuple[float, Float[np.ndarray, " parameters"]]:
    """Log marginal likelihood of a Gaussian process and its gradient in the log hyperparameters.

    A row of weight w is w rows in one: its noise variance is divided by w, and the density of the w - 1 others
    about their mean is counted.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, equations 2.30 and 5.9.

    >>> observation = Observations(np.zeros(1, int), np.zeros((1, 1)), np.zeros(1), np.ones(1))
    >>> value, gradient = log_evidence(np.zeros(4), observation)
    >>> round(value, 4), gradient.shape  # a Normal of variance 1 + 1 + 1
    (-1.4682, (4,))
    """
    from scipy.linalg.blas import dsyr
    from scipy.linalg.lapack import dpotri, dpotrs

    y, weights = observations.y, observations.weights
    covariance, noise = unpack(parameters, observations.groups)
    terms = covariance_terms(covariance, observations.x, observations.x)
    spread = noise**2 / weights
    terms.total[np.diag_indices(len(y))] += spread
    factor = cholesky(terms.total)
    solved = dpotrs(factor, y, lower=1)[0]
    value = -0.5 * y @ solved - np.log(np.diag(factor)).sum() - 0.5 * len(y) * np.log(2 * np.pi)
    inverse = dpotri(factor, lower=1, overwrite_c=1)[0]
    # One triangle stands for both, so that half of the sum over pairs is the sum over one with the diagonal halved.
    adjoint = dsyr(-1.0, solved, lower=1, a=inverse, overwrite_a=1).T
    np.negative(adjoint, out=adjoint)
    adjoint[np.diag_indices(len(y))] /= 2
    by_noise = 2 * (np.diag(adjoint) * spread).sum()
    extra, extra_gradient = repeated_rows(noise, weights)
    return float(value + extra), np.append(terms.pull_back(adjoint, observations.groups), by_noise + extra_gradient)


def traceable_log_evidence(parameters: Float[Array, " parameters"], observations: Observations) -> Float[Array, ""]:
    """`log_evidence` in JAX, up to a constant: NaN where the covariance is not positive definite.

    >>> row = Observations(np.zeros(1, int), np.zeros((1, 1)), np.zeros(1), np.ones(1))
    >>> round(float(traceable_log_evidence(jnp.zeros(4), row)), 4)
    -1.4682
    """
    x, y, weights = jnp.asarray(observations.x), observations.y, observations.weights
    *_, smooth, linear, noise = jnp.exp(parameters)
    covariance = Covariance(jnp.exp(parameters[:-3])[observations.groups], smooth, linear)
    total = covariance(x, x) + jnp.diag(jnp.square(noise) / weights)
    density = dist.MultivariateNormal(jnp.zeros(len(y)), covariance_matrix=total).log_prob(y)
    return density - (weights - 1).sum() * parameters[-1]


def repeated_rows(noise: float, weights: Float[np.ndarray, " rows"]) -> tuple[float, float]:
    """Log density that weights add to one row each, and its derivative in log noise.

    >>> repeated_rows(2.0, np.full(3, 2.0))[1]
    -3.0
    """
    others = float((weights - 1).sum())
    return float(-others * np.log(np.sqrt(2 * np.pi) * noise) - 0.5 * np.log(weights).sum()), -others
