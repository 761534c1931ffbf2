"""Gaussian process regression: exact for small tables, with inducing points for large ones.

Everything runs on the host in float64 with gradients in closed form: a few hundred rows take a fraction of a
second and nothing is compiled. Predictions on a `jax.Array` are the same formulas in JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float, Int
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.mixture import mix_members
from bayeslens.core.table import MAX_INDICATORS, Table, Target
from bayeslens.learners.linear import check_weights

_CHUNK = 4096  # rows predicted at once
_STARTING_ROWS = 400  # restarts run on at most this many rows
_DRAW_ROWS = 500  # more rows leave little doubt about hyperparameters, and every draw keeps a matrix of rows x rows
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
_CONSTANT = 1.0  # prior variance of the constant, in units of the target's variance
# Log standard deviations of smooth part, linear part and noise: prior means and standard deviations, and bounds.
_SCALE_MEANS, _SCALE_DEVIATIONS = np.log([0.8, 0.3, 0.4]), np.array([1.0, 1.5, 1.2])
_LENGTH_DEVIATION = 1.2
_LOWEST_NOISE = 1e-3


def input_groups(table: Table) -> Int[np.ndarray, " inputs"]:
    """Which length scale each column of `table.dense` has: one per feature, and one for all categories of a column.

    >>> input_groups(Table.from_data(np.array([[1.0, 2.0], [3.0, 5.0]]))).tolist()
    [0, 1]
    """
    groups, following = [], 0
    for column in table.columns:
        if column.kind == "categorical":
            kept = min(len(column.categories), MAX_INDICATORS)
            groups += [following] * (1 if kept == 2 and not column.has_missing else kept)
            following += 1
        elif column.kind in ("numeric", "date"):
            count = column.num_features + column.has_missing
            groups += range(following, following + count)
            following += count
    return np.array(groups, int)


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
    parameters: Float[np.ndarray, " parameters"],
    groups: Int[np.ndarray, " inputs"],
    x: Float[np.ndarray, "rows inputs"],
    y: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
) -> tuple[float, Float[np.ndarray, " parameters"]]:
    """Log marginal likelihood of a Gaussian process and its gradient in the log hyperparameters.

    A row of weight w is w rows in one: its noise variance is divided by w, and the density of the w - 1 others
    about their mean is counted.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, equations 2.30 and 5.9.

    >>> value, gradient = log_evidence(np.zeros(4), np.zeros(1, int), np.zeros((1, 1)), np.zeros(1), np.ones(1))
    >>> round(value, 4), gradient.shape  # a Normal of variance 1 + 1 + 1
    (-1.4682, (4,))
    """
    from scipy.linalg.blas import dsyr
    from scipy.linalg.lapack import dpotri, dpotrs

    covariance, noise = unpack(parameters, groups)
    terms = covariance_terms(covariance, x, x)
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
    return float(value + extra), np.append(terms.pull_back(adjoint, groups), by_noise + extra_gradient)


def repeated_rows(noise: float, weights: Float[np.ndarray, " rows"]) -> tuple[float, float]:
    """Log density that weights add to one row each, and its derivative in log noise.

    >>> repeated_rows(2.0, np.full(3, 2.0))[1]
    -3.0
    """
    others = float((weights - 1).sum())
    return float(-others * np.log(np.sqrt(2 * np.pi) * noise) - 0.5 * np.log(weights).sum()), -others


def hyperprior(num_lengths: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and standard deviations of the Normal priors on log hyperparameters, and their bounds.

    Length scales grow with the root of their number, so that the function stays as complex when inputs are added
    (Hvarfner, Hellsten and Nardi 2024, Vanilla Bayesian Optimization Performs Great in High Dimensions).

    >>> means, deviations, bounds = hyperprior(4)
    >>> means.shape, bounds.shape
    ((7,), (7, 2))
    """
    means = np.append(np.full(num_lengths, np.log(1.5 * np.sqrt(max(num_lengths, 1)))), _SCALE_MEANS)
    deviations = np.append(np.full(num_lengths, _LENGTH_DEVIATION), _SCALE_DEVIATIONS)
    bounds = np.stack([means - 6 * deviations, means + 6 * deviations], 1)
    bounds[-1] = np.log([_LOWEST_NOISE, 10.0])
    return means, deviations, bounds


def maximize(
    objective: Callable, start: Float[np.ndarray, " parameters"], num_lengths: int, iterations: int
) -> tuple[np.ndarray, float]:
    """Maximize objective(parameters) -> (value, gradient) plus the log prior by L-BFGS, within the prior's bounds.

    Returns the parameters and the value there.
    """
    from scipy.optimize import minimize

    means, deviations, bounds = hyperprior(num_lengths)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(parameters)
        z = (parameters - means) / deviations
        return 0.5 * z @ z - value, z / deviations - gradient

    options = {"maxiter": iterations, "ftol": 1e-6, "gtol": 1e-2}
    found = minimize(loss, np.clip(start, *bounds.T), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return found.x, -float(found.fun)


def optimize_hyperparameters(
    groups: Int[np.ndarray, " inputs"],
    x: Float[np.ndarray, "rows inputs"],
    y: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
) -> Float[np.ndarray, " parameters"]:
    """The most probable log hyperparameters: restarts on some rows, the best of them finished on all."""
    num_lengths = int(groups.max(initial=-1)) + 1
    means, _, _ = hyperprior(num_lengths)
    rough, plain = means.copy(), means.copy()
    rough[:-3] -= 0.7
    plain[:-3] += 1.0
    rough[-3:], plain[-3:] = np.log([1.0, 0.1, 0.2]), np.log([0.5, 0.5, 0.8])
    some = np.linspace(0, len(y) - 1, min(len(y), _STARTING_ROWS)).round().astype(int)
    part = (groups, x[some], y[some], weights[some])
    trials = [maximize(lambda p: log_evidence(p, *part), start, num_lengths, 15) for start in (rough, plain)]
    best = max(trials, key=lambda trial: trial[1])[0]
    # Many rows leave little to do after some of them, and each step costs the third power of the rows.
    iterations = 100 if len(y) <= _STARTING_ROWS else max(10, 20_000 // len(y))
    return maximize(lambda p: log_evidence(p, groups, x, y, weights), best, num_lengths, iterations)[0]


def draw_hyperparameters(
    best: Float[np.ndarray, " parameters"], objective: Callable, num_draws: int
) -> Float[np.ndarray, "draws parameters"]:
    """Draws from the Normal approximation of the posterior of log hyperparameters at its mode (Laplace).

    The Hessian is by differences of the gradient of objective(parameters) -> (value, gradient). Antithetic pairs, from
    the same random numbers every time, so that folds differ by their data only.

    >>> means, deviations, _ = hyperprior(1)
    >>> draw_hyperparameters(means, lambda p: (0.0, 0.0 * p), 4).shape  # no data: the prior
    (4, 4)
    """
    _, deviations, bounds = hyperprior(len(best) - 3)
    step, there = 0.01, objective(best)[1]
    columns = np.stack([objective(best + step * e)[1] - there for e in np.eye(len(best))])
    precision = np.diag(1 / deviations**2) - columns / step
    values, vectors = np.linalg.eigh((precision + precision.T) / 2)
    values = np.maximum(values, 1 / deviations.max() ** 2)  # the data never say less than the prior
    noise = np.random.default_rng(0).normal(size=((num_draws + 1) // 2, len(best)))
    noise = np.concatenate([noise, -noise])[:num_draws]
    return np.clip(best + (noise / np.sqrt(values)) @ vectors.T, *bounds.T)


class LatentFunction(eqx.Module):
    """The posterior of a regression function, in standardized units, given hyperparameters.

    Its mean at x is k(x, points) coefficients; its variance k(x, x) - |k(x, points) root|^2.
    """

    covariance: Covariance
    coefficients: Float[np.ndarray, " points"]
    root: Float[np.ndarray, "points rank"]
    noise: float

    def moments(self, x: Any, points: Any) -> tuple[Any, Any]:
        """Mean and standard deviation of the function at every row of `x`, shape (rows,) each."""
        xp = jnp if isinstance(x, jax.Array) else np
        cross = self.covariance(x, points)
        variance = self.covariance.diagonal(x) - xp.square(cross @ self.root).sum(1)
        return cross @ self.coefficients, xp.sqrt(xp.maximum(variance, 1e-10))

    def joint(self, x: Any, points: Any) -> tuple[Any, Any]:
        """Mean and covariance of the function over the rows of `x`."""
        cross = self.covariance(x, points)
        rooted = cross @ self.root
        return cross @ self.coefficients, self.covariance(x, x) - rooted @ rooted.T


def exact_posterior(
    parameters: Float[np.ndarray, " parameters"],
    groups: Int[np.ndarray, " inputs"],
    x: Float[np.ndarray, "rows inputs"],
    y: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
) -> LatentFunction:
    """The exact posterior of the function; its points are the rows of `x`.

    >>> rows = np.zeros((1, 1))
    >>> latent = exact_posterior(np.zeros(4), np.zeros(1, int), rows, np.ones(1), np.ones(1))
    >>> round(float(latent.moments(rows, rows)[0][0]), 4)  # 2 / (2 + 1)
    0.6667
    """
    from scipy.linalg.lapack import dpotrs, dtrtri

    covariance, noise = unpack(parameters, groups)
    factor = cholesky(covariance(x, x) + np.diag(noise**2 / weights))
    coefficients = dpotrs(factor, y, lower=1)[0]
    return LatentFunction(covariance, coefficients, np.ascontiguousarray(dtrtri(factor, lower=1)[0].T), noise)


class GaussianProcess(Learner):
    """Gaussian process regression: a smooth function with a length scale per feature, a linear part, Gaussian noise.

    Up to 500 rows, predictions are averaged over draws from the posterior of the hyperparameters, which was worth up to
    0.5 nats a row on tables of 30 to 300 rows; beyond, hyperparameters are the most probable ones. Up to
    `max_exact_rows` rows the posterior of the function is exact; beyond, it is Titsias's variational one.

    Args:
        max_exact_rows: 2000 rows take about ten seconds; the time grows with the third power.
        num_inducing: inducing points, used above `max_exact_rows`; 256 follow most functions of ten features.
        num_draws: draws of the hyperparameters; 8 are within 0.05 nats of 16. With 1, the most probable ones are used
            and marginals are Normal.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning; and `sparse_gaussian_process`.

    >>> X = np.linspace(-3, 3, 40)[:, None]
    >>> predictive = GaussianProcess().fit(X, np.sin(X[:, 0]), key=None)
    >>> bool(abs(predictive(np.array([[1.0]])).mean[0] - np.sin(1.0)) < 0.01)
    True
    """

    max_exact_rows: int = 2000
    num_inducing: int = 256
    num_draws: int = 8

    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any = None, weights: Any = None) -> GaussianProcessPredictive:
        """See `Learner.fit`; the key is not used. A row of weight 2 counts as two equal rows.

        Raises:
            InputError: a target that is not numeric, or weights that do not fit.
        """
        target = Target.from_values(y, "regression")
        table = Table.from_data(X)
        weights = check_weights(weights, len(target.values))
        kept = weights > 0
        x, y, weights = table.dense(X)[kept].astype(np.float64), target.values[kept], weights[kept]
        center = (weights * y).sum() / weights.sum()
        scale = max(np.sqrt((weights * (y - center) ** 2).sum() / weights.sum()), 1e-12 * max(1.0, abs(center)))
        y = (y - center) / scale
        data = (input_groups(table), x, y, weights)
        with one_thread():
            if len(y) <= self.max_exact_rows:
                best, points = optimize_hyperparameters(*data), x
                evidence, draws = log_evidence(best, *data)[0], best[None]
                if self.num_draws > 1 and len(y) <= _DRAW_ROWS:
                    draws = draw_hyperparameters(best, lambda p: log_evidence(p, *data), self.num_draws)
                latents = tuple(exact_posterior(parameters, *data) for parameters in draws)
            else:
                from bayeslens.learners.sparse_gaussian_process import fit_sparse

                points, latent, evidence = fit_sparse(*data, self.num_inducing)
                latents = (latent,)
        return GaussianProcessPredictive(
            table=table,
            points=points,
            latents=latents,
            num_components=max(self.num_draws, 1),
            center=float(center),
            scale=float(scale),
            log_evidence=float(evidence - weights.sum() * np.log(scale)),
        )


class GaussianProcessPredictive(Predictive):
    """Predictions of Gaussian process regression.

    `latents` are posteriors of the function under each draw of the hyperparameters, or the most probable ones alone.
    Marginals mix `num_components` Normals, also when these are equal: one family for every number of rows, so that
    predictions of several folds can be joined. `log_evidence` is the log marginal likelihood (with inducing points a
    lower bound) at the most probable hyperparameters; it does not charge for having chosen them.
    """

    table: Table
    points: Float[np.ndarray, "points inputs"]
    latents: tuple[LatentFunction, ...]
    center: float
    scale: float
    log_evidence: float
    num_components: int = eqx.field(static=True, default=1)
    classes: tuple | None = None

    traceable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def _inputs(self, x: Any) -> tuple[Any, Any, Any]:
        """Features, the posterior's points, and the library they belong to."""
        inputs = self.table.dense(x)
        if isinstance(inputs, jax.Array):
            return inputs, jnp.asarray(self.points), jnp
        return inputs.astype(np.float64), self.points, np

    def _moments(self, x: Any) -> tuple[Any, Any, Any]:
        """Means and standard deviations of the function, shape (draws, rows), and of the noise, shape (draws, 1)."""
        inputs, points, xp = self._inputs(x)
        chunk = max(len(inputs), 1) if xp is jnp else _CHUNK
        with one_thread():
            parts = [
                [latent.moments(inputs[i : i + chunk], points) for i in range(0, max(len(inputs), 1), chunk)]
                for latent in self.latents
            ]
        mean, deviation = (xp.stack([xp.concatenate([p[i] for p in part]) for part in parts]) for i in (0, 1))
        noise = xp.asarray([[latent.noise] for latent in self.latents], mean.dtype)
        return self.center + self.scale * mean, self.scale * deviation, self.scale * noise

    def __call__(self, x: Any) -> Distribution:
        """The marginals: exact Normals under each draw of the hyperparameters, mixed."""
        mean, deviation, noise = self._moments(x)
        xp = jnp if isinstance(mean, jax.Array) else np
        shape, share = (self.num_components, mean.shape[1]), 1 / self.num_components
        normal = dist.Normal(xp.broadcast_to(mean, shape), xp.broadcast_to(xp.hypot(deviation, noise), shape))
        return mix_members(normal, np.full(self.num_components, share))

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """Gauss-Hermite nodes of the function's posterior under each draw, each with Normal noise."""
        mean, deviation, noise = self._moments(x)
        xp = jnp if isinstance(mean, jax.Array) else np
        locations = (mean + _NODES[:, None, None] * deviation).reshape(-1, mean.shape[1])
        spread = xp.broadcast_to(noise, (len(_NODES), *mean.shape)).reshape(locations.shape)
        return dist.Normal(locations, spread), np.repeat(_NODE_WEIGHTS, len(mean)) / _NODE_WEIGHTS.sum() / len(mean)

    def joint(self, x: Any) -> Distribution:
        """The exact multivariate Normal over all rows, noise included: one per draw of the hyperparameters, mixed."""
        inputs, points, xp = self._inputs(x)
        means, factors = [], []
        with one_thread():
            for latent in self.latents:
                mean, covariance = latent.joint(inputs, points)
                covariance = covariance + latent.noise**2 * xp.eye(len(mean))
                factors.append(jnp.linalg.cholesky(covariance) if xp is jnp else cholesky(covariance))
                means.append(mean)
        loc = self.center + self.scale * xp.stack(means)
        joint = dist.MultivariateNormal(loc, scale_tril=self.scale * xp.stack(factors))
        return mix_members(joint, np.full(len(means), 1 / len(means)))
