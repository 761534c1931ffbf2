"""Markov chains for models whose plates take a part of the data at a time: Langevin and Hamiltonian dynamics by noisy
gradients.

A warm-up climbs to a mode, and measures the gradient and the curvature there over many parts of the data. Chains then
walk in coordinates in which the posterior is about standard normal. The gradient of a part is compared with that of the
same part at the mode (a control variate), so that its noise falls with the distance between the two; what is left of it
is measured, and the noise that the dynamics add is reduced by as much.

There is no test that accepts or rejects, since it would need all data: draws have an error that the step size decides.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel, site_log_prob
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.inference.diagnostics import doubts_of_chains

_LEARNING_RATE = 0.1  # of the climb, in unconstrained coordinates
_MEASURED = 200  # parts of the data that gradient and curvature at the mode are averaged over
_DENSE_LIMIT = 100  # dimensions up to which coordinates are rotated too
_FRICTION = 1.0  # critical for a standard normal would be 2; less keeps momentum longer
_BLOCKS = 20
_SETTLING = 200  # steps that are not kept
_FAR = 5.0  # whitened distance by which the mode may have been missed


class Control(NamedTuple):
    """A mode, and what is known there.

    `vector = center + root u` whitens: `root` is a matrix, or the diagonal of one. `slope` is the gradient of all data
    at the center, `noise` the variance of a part's whitened gradient, per dimension, where the posterior is.
    """

    center: Float[Array, " dimension"]
    root: Float[Array, "..."]
    slope: Float[Array, " dimension"]
    noise: Float[Array, " dimension"]

    def vector(self, u: Float[Array, " dimension"]) -> Float[Array, " dimension"]:
        """The unconstrained vector of whitened coordinates."""
        return self.center + (self.root * u if self.root.ndim == 1 else self.root @ u)

    def force(self, conditioned: ConditionedModel, u: Float[Array, " dimension"], rows: dict[str, Array]) -> Array:
        """An unbiased estimate of the whitened gradient from one part of the data."""
        slope = jax.grad(conditioned.log_prob)
        found = slope(self.vector(u), rows) - slope(self.center, rows) + self.slope
        found = self.root * found if self.root.ndim == 1 else self.root.T @ found
        return jnp.where(jnp.isfinite(found), found, 0.0)


class Plates(eqx.Module):
    """The subsampled plates of a model.

    Attributes:
        sizes: name, rows in all and rows taken at a time, of each.
        parts: name -> indices, shape (parts, rows taken at a time), which together hold every row.
        shares: name -> what each part's terms count in the sum over all data, shape (parts,).
    """

    sizes: tuple[tuple[str, int, int], ...] = eqx.field(static=True)
    parts: dict[str, np.ndarray]
    shares: dict[str, np.ndarray]

    @classmethod
    def of(cls, sizes: tuple[tuple[str, int, int], ...]) -> Plates:
        """Whole parts first; each row that is left makes a part of its own, where it is repeated."""
        parts, shares = {}, {}
        for name, size, taken in sizes:
            whole, left = divmod(size, taken)
            alone = np.repeat(np.arange(size - left, size)[:, None], taken, 1)
            parts[name] = np.concatenate([np.arange(whole * taken).reshape(whole, taken), alone])
            shares[name] = np.repeat([taken / size, 1 / size], [whole, left])
        longest = max(map(len, shares.values()))
        for name in parts:
            padding = longest - len(shares[name])
            parts[name] = np.pad(parts[name], ((0, padding), (0, 0))).astype(np.int32)
            shares[name] = np.pad(shares[name], (0, padding)).astype(np.float32)
        return cls(sizes, parts, shares)

    def draw(self, key: Any) -> dict[str, Array]:
        """Rows for one step, each drawn from all: drawing without replacement takes as long as a large model."""
        keys = jax.random.split(key, len(self.sizes))
        pairs = zip(keys, self.sizes, strict=True)
        return {name: jax.random.randint(k, (taken,), 0, size) for k, (name, size, taken) in pairs}

    def slope(self, conditioned: ConditionedModel, vector: Float[Array, " dimension"]) -> Float[Array, " dimension"]:
        """The gradient of the log density of all data, one part after the other."""
        count = len(next(iter(self.shares.values())))

        def share_of_all(vector: Array, now: tuple[dict, dict]) -> Array:
            rows, shares = now
            total = jnp.zeros(())
            for site in conditioned.trace(vector, rows).values():
                if site["type"] == "sample":
                    within = [f.name for f in site["cond_indep_stack"] if f.name in shares]
                    share = shares[within[0]] if within else 1 / count
                    total = total + share * jnp.sum(site_log_prob(site))
            return total

        def add(total: Array, now: tuple[dict, dict]) -> tuple[Array, None]:
            return total + jax.grad(share_of_all)(vector, now), None

        return jax.lax.scan(add, 0 * vector, (self.parts, self.shares))[0]


@eqx.filter_jit
def measure(
    conditioned: ConditionedModel, plates: Plates, starts: Float[Array, "chains dimension"], key: Any, num_steps: Any
) -> Control:
    """A mode near each start and what is known there; leaves have a leading axis of chains."""
    slope = jax.grad(conditioned.log_prob)
    size, dtype = starts.shape[1], starts.dtype

    def climb(start: Array, key: Any) -> Array:
        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, mean, square = state
            g = slope(x, plates.draw(jax.random.fold_in(key, i)))
            g = jnp.where(jnp.isfinite(g), g, 0.0)
            mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
            age = (i + 1).astype(dtype)
            direction = mean / (1 - 0.9**age) / (jnp.sqrt(square / (1 - 0.99**age)) + 1e-12)
            rate = _LEARNING_RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / num_steps))
            return x + rate * direction, mean, square

        return jax.lax.fori_loop(0, num_steps, step, (start, 0 * start, 0 * start))[0]

    def look(center: Array, key: Any) -> Control:
        keys = jax.random.split(key, _MEASURED)

        def times(v: Array, key: Any) -> Array:
            rows = plates.draw(key)
            return -jax.jvp(lambda x: slope(x, rows), (center,), (v,))[1]

        if size <= _DENSE_LIMIT:
            hessian = jax.lax.map(lambda k: jax.vmap(lambda v: times(v, k))(jnp.eye(size, dtype=dtype)), keys).mean(0)
            values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
            # Where the density curves upwards, its absolute curvature still tells how far to go.
            root = vectors / jnp.sqrt(jnp.maximum(jnp.abs(values), 1e-6 * jnp.abs(values).max()))
        else:
            signs = jnp.sign(jax.random.uniform(key, (_MEASURED, size), dtype) - 0.5)
            diagonal = jnp.abs(jax.lax.map(lambda p: p[0] * times(*p), (signs, keys)).mean(0))
            root = 1 / jnp.sqrt(jnp.maximum(diagonal, 1e-6 * diagonal.max()))
        found = Control(center, root, plates.slope(conditioned, center), 0 * center)
        # The gradient's noise at places where the posterior has its mass.
        places = jax.random.normal(jax.random.fold_in(key, 1), (8, size), dtype)

        def forces(key: Any) -> Array:
            rows = plates.draw(key)
            return jax.vmap(lambda u: found.force(conditioned, u, rows))(places)

        return found._replace(noise=jax.lax.map(forces, keys[:50]).var(0, ddof=1).mean(0))

    climbing, looking = jax.random.split(key)
    chains = jnp.arange(len(starts))
    keys = jax.vmap(jax.random.fold_in, (None, 0))
    centers = jax.vmap(climb)(starts, keys(climbing, chains))
    return jax.vmap(look)(centers, keys(looking, chains))


@eqx.filter_jit
def _walk(
    conditioned: ConditionedModel, plates: Plates, control: Control, state: tuple[Array, Array], key: Any, step: Any,
    decay: Any, counts: tuple[int, int],
) -> tuple[tuple[Array, Array], Array]:  # fmt: skip
    """Go on for as many draws, each of as many steps; unconstrained draws of shape (chains, draws, dimension).

    The step is that of B. Leimkuhler and C. Matthews (half a drift, friction and noise, half a drift, a kick), of which
    a decay of zero leaves Langevin dynamics without momentum.
    """
    draws, thinning = counts

    def chain(control: Control, u: Array, v: Array, key: Any) -> tuple[tuple[Array, Array], Array]:
        # Kicks bring noise of their own: added noise keeps the momentum's variance at one or, without momentum, that
        # of the steps at step^2.
        carried = jnp.where(decay > 0, decay**2, 0.25)
        spread = jnp.sqrt(jnp.maximum(1 - decay**2 - carried * step**2 * control.noise, 0.0))

        def advance(state: tuple[Array, Array], key: Any) -> tuple[tuple[Array, Array], None]:
            u, v = state
            shaking, taking = jax.random.split(key)
            u = u + step / 2 * v
            v = decay * v + spread * jax.random.normal(shaking, u.shape, u.dtype)
            u = u + step / 2 * v
            return (u, v + step * control.force(conditioned, u, plates.draw(taking))), None

        def draw(state: tuple[Array, Array], key: Any) -> tuple[tuple[Array, Array], Array]:
            state, _ = jax.lax.scan(advance, state, jax.random.split(key, thinning))
            return state, control.vector(state[0])

        return jax.lax.scan(draw, (u, v), jax.random.split(key, draws))

    return jax.vmap(chain)(control, *state, jax.random.split(key, len(state[0])))


class SGLD(Engine):
    """Stochastic gradient Langevin dynamics: for models whose plates have a `subsample_size`.

    Args:
        num_chains: run at once; 4 are needed to trust R-hat.
        num_warmup: steps of the climb to a mode, with a learning rate that falls to zero.
        num_samples: draws kept per chain.
        step_size: in standard deviations.
        thinning: steps per draw; at the default step a chain forgets where it was in 22.

    Sources: M. Welling, Y. Teh, "Bayesian learning via stochastic gradient Langevin dynamics" (2011); J. Baker, P.
    Fearnhead, E. Fox, C. Nemeth, "Control variates for stochastic gradient MCMC" (2019).
    """

    name: ClassVar[str] = "sgld"

    num_chains: int = 4
    num_warmup: int = 2000
    num_samples: int = 1000
    step_size: float = 0.3
    thinning: int = 20

    def __check_init__(self):
        _check_settings(self)

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        return _sampled(self, conditioned, key, decay=0.0)


class SGHMC(Engine):
    """Stochastic gradient Hamiltonian Monte Carlo: for models whose plates have a `subsample_size`.

    Momentum makes it forget in fewer steps than Langevin dynamics, and its error in the step size is of higher order.

    Args:
        num_chains: run at once; 4 are needed to trust R-hat.
        num_warmup: steps of the climb to a mode, with a learning rate that falls to zero.
        num_samples: draws kept per chain.
        step_size: in standard deviations.
        thinning: steps per draw; at the default step a chain forgets where it was in about 10.

    Sources: T. Chen, E. Fox, C. Guestrin, "Stochastic gradient Hamiltonian Monte Carlo" (2014); B. Leimkuhler, C.
    Matthews, "Rational construction of stochastic numerical methods for molecular sampling" (2013); control variates by
    J. Baker and others (2019).
    """

    name: ClassVar[str] = "sghmc"

    num_chains: int = 4
    num_warmup: int = 2000
    num_samples: int = 1000
    step_size: float = 0.25
    thinning: int = 10

    def __check_init__(self):
        _check_settings(self)

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        return _sampled(self, conditioned, key, decay=float(np.exp(-_FRICTION * self.step_size)))


def _check_settings(engine: Any) -> None:
    check_counts(engine, "num_chains", "num_warmup", "num_samples", "thinning")
    if not 0 < engine.step_size < 1:
        raise InputError(f"step_size must lie between 0 and 1 standard deviations, got {engine.step_size}")


def _sampled(engine: Any, conditioned: ConditionedModel, key: Any, decay: float) -> Posterior:
    conditioned.check_continuous("dynamics by gradients")
    plates = Plates.of(_sizes(conditioned))
    keys = jax.random.split(key, 4)
    starts = conditioned.start(keys[0], engine.num_chains)
    control = measure(conditioned, plates, starts, keys[1], np.asarray(engine.num_warmup, np.int32))
    u, v = jax.random.normal(keys[2], (2, *starts.shape), starts.dtype)
    draws_at_once = max(1, -(-engine.num_samples // _BLOCKS))
    settling = -(-_SETTLING // (draws_at_once * engine.thinning))
    drawn, state, interrupted = [], (u, v), False
    step, decay = np.asarray(engine.step_size, starts.dtype), np.asarray(decay, starts.dtype)
    with ProgressBar(engine.name.upper(), engine.num_samples) as bar:
        try:
            while len(drawn) * draws_at_once < engine.num_samples + settling * draws_at_once:
                block = jax.random.fold_in(keys[3], len(drawn))
                counts = (draws_at_once, engine.thinning)
                state, found = _walk(conditioned, plates, control, state, block, step, decay, counts)
                drawn.append(np.asarray(found))
                bar(min(engine.num_samples, max(0, len(drawn) - settling) * draws_at_once))
        except KeyboardInterrupt:
            if len(drawn) <= settling:
                raise
            interrupted = True
    draws = np.concatenate(drawn[settling:], 1)[:, : engine.num_samples]
    posterior = posterior_of(engine, conditioned, draws, key=key)
    latents = {n: v for n, v in posterior.draws.items() if n not in conditioned.deterministic}
    return posterior.doubted(
        (*_doubts(engine, control, decay, draws, interrupted), *doubts_of_chains(latents, posterior.statistics))
    )


def _sizes(conditioned: ConditionedModel) -> tuple[tuple[str, int, int], ...]:
    """Sizes of the subsampled plates; refuses models without any, and latents that belong to a part of the data."""
    if not conditioned.subsampled:
        raise InputError(
            "no plate of the model takes a part of the data: give it a subsample_size and take the rows that it "
            "yields, or use engine nuts"
        )
    found, sizes = {}, {}

    def look() -> Array:
        for name, site in conditioned.trace(jnp.zeros(conditioned.dimension), {}).items():
            if site["type"] == "plate" and name in conditioned.subsampled:
                sizes[name] = tuple(int(n) for n in site["args"])
            elif site["type"] == "sample":
                found[name] = [f.name for f in site["cond_indep_stack"] if f.name in conditioned.subsampled]
        return jnp.zeros(())

    jax.eval_shape(look)
    crossed = [n for n, plates in found.items() if len(plates) > 1]
    if crossed:
        raise InputError(f"the sites {crossed} are in two subsampled plates: leave subsample_size out of one of them")
    local = [n for n in conditioned.structure.names if found[n]]
    if local:
        raise InputError(
            f"the sites {local} belong to rows of the plates {list(conditioned.subsampled)}, of which only a part is "
            "seen at a time: integrate them out of the model, or leave out subsample_size and use engine nuts"
        )
    return tuple((name, *size) for name, size in sizes.items())


def _doubts(
    engine: Any, control: Control, decay: Any, draws: Float[np.ndarray, "chains draws dimension"], interrupted: bool
) -> list[str]:
    found = []
    if interrupted:
        found.append(f"the run was interrupted after {draws.shape[1]} of {engine.num_samples} draws per chain")
    carried = float(decay) ** 2 if decay > 0 else 0.25
    share = float(jnp.max(control.noise)) * carried * engine.step_size**2 / (1 - float(decay) ** 2)
    if not share < 1:
        found.append(
            f"the noise of the gradients is {share:.1f} times what the dynamics allow, so that variances are "
            "too large: raise subsample_size, or lower step_size"
        )
    moved = np.abs(draws.mean(1) - np.asarray(control.center)) / (draws.std(1) + 1e-30)
    if not moved.max() < _FAR:
        found.append(
            "the chains left the mode that the warm-up found, so that it was none: raise num_warmup, or scale what the "
            "model takes"
        )
    return found
