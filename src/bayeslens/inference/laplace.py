"""Laplace's approximation: a normal distribution at the mode, with the curvature there.

Source: P. S. Laplace (1774); L. Tierney, J. Kadane, "Accurate approximations for posterior moments and marginal
densities" (1986).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import linalg

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.posterior import Posterior
from bayeslens.inference.diagnostics import doubts_of_weights, importance_evidence
from bayeslens.inference.pathfinder import climb_from, log_probs, standard_normal

_NEWTON_STEPS = 30
_PATHS = 8  # as many as Pathfinder runs, so that both are compiled once
_HESSIAN_LIMIT = 300  # dimensions up to which a Hessian is cheap beside a training
_CONVERGED = 1e-2  # nats that a Newton step would still gain
_OTHER_MODE = 5.0  # standard deviations between what counts as two modes
_NEAR_AS_HIGH = 10.0  # nats below the best mode at which another one still matters


class ModeNormal(NamedTuple):
    """The normal approximation at a mode: draws are `mode + root @ z`.

    `log_prob` is the log joint density at the mode, `decrement` twice what a Newton step would still gain, in nats, and
    `flat` counts directions without measurable curvature. Arrays are float64 on the host.
    """

    mode: Float[np.ndarray, " dimension"]
    root: Float[np.ndarray, "dimension dimension"]
    log_prob: float
    decrement: float
    flat: int

    @property
    def log_det_root(self) -> float:
        """log |det root|."""
        return float(np.linalg.slogdet(self.root)[1])

    @property
    def log_evidence(self) -> float:
        """Laplace's estimate of the log evidence: exact where the posterior is normal."""
        return self.log_prob + self.log_det_root + 0.5 * len(self.mode) * np.log(2 * np.pi)


@eqx.filter_jit
def _curvature(conditioned: ConditionedModel, vector: Array) -> tuple[Array, Array, Array]:
    """Negative log density, its gradient and its Hessian."""
    evaluate = jax.value_and_grad(lambda x: -conditioned.log_prob(x))
    # Reverse over reverse, since programs with differential equations have no forward derivative.
    slope, pull, value = jax.vjp(lambda x: evaluate(x)[::-1], vector, has_aux=True)
    size = len(vector)
    hessian = jax.lax.map(lambda row: pull(row)[0], jnp.eye(size, dtype=vector.dtype), batch_size=min(size, 64))
    return value, slope, hessian


def mode_normal(conditioned: ConditionedModel, start: Float[Array, " dimension"]) -> ModeNormal:
    """The normal approximation at the mode near a start, by damped Newton steps.

    Linear algebra is done in float64, on the Hessian scaled to unit diagonal: neither predictors of unlike units nor
    float32 spoil it.

    Args:
        conditioned: the model with its data.
        start: an unconstrained vector, best from an optimizer.

    >>> import numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> found = mode_normal(conditioned_model(model, {"y": 1.0}), jnp.zeros(1))
    >>> round(float(found.mode[0]), 3), round(float(found.root[0, 0] ** 2), 3)
    (0.5, 0.5)
    """
    point = np.asarray(start, np.float64)
    dtype = jnp.asarray(start).dtype
    value, slope, hessian = _evaluate(conditioned, point, dtype)
    eps, damping = float(jnp.finfo(dtype).eps), 0.0
    for _ in range(_NEWTON_STEPS):
        root, _ = _inverse_root(hessian, eps, damping)
        step = -root @ (root.T @ slope)
        decrement = float(-slope @ step)
        if decrement < 1e2 * eps:
            break
        new = _evaluate(conditioned, point + step, dtype)
        if np.isfinite(new[0]) and new[0] <= value + 4 * eps * abs(value):
            point, damping = point + step, damping / 10 if damping > 1e-3 else 0.0
            value, slope, hessian = new
        else:
            damping = max(10 * damping, 1e-2)
            if damping > 1e8:
                break
    root, flat = _inverse_root(hessian, eps)
    decrement = float(np.sum((root.T @ slope) ** 2))
    return ModeNormal(point, root, -value, decrement, flat)


def _evaluate(conditioned: ConditionedModel, point: np.ndarray, dtype: Any) -> tuple[float, np.ndarray, np.ndarray]:
    value, slope, hessian = (np.asarray(a, np.float64) for a in _curvature(conditioned, jnp.asarray(point, dtype)))
    finite = np.isfinite(slope).all() and np.isfinite(hessian).all()
    return (float(value) if finite else np.inf), slope, (hessian + hessian.T) / 2


def _inverse_root(hessian: np.ndarray, eps: float, damping: float = 0.0) -> tuple[np.ndarray, int]:
    """A root of the inverse of a Hessian made positive, and how many directions had to be."""
    if not np.isfinite(hessian).all():
        return np.eye(len(hessian)), len(hessian)
    scale = 1 / np.sqrt(np.maximum(np.abs(np.diag(hessian)), 1e-30))
    values, vectors = linalg.eigh(hessian * scale * scale[:, None])
    floor = 10 * len(hessian) * eps
    flat = int((values < floor).sum())
    # Where the density curves upwards, its absolute curvature still tells how far to go.
    values = np.maximum(np.abs(values), floor) + damping
    return scale[:, None] * vectors / np.sqrt(values), flat


class Laplace(Engine):
    """Laplace's approximation: a normal distribution at the highest mode of the unconstrained density.

    The quickest engine, exact where the posterior is normal. `log_evidence` is Laplace's estimate, not a bound;
    `log_evidence_error` is how far importance sampling from the approximation disagrees with it, plus the standard
    error of that.

    Args:
        num_samples: independent draws.
        num_starts: of the optimizer, run at once; 8 rarely miss the highest of a few modes.

    Source: Laplace (1774); L. Tierney, J. Kadane (1986).
    """

    name: ClassVar[str] = "laplace"

    num_samples: int = 4000
    num_starts: int = 8

    def __check_init__(self):
        check_counts(self, "num_samples", "num_starts")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("Laplace's approximation")
        climbed = climb_from(conditioned, key, self.num_starts)
        values = np.where(np.isfinite(climbed.value), np.asarray(climbed.value, np.float64), np.inf)
        normal = mode_normal(conditioned, climbed.position[int(values.argmin())])
        noise = np.asarray(
            standard_normal(jax.random.fold_in(key, 2), (self.num_samples, conditioned.dimension)), np.float64
        )
        draws = normal.mode + noise @ normal.root.T
        log_q = -0.5 * (noise**2).sum(1) - normal.log_det_root - 0.5 * noise.shape[1] * np.log(2 * np.pi)
        vectors = jnp.asarray(draws, climbed.position.dtype)
        ratios = np.asarray(log_probs(conditioned, vectors), np.float64) - log_q
        k_hat, doubts = doubts_of_weights(ratios)
        posterior = posterior_of(
            self, conditioned, vectors[None], key=key, k_hat=k_hat, log_evidence=normal.log_evidence,
            log_evidence_error=_disagreement(ratios, normal.log_evidence),
        )  # fmt: skip
        return posterior.doubted((*_doubts_of_mode(normal, np.asarray(climbed.position, np.float64), values), *doubts))


def _disagreement(ratios: np.ndarray, log_evidence: float) -> float:
    """Between importance sampling and Laplace's estimate, plus the standard error of the former."""
    if not np.isfinite(ratios).any():
        return float("inf")
    sampled, error = importance_evidence(ratios)
    return abs(sampled - log_evidence) + error


def _doubts_of_mode(normal: ModeNormal, ends: np.ndarray, values: np.ndarray) -> tuple[str, ...]:
    found = []
    if not normal.decrement < _CONVERGED:
        found.append(
            "the optimizer found no mode: the density may grow without bound, as in a centred hierarchical model; try "
            "a non-centred parameterization, or engine nuts"
        )
    if normal.flat:
        found.append(
            f"the density is flat or curves upwards in {normal.flat} directions at the mode: some latents are not "
            "identified, or the mode is at a boundary; try engine nuts"
        )
    far = np.linalg.norm(np.linalg.solve(normal.root, (ends - normal.mode).T), axis=0) > _OTHER_MODE
    other = int((far & (values < -normal.log_prob + _NEAR_AS_HIGH)).sum())
    if other:
        found.append(
            f"{other} of {len(values)} starts ended at another mode that is nearly as high: this one alone is "
            "approximated; try engine smc or nested"
        )
    return tuple(found)


class Whitening(NamedTuple):
    """Coordinates in which a quick approximation is standard normal: `vector = center + root u`.

    `root` is a matrix, or the diagonal of one; both are NumPy arrays, which training leaves as they are.
    """

    center: Float[np.ndarray, " dimension"]
    root: Float[np.ndarray, "..."]

    def vector(self, u: Float[Array, " dimension"]) -> Float[Array, " dimension"]:
        """The unconstrained vector of whitened coordinates."""
        return self.center + (self.root * u if self.root.ndim == 1 else self.root @ u)

    @property
    def log_det(self) -> float:
        """Log determinant of the root."""
        return float(np.log(np.abs(self.root)).sum() if self.root.ndim == 1 else np.linalg.slogdet(self.root)[1])


def whitening(conditioned: ConditionedModel, key: Any, *, dense: bool) -> Whitening:
    """Laplace's or Pathfinder's coordinates, whichever has the better evidence bound.

    Args:
        conditioned: the model with its data.
        key: a `jax.random.key`.
        dense: whether dimensions are mixed; otherwise each is only shifted and scaled.
    """
    climbed = climb_from(conditioned, key, _PATHS)
    best = jax.tree.map(lambda a: a[int(np.argmax(climbed.best.bound))], climbed.best.normal)
    size, dtype = conditioned.dimension, best.mean.dtype
    candidates = []
    if np.isfinite(np.asarray(climbed.best.bound)).any():
        root = jax.vmap(best.root)(jnp.eye(size)).T if dense else jnp.sqrt(best.variances)
        candidates.append((best.mean, root))
    if size <= _HESSIAN_LIMIT:
        value = np.where(np.isfinite(climbed.value), climbed.value, np.inf)
        normal = mode_normal(conditioned, climbed.position[int(np.argmin(value))])
        # The best independent normal has the precisions' diagonal, not the variances'.
        narrow = 1 / np.sqrt(np.sum(np.linalg.inv(normal.root) ** 2, 0))
        candidates.append((normal.mode, normal.root if dense else narrow))
    noise = np.asarray(standard_normal(jax.random.fold_in(key, 3), (100, size)))
    found, bounds = [], []
    for center, root in candidates:
        white = Whitening(np.asarray(center, dtype), np.asarray(root, dtype))
        vectors = white.center + (noise * white.root if white.root.ndim == 1 else noise @ white.root.T)
        bounds.append(float(np.mean(np.asarray(log_probs(conditioned, jnp.asarray(vectors, dtype))))) + white.log_det)
        found.append(white)
    if not np.isfinite(bounds).any():
        start = np.asarray(climbed.position[0], dtype)
        scale = np.full(size, 1e-2, dtype)
        return Whitening(start, np.diag(scale) if dense else scale)
    return found[int(np.nanargmax(bounds))]
