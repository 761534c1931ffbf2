"""Factorial hidden Markov models: many chains side by side, seen together, filtered and smoothed at linear cost.

The chains move independently of each other; an observation depends on several of them. After an observation the
chains are dependent, so that exact filtering works on the product of all their state spaces, which grows
exponentially with the number of chains. The likelihood however is a product of factors, each of which sees few chains:
a factor graph. The Graph Filter keeps one distribution for each block of chains. To update a block it takes the
product of the predicted block distributions as prior, multiplies it by those likelihood factors that are close to the
block in the factor graph, and sums out all but the block. What the left out factors would tell about the block decays
with their distance, and the error, measured block by block, need not grow with the number of chains.

Source: L. Rimella, N. Whiteley, "Exploiting locality in high-dimensional factorial hidden Markov models" (2022). The
paper has no estimate of the likelihood; ours applies its rule to the chain rule of probability, see `graph_filter`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bayeslens.core.errors import InputError
from bayeslens.core.finite import as_floating

_LARGEST, _LARGEST_EXACT = 2**20, 2**12  # joint states of a neighbourhood; of all chains, whose matrix is dense

Scopes = tuple[tuple[int, ...], ...]


def _as_scopes(scopes: Sequence[Sequence[int]]) -> Scopes:
    return tuple(tuple(int(i) for i in scope) for scope in scopes)


class FactorialHiddenMarkovModel(eqx.Module):
    """Independent Markov chains, and which of them each factor of the likelihood sees.

    Args:
        initial: shape (chains, states): distribution of each chain at the time of the first observation. Chains with
            fewer states than others have probability zero at the states that they lack.
        transition: shape (chains, states, states): rows are the present state, columns the next.
        scopes: for each likelihood factor the chains that it depends on. Hashable, and not differentiated.

    Raises:
        InputError: shapes that do not fit, rows that are no distributions, or scopes that name no or unknown chains.

    Three switches; each of two lamps shows how many of its two switches are on, with some noise:

    >>> chains = [[0.9, 0.1], [0.1, 0.9]]
    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]] * 3, [chains] * 3, [(0, 1), (1, 2)])
    >>> lamps = jnp.array([[2.1, 1.0], [1.9, 1.1], [2.0, 0.9]])  # shape (time, factors)
    >>> log_factors = tabulate(model, lambda lamp, switches: -((lamp - switches.sum()) ** 2) / 0.2, lamps)
    >>> graph_smoother(model, log_factors, radius=1).chains[1, :, 1].round(2).tolist()
    [1.0, 1.0, 0.0]
    """

    initial: Float[Array, "chains states"] = eqx.field(converter=as_floating)
    transition: Float[Array, "chains states states"] = eqx.field(converter=as_floating)
    scopes: Scopes = eqx.field(static=True, converter=_as_scopes)

    def __check_init__(self):
        shape = self.initial.shape
        if len(shape) != 2 or self.transition.shape != (*shape, shape[1]):
            raise InputError(
                f"initial and transition have shapes {shape} and {self.transition.shape}; "
                "(chains, states) and (chains, states, states) are needed"
            )
        if not self.scopes:
            raise InputError("scopes is empty: give for each likelihood factor the chains that it sees")
        for scope in self.scopes:
            if not scope or len(set(scope)) < len(scope) or not all(0 <= i < shape[0] for i in scope):
                raise InputError(f"the scope {scope} is not a set of chains between 0 and {shape[0] - 1}")
        for name, rows in (("initial", self.initial), ("transition", self.transition)):
            if isinstance(rows, jax.core.Tracer):
                continue
            rows = np.asarray(rows)
            if not ((rows >= 0).all() and np.allclose(rows.sum(-1), 1, atol=1e-3)):
                raise InputError(f"{name} has rows that are no distributions: nonnegative, with sum one")

    num_chains = property(lambda self: self.initial.shape[0], doc="How many chains there are.")
    num_states = property(lambda self: self.initial.shape[1], doc="How many states each chain has.")

    @property
    def width(self) -> int:
        """How many chains the widest factor sees."""
        return max(map(len, self.scopes))

    def sample(self, key: PRNGKeyArray, num_steps: int) -> Int[Array, "time chains"]:
        """Draw the paths of all chains.

        >>> model = FactorialHiddenMarkovModel([[0.0, 1.0]], [[[0.0, 1.0], [1.0, 0.0]]], [(0,)])
        >>> model.sample(jax.random.key(0), 3)[:, 0].tolist()
        [1, 0, 1]
        """
        chains = jnp.arange(self.num_chains)

        def step(state, key):
            return jax.random.categorical(key, jnp.log(self.transition[chains, state])), state

        first, *_ = keys = jax.random.split(key, num_steps + 1)
        state = jax.random.categorical(first, jnp.log(self.initial))
        return jax.lax.scan(step, state, keys[1:])[1]


class Beliefs(eqx.Module):
    """What is believed about the chains at each time.

    Attributes:
        blocks: shape (time, blocks, states of a block): joint distributions within blocks, states in row-major order
            of the block's chains. Blocks smaller than the largest are padded by zeros, at the end of the block's axes.
        chains: shape (time, chains, states): the distribution of each chain.
        log_likelihood: of all observations; exact or estimated.
    """

    blocks: Float[Array, "time blocks joint"]
    chains: Float[Array, "time chains states"]
    log_likelihood: Float[Array, ""]


def tabulate(
    model: FactorialHiddenMarkovModel, log_prob: Callable[[Any, Int[Array, " width"]], Any], observations: Any
) -> Float[Array, "time factors ..."]:
    """Evaluate the likelihood factors at every state of the chains that they see.

    Args:
        model: gives the number of states and the scopes.
        log_prob: log likelihood of one observation of one factor given the states of its chains, integers in the
            order of its scope; where its scope is narrower than the widest one, the last states are to be ignored.
        observations: an array, or a pytree of arrays, with leading axes (time, factors); what belongs to a factor,
            such as its noise, may be part of it.

    Returns:
        shape (time, factors, states, ..., states), one axis of states for each chain of the widest scope.

    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]] * 2, [[[0.9, 0.1], [0.1, 0.9]]] * 2, [(0, 1)])
    >>> tabulate(model, lambda y, x: -((y - x.sum()) ** 2), jnp.array([[3.0]])).tolist()
    [[[[-9.0, -4.0], [-4.0, -1.0]]]]
    """
    states = jnp.stack(jnp.meshgrid(*[jnp.arange(model.num_states)] * model.width, indexing="ij"), -1)
    over_states = jax.vmap(log_prob, (None, 0))
    table = jax.vmap(jax.vmap(over_states, (0, None)), (0, None))(observations, states.reshape(-1, model.width))
    return table.reshape(*table.shape[:2], *states.shape[:-1])


def local_total_variation(first: Beliefs, second: Beliefs) -> Float[Array, "time blocks"]:
    """Total variation distance between two beliefs, block by block.

    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]], [[[0.9, 0.1], [0.1, 0.9]]], [(0,)])
    >>> seen, unseen = jnp.array([[[0.0, -1e9]]]), jnp.zeros((1, 1, 2))
    >>> local_total_variation(exact_filter(model, seen), exact_filter(model, unseen)).tolist()
    [[0.5]]
    """
    return jnp.abs(first.blocks - second.blocks).sum(-1) / 2


# Which factors and blocks a region of the factor graph depends on: worked out once, in NumPy


class _Regions(NamedTuple):
    """Index arrays by which the joint distributions of all regions are gathered at once."""

    source: np.ndarray  # (regions, pieces): the blocks that a region overlaps
    kept: np.ndarray  # (regions, pieces, block size): which of their chains lie in it
    block_state: np.ndarray  # (regions, pieces, joint): their state in each joint state of the region
    factor: np.ndarray  # (regions, factors): the likelihood factors
    factor_state: np.ndarray  # (regions, factors, joint): where a joint state is in their tables
    valid: np.ndarray  # (regions, joint): false where a chain that only pads the region leaves its state 0


def _within(core: tuple[int, ...], scopes: Scopes, radius: int) -> list[int]:
    """The factors at distance at most 2 radius + 1 from the chains in `core`, in the bipartite factor graph."""
    reached, factors = set(core), []
    for _ in range(radius + 1):
        factors = [f for f, scope in enumerate(scopes) if reached & set(scope)]
        reached = reached.union(*(scopes[f] for f in factors))
    return factors


def _regions(
    cores: Sequence[tuple[int, ...]], factors: Sequence[list[int]], scopes: Scopes, blocks: Scopes, num_states: int
) -> _Regions:
    """Regions of the graph: the core chains first (padded to the widest core), then all others that factors see."""
    width, size = max(map(len, cores)), max(map(len, blocks))
    block_of = {chain: (k, j) for k, block in enumerate(blocks) for j, chain in enumerate(block)}
    chains = []
    for core, seen in zip(cores, factors, strict=True):
        others = sorted({i for f in seen for i in scopes[f]} - set(core))
        chains.append([*core, *[None] * (width - len(core)), *others])
    length = max(map(len, chains))
    if num_states**length > _LARGEST:
        raise InputError(
            f"a neighbourhood holds {length} chains, {num_states}^{length} joint states: "
            "use a smaller radius, smaller blocks, or factors that see fewer chains"
        )
    digits = np.stack(np.unravel_index(np.arange(num_states**length), (num_states,) * length))
    pieces = [sorted({block_of[i][0] for i in region if i is not None}) for region in chains]
    num_pieces, num_factors = max(map(len, pieces)), max(map(len, factors))
    joint, regions = digits.shape[1], len(cores)
    source = np.zeros((regions, num_pieces), np.int32)
    kept = np.zeros((regions, num_pieces, size), bool)
    block_state = np.zeros((regions, num_pieces, joint), np.int32)
    factor = np.full((regions, num_factors), len(scopes), np.int32)  # past the end: a factor that says nothing
    factor_state = np.zeros((regions, num_factors, joint), np.int32)
    valid = np.ones((regions, joint), bool)
    weight = num_states ** np.arange(size)[::-1]
    factor_weight = num_states ** np.arange(max(map(len, scopes)))[::-1]
    for r, region in enumerate(chains):
        for position, chain in enumerate([*region, *[None] * (length - len(region))]):
            if chain is None:
                valid[r] &= digits[position] == 0
                continue
            block, j = block_of[chain]
            p = pieces[r].index(block)
            source[r, p], kept[r, p, j] = block, True
            block_state[r, p] += digits[position] * weight[j]
        for n, f in enumerate(factors[r]):
            factor[r, n] = f
            for j, chain in enumerate(scopes[f]):
                factor_state[r, n] += digits[region.index(chain)] * factor_weight[j]
    return _Regions(source, kept, block_state, factor, factor_state, valid)


@functools.lru_cache(maxsize=32)
def _plan(scopes: Scopes, blocks: Scopes, num_states: int, radius: int) -> tuple[_Regions, _Regions]:
    """For every block itself and the factors near to it; for every factor itself, then those near and before it."""
    near = [_within(block, scopes, radius) for block in blocks]
    before = [[f, *(g for g in _within(scope, scopes, radius) if g < f)] for f, scope in enumerate(scopes)]
    return _regions(blocks, near, scopes, blocks, num_states), _regions(scopes, before, scopes, blocks, num_states)


def _log_joint(
    regions: _Regions, predicted: Float[Array, "blocks joint"], log_factors: Float[Array, "factors cells"], skip: int
) -> Float[Array, "regions joint"]:
    """Log of the product of the predicted block distributions and the likelihood factors, on every region.

    The first `skip` factors of each region are left out.
    """
    num_regions, pieces, size = regions.kept.shape
    table = predicted[regions.source]
    states = round(predicted.shape[1] ** (1 / size))
    for j in range(size):  # sum out the chains of a block that lie outside the region
        axes = table.reshape(num_regions, pieces, states**j, states, -1)
        summed = jnp.broadcast_to(axes.sum(3, keepdims=True), axes.shape).reshape(table.shape)
        table = jnp.where(regions.kept[:, :, None, j], table, summed)
    possible = table > 0
    log_table = jnp.where(possible, jnp.log(jnp.where(possible, table, 1)), -jnp.inf)
    log_joint = jnp.take_along_axis(log_table, regions.block_state, axis=2).sum(1)
    seen = log_factors[regions.factor[:, skip:, None], regions.factor_state[:, skip:]]
    return jnp.where(regions.valid, log_joint + seen.sum(1), -jnp.inf)


def _normalize(log_joint: Float[Array, "regions joint"]) -> tuple[Array, Array]:
    """Probabilities along the last axis and the log of their sum; all zeros and minus infinity if none is possible."""
    highest = jax.lax.stop_gradient(log_joint.max(-1, keepdims=True))
    weights = jnp.exp(log_joint - jnp.where(jnp.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    log_total = jnp.where(total > 0, jnp.log(some) + highest, -jnp.inf)
    return weights / some, log_total[..., 0]


def _move(
    blocks: Float[Array, "blocks joint"], transition: Float[Array, "blocks size states states"]
) -> Float[Array, "blocks joint"]:
    """Apply to each chain of each block its matrix, from the left."""
    count, size, states, _ = transition.shape
    for j in range(size):
        axes = blocks.reshape(count, states**j, states, -1)
        blocks = jnp.einsum("kasb,ksz->kazb", axes, transition[:, j], precision="highest").reshape(count, -1)
    return blocks


class _Blocks(NamedTuple):
    """The model arranged by blocks; places left free in small blocks hold a chain that stays in state 0."""

    initial: Float[Array, "blocks joint"]
    transition: Float[Array, "blocks size states states"]
    position: np.ndarray  # (chains, 2): block and place of each chain

    def chains(self, blocks: Float[Array, "time blocks joint"]) -> Float[Array, "time chains states"]:
        """Distributions of single chains."""
        time, (count, size, states, _) = blocks.shape[0], self.transition.shape
        parts = [blocks.reshape(time, count, states**j, states, -1).sum((2, 4)) for j in range(size)]
        return jnp.stack(parts, 2)[:, self.position[:, 0], self.position[:, 1]]


def _arrange(model: FactorialHiddenMarkovModel, blocks: Scopes) -> _Blocks:
    size, states, dtype = max(map(len, blocks)), model.num_states, model.initial.dtype
    index = np.full((len(blocks), size), model.num_chains)
    position = np.zeros((model.num_chains, 2), int)
    for k, block in enumerate(blocks):
        index[k, : len(block)] = block
        for j, chain in enumerate(block):
            position[chain] = k, j
    stay = jnp.zeros((1, states), dtype).at[0, 0].set(1)
    initial = jnp.concatenate([model.initial, stay])[index]
    transition = jnp.concatenate([model.transition, jnp.broadcast_to(stay, (1, states, states))])[index]
    joint = jnp.ones((len(blocks), 1), dtype)
    for j in range(size):
        joint = (joint[:, :, None] * initial[:, None, j]).reshape(len(blocks), -1)
    return _Blocks(joint, transition, position)


def _check(
    model: FactorialHiddenMarkovModel, log_factors: Array, blocks: Sequence[Sequence[int]] | None, radius: int = 0
) -> tuple[Array, Scopes]:
    """The factors with a silent one appended and their states flattened; and the blocks."""
    if not (isinstance(radius, int) and radius >= 0):
        raise InputError(f"radius is {radius!r}: give a whole number, 0 or more")
    wanted = (len(model.scopes), *[model.num_states] * model.width)
    log_factors = as_floating(log_factors)
    if log_factors.ndim < 2 or log_factors.shape[0] == 0 or log_factors.shape[1:] != wanted:
        raise InputError(f"log_factors has shape {log_factors.shape}, but (time, *{wanted}) is needed: see `tabulate`")
    if not isinstance(log_factors, jax.core.Tracer) and (np.isnan(log_factors) | np.isposinf(log_factors)).any():
        raise InputError(
            "log_factors has entries that are missing or plus infinity; a missing observation is all zeros"
        )
    blocks = _as_scopes(blocks) if blocks is not None else tuple((i,) for i in range(model.num_chains))
    if sorted(itertools.chain(*blocks)) != list(range(model.num_chains)) or not all(blocks):
        raise InputError(f"the blocks do not hold each of the {model.num_chains} chains exactly once")
    flat = log_factors.reshape(*log_factors.shape[:2], -1)
    return jnp.pad(flat, ((0, 0), (0, 1), (0, 0))), blocks


@functools.partial(jax.jit, static_argnames=("blocks", "radius", "smooth"))
def _graph(model, log_factors, *, blocks: Scopes, radius: int, smooth: bool) -> Beliefs:
    """Graph Filter, or Graph Smoother, and the log likelihood."""
    arranged = _arrange(model, blocks)
    by_block, by_factor = _plan(model.scopes, blocks, model.num_states, radius)

    def step(predicted, seen):
        weights, _ = _normalize(_log_joint(by_block, predicted, seen, 0))
        filtered = weights.reshape(*predicted.shape, -1).sum(-1)  # the core comes first: sum out all others
        return _move(filtered, arranged.transition), (predicted, filtered)

    _, (predicted, beliefs) = jax.lax.scan(step, arranged.initial, log_factors)

    def increment(arguments):
        predicted, seen = arguments
        with_it, without = (_normalize(_log_joint(by_factor, predicted, seen, skip))[1] for skip in (0, 1))
        known = jnp.isfinite(without)
        return jnp.where(known, with_it - jnp.where(known, without, 0), -jnp.inf).sum()

    log_likelihood = jax.lax.map(increment, (predicted, log_factors)).sum()
    if smooth:
        back = jnp.swapaxes(arranged.transition, -1, -2)
        beliefs = _back(beliefs, predicted, lambda ratio: _move(ratio, back))
    return Beliefs(beliefs, arranged.chains(beliefs), log_likelihood)


def _back(filtered: Array, predicted: Array, pull: Callable[[Array], Array]) -> Array:
    """From filtered and predicted to smoothed distributions; `pull` applies the transition matrix from the right."""

    def step(later, now):
        filtered, predicted = now
        smoothed = filtered * pull(later / jnp.where(predicted > 0, predicted, 1))
        return smoothed, smoothed

    _, earlier = jax.lax.scan(step, filtered[-1], (filtered[:-1], predicted[1:]), reverse=True)
    return jnp.concatenate([earlier, filtered[-1:]])


def graph_filter(
    model: FactorialHiddenMarkovModel,
    log_factors: Float[Array, "time factors ..."],
    *,
    radius: int,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Beliefs:
    """Approximate filtering: the distributions of the chains at each time given the observations up to it.

    The cost is linear in the number of blocks, and exponential in the number of chains in one neighbourhood.

    The log likelihood is an estimate: the likelihood of the observations at one time is the product over factors of
    the probability of each given those before it, under the predicted product of blocks; of those before it, only
    the ones within the radius are used. It is exact where all chains are one block and the radius reaches all factors.
    It can be differentiated, so that it may stand as `numpyro.factor` in a model of the parameters.

    Args:
        model: the chains and the factor graph.
        log_factors: shape (time, factors, states, ..., states), log likelihoods as `tabulate` makes them. A table of
            zeros is a missing observation, minus infinity marks impossible states.
        radius: m of the paper. Blocks use likelihood factors up to distance 2 m + 1 in the factor graph: with 0 those
            that see a chain of the block, with 1 also those that share a chain with these, and so on.
        blocks: a partition of the chains. By default each chain is a block of its own, which costs least; larger
            blocks keep more of the dependence from one time to the next.

    Raises:
        InputError: shapes that do not fit, blocks that are no partition, or a neighbourhood too large to sum over.

    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]] * 3, [[[0.6, 0.4], [0.4, 0.6]]] * 3, [(0, 1), (1, 2)])
    >>> log_factors = jax.random.normal(jax.random.key(0), (4, 2, 2, 2))
    >>> near, exact = graph_filter(model, log_factors, radius=1), exact_filter(model, log_factors)
    >>> float(local_total_variation(near, exact).max()) < 0.01
    True
    """
    log_factors, blocks = _check(model, log_factors, blocks, radius)
    return _graph(model, log_factors, blocks=blocks, radius=radius, smooth=False)


def graph_smoother(
    model: FactorialHiddenMarkovModel,
    log_factors: Float[Array, "time factors ..."],
    *,
    radius: int,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Beliefs:
    """Approximate smoothing: the distributions of the chains at each time given all observations.

    Runs `graph_filter`, then goes back in time block by block. The arguments and the log likelihood are the filter's.

    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]], [[[0.75, 0.25], [0.25, 0.75]]], [(0,)])
    >>> log_factors = jnp.log(jnp.array([[[0.5, 0.5]], [[0.0, 1.0]]]))
    >>> graph_smoother(model, log_factors, radius=0).chains[:, 0, 1].tolist()
    [0.75, 1.0]
    """
    log_factors, blocks = _check(model, log_factors, blocks, radius)
    return _graph(model, log_factors, blocks=blocks, radius=radius, smooth=True)


# The exact answer, on the product of all state spaces


@functools.partial(jax.jit, static_argnames=("blocks", "smooth"))
def _exact(model, log_factors, *, blocks: Scopes, smooth: bool) -> Beliefs:
    chains, states = model.num_chains, model.num_states
    if states**chains > _LARGEST_EXACT:
        raise InputError(
            f"{chains} chains have {states}^{chains} joint states, too many for an exact answer: use `graph_filter`"
        )
    digits = np.stack(np.unravel_index(np.arange(states**chains), (states,) * chains))
    weight = states ** np.arange(model.width)[::-1]
    cells = np.stack([weight[: len(scope)] @ digits[list(scope)] for scope in model.scopes])
    seen = jnp.take_along_axis(log_factors[:, :-1], cells[None], axis=2).sum(1)
    initial = functools.reduce(jnp.kron, list(model.initial))
    transition = functools.reduce(jnp.kron, list(model.transition))

    def step(predicted, seen):
        possible = predicted > 0
        log_joint = jnp.where(possible, jnp.log(jnp.where(possible, predicted, 1)) + seen, -jnp.inf)
        filtered, evidence = _normalize(log_joint)
        return jnp.matmul(filtered, transition, precision="highest"), (predicted, filtered, evidence)

    _, (predicted, joint, evidence) = jax.lax.scan(step, initial, seen)
    if smooth:
        joint = _back(joint, predicted, lambda ratio: jnp.matmul(transition, ratio, precision="highest"))
    axes = joint.reshape(-1, *[states] * chains)

    def keep(some, size):
        kept = jnp.einsum(axes, [*range(chains + 1)], [0, *(i + 1 for i in some)]).reshape(len(axes), -1)
        free = states ** (size - len(some))  # places left free in a small block are chains in state 0
        return jnp.zeros((len(axes), kept.shape[1] * free), kept.dtype).at[:, ::free].set(kept)

    of_blocks = jnp.stack([keep(block, max(map(len, blocks))) for block in blocks], 1)
    return Beliefs(of_blocks, jnp.stack([keep((i,), 1) for i in range(chains)], 1), evidence.sum())


def exact_filter(
    model: FactorialHiddenMarkovModel,
    log_factors: Float[Array, "time factors ..."],
    *,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Beliefs:
    """Exact filtering on the product of all state spaces: what `graph_filter` approximates, for few chains.

    Args:
        model, log_factors: as for `graph_filter`.
        blocks: which joint distributions to report; they do not change the answer.

    Raises:
        InputError: as `graph_filter`; or more than 4096 joint states.

    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]], [[[0.9, 0.1], [0.1, 0.9]]], [(0,)])
    >>> round(float(exact_filter(model, jnp.log(jnp.array([[[0.2, 0.6]]]))).chains[0, 0, 1]), 3)
    0.75
    """
    log_factors, blocks = _check(model, log_factors, blocks)
    return _exact(model, log_factors, blocks=blocks, smooth=False)


def exact_smoother(
    model: FactorialHiddenMarkovModel,
    log_factors: Float[Array, "time factors ..."],
    *,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Beliefs:
    """Exact smoothing on the product of all state spaces, for few chains; arguments as for `exact_filter`.

    >>> model = FactorialHiddenMarkovModel([[0.5, 0.5]], [[[0.75, 0.25], [0.25, 0.75]]], [(0,)])
    >>> round(float(exact_smoother(model, jnp.log(jnp.array([[[0.5, 0.5]], [[0.0, 1.0]]]))).chains[0, 0, 1]), 3)
    0.75
    """
    log_factors, blocks = _check(model, log_factors, blocks)
    return _exact(model, log_factors, blocks=blocks, smooth=True)
