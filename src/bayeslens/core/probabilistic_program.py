"""Probabilistic programs as plain Python functions, and the measures that they denote, by enumeration.

A program is a function of `Operations`: it draws with `sample`, weighs with `score`, and may branch, loop and recurse
on what it drew. It denotes an unnormalized measure on its results, which is the posterior times the evidence.

>>> def program(p):  # rolled until a six; it took fewer than three rolls
...     loaded = p.sample(dist.Bernoulli(0.5))
...     for rolls in range(1, 3):
...         if p.sample(dist.Bernoulli([1 / 6, 1 / 2][loaded])):
...             return {"loaded": loaded, "rolls": rolls}
...     p.score(-np.inf)
>>> round(enumerate_measure(program).log_evidence, 4)
-0.6391

Random choices are functions of uniform numbers: quantiles, where these are known. What runs or changes a program
needs to draw nothing else.

Source: A. Scibior, O. Kammar, M. Vakar, S. Staton, H. Yang, Y. Cai, K. Ostermann, S. Moss, C. Heunen, Z. Ghahramani,
"Denotational validation of higher-order Bayesian inference" (2018).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Bool, Float
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import invert_cdf, log_density

UNIT = dist.Uniform(0.0, 1.0)  # what traces draw; told from other distributions by identity
_QUICK_QUANTILE = (dist.Normal, dist.StudentT, dist.Laplace, dist.LogNormal, dist.Uniform, dist.Exponential,
                   dist.HalfNormal, dist.Gamma, dist.Beta, dist.Poisson)  # fmt: skip
_MAX_CHOICES, _MAX_RUNS = 1_000, 1_000_000  # enumerating more than this is taken for a program that never ends
IMPOSSIBLE = "of weight zero"  # the result of a run that ended so; compared by identity
ALL_ZERO = "all weights are zero: no run of the program can explain the data, so check its scores"


class Operations(NamedTuple):
    """What a program may do.

    Attributes:
        sample: draws from a NumPyro distribution; scalars come as Python numbers, others as NumPy arrays.
        score: multiplies the weight of this run, given the logarithm of the factor. Minus infinity ends the run.
        fresh: draws like `sample`, but is never recorded in a trace: a program that is replayed draws anew.
    """

    sample: Callable[[Distribution], Any]
    score: Callable[[Any], None]
    fresh: Callable[[Distribution], Any]

    def observe(self, distribution: Distribution, value: Any) -> None:
        """Score by the log density, or log probability, of an observed value; elements of an array are independent."""
        outcomes = outcomes_of(distribution)
        if outcomes is None:
            self.score(np.sum(log_density(distribution, np.asarray(value))))
        else:
            probs = dict(zip(*outcomes, strict=True))
            each = [probs.get(y, 0.0) for y in np.ravel(value).tolist()]
            self.score(sum(math.log(prob) if prob > 0 else -math.inf for prob in each))


Program = Callable[[Operations], Any]


class Population(NamedTuple):
    """Weighted draws that together denote a measure: the mean over members of weight times point mass.

    Attributes:
        members: results, or traces while the program is suspended.
        log_weights: of each member.
        accepted: for the states of a Markov chain, whether each step accepted its proposal; None otherwise.
    """

    members: list[Any]
    log_weights: Float[np.ndarray, " members"]
    accepted: Bool[np.ndarray, " members"] | None = None

    @property
    def log_evidence(self) -> float:
        """Log of the mean weight, whose expectation is the total mass of the program's measure."""
        return float(np.logaddexp.reduce(self.log_weights)) - math.log(len(self.log_weights))


class Measure(NamedTuple):
    """An unnormalized measure on finitely many results: the log mass of each."""

    log_masses: dict[Hashable, float]

    @property
    def log_evidence(self) -> float:
        """Log of the total mass."""
        return float(np.logaddexp.reduce(list(self.log_masses.values()), initial=-np.inf))

    @property
    def probs(self) -> dict[Hashable, float]:
        """The probability of each result.

        Raises:
            InputError: the total mass is zero.
        """
        total = self.log_evidence
        if total == -math.inf:
            raise InputError(ALL_ZERO)
        return {result: math.exp(mass - total) for result, mass in self.log_masses.items()}


class Stop(BaseException):
    """Ends a run early. Each belongs to one call, since programs run within programs. No `except Exception` eats it."""


def weighted(program: Program) -> Program:
    """The program that returns its result with its scores, and scores nothing. It ends at a weight of zero.

    >>> weighted(lambda p: p.score(-1.5))(Operations(None, None, None))
    (None, (-1.5,))
    """

    def run(p: Operations) -> tuple[Any, tuple[float, ...]]:
        scores, impossible = [], Stop()

        def score(log_weight: Any) -> None:
            scores.append(_checked(log_weight))
            if scores[-1] == -math.inf:
                raise impossible

        try:
            return program(p._replace(score=score)), tuple(scores)
        except Stop as stop:
            if stop is not impossible:
                raise
            return IMPOSSIBLE, tuple(scores)

    return run


def enumerate_measure(program: Program, *, cells: int | None = None) -> Measure:
    """The measure that a program denotes, by running it on every combination of its choices.

    Args:
        program: with finitely many choices of finite support. Results are hashable; a dict counts as the tuple of
            its items, an array as nested tuples. A `Population` counts as the measure that it denotes, so that
            algorithms are programs here as well.
        cells: uniform numbers between 0 and 1, which traces are made of, take this many equally likely values. The
            measure is exact where the probabilities of all traced choices are multiples of 1 / cells.

    Raises:
        InputError: a distribution without finite support, choices without end, a result that is not hashable, or
            a program that depends on more than its choices.

    >>> def program(p):
    ...     rolls = [p.sample(dist.DiscreteUniform(1, 6)) for _ in range(2)]
    ...     p.score(0.0 if max(rolls) == 2 else -np.inf)
    ...     return sum(rolls)
    >>> {k: round(v, 4) for k, v in sorted(enumerate_measure(program).probs.items())}
    {3: 0.6667, 4: 0.3333}
    """
    found: dict[Hashable, list[float]] = {}
    pending: list[tuple] = [()]
    for num_runs in itertools.count():
        if not pending:
            return Measure({result: float(np.logaddexp.reduce(masses)) for result, masses in found.items()})
        if num_runs == _MAX_RUNS:
            raise InputError(f"the program has more than {_MAX_RUNS} runs: enumerate a smaller one, or use smc")
        result, scores, taken, others = _run_along(pending.pop(), program, cells)
        pending.extend(others)
        log_mass = math.fsum(math.log(prob) for _, prob in taken) + sum(scores)
        population = result if isinstance(result, Population) else Population([result], np.zeros(1))
        for member, log_weight in zip(population.members, population.log_weights, strict=True):
            if log_mass + log_weight > -math.inf:
                mass = log_mass + float(log_weight) - math.log(len(population.members))
                found.setdefault(_frozen(member), []).append(mass)


def _run_along(planned: tuple, program: Program, cells: int | None) -> tuple[Any, tuple, list, list[tuple]]:
    """Run on the planned branches, then on the first possible ones: also returns the branches taken, and those left.

    A branch is the index of an outcome with its probability.
    """
    taken, others = [], []

    def sample(distribution: Distribution) -> Any:
        values, probs = _cells(cells) if distribution is UNIT and cells else _branches(distribution)
        if len(taken) == _MAX_CHOICES:
            raise InputError(f"a run makes more than {_MAX_CHOICES} choices: bound its loops, or use smc")
        if len(taken) < len(planned):
            branch, prob = planned[len(taken)]
            if branch >= len(probs) or probs[branch] != prob:
                raise InputError(not_reproducible(f"choice {len(taken)} came with other probabilities"))
        else:
            branch, *left = [b for b, prob in enumerate(probs) if prob > 0]
            others.extend((*taken, (b, probs[b])) for b in left)
        taken.append((branch, probs[branch]))
        return values[branch]

    result, scores = weighted(program)(Operations(sample, refuse_score, sample))
    return result, scores, taken, others


# Distributions as functions of one uniform number


def value_of(distribution: Distribution, u: float) -> Any:
    """The value of a choice. A function of a uniform number that has this distribution when u is uniform."""
    if distribution is UNIT:
        return u
    if not isinstance(distribution, Distribution):
        raise InputError(f"cannot sample from {distribution!r}: give a NumPyro distribution")
    outcomes = outcomes_of(distribution)
    if outcomes is not None:
        cumulative = np.cumsum(outcomes[1])
        return outcomes[0][int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))]
    if isinstance(distribution, _QUICK_QUANTILE) and distribution.batch_shape == ():
        return np.asarray(invert_cdf(distribution, np.asarray(u))).item()
    high, low = divmod(int(u * 2**53), 2**21)  # all 53 bits of the number make the key
    drawn = np.asarray(distribution.sample(jax.random.fold_in(jax.random.key(high), low)))
    return drawn.item() if drawn.ndim == 0 else drawn


def outcomes_of(distribution: Distribution) -> tuple[list[Any], np.ndarray] | None:
    """Values and probabilities of a scalar distribution of finite support, or None."""
    if not isinstance(distribution, Distribution) or distribution.batch_shape or distribution.event_shape:
        return None
    if isinstance(distribution, dist.BernoulliProbs):  # these two without JAX, a hundred times as quick
        prob = float(distribution.probs)
        values, probs = [0, 1], np.array([1 - prob, prob])
    elif isinstance(distribution, dist.CategoricalProbs):
        probs = np.asarray(distribution.probs, np.float64)
        values = list(range(len(probs)))
    elif distribution.has_enumerate_support:
        leaves, structure = jax.tree.flatten(distribution)
        values, probs = _enumerated(structure, *((a.dtype.str, a.shape, a.tobytes()) for a in map(np.asarray, leaves)))
    else:
        return None
    if not (probs.min() >= 0 and 0 < probs.sum() < math.inf):
        raise InputError(f"{type(distribution).__name__} has probabilities {probs.tolist()}: they lie between 0 and 1")
    return values, probs


@functools.lru_cache(maxsize=4096)  # NumPyro needs milliseconds for this
def _enumerated(structure: Any, *leaves: tuple) -> tuple[list[Any], np.ndarray]:
    arrays = [np.frombuffer(content, dtype).reshape(shape) for dtype, shape, content in leaves]
    distribution = jax.tree.unflatten(structure, arrays)
    support = np.asarray(distribution.enumerate_support())
    probs = np.exp(np.asarray(log_density(distribution, support), np.float64))
    return support.tolist(), probs / probs.sum()


def _branches(distribution: Distribution) -> tuple[list[Any], list[float]]:
    outcomes = outcomes_of(distribution)
    if outcomes is None:
        raise InputError(
            f"cannot enumerate {type(distribution).__name__} of shape {getattr(distribution, 'batch_shape', ())}: a "
            "scalar distribution of finite support is needed; for the uniform numbers of traces, set `cells`"
        )
    return outcomes[0], (outcomes[1] / outcomes[1].sum()).tolist()


def _cells(count: int) -> tuple[list[float], list[float]]:
    return [(i + 0.5) / count for i in range(count)], [1 / count] * count


def _checked(log_weight: Any) -> float:
    value = float(log_weight)
    if math.isnan(value) or value == math.inf:
        raise InputError(f"a score is {value}: a log weight is a number, or minus infinity for what is impossible")
    return value


def refuse_score(log_weight: Any) -> None:
    raise InputError("a score outside of any algorithm: give the program to importance, smc or metropolis_hastings")


def not_reproducible(what: str) -> str:
    return (
        f"the program is not reproducible: {what}. It may depend on nothing but what `sample` gives it: no random "
        "numbers, clocks or state from elsewhere, and no `fresh` where it is replayed"
    )


def _frozen(result: Any) -> Hashable:
    if isinstance(result, dict):
        return tuple((name, _frozen(value)) for name, value in sorted(result.items()))
    if isinstance(result, np.ndarray | jax.Array | list):
        return tuple(map(_frozen, result)) if np.ndim(result) else np.asarray(result).item()
    try:
        hash(result)
    except TypeError:
        raise InputError(
            f"a result of type {type(result).__name__} is not hashable: return numbers, tuples or text"
        ) from None
    return result
