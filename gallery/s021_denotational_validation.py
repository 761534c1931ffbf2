"""Inference algorithms as stacks of program transformers, each of which keeps the measure that a program denotes.

Claim: a program denotes an unnormalized measure, the posterior times the evidence. Sequential Monte Carlo, trace
Metropolis-Hastings, resample-move and particle marginal Metropolis-Hastings are stacks of a few transformers
(weighted, population, suspended, traced), and each keeps the measure in expectation, whatever the number of
particles or steps. So does each stack. That holds for programs whose number of choices and scores is random.

The algorithms are programs, with random choices of their own. Here these are enumerated too, so that the expected
weighted measure is known exactly and not by averaging runs.

Source: A. Scibior, O. Kammar, M. Vakar, S. Staton, H. Yang, Y. Cai, K. Ostermann, S. Moss, C. Heunen, Z. Ghahramani,
"Denotational validation of higher-order Bayesian inference" (2018).
"""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import jax
import numpy as np
import numpyro.distributions as dist

from bayeslens.core import representations
from bayeslens.core.probabilistic_program import Operations, Population, enumerate_measure
from bayeslens.core.representations import (
    Program,
    Trace,
    collapse,
    importance,
    metropolis_hastings,
    particle_marginal,
    resample,
    resample_move_smc,
    sample_posterior,
    smc,
    trace,
)
from bayeslens.gallery import Evidence

PAPER = "S021"
CLAIM = "Every inference transformer, and every stack of them, keeps the measure that a program denotes."
NOT_CHECKED = "The theory of quasi-Borel spaces and the proofs; continuous programs, of which no enumeration exists."
RUNS = 24
# Distributions are made once: NumPyro takes longer to check their parameters than a program takes to run.
COIN = {q: dist.Bernoulli(q) for q in (0.25, 0.5, 0.6, 0.75, 0.9)}
THIRDS = dist.Categorical(probs=np.array([0.25, 0.25, 0.5]))
SEEN = (dist.Normal(-1.0, 1.0), dist.Normal(1.0, 1.0))


def branching(p):
    """The second choice depends on the first, and one branch is impossible."""
    if p.sample(COIN[0.5]):
        kind = p.sample(THIRDS)
        p.score([-0.3, -np.inf, 0.7][kind])
        return kind
    flip = p.sample(COIN[0.25])
    p.score([-1.2, 0.4][flip])
    return "tails", flip


def flips(p):
    """A random number of choices and of scores."""
    seen = []
    for _ in range(p.sample(dist.Categorical(probs=np.array([0.5, 0.25, 0.25])))):
        seen.append(p.sample(COIN[0.75 if sum(seen) else 0.5]))
        p.score([-1.2, 0.7][seen[-1]])
    return tuple(seen)


def stopping(p):
    """Some runs end where others go on to a second choice and score; all probabilities are halves."""
    if p.sample(COIN[0.5]):
        p.score(-0.2)
        return "stopped"
    p.score(0.5)
    y = p.sample(COIN[0.5])
    p.score([-1.7, 0.3][y])
    return y


def stay(p):
    """The parameter of the hidden Markov model: how likely it stays in its state."""
    return (0.6, 0.75, 0.9)[p.sample(THIRDS)]


def regime(p, probability, observations=(0.7, -0.9, -1.4, 0.3)):
    """A hidden Markov model of two states with means -1 and 1."""
    state, path = p.sample(COIN[0.5]), []
    for y in observations:
        state = state if p.sample(COIN[probability]) else 1 - state
        p.observe(SEEN[state], y)
        path.append(state)
    return {"stay": probability, "last": path[-1]}


def whole(p):
    """The same as one program: parameter, states and observations."""
    return regime(p, stay(p))


def parameter(p):
    """For particle marginal Metropolis-Hastings on small programs: which of two coins is flipped."""
    return p.sample(COIN[0.5])


def coin(p, bias):
    """A hidden choice, observed twice; what was seen is likelier under one bias."""
    x = p.sample(COIN[0.5])
    p.score([[-0.2, -1.5], [-0.9, -0.4]][bias][x])
    p.score([[-1.1, -0.3], [-0.2, -2.0]][bias][x])
    return bias, x


# The program, its algorithm, and the common denominator of its probabilities.
STACKS = {
    "importance": (flips, importance(flips, 2), 4),
    "smc": (branching, smc(branching, 2), 4),
    "smc, random number of scores": (stopping, smc(stopping, 2), 2),
    "smc, as a program again": (stopping, collapse(smc(stopping, 2)), 2),
    "metropolis-hastings": (flips, metropolis_hastings(flips, 1, 1), 4),
    "metropolis-hastings, two steps": (branching, metropolis_hastings(branching, 2, 1), 4),
    "resample-move": (stopping, resample_move_smc(stopping, 1, 1), 2),
    "particle marginal metropolis-hastings": (
        lambda p: coin(p, parameter(p)),
        metropolis_hastings(particle_marginal(parameter, coin, 1), 2, 1),
        2,
    ),
    "evidence of smc as a score": (lambda p: coin(p, parameter(p)), particle_marginal(parameter, coin, 2), 2),
}


def worst_mass(program: Program, algorithm: Program, cells: int) -> float:
    """Largest difference of a mass, of the expected measure of an algorithm against enumeration of its program."""
    exact, found = (enumerate_measure(a, cells=cells).log_masses for a in (program, algorithm))
    return max(abs(math.exp(exact.get(k, -np.inf)) - math.exp(found.get(k, -np.inf))) for k in exact | found)


# The control: both mechanisms broken, as they are when written without the theory


def resample_without_mean_weight(population: Population, p: Operations) -> Population:
    """Resampling which forgets the mean weight: the posterior of one step survives, the measure does not."""
    return resample(population, p)._replace(log_weights=np.zeros(len(population.members)))


def step_without_number_of_choices(state: Trace, program: Program, p: Operations) -> tuple[Trace, bool]:
    """Metropolis-Hastings which ignores that the number of choices may change."""
    count = len(state.choices)
    site = p.sample(dist.DiscreteUniform(0, count - 1))
    new = trace(program, p, (*state.choices[:site], None, *state.choices[site + 1 :]))
    ratio = math.exp(min(new.log_weight - state.log_weight, 0.0))
    accepted = bool(p.sample(dist.Categorical(probs=np.array([1 - ratio, ratio]))))
    return (new if accepted else state), accepted


@contextlib.contextmanager
def broken(yes: bool):
    """The library with both mechanisms broken, where asked."""
    with contextlib.ExitStack() as stack:
        if yes:
            stack.enter_context(mock.patch.object(representations, "resample", resample_without_mean_weight))
            stack.enter_context(
                mock.patch.object(representations, "metropolis_hastings_step", step_without_number_of_choices)
            )
        yield


def standard_errors(estimates: np.ndarray, exact: np.ndarray) -> float:
    """Largest deviation of an average of independent rows, in its standard errors."""
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    return float((np.abs(estimates.mean(0) - exact) / np.maximum(error, 1e-9)).max())  # a broken sampler may not vary


def particles(algorithm: Program, keys) -> np.ndarray:
    """Evidence, and evidence times the mean of `stay` and `last`: linear in the measure, so free of bias."""
    rows = []
    for key in keys:
        posterior = sample_posterior(algorithm, key=key)
        weights = np.exp(posterior.log_weights[0] - np.logaddexp.reduce(posterior.log_weights[0]))
        evidence = math.exp(posterior.log_evidence)
        rows.append([evidence, *(evidence * weights @ posterior[name][0] for name in ("stay", "last"))])
    return np.array(rows)


def chains(algorithm: Program, keys) -> np.ndarray:
    """Means of `stay` and `last` of independent chains."""
    return np.array([[sample_posterior(algorithm, key=key)[name].mean() for name in ("stay", "last")] for key in keys])


def check(*, control: bool = False) -> Evidence:
    """Each stack against enumeration, then four algorithms run on a hidden Markov model."""
    measure = enumerate_measure(whole)
    evidence = math.exp(measure.log_evidence)
    means = np.array([sum(dict(k)[name] * prob for k, prob in measure.probs.items()) for name in ("stay", "last")])
    keys = jax.random.split(jax.random.key(0), RUNS)
    with broken(control):
        exact = {name: worst_mass(*stack) for name, stack in STACKS.items()}
        exactly = np.array([evidence, *(evidence * means)])
        sampled = {
            "smc": standard_errors(particles(smc(whole, 30), keys), exactly),
            "resample-move": standard_errors(particles(resample_move_smc(whole, 15, 1), keys), exactly),
            "metropolis-hastings": standard_errors(chains(metropolis_hastings(whole, 200), keys), means),
            "particle marginal": standard_errors(
                chains(metropolis_hastings(particle_marginal(stay, regime, 4), 30, 10), keys), means
            ),
        }
    numbers = {f"exact: {k}": v for k, v in exact.items()} | {f"sampled: {k}": v for k, v in sampled.items()}
    worst, most = max(exact.values()), max(sampled.values())
    shown = (
        f"expected measures of {len(exact)} stacks differ from enumeration by at most {worst:.1e} in mass (exact is "
        f"0); on a hidden Markov model of log evidence {measure.log_evidence:.2f}, averages of {RUNS} runs of four "
        f"algorithms are within {most:.1f} standard errors of the exact posterior"
    )
    # 10 averages with 23 degrees of freedom: one is beyond 5 standard errors once in 2,000
    return Evidence(bool(worst < 1e-9 and most < 5), shown, numbers)
