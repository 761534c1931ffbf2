"""Bayesian linear regression with exact evidence, and Bayesian logistic regression by Laplace's approximation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.table import Table, Target, take

_CHUNK = 65536  # rows whose features are held in float64 at once
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(7)


def check_weights(weights: Any, rows: int) -> Float[np.ndarray, " rows"]:
    """Row weights as floats, ones when None.

    Raises:
        InputError: wrong length, negative, missing, or all zero.
    """
    if weights is None:
        return np.ones(rows)
    weights = np.asarray(weights, np.float64)
    if weights.ndim == 0:
        weights = np.full(rows, float(weights))
    if weights.shape != (rows,):
        raise InputError(f"weights have shape {weights.shape}, sample_weight.shape == {(rows,)} is needed: one per row")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError("weights must be finite and not negative")
    if not (weights > 0).any():
        raise InputError("all weights are zero: at least one row has to count")
    return weights


class BayesianLinearRegression(Learner):
    """Linear regression with a Gaussian prior on the coefficients and an inverse-gamma prior on the noise.

    y = b + x'w + e with w ~ N(0, s2/a), e ~ N(0, s2), s2 ~ InverseGamma, b flat, on standardized features. The
    prior precision a maximizes the exact evidence (MacKay 1992); everything else is integrated out in closed form,
    so that predictions are Student t.

    Args:
        prior_precision: a; None (default) maximizes the evidence.

    >>> X = np.arange(8.0)[:, None]
    >>> predictive = BayesianLinearRegression().fit(X, 3 * X[:, 0] + 1, key=None)
    >>> bool(abs(predictive(np.array([[2.0]])).mean[0] - 7) < 0.1)
    True
    """

    prior_precision: float | None = None

    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any = None, weights: Any = None) -> LinearPredictive:
        """See `Learner.fit`; the key is not used.

        Raises:
            InputError: a target that is not numeric, or weights that do not fit.
        """
        target = Target.from_values(y, "regression")
        weights = check_weights(weights, len(target.values))
        table = Table.from_data(X, weights)
        count = weights.sum()
        center = (weights * target.values).sum() / count
        scale = max(np.sqrt((weights * (target.values - center) ** 2).sum() / count), 1e-12 * max(1.0, abs(center)))
        y_scaled = (target.values - center) / scale
        gram, moment, mean_x, square = _moments(table, X, y_scaled, weights)
        eigenvalues, vectors = np.linalg.eigh(gram)
        eigenvalues, rotated = np.maximum(eigenvalues, 0.0), vectors.T @ moment
        degrees = max(count - 1.0, 0.0)  # the flat intercept costs one
        shape = 0.5 + degrees / 2

        def evidence(log_precision: float) -> float:
            shrunk = eigenvalues + np.exp(log_precision)
            rate = 0.5 + max(square - (rotated**2 / shrunk).sum(), 0.0) / 2
            return 0.5 * (log_precision - np.log(shrunk)).sum() - shape * np.log(rate)

        precision = self.prior_precision or np.exp(_maximize(evidence, np.log(1e-6), np.log(1e6)))
        shrunk = eigenvalues + precision
        coefficients = vectors @ (rotated / shrunk)
        rate = 0.5 + max(square - (rotated**2 / shrunk).sum(), 0.0) / 2
        log_evidence = evidence(np.log(precision)) + _constant(shape, degrees) - degrees * np.log(scale)
        return LinearPredictive(
            table=table,
            intercept=float(center),
            coefficients=coefficients * scale,
            feature_means=mean_x,
            covariance_root=vectors / np.sqrt(shrunk),
            noise_scale=float(np.sqrt(rate / shape) * scale),
            degrees=float(2 * shape),
            count=float(count),
            prior_precision=float(precision),
            log_evidence=float(log_evidence),
        )


def _constant(shape: float, degrees: float) -> float:
    from scipy.special import gammaln

    return gammaln(shape) - gammaln(0.5) + 0.5 * np.log(0.5) - degrees / 2 * np.log(2 * np.pi)


def _maximize(function: Any, low: float, high: float) -> float:
    """The best of a grid, polished: the evidence can have two modes."""
    from scipy.optimize import minimize_scalar

    grid = np.linspace(low, high, 33)
    best = int(np.argmax([function(g) for g in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    return float(minimize_scalar(lambda g: -function(g), bounds=bounds, method="bounded").x)


def _chunks(table: Table, X: Any, *columns: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Dense features in float64, a bounded number of rows at a time."""
    for start in range(0, len(columns[0]), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = take(X, rows)
        yield table.dense(part).astype(np.float64), *(c[rows] for c in columns)


def _moments(table: Table, X: Any, y: np.ndarray, weights: np.ndarray) -> tuple:
    """Weighted, centred X'X, X'y, mean of X and y'y, accumulated over chunks."""
    gram, moment, mean_x, square = 0.0, 0.0, 0.0, float((weights * y * y).sum())
    for x, y_part, w in _chunks(table, X, y, weights):
        weighted = x * w[:, None]
        gram, moment, mean_x = gram + weighted.T @ x, moment + weighted.T @ y_part, mean_x + weighted.sum(0)
    total = weights.sum()
    mean_x = mean_x / total
    return gram - total * np.outer(mean_x, mean_x), moment, mean_x, square  # y has mean zero


class LinearPredictive(Predictive):
    """Student t predictions of Bayesian linear regression."""

    table: Table
    intercept: float
    coefficients: Float[np.ndarray, " inputs"]
    feature_means: Float[np.ndarray, " inputs"]
    covariance_root: Float[np.ndarray, "inputs inputs"]
    noise_scale: float
    degrees: float
    count: float
    prior_precision: float
    log_evidence: float
    classes: tuple | None = None

    traceable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def _location_and_spread(self, x: Any) -> tuple[Any, Any]:
        """Mean, and the posterior variance of the mean in units of the noise variance."""
        xp = jnp if isinstance(x, jax.Array) else np
        centred = self.table.dense(x) - self.feature_means
        spread = 1 / self.count + xp.square(centred @ self.covariance_root).sum(-1)
        return self.intercept + centred @ self.coefficients, spread

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """Gauss-Hermite nodes of the regression function's posterior, each with Student t noise."""
        xp = jnp if isinstance(x, jax.Array) else np
        location, spread = self._location_and_spread(x)
        # Of the regression function's Student t, so that the members' variance is that of the marginals.
        inflation = self.degrees / max(self.degrees - 2, 1.0)
        deviation = self.noise_scale * xp.sqrt(inflation * spread)
        locations = location + _NODES[:, None] * deviation
        noise = xp.full_like(locations, self.noise_scale)
        members = build(dist.StudentT, df=xp.full_like(locations, self.degrees), loc=locations, scale=noise)
        return members, _NODE_WEIGHTS / _NODE_WEIGHTS.sum()

    def __call__(self, x: Any) -> Distribution:
        """The exact Student t marginals."""
        xp = jnp if isinstance(x, jax.Array) else np
        location, spread = self._location_and_spread(x)
        scale = self.noise_scale * xp.sqrt(1 + spread)
        return build(dist.StudentT, df=xp.full_like(location, self.degrees), loc=location, scale=scale)

    def joint(self, x: Any) -> Distribution:
        """The exact multivariate Student t over all rows."""
        location, _ = self._location_and_spread(x)
        rooted = (self.table.dense(x) - self.feature_means) @ self.covariance_root
        covariance = rooted @ rooted.T + 1 / self.count + jnp.eye(len(location))
        return dist.MultivariateStudentT(self.degrees, location, self.noise_scale * jnp.linalg.cholesky(covariance))


class BayesianLogisticRegression(Learner):
    """Multinomial logistic regression with a Gaussian prior, by Laplace's approximation.

    The prior precision maximizes the Laplace evidence (MacKay's fixed point). The members are draws from the Gaussian
    around the mode, in antithetic pairs.

    Args:
        num_members: posterior draws of the coefficients; 32 keeps the error of a probability below 0.01.
        prior_precision: of each coefficient on standardized features; None (default) maximizes the evidence.

    >>> X = np.linspace(-2, 2, 40)[:, None]
    >>> predictive = BayesianLogisticRegression().fit(X, X[:, 0] > 0.1, key=jax.random.key(0))
    >>> predictive(np.array([[-1.5]])).probs[0].round() .tolist()
    [1.0, 0.0]
    """

    num_members: int = 32
    prior_precision: float | None = None

    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any, weights: Any = None) -> LogisticPredictive:
        """See `Learner.fit`.

        Raises:
            InputError: one class only, or weights that do not fit.
        """
        target = Target.from_values(y, "classification")
        weights = check_weights(weights, len(target.values))
        table = Table.from_data(X, weights)
        features = np.concatenate([np.ones((len(weights), 1), np.float32), table.dense(X)], 1).astype(np.float64)
        labels = np.eye(len(target.classes))[target.values.astype(int)]
        mode = np.zeros((features.shape[1], labels.shape[1]))
        precision = self.prior_precision or 1.0
        for _ in range(1 if self.prior_precision else 12):
            mode, hessian = _logistic_mode(features, labels, weights, mode, precision)
            inverse = np.linalg.inv(hessian)
            slopes = np.ones_like(mode, bool)
            slopes[0] = False  # the intercept's prior is fixed and wide
            effective = slopes.sum() - precision * np.diag(inverse)[slopes.ravel()].sum()
            if self.prior_precision:
                break
            updated = np.clip(effective / max((mode[slopes] ** 2).sum(), 1e-12), 1e-4, 1e4)
            converged = abs(np.log(updated / precision)) < 0.05
            precision = updated
            if converged:
                break
        noise = np.asarray(jax.random.normal(key, (self.num_members // 2, mode.size)), np.float64)
        root = np.linalg.cholesky(inverse + 1e-12 * np.eye(mode.size))
        deviations = np.concatenate([noise, -noise]) @ root.T
        members = mode + deviations.reshape(-1, *mode.shape)
        return LogisticPredictive(table, members.astype(np.float32), target.classes, float(precision))


_INTERCEPT_PRECISION = 0.01


def _logistic_mode(
    x: np.ndarray, labels: np.ndarray, weights: np.ndarray, start: np.ndarray, precision: float
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for the penalized softmax likelihood; returns the mode and the Hessian there."""
    inputs, classes = start.shape
    penalty = np.full(start.shape, precision)
    penalty[0] = _INTERCEPT_PRECISION

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ w
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(weights * (labels * log_p).sum(1)).sum() + 0.5 * (penalty * w * w).sum(), np.exp(log_p)

    w = start
    value, p = objective(w)
    for _ in range(50):
        gradient = x.T @ (weights[:, None] * (p - labels)) + penalty * w
        hessian = np.empty((inputs, classes, inputs, classes))
        for i in range(classes):
            for j in range(i, classes):
                block = (x * (weights * p[:, i] * ((i == j) - p[:, j]))[:, None]).T @ x
                hessian[:, i, :, j] = hessian[:, j, :, i] = block
        hessian = hessian.reshape(w.size, w.size) + np.diag(penalty.ravel())
        step = np.linalg.solve(hessian, gradient.ravel()).reshape(w.shape)
        size = 1.0
        while size > 1e-4:
            trial, trial_p = objective(w - size * step)
            if trial <= value:
                break
            size /= 2
        decrease = value - trial
        if decrease <= 0:
            break
        w, value, p = w - size * step, trial, trial_p
        if decrease < 1e-8 * (1 + abs(value)):
            break
    return w, hessian


class LogisticPredictive(Predictive):
    """Class probabilities averaged over draws of the coefficients."""

    table: Table
    coefficients: Float[np.ndarray, "members inputs classes"]
    classes: tuple
    prior_precision: float

    traceable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One Categorical per draw of the coefficients."""
        xp = jnp if isinstance(x, jax.Array) else np
        logits = self.table.dense(x) @ self.coefficients[:, 1:] + self.coefficients[:, :1]
        logits = logits - logits.max(-1, keepdims=True)
        probs = xp.exp(logits)
        count = len(self.coefficients)
        members = build(dist.CategoricalProbs, probs=probs / probs.sum(-1, keepdims=True))
        return members, np.full(count, 1 / count, np.float32)
