"""Ladders of replicas between prior and posterior, which move and exchange places in one compiled loop.

Replicas are kept by rung. As many tiles of rungs are computed as the ladder has, so that ladders of all lengths share
one program. Random numbers come from NumPy, since the compiled form of JAX's would be as large as the sampler.

Source: S. Syed, A. Bouchard-Cote, G. Deligiannidis, A. Doucet, "Non-reversible parallel tempering: a scalable highly
parallel MCMC scheme" (2022), for the order of exchanges and the choice of rungs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from scipy import interpolate, special

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.randomness import host_generator
from bayeslens.inference.leapfrog import Scale
from bayeslens.inference.prior_population import Population, prior_population
from bayeslens.inference.warmup import fisher_scale, rank_of

SCANS = 8  # of a compiled call: many enough that calls cost little, few enough to be interrupted
_TILE = 8  # rungs that move at once
_MOST_RUNGS = 64  # where their number is found
_LEAPFROGS = 8  # of a move at most; each takes from half to all
_SMALLEST_STEP = 0.1  # relative to the largest of a rung, where narrow modes and wide ones may stand side by side
_ACCEPTANCE = 0.8  # leaves room where curvature varies; 0.65 is best for normal targets
_POPULATION = 1024  # draws from the prior that are made at once


class Replicas(NamedTuple):
    """Replicas by the rungs where they are.

    Attributes:
        population: where they are in space.
        from_prior: whether they have been at the foot since they were at the top.
    """

    population: Population
    from_prior: Bool[Array, "rungs chains"]


class Rungs(NamedTuple):
    """What moves depend on, for every rung; padded at the top."""

    betas: Float[Array, " rungs"]
    log_steps: Float[Array, " rungs"]
    scale: Scale


class Noise(NamedTuple):
    """Random numbers of a call, and what else differs between its scans.

    Attributes:
        momenta: of moves, in whitened coordinates.
        uniforms: for moves, their steps, and exchanges.
        lengths: of trajectories in leapfrog steps.
        parity: 0 where even pairs are offered to exchange places, 1 where odd ones are.
        gains: by which the steps learn.
        prior: draws of the prior.
    """

    momenta: Float[Array, "scans rungs chains dimension"]
    uniforms: Float[Array, "scans 3 rungs chains"]
    lengths: Int[Array, " scans"]
    parity: Int[Array, " scans"]
    gains: Float[Array, " scans"]
    prior: Population


class Trace(NamedTuple):
    """What a call found, scan by scan: see `Exchanged`. `seen` are points and gradients of all rungs in its last."""

    points: Float[np.ndarray, "scans chains dimension"]
    log_density: Float[np.ndarray, "scans chains"]
    log_likelihood_of_draws: Float[np.ndarray, "scans chains"]
    round_trips: Bool[np.ndarray, "scans chains"]
    log_likelihood: Float[np.ndarray, "scans rungs chains"]
    acceptance: Float[np.ndarray, "scans rungs"]
    seen: tuple[Float[np.ndarray, "calls rungs chains dimension"], Float[np.ndarray, "calls rungs chains dimension"]]


def joined(parts: list[Any]) -> Any:
    """Tuples of arrays, such as traces, one after another."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


class Ladders:
    """Ladders of replicas on the host: what the compiled loop needs, and what comes out of it.

    Args:
        conditioned: the model with its data.
        num_chains: ladders.
        num_rungs: of each; None finds their number.
        key: a `jax.random.key`.
        reversible: offer even or odd pairs at random, by which replicas diffuse; to compare with.
    """

    def __init__(
        self,
        conditioned: ConditionedModel,
        num_chains: int,
        num_rungs: int | None,
        key: Any,
        *,
        reversible: bool = False,
    ):
        self.conditioned, self.num_chains, self.num_rungs = conditioned, num_chains, num_rungs
        self.random, self.reversible = host_generator(key), reversible
        self.dtype, self.num_gradients, self.num_scans = jax.dtypes.canonicalize_dtype(float), 0, 0
        most = num_rungs or _MOST_RUNGS
        self.padded = -(-most // _TILE) * _TILE
        self.prior, self.num_used = self._more_prior(), 0
        heights = np.asarray(self.prior.log_likelihood, np.float64)
        self.betas = first_ladder(heights, num_rungs or _TILE)
        with np.errstate(invalid="ignore"):
            weights = np.where(np.isfinite(heights), self.betas[:, None] * heights, -np.inf)
        # Each rung begins with draws of the prior, taken by their weights there.
        weights = special.softmax(weights, axis=1)
        chosen = np.stack([self.random.choice(len(heights), num_chains, p=w / w.sum()) for w in weights])
        population = jax.tree.map(lambda a: np.asarray(a)[chosen], self.prior)
        self.replicas = Replicas(population, np.zeros(chosen.shape, bool))
        rungs, dimension = len(self.betas), conditioned.dimension
        self.rank = rank_of("low_rank", dimension)
        flat = Scale(np.ones(dimension), np.zeros((dimension, self.rank)), np.ones(self.rank))
        self.scales = [flat] * rungs
        self.log_steps = np.full(rungs, -20.0)  # not to move: gradients at these points give the first scales
        trace = self.run()
        self._rescale(trace)
        self.log_steps = np.full(rungs, np.log(0.5))

    def _more_prior(self) -> Population:
        key = jax.random.key(self.random.integers(2**31))
        return jax.tree.map(np.asarray, prior_population(self.conditioned, "parallel tempering", key, _POPULATION)[0])

    def _draws_of_prior(self, count: int) -> Population:
        while self.num_used + count > len(self.prior.points):
            left = jax.tree.map(lambda a: a[self.num_used :], self.prior)
            self.prior, self.num_used = joined([left, self._more_prior()]), 0
        self.num_used += count
        return jax.tree.map(lambda a: a[self.num_used - count : self.num_used], self.prior)

    def run(self, gains: Float[np.ndarray, " scans"] | None = None) -> Trace:
        """Some scans; the steps learn by these gains, or not at all."""
        chains, rungs, dimension = self.num_chains, len(self.betas), self.conditioned.dimension
        momenta = np.zeros((SCANS, self.padded, chains, dimension), self.dtype)
        momenta[:, :rungs] = self.random.standard_normal((SCANS, rungs, chains, dimension), np.float32)
        order = self.num_scans + np.arange(SCANS)
        prior = self._draws_of_prior(SCANS * chains)
        noise = Noise(
            momenta,
            self.random.random((SCANS, 3, self.padded, chains), np.float32).astype(self.dtype),
            self.random.integers(_LEAPFROGS // 2, _LEAPFROGS + 1, SCANS),
            self.random.integers(0, 2, SCANS) if self.reversible else order % 2,
            np.zeros(SCANS) if gains is None else gains,
            jax.tree.map(lambda a: a.reshape(SCANS, chains, *a.shape[1:]), prior),
        )
        scale = jax.tree.map(lambda *a: np.stack(a), *self.scales)
        ladder = Rungs(self.betas, self.log_steps, scale)
        pad = lambda a: np.concatenate([a, np.repeat(a[-1:], self.padded - len(a), 0)])  # noqa: E731
        arrays = jax.tree.map(pad, (self.replicas, ladder))
        replicas, ladder, noise = jax.tree.map(
            lambda a: a.astype(self.dtype) if np.issubdtype(a.dtype, np.floating) else a, (*arrays, noise)
        )
        replicas, log_steps, trace = jax.tree.map(
            np.asarray, _scan(self.conditioned, replicas, ladder, noise, np.int32(rungs))
        )
        self.replicas = jax.tree.map(lambda a: a[:rungs], replicas)
        self.log_steps = np.asarray(log_steps[:rungs], np.float64)
        self.num_scans += SCANS
        self.num_gradients += int((noise.lengths + 1).sum()) * -(-rungs // _TILE) * _TILE * chains
        return trace._replace(
            log_likelihood=np.asarray(trace.log_likelihood[:, :rungs], np.float64),
            acceptance=trace.acceptance[:, :rungs],
            seen=tuple(np.asarray(a[None, :rungs], np.float64) for a in trace.seen),
        )

    def adapt(self, trace: Trace) -> None:
        """Set the ladder, its scales and where the replicas are on it, by what a round has found."""
        rejections = rejection_rates(trace.log_likelihood, self.betas)
        tiles = np.ceil((2 * rejections.sum() + 1) / _TILE)
        wanted = int(min(tiles * _TILE, _MOST_RUNGS))
        betas = equal_rejection(self.betas, rejections, self.num_rungs or wanted)
        self._rescale(trace)
        where = np.interp(betas, self.betas, np.arange(len(self.betas)))
        nearest = np.round(where).astype(int)
        self.log_steps = np.interp(where, np.arange(len(self.betas)), self.log_steps)
        self.scales = [self.scales[i] for i in nearest]
        self.replicas = jax.tree.map(lambda a: a[nearest], self.replicas)
        self.replicas = self.replicas._replace(from_prior=np.zeros_like(self.replicas.from_prior))
        self.betas = betas

    def _rescale(self, trace: Trace) -> None:
        points, gradients = (np.concatenate(list(a), 1) for a in trace.seen)
        groups = np.zeros(points.shape[1], int)
        self.scales = [fisher_scale(p, g, groups, self.rank) for p, g in zip(points, gradients, strict=True)]


def rejection_rates(
    log_likelihood: Float[np.ndarray, "scans rungs chains"], betas: Float[np.ndarray, " rungs"]
) -> Float[np.ndarray, " intervals"]:
    """Mean probabilities that neighbours would not exchange places.

    >>> rejection_rates(np.zeros((5, 3, 2)), np.array([0.0, 0.5, 1.0])).tolist()
    [0.0, 0.0]
    """
    with np.errstate(invalid="ignore"):  # the prior may draw what is impossible, at both of two scans
        ratio = np.diff(betas)[:, None] * (log_likelihood[:, :-1] - log_likelihood[:, 1:])
    return np.nan_to_num(1 - np.exp(np.minimum(ratio, 0.0)), nan=1.0).mean((0, 2))


def equal_rejection(
    betas: Float[np.ndarray, " rungs"], rejections: Float[np.ndarray, " intervals"], num_rungs: int
) -> Float[np.ndarray, " num_rungs"]:
    """The ladder on which all neighbours reject as often as each other.

    The sum of the rejections below an exponent hardly depends on the ladder that it is measured with; between rungs
    it is interpolated monotonically.

    >>> equal_rejection(np.array([0.0, 0.5, 1.0]), np.array([0.3, 0.1]), 3).round(2).tolist()
    [0.0, 0.25, 1.0]
    """
    least = 1e-6 + 1e-3 * rejections.mean()  # so that the sum grows everywhere
    barrier = np.concatenate([[0.0], np.cumsum(np.maximum(rejections, least))])
    found = interpolate.PchipInterpolator(barrier, betas)(np.linspace(0, barrier[-1], num_rungs))
    found[0], found[-1] = 0.0, 1.0
    return found


def first_ladder(log_likelihood: Float[np.ndarray, " draws"], num_rungs: int) -> Float[np.ndarray, " num_rungs"]:
    """Exponents to begin with, from the log likelihoods of draws of the prior.

    The first differs from the prior by one over the spread of the log likelihoods; from there they grow by a factor.

    >>> first_ladder(np.linspace(-400.0, 0.0, 9), 4).round(3).tolist()
    [0.0, 0.005, 0.071, 1.0]
    """
    known = log_likelihood[np.isfinite(log_likelihood)]
    spread = np.subtract(*np.quantile(known, [0.75, 0.25]))
    first = min(1 / (num_rungs - 1), 1 / max(spread, 1e-30))
    return np.concatenate([[0.0], np.geomspace(first, 1.0, num_rungs - 1)]) if num_rungs > 2 else np.array([0.0, 1.0])


class _Place(NamedTuple):
    """Points of a trajectory, with the tempered log density and its gradient."""

    points: Float[Array, "rungs chains dimension"]
    gradient: Float[Array, "rungs chains dimension"]
    log_density: Float[Array, "rungs chains"]
    log_prior: Float[Array, "rungs chains"]
    log_likelihood: Float[Array, "rungs chains"]


def _moved(
    conditioned: ConditionedModel, points: Array, rungs: Rungs, momenta: Array, uniforms: Array, length: Any
) -> tuple[_Place, Array]:
    """Replicas after a Hamiltonian trajectory that was accepted or not, and its acceptance probability.

    The first turn of the loop only takes the gradient where the trajectory begins, so that the program has one.
    """

    def terms(point: Array, beta: Array) -> tuple[Array, tuple[Array, Array]]:
        prior, likelihood = conditioned.log_terms(point)
        return prior + beta * likelihood, (prior, likelihood)

    slope = jax.vmap(jax.vmap(jax.value_and_grad(terms, has_aux=True), (0, None)))
    step = jnp.exp(rungs.log_steps[:, None] + np.log(_SMALLEST_STEP) * uniforms[1] ** 2)[:, :, None]

    def leap(turn: Array, carry: tuple) -> tuple:
        begin, here, momentum = carry
        drift = jnp.where(turn > 0, step, 0.0)
        points = here.points + drift * jax.vmap(Scale.forward)(rungs.scale, momentum)
        (density, (prior, likelihood)), gradient = slope(points, rungs.betas)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        kick = jnp.where((turn == 0) | (turn == length), 0.5, 1.0).astype(step.dtype) * step
        momentum = momentum + kick * jax.vmap(Scale.backward)(rungs.scale, gradient)
        here = jax.tree.map(lambda a, b: a.astype(b.dtype), _Place(points, gradient, density, prior, likelihood), here)
        return jax.tree.map(lambda a, b: jnp.where(turn == 0, a, b), here, begin), here, momentum

    blank = _Place(points, points, *(jnp.zeros(points.shape[:2], points.dtype),) * 3)
    begin, end, last = lax.fori_loop(0, length + 1, leap, (blank, blank, momenta))
    log_ratio = end.log_density - begin.log_density + 0.5 * jnp.sum(momenta**2 - last**2, axis=-1)
    possible = (end.log_likelihood < jnp.inf) & ~jnp.isnan(log_ratio)
    probability = jnp.where(possible, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    accept = uniforms[0] < probability
    choose = lambda a, b: jnp.where(accept.reshape(accept.shape + (1,) * (a.ndim - 2)), a, b)  # noqa: E731
    return jax.tree.map(choose, end, begin), probability


@eqx.filter_jit
def _scan(
    conditioned: ConditionedModel, replicas: Replicas, rungs: Rungs, noise: Noise, num_rungs: Any
) -> tuple[Replicas, Array, Trace]:
    """Replicas and steps after some scans, and their trace."""
    padded, top = rungs.betas.shape[0], num_rungs - 1
    num_tiles = (num_rungs + _TILE - 1) // _TILE

    def one(carry: tuple, noise: Noise) -> tuple[tuple, tuple]:
        replicas, log_steps, place = carry
        ladder = rungs._replace(log_steps=log_steps)
        points = replicas.population.points

        def move(tile: Array, moved: tuple) -> tuple:
            part = lambda a: lax.dynamic_slice_in_dim(a, tile * _TILE, _TILE)  # noqa: E731
            uniforms = lax.dynamic_slice_in_dim(noise.uniforms[:2], tile * _TILE, _TILE, 1)
            found = _moved(
                conditioned, part(points), jax.tree.map(part, ladder), part(noise.momenta), uniforms,
                noise.lengths,
            )  # fmt: skip
            return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, tile * _TILE, 0), moved, found)

        place, acceptance = lax.fori_loop(0, num_tiles, move, (place, jnp.zeros_like(noise.uniforms[0])))
        acceptance = acceptance.mean(1)
        population = Population(place.points, place.log_prior, place.log_likelihood)
        population = jax.tree.map(lambda a, b: a.at[0].set(b), population, noise.prior)
        before = population.log_likelihood
        source = _exchanged(before, rungs.betas, noise.uniforms[2], noise.parity, num_rungs)
        from_prior = replicas.from_prior.at[0].set(True)
        replicas = jax.tree.map(
            lambda a: jnp.take_along_axis(a, source.reshape(source.shape + (1,) * (a.ndim - 2)), 0),
            Replicas(population, from_prior),
        )
        points, log_prior, log_likelihood = (a[top] for a in replicas.population)
        round_trips = replicas.from_prior[top]
        replicas = replicas._replace(from_prior=replicas.from_prior.at[top].set(False))
        log_steps = log_steps + noise.gains * (acceptance - _ACCEPTANCE)
        found = points, log_prior + log_likelihood, log_likelihood, round_trips, before, acceptance
        return (replicas, log_steps, place), found

    shape = (padded, noise.prior.points.shape[1])
    blank = _Place(replicas.population.points, replicas.population.points, *(jnp.zeros(shape, rungs.betas.dtype),) * 3)
    (replicas, log_steps, place), found = lax.scan(one, (replicas, rungs.log_steps, blank), noise)
    return replicas, log_steps, Trace(*found, (place.points, place.gradient))


def _exchanged(
    log_likelihood: Float[Array, "rungs chains"],
    betas: Float[Array, " rungs"],
    uniforms: Float[Array, "rungs chains"],
    parity: Any,
    num_rungs: Any,
) -> Int[Array, "rungs chains"]:
    """The rungs from which the replicas come that are at each rung after an exchange of places."""
    lower = jnp.arange(len(betas) - 1)
    offered = (lower % 2 == parity) & (lower + 1 < num_rungs)
    log_ratio = jnp.diff(betas)[:, None] * (log_likelihood[:-1] - log_likelihood[1:])
    swap = (offered[:, None] & (jnp.log(uniforms[:-1]) < log_ratio)).astype(int)
    return jnp.arange(len(betas))[:, None] + jnp.pad(swap, ((0, 1), (0, 0))) - jnp.pad(swap, ((1, 0), (0, 0)))
