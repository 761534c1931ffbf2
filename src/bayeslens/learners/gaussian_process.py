"""Gaussian process regression: exact for small tables, with inducing points for large ones.

Fits run on the host in float64. Predictions on a `jax.Array` are the same formulas in JAX.
"""

from __future__ import annotations

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
from bayeslens.learners.gaussian_process_evidence import (
    Covariance,
    Observations,
    cholesky,
    log_evidence,
    one_thread,
    unpack,
)
from bayeslens.learners.gaussian_process_hyperparameters import (
    draw_by_laplace,
    draw_by_nuts,
    optimize_hyperparameters,
)
from bayeslens.learners.linear import check_weights

_CHUNK = 4096  # rows predicted at once
_DRAW_ROWS = 500  # more rows leave little doubt about hyperparameters, and every draw keeps a matrix of rows x rows
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)


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


def exact_posterior(parameters: Float[np.ndarray, " parameters"], observations: Observations) -> LatentFunction:
    """The exact posterior of the function; its points are the rows of `observations.x`.

    >>> row = np.zeros((1, 1))
    >>> latent = exact_posterior(np.zeros(4), Observations(np.zeros(1, int), row, np.ones(1), np.ones(1)))
    >>> round(float(latent.moments(row, row)[0][0]), 4)  # 2 / (2 + 1)
    0.6667
    """
    from scipy.linalg.lapack import dpotrs, dtrtri

    x = observations.x
    covariance, noise = unpack(parameters, observations.groups)
    factor = cholesky(covariance(x, x) + np.diag(noise**2 / observations.weights))
    coefficients = dpotrs(factor, observations.y, lower=1)[0]
    return LatentFunction(covariance, coefficients, np.ascontiguousarray(dtrtri(factor, lower=1)[0].T), noise)


class GaussianProcess(Learner):
    """Gaussian process regression: a smooth function with a length scale per feature, a linear part, Gaussian noise.

    Up to `max_exact_rows` rows the posterior of the function is exact; beyond, it is Titsias's variational one.

    Args:
        max_exact_rows: 2000 rows take about ten seconds; the time grows with the third power.
        num_inducing: inducing points, used above `max_exact_rows`; 256 follow most functions of ten features.
        hyperparameters: `"map"`: the most probable ones, and marginals are Normal. `"auto"`: predictions are averaged
            over draws from Laplace's approximation of their posterior up to 500 rows, which was worth up to 0.5 nats
            a row on tables of 30 to 300 rows; beyond, where draws hardly differ, the most probable ones. `"nuts"`:
            averaged over draws from the posterior itself, up to 500 rows; that takes minutes where the others take
            tenths of a second.
        num_draws: draws of the hyperparameters, each of which becomes a member; 8 are within 0.05 nats of 16.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning; and `sparse_gaussian_process`.

    >>> X = np.linspace(-3, 3, 40)[:, None]
    >>> predictive = GaussianProcess().fit(X, np.sin(X[:, 0]), key=None)
    >>> bool(abs(predictive(np.array([[1.0]])).mean[0] - np.sin(1.0)) < 0.01)
    True
    """

    max_exact_rows: int = 2000
    num_inducing: int = 256
    hyperparameters: str = "auto"
    num_draws: int = 8

    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any = None, weights: Any = None) -> GaussianProcessPredictive:
        """See `Learner.fit`; only `"nuts"` uses the key. A row of weight 2 counts as two equal rows.

        Raises:
            InputError: a target that is not numeric, weights that do not fit, unknown or too few hyperparameters, or
                NUTS without a key or on too many rows.
        """
        target = Target.from_values(y, "regression")
        weights = check_weights(weights, len(target.values))
        table = Table.from_data(X, weights)
        kept = weights > 0
        x, y, weights = table.dense(X)[kept].astype(np.float64), target.values[kept], weights[kept]
        self._check(len(y), key)
        center = (weights * y).sum() / weights.sum()
        scale = max(np.sqrt((weights * (y - center) ** 2).sum() / weights.sum()), 1e-12 * max(1.0, abs(center)))
        observations = Observations(input_groups(table), x, (y - center) / scale, weights)
        with one_thread():
            if len(y) <= self.max_exact_rows:
                best, points = optimize_hyperparameters(observations), x
                evidence = log_evidence(best, observations)[0]
                latents = tuple(exact_posterior(p, observations) for p in self._draw(best, observations, key))
            else:
                from bayeslens.learners.sparse_gaussian_process import fit_sparse

                points, latent, evidence = fit_sparse(observations, self.num_inducing)
                latents = (latent,)
        return GaussianProcessPredictive(
            table=table,
            points=points,
            latents=latents,
            num_components=1 if self.hyperparameters == "map" else self.num_draws,
            center=float(center),
            scale=float(scale),
            log_evidence=float(evidence - weights.sum() * np.log(scale)),
        )

    def _check(self, rows: int, key: Any) -> None:
        """Refuse settings that make no sense, before any work is done."""
        if self.hyperparameters not in ("auto", "map", "nuts"):
            raise InputError(f"unknown hyperparameters {self.hyperparameters!r}: use auto, map or nuts")
        if self.hyperparameters != "map" and self.num_draws < 2:
            cure = "or use hyperparameters='map', the most probable ones alone"
            raise InputError(f"num_draws is {self.num_draws}: raise it to at least 2, {cure}")
        if self.hyperparameters != "nuts":
            return
        most = min(_DRAW_ROWS, self.max_exact_rows)
        if rows > most:
            raise InputError(f"hyperparameters='nuts' takes at most {most} rows, got {rows}: use 'auto'")
        if key is None:
            raise InputError("hyperparameters='nuts' draws at random: give fit a key, such as key=jax.random.key(0)")

    def _draw(
        self, best: Float[np.ndarray, " parameters"], observations: Observations, key: Any
    ) -> Float[np.ndarray, "draws parameters"]:
        """Log hyperparameters under which predictions are averaged."""
        if self.hyperparameters == "map" or len(observations.y) > _DRAW_ROWS:
            return best[None]
        if self.hyperparameters == "nuts":
            return draw_by_nuts(best, observations, self.num_draws, key=key)
        return draw_by_laplace(best, lambda p: log_evidence(p, observations), self.num_draws)


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
