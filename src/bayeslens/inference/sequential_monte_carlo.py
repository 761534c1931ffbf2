"""Sequential Monte Carlo from the prior to the posterior: tempered likelihoods, systematic resampling, moves.

Particles live on islands. All share the temperatures and what the moves learn; each resamples within itself and has
an evidence of its own, so that the spread of those says how far their mean can be trusted.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import special, stats

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.inference.prior_population import (
    Population,
    evaluate,
    impossible_likelihoods,
    prior_population,
    until_interrupted,
)

_PIECE_SECONDS = 0.25  # of one compiled call: how long Ctrl-C may have to wait
_BISECTIONS = 50
_JUMPS = 0.1  # share of steps by the whole difference of two particles, which lead from one mode to another
_ACCEPTANCE = 0.25  # near the best for random walks in any dimension (Roberts and Rosenthal 2001)
_ACCEPTANCE_OF_GRADIENTS = 0.8  # leaves room where curvature varies; 0.65 is best for normal targets
_LEAPFROGS = 8
_DECORRELATED = 0.1  # correlation with where a move began, below which a particle counts as new
_LARGE_ERROR = 0.5


class SMC(Engine):
    """Adaptive tempered sequential Monte Carlo: posterior and evidence, also of several modes, without gradients.

    Particles drawn from the prior are led to the posterior through the targets prior * likelihood^temperature. The
    next temperature is the one at which the effective sample size of the weights falls to `target_ess` of the
    particles. Then they are resampled and moved until they have forgotten where they were: by the difference of two
    particles of other islands (differential evolution, which fits itself to scales, correlations and modes) or, with
    `gradient`, by Hamiltonian steps. All particles are evaluated in one call.

    The evidence is the mean over the islands, its standard error comes from their spread; it is widened by Student's
    t distribution, so that two errors cover 95% although the islands are few. Draws have an island per chain, and
    `statistics` holds each draw's `log_likelihood` and `num_evaluations`, whose sum is the number of likelihoods
    that were computed.

    Args:
        num_particles: on each island; the evidence's error falls with the square root of their number.
        num_islands: from 2 on; 8 tell the error within a third.
        target_ess: share of effective particles after each change of temperature, the usual 1/2.
        max_moves: at each temperature. Moves end by themselves when no coordinate, nor the likelihood, correlates
            above 0.1 with where it began; well separated modes never get there.
        gradient: whether to move by gradients of the density: worth it from some ten dimensions on.

    Sources: P. Del Moral, A. Doucet, A. Jasra, "Sequential Monte Carlo samplers" (2006); C. Dai, J. Heng, P. Jacob, N.
    Whiteley, "An invitation to sequential Monte Carlo samplers" (2022); C. ter Braak, "A Markov chain Monte Carlo
    version of the genetic algorithm differential evolution" (2006).

    >>> import numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> found = SMC(num_particles=256)(conditioned_model(model, {"y": 1.0}), key=jax.random.key(0))
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(1.0)
    >>> bool(abs(found.log_evidence - exact) < 4 * found.log_evidence_error)
    True
    """

    name: ClassVar[str] = "smc"

    num_particles: int = 512
    num_islands: int = 8
    target_ess: float = 0.5
    max_moves: int = 200
    gradient: bool = False

    def __check_init__(self):
        for name, least in (("num_particles", 8), ("num_islands", 2), ("max_moves", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.target_ess < 1:
            raise InputError(f"target_ess must lie between 0 and 1, got {self.target_ess}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        try:
            found = temper(conditioned, self, key=key)
        except ValueError as error:
            if not self.gradient or "callback" not in str(error).lower():
                raise
            raise InputError("the likelihood is plain Python and has no gradient: set gradient=False") from error
        shape = (self.num_islands, self.num_particles)
        # After an interruption the rest of the way is made by weights.
        rest = np.where(found.temperatures[-1] < 1, (1 - found.temperatures[-1]) * found.log_likelihood, 0.0)
        log_weights = found.log_evidences[:, None] - np.log(self.num_particles) + rest
        log_evidences = special.logsumexp(log_weights, axis=1)
        log_evidence, error = mean_evidence(log_evidences)
        statistics = {
            "log_likelihood": found.log_likelihood,
            "num_evaluations": np.full(shape, found.num_evaluations / np.prod(shape)),
        }
        return posterior_of(
            self,
            conditioned,
            found.points,
            key=key,
            log_weights=log_weights,
            log_evidence=log_evidence,
            log_evidence_error=error,
            statistics=statistics,
            warnings=tuple(_doubts(found, error)),
        )


class Tempered(NamedTuple):
    """What `temper` found.

    Attributes:
        points: unconstrained particles.
        log_likelihood: at them.
        log_evidences: of each island.
        temperatures: from 0 to 1.
        num_moves: at each temperature but the first.
        acceptance: share of accepted moves at each of those.
        num_evaluations: of the likelihood.
        num_impossible: of those that were not a number or infinite.
    """

    points: Float[np.ndarray, "islands particles dimension"]
    log_likelihood: Float[np.ndarray, "islands particles"]
    log_evidences: Float[np.ndarray, " islands"]
    temperatures: list[float]
    num_moves: list[int]
    acceptance: list[float]
    num_evaluations: int
    num_impossible: int


def temper(conditioned: ConditionedModel, settings: SMC, *, key: Any) -> Tempered:
    """Particles of the posterior, with the evidence of each island and how they came about."""
    shape = (settings.num_islands, settings.num_particles)
    population, impossible = prior_population(conditioned, "sequential Monte Carlo", key, int(np.prod(shape)))
    population = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), population)
    evaluations, temperatures, num_moves, acceptance = int(np.prod(shape)), [0.0], [], []
    log_evidences, log_scale = np.zeros(shape[0]), jnp.zeros((), population.points.dtype)
    piece, key = 1, jax.random.fold_in(key, 1)
    with until_interrupted(), ProgressBar("sequential Monte Carlo", 100) as bar:
        while temperatures[-1] < 1:
            key, resampling, moving = jax.random.split(key, 3)
            # Arrays, since each Python number would be a program of its own.
            target, before = np.asarray(settings.target_ess), np.asarray(temperatures[-1])
            step, gained, resampled = _reweight(population, before, target, resampling)
            # The dtype's rounding of 1 - temperature must not make the last steps endless.
            temperature = 1.0 if temperatures[-1] + float(step) > 1 - 1e-6 else temperatures[-1] + float(step)
            state = _Moves(
                resampled, jnp.zeros((), int), log_scale, jnp.zeros(()), jnp.zeros((), int), jnp.array(False)
            )
            while not state.done:
                first, began = int(state.count), time.perf_counter()
                last = np.asarray(min(first + piece, settings.max_moves))
                state = _move(conditioned, resampled, state, np.asarray(temperature), moving, last, settings.gradient)
                per_move = (time.perf_counter() - began) / max(int(state.count) - first, 1)
                piece = max(1, min(4 * piece, int(_PIECE_SECONDS / per_move)))
                if int(state.count) >= settings.max_moves:
                    break
                bar(100 * temperature, f"temperature {temperature:.2g}, {int(state.count)} moves")
            # Taken over together, so that an interruption finds a whole step.
            population, log_evidences, log_scale = (
                state.population,
                log_evidences + np.asarray(gained),
                state.log_scale,
            )
            temperatures.append(temperature)
            num_moves.append(int(state.count))
            acceptance.append(float(state.accepted) / num_moves[-1])
            impossible += int(state.impossible)
            evaluations += num_moves[-1] * int(np.prod(shape)) * (_LEAPFROGS if settings.gradient else 1)
    points, _, likelihood = (np.asarray(a) for a in population)
    return Tempered(points, likelihood, log_evidences, temperatures, num_moves, acceptance, evaluations, impossible)


def mean_evidence(log_evidences: Float[np.ndarray, " islands"]) -> tuple[float, float]:
    """Log of the mean of independent unbiased evidences and its standard error.

    The error is that of the mean relative to the mean, widened by the 97.5% quantile of Student's t distribution over
    that of the normal one, so that plus and minus two errors cover 95% however few islands there are.

    >>> log_evidence, error = mean_evidence(np.log([1.0, 3.0, 2.0, 2.0]))
    >>> round(log_evidence, 4), round(error, 3)
    (0.6931, 0.331)
    """
    count = len(log_evidences)
    log_mean = float(special.logsumexp(log_evidences) - np.log(count))
    if not np.isfinite(log_mean):
        return log_mean, float("inf")
    relative = np.exp(log_evidences - log_mean)
    widened = stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975)
    return log_mean, float(relative.std(ddof=1) / np.sqrt(count) * widened)


@eqx.filter_jit
def _reweight(population: Population, temperature: Any, target: Any, key: Any) -> tuple[Array, Array, Population]:
    """The step to the next temperature, each island's gain of log evidence, and the resampled population."""
    log_likelihood = population.log_likelihood
    # Relative to the largest, so that products with small steps keep their digits.
    top = jnp.max(log_likelihood)
    height = log_likelihood - top
    size = height.size

    def effective(step: Array) -> Array:
        # 0 times -inf: a particle of likelihood zero has no weight at any temperature.
        weights = jnp.where(height > -jnp.inf, jnp.exp(step * height), 0.0)
        return jnp.sum(weights) ** 2 / jnp.sum(weights**2) / size

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        fine = effective(middle) >= target
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    whole = jnp.asarray(1 - temperature, height.dtype)
    # If impossible particles alone take more than the share, the step is so small that only these go.
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(whole), whole))
    step = jnp.where(effective(whole) >= target, whole, jnp.where(low > 0, low, high))
    log_weights = jnp.where(height > -jnp.inf, step * height, -jnp.inf)
    gained = jax.nn.logsumexp(log_weights, axis=1) - jnp.log(height.shape[1]) + step * top
    keys = jax.random.split(key, len(height))
    ancestors = jax.vmap(systematic)(keys, log_weights)
    return step, gained, jax.tree.map(lambda a: jax.vmap(lambda b, i: b[i])(a, ancestors), population)


def systematic(key: Any, log_weights: Float[Array, " particles"]) -> Int[Array, " particles"]:
    """Systematic resampling: as many indices, each as often as its share of the weights says, up to rounding.

    >>> systematic(jax.random.key(0), jnp.log(jnp.array([0.5, 0.25, 0.25, 0.0]))).tolist()
    [0, 0, 1, 2]
    """
    count = len(log_weights)
    weights = jnp.where(jnp.max(log_weights) > -jnp.inf, jax.nn.softmax(log_weights), 1 / count)
    edges = jnp.cumsum(weights)
    places = (jnp.arange(count) + jax.random.uniform(key, (), weights.dtype)) / count
    return jnp.minimum(jnp.searchsorted(edges / edges[-1], places, side="right"), count - 1)


class _Moves(NamedTuple):
    """Particles on their way at one temperature."""

    population: Population
    count: Int[Array, ""]
    log_scale: Float[Array, ""]  # of the proposals, relative to the best for a normal target
    accepted: Float[Array, ""]  # sum over moves of the accepted share
    impossible: Int[Array, ""]
    done: Bool[Array, ""]


@eqx.filter_jit
def _move(
    conditioned: ConditionedModel, start: Population, moves: _Moves, temperature: Any, key: Any, last: Any,
    gradient: bool,
) -> _Moves:  # fmt: skip
    """Move until `last` moves are made or the particles do not correlate with `start` any more."""
    propose = _hamiltonian(conditioned, start) if gradient else _differential(conditioned, start)
    goal = _ACCEPTANCE_OF_GRADIENTS if gradient else _ACCEPTANCE
    temperature = jnp.asarray(temperature, start.points.dtype)

    def unfinished(moves: _Moves) -> Array:
        return (moves.count < last) & ~moves.done

    def advance(moves: _Moves) -> _Moves:
        key_of_move = jax.random.fold_in(key, moves.count)
        population, probability, impossible = propose(key_of_move, moves.population, temperature, moves.log_scale)
        count = moves.count + 1
        scale = moves.log_scale + (jnp.mean(probability) - goal) / jnp.sqrt(jnp.minimum(count, 25) / 4.0)
        correlated = _correlation(start, population)
        return _Moves(
            population,
            count,
            jnp.clip(scale, -10.0, 3.0).astype(moves.log_scale.dtype),
            moves.accepted + jnp.mean(probability).astype(moves.accepted.dtype),
            moves.impossible + impossible,
            correlated < _DECORRELATED,
        )

    return jax.lax.while_loop(unfinished, advance, moves)


def _differential(conditioned: ConditionedModel, start: Population) -> Any:
    """Metropolis steps by multiples of the difference of two particles, as they were, of an island other than its own.

    The other islands know nothing of a particle, so that each step leaves its target exactly as it is.
    """
    islands, count, dimension = start.points.shape

    def propose(key: Any, now: Population, temperature: Array, log_scale: Array) -> tuple[Population, Array, Array]:
        keys = jax.random.split(key, 6)
        shape = (islands, count)
        other = (jnp.arange(islands)[:, None] + jax.random.randint(keys[0], shape, 1, islands)) % islands
        first = jax.random.randint(keys[1], shape, 0, count)
        second = (first + jax.random.randint(keys[2], shape, 1, count)) % count
        jump = jax.random.uniform(keys[3], ()) < _JUMPS
        best = 2.38 / jnp.sqrt(2.0 * dimension)
        small = best * jnp.exp(log_scale + 0.5 * jax.random.normal(keys[4], shape, start.points.dtype))
        factor = jnp.where(jump, 1.0, small).astype(start.points.dtype)
        points = now.points + factor[..., None] * (start.points[other, first] - start.points[other, second])
        proposed, impossible = _evaluated(conditioned, points)
        accept, probability = _accept(keys[5], _difference(now, proposed, temperature))
        # Jumps say nothing about the scale of the other steps.
        return _chosen(accept, proposed, now), jnp.where(jump, _ACCEPTANCE, probability), impossible

    return propose


def _hamiltonian(conditioned: ConditionedModel, start: Population) -> Any:
    """Leapfrog trajectories of random length, with the covariance of the particles as inverse mass matrix."""
    dimension = start.points.shape[-1]
    flat = start.points.reshape(-1, dimension)
    covariance = jnp.atleast_2d(jnp.cov(flat, rowvar=False))
    # A little of the diagonal keeps few particles in many dimensions from a singular matrix.
    covariance = 0.99 * covariance + 0.01 * jnp.diag(jnp.diag(covariance)) + 1e-12 * jnp.eye(dimension)
    root = jnp.linalg.cholesky(covariance)

    def terms(point: Array, temperature: Array) -> tuple[Array, tuple[Array, Array]]:
        prior, likelihood = conditioned.log_terms(point)
        return prior + temperature * likelihood, (prior, likelihood)

    def propose(key: Any, now: Population, temperature: Array, log_scale: Array) -> tuple[Population, Array, Array]:
        keys = jax.random.split(key, 4)
        points = now.points.reshape(flat.shape)
        slope = jax.vmap(jax.value_and_grad(terms, has_aux=True), (0, None))
        jitter = jnp.exp(0.2 * jax.random.normal(keys[1], (len(points), 1), points.dtype))
        step = jitter * jnp.exp(log_scale) / dimension**0.25
        momentum = jax.random.normal(keys[0], points.shape, points.dtype)  # in whitened coordinates
        length = jax.random.randint(keys[2], (), _LEAPFROGS // 2, _LEAPFROGS + 1)

        def finite(gradient: Array) -> Array:
            return jnp.where(jnp.isfinite(gradient), gradient, 0.0) @ root

        def leap(i: int, carry: tuple) -> tuple:
            points, momentum, gradient, *_ = carry
            momentum = momentum + 0.5 * step * gradient
            points = points + step * (momentum @ root.T)
            (_, (prior, likelihood)), gradient = slope(points, temperature)
            gradient = finite(gradient)
            return points, momentum + 0.5 * step * gradient, gradient, prior, likelihood

        # Gradients where the moves begin are computed anew rather than carried along.
        (_, (prior, likelihood)), gradient = slope(points, temperature)
        begun = (points, momentum, finite(gradient), prior, likelihood)
        points, ended, _, prior, likelihood = jax.lax.fori_loop(0, length, leap, begun)
        bad = ~(likelihood < jnp.inf)
        prior = jnp.where(jnp.isnan(prior), -jnp.inf, prior)
        proposed = Population(points, prior, jnp.where(bad, -jnp.inf, likelihood))
        proposed = jax.tree.map(lambda a, b: a.reshape(b.shape).astype(b.dtype), proposed, now)
        kinetic = 0.5 * jnp.sum(momentum**2 - ended**2, axis=1).reshape(now.log_prior.shape)
        accept, probability = _accept(keys[3], _difference(now, proposed, temperature) + kinetic)
        return _chosen(accept, proposed, now), probability, jnp.sum(bad)

    return propose


def _evaluated(conditioned: ConditionedModel, points: Array) -> tuple[Population, Array]:
    prior, likelihood, impossible = evaluate(conditioned, points.reshape(-1, points.shape[-1]))
    return Population(points, prior.reshape(points.shape[:-1]), likelihood.reshape(points.shape[:-1])), impossible


def _difference(now: Population, proposed: Population, temperature: Array) -> Array:
    """Log ratio of the tempered density there and here."""
    prior = proposed.log_prior - now.log_prior
    return prior + temperature * (proposed.log_likelihood - now.log_likelihood)


def _accept(key: Any, log_ratio: Array) -> tuple[Array, Array]:
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    accept = jnp.log(jax.random.uniform(key, log_ratio.shape, log_ratio.dtype)) < log_ratio
    return accept, jnp.exp(jnp.minimum(log_ratio, 0.0))


def _chosen(accept: Array, proposed: Population, now: Population) -> Population:
    wide = Population(accept[..., None], accept, accept)
    return jax.tree.map(jnp.where, wide, proposed, now)


def _correlation(start: Population, now: Population) -> Array:
    """The largest correlation, over coordinates and the log likelihood, of where particles are and where they began."""

    def columns(population: Population) -> Array:
        points = population.points.reshape(-1, population.points.shape[-1])
        likelihood = population.log_likelihood.reshape(-1, 1)
        values = jnp.concatenate([points, jnp.where(likelihood > -jnp.inf, likelihood, 0.0)], axis=1)
        centred = values - jnp.mean(values, axis=0)
        return centred / jnp.maximum(jnp.max(jnp.abs(centred), axis=0), jnp.finfo(centred.dtype).tiny)

    first, second = columns(start), columns(now)
    product = jnp.sqrt(jnp.sum(first**2, axis=0) * jnp.sum(second**2, axis=0))
    return jnp.max(jnp.where(product > 0, jnp.sum(first * second, axis=0) / product, 0.0))


def _doubts(found: Tempered, error: float) -> list[str]:
    doubts = []
    if found.temperatures[-1] < 1:
        doubts.append(
            f"the run was interrupted at temperature {found.temperatures[-1]:.2g} of 1: the rest was made by weights, "
            "and neither they nor the evidence can be trusted; let it run to its end"
        )
    if found.num_impossible:
        doubts.append(impossible_likelihoods(found.num_impossible, found.num_evaluations))
    if not error < _LARGE_ERROR:
        doubts.append(
            f"the islands disagree: the log evidence has a standard error of {error:.2g}; raise num_particles or "
            "max_moves, or give less vague priors"
        )
    if found.acceptance and min(found.acceptance) < 0.02:
        doubts.append(
            f"only {min(found.acceptance):.1%} of the moves at one temperature were accepted: particles are copies of "
            "a few; raise num_particles, or try another parameterization"
        )
    return doubts
