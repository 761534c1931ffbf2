"""Nested sampling: live points climb from the prior to the posterior through ever higher likelihoods.

Points are unconstrained vectors, their base measure is the prior with its Jacobian. `Run` is the state of a run;
`climb` takes it further in one compiled program, `account` turns the points that died into evidence and weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import special, stats

from bayeslens.core.conditioned_model import ConditionedModel, constrain_draws
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.core.randomness import host_generator
from bayeslens.inference.constrained_slices import Live, slices_above
from bayeslens.inference.prior_population import (
    evaluate,
    impossible_likelihoods,
    prior_population,
    until_interrupted,
)

BATCH = 10  # one in so many live points is replaced at a time
STEPS_PER_DIMENSION = 5
_BLOCK = 16  # batches in one compiled call, at most
_GUIDED_BLOCK = 4  # with a stand-in for the likelihood: how far it may go wrong before it is looked at
_BLOCK_SECONDS = 0.25  # of one compiled call: how long Ctrl-C may have to wait
_SIMULATIONS = 200
_DEEPEST = 1000.0  # e-folds of prior volume after which a likelihood is taken to have no upper bound
_SUSPICIOUS = 1e-4  # p value of the insertion ranks


class NestedSampling(Engine):
    """Nested sampling by slices: evidence and posterior of continuous latents, of several modes too, no gradients.

    The live points of least likelihood die, a tenth at a time, and copies of others take their places, after enough
    slice sampling steps within the prior where the likelihood is higher. Directions are differences of two other
    live points, which fits them to scales and correlations; a fifth of the steps are jumps by a whole difference,
    from mode to mode. Each death shrinks the prior volume that is left by
    a factor of known distribution; the evidence is the sum of likelihoods times volumes. Equal likelihoods are
    ordered at random, so that flat parts, also of likelihood zero, do no harm.

    The standard error comes from simulated shrinkage; it is about the root of (information / `num_live`) and does not
    know of steps that mix badly. Those are looked for by the ranks of new points among the live ones, which must be
    uniform. Draws are all points that ever lived, weighted, in order; `statistics` has their `log_likelihood`, the
    `log_volume` of prior that was left, and `num_evaluations`, whose sum is the number of likelihoods computed.

    Args:
        num_live: live points; the error falls with the square root of their number, time grows in proportion. 500
            keep it under 0.2 for up to 20 nats of information. At least twice the dimension, better much more.
        num_steps: slices and jumps before a copy counts as new; None takes five per dimension, as PolyChord does.
        tolerance: log evidence that the live points may still add when the run ends; they are then counted in.

    Sources: J. Skilling, "Nested sampling for general Bayesian computation" (2006); W. Handley, M. Hobson, A. Lasenby,
    "PolyChord" (2015); J. Buchner, "Comparison of step samplers for nested sampling" (2022); D. Yallup, N. Kroupa, W.
    Handley, "Nested slice sampling" (2025); A. Fowlie, W. Handley, L. Su, "Nested sampling cross-checks using order
    statistics" (2020).

    >>> import numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> found = NestedSampling(num_live=100)(conditioned_model(model, {"y": 1.0}), key=jax.random.key(0))
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(1.0)
    >>> bool(abs(found.log_evidence - exact) < 4 * found.log_evidence_error)
    True
    """

    name: ClassVar[str] = "nested"

    num_live: int = 500
    num_steps: int | None = None
    tolerance: float = 0.01

    def __check_init__(self):
        check_settings(self)

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        run = begin(conditioned, self, "nested sampling", key)
        with until_interrupted(), ProgressBar("nested sampling", 100) as bar:
            while not run.finished:
                run = run.advance(conditioned, None, self.tolerance)
                bar(100 * run.done(self.tolerance), run.said())
        return finish(self, conditioned, run, key)


def check_settings(engine: Any) -> None:
    """Refuse settings that cannot work.

    Raises:
        InputError: naming the setting.
    """
    if engine.num_live < 2 * BATCH:
        raise InputError(f"num_live must be at least {2 * BATCH}, got {engine.num_live}")
    check_counts(engine, "num_steps")
    if not 0 < engine.tolerance < 10:
        raise InputError(f"tolerance must lie between 0 and 10, got {engine.tolerance}")


class Dead(NamedTuple):
    """Points that died, in order, and the ranks of those born in their places among the survivors of a batch."""

    points: Float[np.ndarray, "deaths dimension"]
    level: Float[np.ndarray, " deaths"]
    log_likelihood: Float[np.ndarray, " deaths"]
    born: Float[np.ndarray, " deaths"]  # level of the point born instead, as its guide gave it
    born_true: Float[np.ndarray, " deaths"]  # its log likelihood
    rank: Int[np.ndarray, " deaths"]


class Run(eqx.Module):
    """A run of nested sampling, as it is after some deaths.

    Attributes:
        live: the live points.
        dead: blocks of those that died.
        key: of all that comes; each batch takes its own part, so that blocks may be cut anywhere.
        num_steps: slices per new point.
        evaluations: of the likelihood for each block, the first of them for the prior draws.
        guided: evaluations of what stood in for the likelihood, likewise.
        impossible: likelihoods that were not a number or infinite.
        log_evidence: collected from the dead so far.
        finished: whether the live points cannot add more than the tolerance, or there is no end to it.
        batches: how many the next call may make.
    """

    live: Live
    dead: tuple[Dead, ...]
    key: Any
    num_steps: int
    evaluations: tuple[int, ...]
    guided: tuple[int, ...]
    impossible: int
    log_evidence: float = -np.inf
    finished: bool = False
    batches: int = 1

    @property
    def size(self) -> int:
        """Number of deaths so far."""
        return sum(len(d.level) for d in self.dead)

    @property
    def log_volume(self) -> float:
        """Log of the share of the prior that is left."""
        num_live = len(self.live.level)
        return -self.size // (num_live // BATCH) * _compression(num_live)

    @property
    def remaining(self) -> float:
        """By how much the log evidence could still grow if all that is left had the highest live likelihood."""
        most = self.log_volume + float(jnp.max(self.live.log_likelihood))
        return float(np.logaddexp(self.log_evidence, most) - self.log_evidence) if most > -np.inf else np.inf

    def done(self, tolerance: float) -> float:
        """A rough share of the way, for a progress bar."""
        return min(1.0, tolerance / max(self.remaining, tolerance)) ** 0.2

    def said(self) -> str:
        """Where it stands, in words."""
        return f"log evidence {self.log_evidence:.2f}, {min(self.remaining, 1e9):.2g} to come"

    def advance(
        self, conditioned: ConditionedModel, guide: Callable | None, tolerance: float, until: int | None = None
    ) -> Run:
        """The run a block further: about a quarter of a second, or to its end.

        Args:
            conditioned: the model with its data.
            guide: an Equinox module that stands in for the log likelihood within the slices, called with the
                conditioned model and an unconstrained vector; None takes the log likelihood itself. Points that are
                kept get their true likelihood.
            tolerance: log evidence to come at which the run ends.
            until: number of deaths at which the block ends at the latest. Blocks with a guide are all of one size.
        """
        began, num_live = time.perf_counter(), len(self.live.level)
        size = num_live // BATCH
        batches = self.batches if guide is None else _GUIDED_BLOCK
        if until is not None and guide is None:
            batches = max(1, min(batches, -(-(until - self.size) // size)))
        # Arrays: no program for each number.
        ends = np.array([tolerance, -_DEEPEST, self.log_evidence])
        numbers = (np.asarray(self.size // size), np.asarray(batches), ends, np.asarray(self.num_steps))
        now = climb(conditioned, guide, self.live, self.key, *numbers)
        made, count = int(now.made), int(now.evaluations)
        dead = Dead(*(np.asarray(a)[:made].reshape(made * size, *np.shape(a)[2:]) for a in now.dead))
        per_batch = (time.perf_counter() - began) / made
        # The first call was compiled: its time says nothing.
        wanted = 2 if len(self.dead) == 0 else min(_BLOCK, 4 * batches, int(_BLOCK_SECONDS / per_batch))
        return Run(
            now.live,
            (*self.dead, dead),
            self.key,
            self.num_steps,
            (*self.evaluations, made * size if guide is not None else count),
            (*self.guided, 0 if guide is None else count),
            self.impossible + int(now.impossible),
            float(now.log_evidence),
            bool(now.finished),
            self.batches if guide is not None else max(1, wanted),
        )


def _compression(num_live: int) -> float:
    """Mean e-folds of volume that a batch of deaths takes."""
    return float(np.sum(_shrinkage(num_live)))


def _shrinkage(num_live: int) -> Float[np.ndarray, " batch"]:
    """Mean e-folds of each death of a batch."""
    return 1.0 / (num_live - np.arange(num_live // BATCH))


def begin(conditioned: ConditionedModel, settings: Any, user: str, key: Any) -> Run:
    """A run before its first death.

    Args:
        conditioned: the model with its data.
        settings: with `num_live` and `num_steps`.
        user: what runs, for messages.
        key: a `jax.random.key`.
    """
    drawn, impossible = prior_population(conditioned, user, key, settings.num_live)
    if settings.num_live < 2 * conditioned.dimension:
        raise InputError(
            f"{settings.num_live} live points do not span {conditioned.dimension} dimensions: set num_live to at "
            f"least {2 * conditioned.dimension}"
        )
    label = jax.random.uniform(jax.random.fold_in(key, 1), drawn.log_prior.shape, drawn.log_prior.dtype)
    live = Live(drawn.points, drawn.log_prior, drawn.log_likelihood, label, drawn.log_likelihood)
    steps = settings.num_steps or STEPS_PER_DIMENSION * conditioned.dimension
    return Run(live, (), jax.random.fold_in(key, 2), steps, (settings.num_live,), (0,), impossible)


class Block(NamedTuple):
    """What `climb` makes.

    Attributes:
        live: points after it.
        dead: arrays with room for all batches that a block may hold.
        log_evidence: with that of the dead.
        finished: whether no more is to come.
        made: number of batches.
        evaluations: of the likelihood, or of its guide, within the slices.
        impossible: likelihoods that were not a number or infinite.
    """

    live: Live
    dead: Dead
    log_evidence: Float[Array, ""]
    finished: Bool[Array, ""]
    made: Int[Array, ""]
    evaluations: Int[Array, ""]
    impossible: Int[Array, ""]


@eqx.filter_jit
def climb(
    conditioned: ConditionedModel, guide: Callable | None, live: Live, key: Any, before: Any, batches: Any, ends: Any,
    num_steps: Any,
) -> Block:  # fmt: skip
    """Batches of deaths and births, until they are enough.

    Args:
        conditioned: the model with its data.
        guide: see `Run.advance`.
        live: the live points.
        key: of the whole run.
        before: number of batches so far.
        batches: to be made at most, up to 16.
        ends: log evidence to come and log volume at which the run ends, and the log evidence so far.
        num_steps: slices per new point.
    """
    num_live, dimension = live.points.shape
    size = num_live // BATCH
    room, dtype = (_BLOCK, size), live.level.dtype
    empty = Dead(
        jnp.zeros((*room, dimension), live.points.dtype),
        *(jnp.zeros(room, dtype) for _ in range(4)),
        jnp.zeros(room, int),
    )
    tolerance, deepest, log_evidence = jnp.asarray(ends, dtype)
    inner = -np.cumsum(_shrinkage(num_live))
    outer = np.concatenate([[0.0], inner[:-1]])
    log_width = jnp.asarray(outer + np.log1p(-np.exp(inner - outer)), dtype)  # of a batch's shells, in what was left

    def batch(block: Block) -> Block:
        live, number = block.live, before + block.made
        keys = jax.random.split(jax.random.fold_in(key, number), 4)
        order = jnp.lexsort((live.label, live.level))
        dying, surviving = order[:size], order[size:]
        last = order[size - 1]
        others = jax.tree.map(lambda a: a[surviving], live)
        parents = jax.random.choice(keys[0], num_live - size, (size,), replace=False)
        above = live.level[last], live.label[last]
        slices = slices_above(conditioned, guide, others, parents, *above, keys[1], num_steps)
        # On the level of the last death, labels above its own are those that live.
        label = jax.random.uniform(keys[2], (size,), live.label.dtype)
        floor = jnp.where(slices.level == above[0], above[1], 0.0)
        label = floor + (1 - floor) * label
        likelihood, bad = slices.level, jnp.zeros((), int)
        if guide is not None:
            _, likelihood, bad = evaluate(conditioned, slices.points)
        lower = (others.level < slices.level[:, None]) | (
            (others.level == slices.level[:, None]) & (others.label < label[:, None])
        )
        died = (live.points[dying], live.level[dying], live.log_likelihood[dying])
        now = Dead(*died, slices.level, likelihood, jnp.sum(lower, axis=1))
        born = Live(slices.points, slices.log_prior, slices.level, label, likelihood)
        volume = -number * jnp.asarray(_compression(num_live), dtype)
        gained = jax.nn.logsumexp(now.log_likelihood + log_width) + volume
        live = jax.tree.map(lambda a, b: a.at[dying].set(b), live, born)
        log_evidence = jnp.logaddexp(block.log_evidence, gained.astype(dtype))
        volume = volume - _compression(num_live)
        # By how much the log evidence could grow if all that is left had the highest live likelihood.
        remaining = jax.nn.softplus(volume + (jnp.max(live.log_likelihood) - log_evidence))
        return Block(
            live,
            jax.tree.map(lambda a, b: a.at[block.made].set(b), block.dead, now),
            log_evidence,
            (remaining < tolerance) | (volume <= deepest),
            block.made + 1,
            block.evaluations + slices.turns * size,
            block.impossible + slices.impossible + bad,
        )

    zero = jnp.zeros((), int)
    begun = Block(live, empty, log_evidence, jnp.array(False), zero, zero, zero)
    return jax.lax.while_loop(lambda b: (b.made < batches) & ~b.finished, batch, begun)


class Account(NamedTuple):
    """What the dead and the live points amount to.

    Attributes:
        points: unconstrained vectors of all of them, in the order of their levels.
        log_weights: of the posterior, unnormalized: log likelihood plus log width of each one's shell of the prior.
        log_likelihood: of each.
        log_volume: share of the prior above each.
        log_evidence: with its standard error, from simulated shrinkage.
        log_evidence_error: see there.
    """

    points: Float[np.ndarray, "points dimension"]
    log_weights: Float[np.ndarray, " points"]
    log_likelihood: Float[np.ndarray, " points"]
    log_volume: Float[np.ndarray, " points"]
    log_evidence: float
    log_evidence_error: float


def account(run: Run) -> Account:
    """Evidence, its error and the weights of all points of a run; live points die one by one at its end."""
    num_live, size = len(run.live.level), len(run.live.level) // BATCH
    order = np.lexsort((run.live.label, run.live.level))
    points = np.concatenate([*(d.points for d in run.dead), np.asarray(run.live.points)[order]])
    log_likelihood = np.concatenate([*(d.log_likelihood for d in run.dead), np.asarray(run.live.log_likelihood)[order]])
    log_likelihood = log_likelihood.astype(np.float64)
    alive = np.concatenate([num_live - np.arange(run.size) % size, np.arange(num_live, 0, -1)])
    # The largest of n uniform volumes is distributed as Beta(n, 1): its log is an exponential over n.
    rng = host_generator(run.key)
    shrinkage = np.concatenate([np.ones((1, len(alive))), rng.exponential(size=(_SIMULATIONS, len(alive)))]) / alive
    log_volume = -np.cumsum(shrinkage, axis=1)
    # Trapezoids: a point stands for the volume between the middles of the shells on its two sides.
    edges = np.concatenate([np.zeros((len(log_volume), 1)), log_volume, np.full((len(log_volume), 1), -np.inf)], axis=1)
    log_width = edges[:, :-2] + np.log(-np.expm1(edges[:, 2:] - edges[:, :-2])) - np.log(2)
    log_width[:, 0] = np.log(
        -np.expm1(log_volume[:, 0] + np.log1p(np.exp(log_volume[:, 1] - log_volume[:, 0])) - np.log(2))
    )
    log_evidences = special.logsumexp(log_likelihood + log_width, axis=1)
    log_weights = log_likelihood + log_width[0]
    error = float(log_evidences[1:].std(ddof=1))
    return Account(points, log_weights, log_likelihood, log_volume[0], float(log_evidences[0]), error)


def finish(engine: Any, conditioned: ConditionedModel, run: Run, key: Any) -> Posterior:
    """The posterior of a run, with what speaks against it."""
    found = account(run)
    block = [len(d.level) for d in run.dead] + [len(run.live.level)]
    # Blocks are charged to the points that died in them, the prior draws to those that live at the end.
    charges = [*run.evaluations[1:], run.evaluations[0]]
    statistics = {
        "log_likelihood": found.log_likelihood,
        "log_volume": found.log_volume,
        "num_evaluations": np.repeat(np.array(charges) / block, block),
    }
    if any(run.guided):
        statistics["num_guesses"] = np.repeat(np.array([*run.guided[1:], 0]) / block, block)
    return posterior_of(
        engine,
        conditioned,
        _constrained(conditioned, found.points),
        key=key,
        log_weights=found.log_weights[None],
        log_evidence=found.log_evidence,
        log_evidence_error=found.log_evidence_error,
        statistics={n: v[None] for n, v in statistics.items()},
        warnings=tuple(_doubts(run)),
    )


def _constrained(conditioned: ConditionedModel, points: np.ndarray) -> dict[str, np.ndarray]:
    """Draws of all sites, through a program for the next power of two, which later runs find compiled."""
    count = len(points)
    padded = np.concatenate([points, np.repeat(points[-1:], 2 ** int(np.ceil(np.log2(count))) - count, axis=0)])
    return {n: v[:, :count] for n, v in constrain_draws(conditioned, padded[None]).items()}


def insertion_p_value(run: Run) -> float:
    """How likely ranks as uneven as those of the born among the survivors are, were they uniform as they must be.

    Kolmogorov-Smirnov. The born of one batch share their survivors, which makes a p value of 1e-4 one of 3e-4.
    """
    if not run.dead:
        return 1.0
    num_live = len(run.live.level)
    ranks = np.concatenate([d.rank for d in run.dead])
    places = (ranks + 0.5) / (num_live - num_live // BATCH + 1)
    return float(stats.kstest(places, "uniform").pvalue)


def _doubts(run: Run) -> list[str]:
    doubts = []
    if not run.finished:
        doubts.append(
            f"the run was interrupted: the log evidence is incomplete, it may grow by up to {run.remaining:.2g}; "
            "let it run to its end"
        )
    elif run.log_volume <= -_DEEPEST:
        doubts.append(
            "the likelihood still grows after e^-1000 of the prior: it has no upper bound, and the evidence cannot be "
            "trusted; bound scales away from zero by their priors"
        )
    if run.impossible:
        doubts.append(impossible_likelihoods(run.impossible, sum(run.evaluations)))
    if (p_value := insertion_p_value(run)) < _SUSPICIOUS:
        doubts.append(
            f"new points are not spread evenly among the live ones (p = {p_value:.1g}): the slices mix badly; raise "
            "num_steps, or try another parameterization"
        )
    return doubts
