"""Inference as a stack of small program transformers, each of which keeps the measure that the program denotes.

A representation replaces one of a program's operations and passes the others on, so a stack of them is a stack of
calls. `weighted` collects the scores, `suspended` stops at a score, `traced` records the choices, a `Population` holds
many weighted draws, and `collapse` turns a population back into a program. Algorithms are programs as well, with
random choices of their own: so they stack further, and `enumerate_measure` checks them exactly.

>>> def program(p):
...     mean = p.sample(dist.Normal(0.0, 1.0))
...     for y in (0.9, 1.1):
...         p.observe(dist.Normal(mean, 1.0), y)
...     return {"mean": mean}
>>> posterior = sample_posterior(smc(program, 200), key=jax.random.key(0))
>>> posterior["mean"].shape, abs(posterior.log_evidence - -2.7274) < 0.2
((1, 200), True)

A trace holds a uniform number for each choice, of which the value is a function. The distribution of these numbers is
the same in every run, so that Metropolis-Hastings needs no densities of choices, and a choice keeps its rank when the
distribution that it is drawn from changes.

Programs are arbitrary Python and run on the host. Python can copy neither a running function nor a generator, which
resampling would need. Suspended programs are therefore run again from the start on their recorded choices: the
simplest way that is correct for every program, at a cost that grows with the square of the number of scores. It asks
that a program depends on its choices alone: a replay that comes to other values or scores is refused.

Source: A. Scibior, O. Kammar, M. Vakar, S. Staton, H. Yang, Y. Cai, K. Ostermann, S. Moss, C. Heunen, Z. Ghahramani,
"Denotational validation of higher-order Bayesian inference" (2018).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior, current_versions
from bayeslens.core.probabilistic_program import (
    ALL_ZERO,
    IMPOSSIBLE,
    UNIT,
    Operations,
    Population,
    Program,
    Stop,
    not_reproducible,
    refuse_score,
    value_of,
    weighted,
)
from bayeslens.core.randomness import host_generator

SUSPENDED = "suspended before its end"  # the result of a run that may go on; compared by identity


class Trace(NamedTuple):
    """One run of a program: the uniform number and the value of every choice, every score, and the result."""

    choices: tuple[float, ...] = ()
    values: tuple[Any, ...] = ()
    scores: tuple[float, ...] = ()
    result: Any = None

    @property
    def log_weight(self) -> float:
        """The sum of the scores."""
        return math.fsum(self.scores) if -math.inf not in self.scores else -math.inf


# Representations: each takes a program to a program


def suspended(program: Program, num_scores: int) -> Program:
    """The program up to and including its score number `num_scores`; all of it where it has fewer scores.

    >>> from bayeslens.core.probabilistic_program import enumerate_measure
    >>> enumerate_measure(suspended(lambda p: p.score(-1.0), 1)).log_masses
    {'suspended before its end': -1.0}
    """

    def run(p: Operations) -> Any:
        count, pause = itertools.count(1), Stop()

        def score(log_weight: Any) -> None:
            p.score(log_weight)
            if next(count) == num_scores:
                raise pause

        try:
            return program(p._replace(score=score))
        except Stop as stop:
            if stop is not pause:
                raise
            return SUSPENDED

    return run


def traced(program: Program, choices: tuple[float | None, ...] = (), values: tuple[Any, ...] = ()) -> Program:
    """The program that returns its result with the uniform numbers and the values of its choices.

    Args:
        program: what to run.
        choices: uniform numbers to use; None, and whatever is needed beyond the end, is drawn.
        values: what the first choices are known to come to.

    Raises:
        InputError: the same choices came to other values: the program depends on more than its choices.
    """

    def run(p: Operations) -> tuple[Any, tuple[float, ...], tuple[Any, ...]]:
        used, made = [], []

        def sample(distribution: Distribution) -> Any:
            site = len(used)
            known = choices[site] if site < len(choices) else None
            used.append(p.sample(UNIT) if known is None else known)
            made.append(value_of(distribution, used[-1]))
            if site < len(values) and not np.array_equal(made[-1], values[site]):
                raise InputError(not_reproducible(f"choice {site} came to {values[site]}, then to {made[-1]}"))
            return made[-1]

        return program(p._replace(sample=sample)), tuple(used), tuple(made)

    return run


def collapse(algorithm: Program) -> Program:
    """A population as a program again: it scores the mean weight and returns a member drawn by weight.

    >>> from bayeslens.core.probabilistic_program import enumerate_measure
    >>> two = Population(["a", "b"], np.log([0.5, 1.5]))
    >>> {k: round(v, 2) for k, v in enumerate_measure(collapse(lambda p: two)).probs.items()}
    {'a': 0.25, 'b': 0.75}
    """

    def run(p: Operations) -> Any:
        population = algorithm(p)
        p.score(population.log_evidence)
        return population.members[_by_weight(population, p)]

    return run


# What algorithms are made of


def trace(program: Program, p: Operations, choices: tuple[float | None, ...] = (), values: tuple = ()) -> Trace:
    """Run a program, weighted and traced; the arguments are those of `traced`."""
    drawn, scores = weighted(traced(program, choices, values))(p)
    if drawn is IMPOSSIBLE:
        return Trace(scores=scores, result=IMPOSSIBLE)
    result, used, made = drawn
    return Trace(used, made, scores, result)


def advance(population: Population, further: Program, p: Operations) -> Population:
    """Run each trace that is not yet finished on to the end of `further`, and weigh it by its new scores.

    Raises:
        InputError: the choices did not replay to the same scores.
    """
    members, log_weights = list(population.members), population.log_weights.copy()
    for i, old in enumerate(members):
        if old.result is not SUSPENDED:
            continue
        members[i] = trace(further, p, old.choices, old.values)
        if members[i].scores[: len(old.scores)] != old.scores:
            raise InputError(not_reproducible("the same choices gave other scores"))
        log_weights[i] += sum(members[i].scores[len(old.scores) :])
    return Population(members, log_weights)


def resample(population: Population, p: Operations) -> Population:
    """Draw as many members by weight; all get the mean weight, which keeps the measure. Zero weights stay as they are.

    Members are drawn independently: that has more variance than systematic resampling, and stays enumerable.
    """
    if population.log_evidence == -math.inf:
        return population
    members = [population.members[_by_weight(population, p)] for _ in population.members]
    return Population(members, np.full(len(members), population.log_evidence))


def metropolis_hastings_step(state: Trace, program: Program, p: Operations) -> tuple[Trace, bool]:
    """Draw one choice of a trace anew, run the program on it, and accept or keep the trace.

    The choice is one of n, and to come back it must be hit among n' of the proposal: hence the factor n / n' in the
    ratio. Choices beyond the end of the shorter trace are drawn from the distribution that they have, and cancel.
    """
    count = max(len(state.choices), 1)  # without traced choices a run is a proposal whole, for what it draws afresh
    site = _pick(np.full(count, 1 / count), p)
    proposal = trace(program, p, (*state.choices[:site], None, *state.choices[site + 1 :]), state.values[:site])
    if proposal.log_weight == -math.inf:
        return state, False
    log_ratio = proposal.log_weight - state.log_weight + math.log(count) - math.log(max(len(proposal.choices), 1))
    acceptance = math.exp(min(log_ratio, 0.0))
    accepted = bool(_pick(np.array([1 - acceptance, acceptance]), p))
    return (proposal if accepted else state), accepted


# Algorithms: from a program to a program that returns a population


def importance(program: Program, num_particles: int) -> Program:
    """A population of independent weighted runs.

    >>> posterior = sample_posterior(importance(lambda p: {"x": p.sample(UNIT)}, 3), key=jax.random.key(0))
    >>> posterior.log_weights.tolist(), abs(posterior.log_evidence) < 1e-12
    ([[0.0, 0.0, 0.0]], True)
    """

    def run(p: Operations) -> Population:
        return _finished(_runs(program, num_particles, p))

    return run


def smc(program: Program, num_particles: int) -> Program:
    """Sequential Monte Carlo: a population of suspended programs, advanced to the next score and resampled."""
    return _sequential(program, num_particles, lambda population, reached, p: resample(population, p))


def resample_move_smc(program: Program, num_particles: int, num_moves: int) -> Program:
    """Sequential Monte Carlo whose particles, after each resampling, each make Metropolis-Hastings steps.

    A step may change any choice so far, under the program as far as it was run. Finished particles stay, and others
    do not move into finishing: the algorithm stops when all particles are finished, so a move across that border
    would be made in one direction only, and the measure lost. Source: W. Gilks, C. Berzuini, "Following a moving
    target" (2001).
    """

    def rejuvenate(population: Population, reached: Program, p: Operations) -> Population:
        population = resample(population, p)
        members = list(population.members)
        for i, member in enumerate(members):
            for _ in range(num_moves if member.result is SUSPENDED else 0):
                members[i], _ = metropolis_hastings_step(members[i], _going_on(reached), p)
        return population._replace(members=members)

    return _sequential(program, num_particles, rejuvenate)


def metropolis_hastings(program: Program, num_steps: int, num_starts: int = 100) -> Program:
    """A Markov chain of traces, which changes one choice at a time; the states after each step.

    Args:
        program: what to run.
        num_steps: length of the chain.
        num_starts: the chain starts at one of this many independent runs, drawn by weight, and all its states have
            their mean weight. This keeps the measure, and makes a start of weight zero unlikely.
    """
    _check_count(num_steps, "num_steps")

    def run(p: Operations) -> Population:
        starts = _runs(program, num_starts, p)
        if starts.log_evidence == -math.inf:
            return _finished(starts)
        states, accepted = [starts.members[_by_weight(starts, p)]], []
        for _ in range(num_steps):
            state, moved = metropolis_hastings_step(states[-1], program, p)
            states.append(state)
            accepted.append(moved)
        return _finished(Population(states[1:], np.full(num_steps, starts.log_evidence), np.array(accepted)))

    return run


def particle_marginal(parameters: Program, model: Callable[[Operations, Any], Any], num_particles: int) -> Program:
    """The program that draws parameters and scores them by the evidence that SMC estimates for the model.

    It denotes the same measure as running the model on the parameters. Only the parameters are traced: SMC draws
    afresh in every run, so `metropolis_hastings(particle_marginal(...), num_steps)` is particle marginal
    Metropolis-Hastings. Source: C. Andrieu, A. Doucet, R. Holenstein, "Particle Markov chain Monte Carlo" (2010).

    Args:
        parameters: the program of the parameters, which may have scores of its own.
        model: a program given operations and parameters; its result is the result of the whole.
        num_particles: of the inner SMC.

    >>> prior = lambda p: p.sample(dist.Gamma(2.0, 1.0))
    >>> def model(p, rate):
    ...     p.observe(dist.Poisson(rate * p.sample(dist.Exponential(1.0))), 3)
    ...     return {"rate": rate}
    >>> chain = metropolis_hastings(particle_marginal(prior, model, 5), 20, 2)
    >>> sample_posterior(chain, key=jax.random.key(0))["rate"].shape
    (1, 20)
    """

    def program(p: Operations) -> Any:
        drawn = parameters(p)
        inner = smc(lambda q: model(q, drawn), num_particles)
        return collapse(inner)(p._replace(sample=p.fresh))

    return program


def _sequential(program: Program, num_particles: int, between: Callable) -> Program:
    _check_count(num_particles, "num_particles")

    def run(p: Operations) -> Population:
        population = Population([Trace(result=SUSPENDED)] * num_particles, np.zeros(num_particles))
        for step in itertools.count(1):
            reached = suspended(program, step)
            population = advance(population, reached, p)
            if all(member.result is not SUSPENDED for member in population.members):
                return _finished(population)
            population = between(population, reached, p)

    return run


def sample_posterior(algorithm: Program, *, key: Any) -> Posterior:
    """Run an algorithm with random numbers.

    Args:
        algorithm: what `importance`, `smc`, `resample_move_smc` or `metropolis_hastings` returned.
        key: a `jax.random.key`.

    Returns:
        Draws of shape (1, particles, ...) at the program's own names, or at `"value"` where its result is no dict.
        Particles have log weights and a log evidence; those of weight zero are left out. A Markov chain has neither:
        it has draws, and whether each was `accepted`.

    Raises:
        InputError: all weights are zero, or results do not stack into arrays.
    """
    generator = host_generator(key)

    def sample(distribution: Distribution) -> Any:
        return value_of(distribution, max(generator.random(), 2.0**-54))  # the quantile at 0 may be infinite

    population = algorithm(Operations(sample, refuse_score, sample))
    if not isinstance(population, Population):
        raise InputError("a program alone is no algorithm: give it to importance, smc or metropolis_hastings first")
    if population.log_evidence == -math.inf:
        raise InputError(ALL_ZERO)
    kept = population.log_weights > -math.inf
    results = [m if isinstance(m, dict) else {"value": m} for m, k in zip(population.members, kept, strict=True) if k]
    try:
        draws = {name: np.stack([np.asarray(r[name]) for r in results])[None] for name in results[0]}
        if any(array.dtype == object for array in draws.values()):
            raise ValueError("a result is neither a number nor an array")
    except (ValueError, KeyError) as error:
        raise InputError(f"results do not stack ({error}): return a dict of arrays of the same shapes") from None
    settings = {"key": np.asarray(jax.random.key_data(key)).ravel().tolist(), "runs": len(kept)}
    made = functools.partial(Posterior, draws, settings=settings, versions=current_versions())
    if population.accepted is not None:
        return made(engine="trace metropolis-hastings", statistics={"accepted": population.accepted[None]})
    return made(population.log_weights[None, kept], population.log_evidence, engine="weighted particles")


def _going_on(reached: Program) -> Program:
    """A suspended program, restricted to the runs that are not finished."""

    def run(p: Operations) -> Any:
        result = reached(p)
        if result is not SUSPENDED:
            p.score(-math.inf)
        return result

    return run


def _runs(program: Program, count: int, p: Operations) -> Population:
    _check_count(count, "the number of runs")
    members = [trace(program, p) for _ in range(count)]
    return Population(members, np.array([member.log_weight for member in members]))


def _finished(population: Population) -> Population:
    return population._replace(members=[member.result for member in population.members])


def _by_weight(population: Population, p: Operations) -> int:
    weights = np.exp(population.log_weights - population.log_weights.max())
    return _pick(weights / weights.sum(), p)


def _pick(probs: np.ndarray, p: Operations) -> int:
    return p.sample(dist.Categorical(probs=probs, validate_args=False))


def _check_count(count: int, name: str) -> None:
    if count < 1:
        raise InputError(f"{name} is {count}: at least 1 is needed")
