"""Pathfinder: normal approximations along the paths of a quasi-Newton optimizer, the best of which are kept.

Source: L. Zhang, B. Carpenter, A. Gelman, A. Vehtari, "Pathfinder: parallel quasi-Newton variational inference" (2022).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.randomness import host_generator
from bayeslens.inference.diagnostics import doubts_of_weights, pareto_smoothed

_HISTORY = 6  # pairs of steps and gradients that the inverse Hessian is made of, as in the paper
_TRIES = 25  # step lengths looked at before a path ends
_ELBO_DRAWS = 16
_STARTING_PATHS = 8  # as many as the engine runs, so that both are compiled once
_LOG_TWO_PI = float(np.log(2 * np.pi))


class QuasiNewtonNormal(eqx.Module):
    """A normal distribution whose covariance is an L-BFGS inverse Hessian, as a product of simple matrices.

    The covariance is A A' with A = (I - s_m v_m') ... (I - s_1 v_1') diag(scale), which no rounding makes indefinite
    (the product form of the BFGS update: K. Brodlie, A. Gourlay, J. Greenstadt 1973). The products are kept expanded:
    A = (I - S' W) diag(scale), and its inverse is diag(1 / scale) (I + S' Z).

    Attributes:
        mean: shape (dimension,).
        scale: root of the diagonal that the updates begin with, shape (dimension,).
        steps: S, shape (history, dimension).
        forward: W, shape (history, dimension).
        backward: Z, shape (history, dimension).
        log_det_root: log det A.
    """

    mean: Float[Array, " dimension"]
    scale: Float[Array, " dimension"]
    steps: Float[Array, "history dimension"]
    forward: Float[Array, "history dimension"]
    backward: Float[Array, "history dimension"]
    log_det_root: Float[Array, ""]

    def root(self, z: Float[Array, " dimension"]) -> Float[Array, " dimension"]:
        """A z."""
        z = self.scale * z
        return z - self.steps.T @ (self.forward @ z)

    def root_transposed(self, z: Float[Array, " dimension"]) -> Float[Array, " dimension"]:
        """A' z."""
        return self.scale * (z - self.forward.T @ (self.steps @ z))

    def solve(self, x: Float[Array, " dimension"]) -> Float[Array, " dimension"]:
        """The inverse of A, times x."""
        return (x + self.steps.T @ (self.backward @ x)) / self.scale

    @property
    def variances(self) -> Float[Array, " dimension"]:
        """The diagonal of the covariance."""
        scaled = self.forward * self.scale
        pairs = jnp.sum((scaled @ scaled.T @ self.steps) * self.steps, 0)
        return self.scale**2 - 2 * jnp.sum(self.steps * scaled * self.scale, 0) + pairs

    def log_prob(self, x: Float[Array, " dimension"]) -> Float[Array, ""]:
        """Log density."""
        z = self.solve(x - self.mean)
        return -0.5 * z @ z - self.log_det_root - 0.5 * len(z) * _LOG_TWO_PI


def quasi_newton_normal(
    position: Float[Array, " dimension"],
    slope: Float[Array, " dimension"],
    diagonal: Float[Array, " dimension"],
    steps: Float[Array, "history dimension"],
    changes: Float[Array, "history dimension"],
) -> QuasiNewtonNormal:
    """The normal approximation at a point of an optimizer's path: its covariance is the L-BFGS inverse Hessian.

    Args:
        position: the point.
        slope: gradient of the negative log density there.
        diagonal: of the inverse Hessian that the updates begin with.
        steps: the last steps, oldest first.
        changes: of the slope, in these steps. Pairs without positive curvature are left out.
    """
    count = len(steps)

    def add(curved: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
        # `curved` is the Hessian of the updates so far, times all steps.
        s, y, bent = steps[i], changes[i], curved[i]
        squared = s @ bent
        fine = _curved(s, y) & (squared > 0)
        rho, squared = 1 / jnp.where(fine, s @ y, 1.0), jnp.where(fine, squared, 1.0)
        shrunk = jnp.sqrt(rho * squared)  # 1 - v's
        v = jnp.where(fine, rho * y - jnp.sqrt(rho / squared) * bent, 0.0)
        updated = curved - jnp.outer(steps @ bent, bent / squared) + jnp.outer(steps @ y, rho * y)
        return jnp.where(fine, updated, curved), (v, jnp.where(fine, shrunk, 1.0))

    _, (normals, shrunk) = jax.lax.scan(add, steps / diagonal, jnp.arange(count))
    forward = _unit_triangular_solve(jnp.tril(normals @ steps.T, -1), normals)
    scaled = normals / shrunk[:, None]
    backward = _unit_triangular_solve(-jnp.triu(scaled @ steps.T, 1), scaled)
    scale = jnp.sqrt(diagonal)
    log_det = jnp.log(scale).sum() + jnp.log(shrunk).sum()
    normal = QuasiNewtonNormal(position, scale, steps, forward, backward, log_det)
    newton = normal.root(normal.root_transposed(slope))
    return eqx.tree_at(lambda n: n.mean, normal, position - newton)


def _unit_triangular_solve(strict: Array, right: Array) -> Array:
    """(I + strict)^-1 right, where powers of `strict` end: a product of few terms, quicker to compile than a solver."""
    power = -strict
    for _ in range(int(np.ceil(np.log2(len(strict))))):
        right = right + power @ right
        power = power @ power
    return right


def _curved(s: Array, y: Array) -> Array:
    return s @ y > 10 * jnp.finfo(s.dtype).eps * jnp.linalg.norm(s) * jnp.linalg.norm(y)


def _next_diagonal(diagonal: Array, s: Array, y: Array) -> Array:
    """The diagonal of a BFGS update of a diagonal matrix (J. Gilbert, C. Lemarechal 1989), as in the paper."""
    a, b, c = y @ (diagonal * y), y @ s, s @ (s / diagonal)
    new = b / (a / diagonal + y**2 - a / c * (s / diagonal) ** 2)
    return jnp.where(_curved(s, y) & jnp.isfinite(new) & (new > 0), new, diagonal)


class Approximation(NamedTuple):
    """A normal approximation, its evidence bound, and the draws that the bound is made of."""

    normal: QuasiNewtonNormal
    bound: Float[Array, ""]
    draws: Float[Array, "elbo_draws dimension"]
    log_ratios: Float[Array, " elbo_draws"]


class Climb(NamedTuple):
    """Where an optimizer's path ended, and the best approximation on its way.

    `value` is the negative log density at `position`, `slope` its gradient, `steps` how many steps were accepted.
    """

    position: Float[Array, " dimension"]
    value: Float[Array, ""]
    slope: Float[Array, " dimension"]
    steps: Int[Array, ""]
    best: Approximation


class _Search(NamedTuple):
    """A path at one evaluation: a step length between `low` and `high` is tried along `direction`."""

    climb: Climb
    diagonal: Array
    history: tuple[Array, Array]
    direction: Array
    decrease: Array  # the slope along the direction, negative
    length: Array
    low: Array
    high: Array
    tries: Array
    done: Bool[Array, ""]


@eqx.filter_jit
def climb(
    conditioned: ConditionedModel,
    starts: Float[Array, "paths dimension"],
    noise: Float[Array, "paths elbo_draws dimension"],
    max_steps: Any = 400,
) -> Climb:
    """Paths of L-BFGS from starts towards modes of the unconstrained density, side by side.

    Step lengths fulfil the weak Wolfe conditions, by bisection (A. Lewis, M. Overton 2013). Every turn of the loop
    evaluates one gradient, and the normal approximation of an accepted point is judged at once, so that the program
    holds the model once for each and compiles quickly.

    Args:
        conditioned: the model with its data.
        starts: where the density and its gradient are finite.
        noise: standard normal numbers of the draws for the evidence bounds, the same for all points of a path.
        max_steps: accepted at most.

    Returns:
        A `Climb` whose leaves have a leading axis of paths.
    """
    evaluate = jax.value_and_grad(lambda x: -conditioned.log_prob(x))
    eps, dtype = jnp.finfo(starts.dtype).eps, starts.dtype
    infinite, size = jnp.full((), jnp.inf, dtype), starts.shape[1]

    def judge(normal: QuasiNewtonNormal, z: Array) -> Approximation:
        draws = normal.mean + jax.vmap(normal.root)(z)
        log_q = -0.5 * (z**2).sum(-1) - normal.log_det_root - 0.5 * size * _LOG_TWO_PI
        ratios = jax.vmap(conditioned.log_prob)(draws) - log_q
        ratios = jnp.where(jnp.isnan(ratios), -jnp.inf, ratios)
        return Approximation(normal, ratios.mean(), draws, ratios)

    def turn(search: _Search, z: Array) -> _Search:
        now, first = search.climb, ~jnp.isfinite(search.climb.value)
        new = now.position + search.length * search.direction
        value, slope = evaluate(new)
        step, change = new - now.position, slope - now.slope
        # Below rounding, decrease cannot be seen.
        allowed = now.value + 1e-4 * search.length * search.decrease + 4 * eps * jnp.abs(now.value)
        lower = jnp.isfinite(value) & jnp.isfinite(slope).all() & (first | (value <= allowed))
        flat = first | (slope @ search.direction >= 0.9 * search.decrease)
        moved = first | (step != 0).any()
        accepted = lower & moved & (flat | (search.tries >= _TRIES - 1))

        low = jnp.where(lower & ~flat, search.length, search.low)
        high = jnp.where(lower, search.high, search.length)
        length = jnp.where(jnp.isfinite(high), (low + high) / 2, 2 * search.length)
        retry = search._replace(
            low=low, high=high, length=length, tries=search.tries + 1, done=~moved | (search.tries >= _TRIES)
        )

        diagonal = _next_diagonal(search.diagonal, step, change)
        history = tuple(jnp.roll(a, -1, 0).at[-1].set(b) for a, b in zip(search.history, (step, change), strict=True))
        normal = quasi_newton_normal(new, slope, diagonal, *history)
        found = judge(normal, z)
        better = found.bound > now.best.bound
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), found, now.best)
        direction = normal.mean - new
        decrease = slope @ direction
        # The Newton decrement is twice the gain that is left, in nats.
        done = (-decrease < 100 * eps) | (now.steps >= max_steps) | ~jnp.isfinite(decrease)
        # The first step has no curvature to go by: length one at most.
        length = jnp.where(first, jnp.minimum(1.0, 1 / jnp.linalg.norm(slope)), jnp.ones((), dtype))
        fresh = _Search(
            Climb(new, value, slope, now.steps + 1, best), diagonal, history, direction, decrease, length,
            jnp.zeros((), dtype), infinite, 0 * search.tries, done,
        )  # fmt: skip
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), fresh, retry)

    def one(start: Array, z: Array) -> Climb:
        zero, count = 0 * start, jnp.zeros((), jnp.int32)
        memory = jnp.zeros((_HISTORY, size), dtype)
        normal = QuasiNewtonNormal(start, zero + 1, memory, memory, memory, jnp.zeros((), dtype))
        none = Approximation(normal, -infinite, 0 * z + start, 0 * z[:, 0] - jnp.inf)
        begun = Climb(start, infinite, zero, count, none)
        search = _Search(
            begun, zero + 1, (memory, memory), zero, -infinite, jnp.ones((), dtype), jnp.zeros((), dtype), infinite,
            count, jnp.zeros((), bool),
        )  # fmt: skip
        return jax.lax.while_loop(lambda s: ~s.done, lambda s: turn(s, z), search).climb

    return jax.vmap(one)(starts, noise)


def climb_from(conditioned: ConditionedModel, key: Any, paths: int) -> Climb:
    """Paths of `climb` from random starts.

    Raises:
        InputError: no point of finite density was found.
    """
    starts = conditioned.start(key, paths)
    return climb(
        conditioned, starts, standard_normal(jax.random.fold_in(key, 1), (paths, _ELBO_DRAWS, starts.shape[1]))
    )


@eqx.filter_jit
def log_probs(conditioned: ConditionedModel, vectors: Float[Array, "draws dimension"]) -> Float[Array, " draws"]:
    """Log joint density of many unconstrained vectors, in blocks that bound the memory; NaN counts as zero density."""
    found = jax.lax.map(conditioned.log_prob, vectors, batch_size=min(len(vectors), 250))
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def standard_normal(key: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard normal numbers made on the host, where no program has to be compiled for them.

    Compiling JAX's default generator takes seconds for every shape.

    >>> standard_normal(jax.random.key(0), (3, 2)).shape
    (3, 2)
    """
    rng = host_generator(key)
    return jnp.asarray(rng.standard_normal(shape), float)


def pathfinder_starts(
    conditioned: ConditionedModel, key: Any, count: int
) -> tuple[Float[Array, "count dimension"], Float[Array, " dimension"]]:
    """Starting points for Markov chains, near the typical set, and the variances there.

    Args:
        conditioned: the model with its data.
        key: a `jax.random.key`.
        count: points wanted.

    Returns:
        Draws of the best approximations of a few paths, taken by their importance weights without replacement, and
        the approximate posterior variances of the unconstrained vector.

    Raises:
        InputError: no point of finite density was found.

    >>> import numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 0.1), obs=y)
    >>> vectors, variances = pathfinder_starts(conditioned_model(model, {"y": 1.0}), jax.random.key(0), 4)
    >>> vectors.shape, bool(jnp.allclose(variances, 1 / 101, rtol=1e-3))
    ((4, 1), True)
    """
    paths = max(count, _STARTING_PATHS)
    chosen = climb_from(conditioned, key, paths).best
    ratios = np.asarray(chosen.log_ratios, np.float64).ravel()
    if not np.isfinite(ratios).any():  # every draw left the support: starts are all that is known
        return conditioned.start(key, count), jnp.ones(conditioned.dimension)
    draws = np.asarray(chosen.draws).reshape(-1, conditioned.dimension)
    # A flat floor keeps far worse modes out and does not take all from a single lucky draw.
    weights = np.exp(np.minimum(ratios, np.quantile(ratios, 0.9)) - ratios.max())
    weights = np.maximum(weights / weights.sum(), 1e-12) * np.isfinite(ratios)
    rng = host_generator(key)
    taken = rng.choice(len(draws), count, replace=bool((weights > 0).sum() < count), p=weights / weights.sum())
    best = jax.tree.map(lambda a: a[int(np.argmax(chosen.bound))], chosen.normal)
    return jnp.asarray(draws[taken]), best.variances


class Pathfinder(Engine):
    """Pathfinder: a quick approximation by normal distributions, often good enough to look at a model with.

    L-BFGS climbs from several starts. At every point of its path the inverse Hessian gives a normal approximation;
    the one with the best evidence bound is kept. Draws of all paths are resampled by Pareto smoothed weights,
    so that some repeat.

    Args:
        num_paths: run at once; 8 rarely miss a mode that chains would find.
        num_samples: draws kept, and made before resampling.

    Source: L. Zhang, B. Carpenter, A. Gelman, A. Vehtari, "Pathfinder" (2022). Weights here are those of the mixture
    of all paths, which vary less than each path's own.
    """

    name: ClassVar[str] = "pathfinder"

    num_paths: int = 8
    num_samples: int = 4000

    def __check_init__(self):
        check_counts(self, "num_paths", "num_samples")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("Pathfinder")
        keys = jax.random.split(key, 3)
        chosen = climb_from(conditioned, keys[0], self.num_paths).best
        if not np.isfinite(np.asarray(chosen.bound)).any():
            raise InputError(
                "no path of the optimizer has a finite evidence bound: the density falls to zero next to every point "
                "that was looked at; use engine nuts or smc, or reparameterize the model"
            )
        draws, ratios = self._draw(conditioned, chosen, keys[1])
        ratios = np.asarray(ratios, np.float64)
        smoothed = pareto_smoothed(ratios)
        weights = np.exp(smoothed - smoothed.max())
        rng = host_generator(keys[2])
        taken = rng.choice(len(weights), self.num_samples, p=weights / weights.sum())
        k_hat, doubts = doubts_of_weights(ratios)
        posterior = posterior_of(
            self, conditioned, np.asarray(draws)[None, np.asarray(taken)], key=key, k_hat=k_hat,
            log_evidence_bound=float(np.max(chosen.bound)),
        )  # fmt: skip
        return posterior.doubted(doubts)

    def _draw(self, conditioned: ConditionedModel, chosen: Approximation, key: Any) -> tuple[Array, Array]:
        """Draws of the mixture of all paths that have a bound, and their log importance ratios."""
        alive = np.isfinite(np.asarray(chosen.bound))
        which = np.resize(np.flatnonzero(alive), self.num_samples)  # equal shares
        noise = standard_normal(key, (self.num_samples, conditioned.dimension))
        return _evaluate_mixture(conditioned, chosen.normal, alive, which, noise)


@eqx.filter_jit
def _evaluate_mixture(
    conditioned: ConditionedModel, normals: QuasiNewtonNormal, alive: Array, which: Array, noise: Array
) -> tuple[Array, Array]:
    """Draws of the equal mixture of the living normals, and their log importance ratios."""

    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        own = jax.tree.map(lambda a: a[pair[0]], normals)
        draw = own.mean + own.root(pair[1])
        densities = jnp.where(alive, jax.vmap(lambda n: n.log_prob(draw))(normals), -jnp.inf)
        return draw, conditioned.log_prob(draw) - jax.nn.logsumexp(densities) + jnp.log(alive.sum())

    draws, ratios = jax.lax.map(one, (which, noise), batch_size=min(len(which), 250))
    return draws, jnp.where(jnp.isnan(ratios), -jnp.inf, ratios)
