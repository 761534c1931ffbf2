"""Block proposals that networks learn from random models, reused as Metropolis-Hastings moves in models unseen.

A motif is a block of latents with its Markov blanket and the parameters of the densities between them. The same motif
stands in many models, and in many places of one. A network that has seen draws from random instances approximates
the block's conditional distribution given blanket and parameters, whatever they are; Metropolis-Hastings acceptance
makes up for its errors, so that the posterior is exact in any case.

Source: T. Wang, Y. Wu, D. Moore, S. Russell, "Meta-learning MCMC proposals" (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.core.randomness import host_generator
from bayeslens.core.structure import Structure
from bayeslens.inference.block_proposal import BlockProposal
from bayeslens.inference.diagnostics import doubts_of_chains

_PIECE = 100  # sweeps in one compiled call of the engine
_TRIES = 100  # draws from the prior among which a chain starts


# Moves


class BlockMove(eqx.Module):
    """A motif in a model: where its blocks are, and what its proposal is told at each place.

    Attributes:
        proposal: of the block.
        blocks: of each place, which entries of the state make up the block, in the proposal's order: indices, or, for
            the engine, labels of latents such as `"z[0,1]"` or `"mu"`.
        context: `context(state, parameters)` gives the features at one place: blanket values and parameters. The
            state that it sees has zeros in the block itself, so that the proposal cannot depend on what it replaces.
        parameters: a pytree of arrays with a leading axis of places, such as indices of the blanket, or numbers of
            the model; None if the context needs none.
    """

    proposal: BlockProposal
    blocks: Any
    context: Callable
    parameters: Any = None

    def __check_init__(self):
        try:
            shape = np.shape(self.blocks)
        except ValueError:
            shape = ()
        if len(shape) != 2 or shape[1] != len(self.proposal.sizes) or shape[0] == 0:
            raise InputError(
                f"blocks must have the shape (places, {len(self.proposal.sizes)}), as the proposal's block has "
                f"{len(self.proposal.sizes)} latents; got {shape or self.blocks}"
            )
        if wrong := {np.shape(a)[:1] for a in jax.tree.leaves(self.parameters)} - {shape[:1]}:
            raise InputError(f"each array of parameters needs {shape[0]} rows, one per place, got {wrong.pop()}")


class Chains(NamedTuple):
    """Draws after each sweep, and whether each block's proposal was accepted, in the order of the moves."""

    draws: Float[Array, "chains sweeps dimension"]
    accepted: Bool[Array, "chains sweeps blocks"]


def log_acceptance_ratio(
    log_density: Callable, move: BlockMove, place: tuple[Array, Any], state: Array, proposed: Array, log_now: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Log of the Metropolis-Hastings ratio of a block's proposed values, and the log density with them.

    Args:
        log_density: of the state.
        move: with the proposal.
        place: the block's indices, and its row of parameters.
        state: shape (dimension,).
        proposed: values for the block, shape (block,).
        log_now: log density of the state.
    """
    block, _ = place
    features = _features(move, place, state)
    then = log_density(state.at[block].set(proposed))
    forward, backward = (move.proposal.log_prob(v, features) for v in (proposed, state[block]))
    return then - log_now + backward - forward, then


def _features(move: BlockMove, place: tuple[Array, Any], state: Array) -> Array:
    block, parameters = place
    return move.context(state.at[block].set(0.0), parameters)


def _sweep(log_density: Callable, moves: tuple[BlockMove, ...], carry: tuple, noise: tuple) -> tuple[tuple, Array]:
    """Propose every block once; the carry is a state and its log density."""
    accepted = []
    for move, numbers in zip(moves, noise, strict=True):

        def visit(carry: tuple, row: tuple, move: BlockMove = move) -> tuple[tuple, Array]:
            (state, log_now), (block, parameters, numbers) = carry, row
            seen = _features(move, (block, parameters), state)
            proposed = move.proposal.transform(numbers[1:], seen).astype(state.dtype)
            ratio, then = log_acceptance_ratio(log_density, move, (block, parameters), state, proposed, log_now)
            # A ratio that is not a number, as from a proposal that overflows, is refused.
            accept = jnp.log(numbers[0]) < ratio
            moved = jnp.where(accept, state.at[block].set(proposed), state)
            return (moved, jnp.where(accept, then, log_now)), accept

        carry, taken = jax.lax.scan(visit, carry, (jnp.asarray(move.blocks), move.parameters, numbers))
        accepted.append(taken)
    return carry, jnp.concatenate(accepted)


@eqx.filter_jit
def _run(log_density: Callable, moves: tuple[BlockMove, ...], states: Array, noise: tuple[Array, ...]) -> Chains:
    def chain(state: Array, noise: tuple[Array, ...]) -> Chains:
        def sweep(carry: tuple, noise: tuple[Array, ...]) -> tuple[tuple, tuple[Array, Array]]:
            carry, accepted = _sweep(log_density, moves, carry, noise)
            return carry, (carry[0], accepted)

        carry = (state, log_density(state).astype(state.dtype))
        return Chains(*jax.lax.scan(sweep, carry, noise)[1])

    return jax.vmap(chain)(states, noise)


def _noise(moves: tuple[BlockMove, ...], states: Array, key: Any, num_sweeps: int) -> tuple[Array, ...]:
    """Uniform numbers for the chains, made on the host: compiling a generator into the loops takes seconds."""
    rng = host_generator(key)
    shapes = [(len(states), num_sweeps, len(m.blocks), 1 + m.proposal.noise_size) for m in moves]
    return tuple(jnp.asarray(rng.random(shape, states.dtype)) for shape in shapes)


def block_metropolis_hastings(
    log_density: Callable[[Array], Array],
    moves: Iterable[BlockMove],
    start: Float[Array, "chains dimension"],
    *,
    key: Any,
    num_sweeps: int = 1000,
) -> Chains:
    """Markov chains that propose every block once in a sweep, one after another, and leave the density invariant.

    Entries of the state that are in no block stay as they are: so observed variables may be part of it.

    Args:
        log_density: of a state, up to a constant; finite latents are their values as floating numbers, counted
            from 0. A callable pytree, such as an Equinox module that holds a model's parameters, is compiled once
            for all models of its shapes; a plain function for each.
        moves: one for each kind of motif.
        start: a state for each chain.
        key: a `jax.random.key`.
        num_sweeps: all are kept.

    Raises:
        InputError: no moves, blocks outside the state, or chains that start where the density is zero.

    Two coins that are always equal, so that single flips would be refused; the network need not know it:

    >>> agree = lambda state: jnp.where(state[0] == state[1], 0.0, -jnp.inf)
    >>> proposal = BlockProposal.random((2, 2), 1, key=jax.random.key(0), hidden=(4,))
    >>> move = BlockMove(proposal, [[0, 1]], lambda state, parameters: jnp.zeros(1))
    >>> chains = block_metropolis_hastings(agree, [move], jnp.zeros((4, 2)), key=jax.random.key(2), num_sweeps=400)
    >>> bool((chains.draws[..., 0] == chains.draws[..., 1]).all()), round(float(chains.draws.mean()), 1)
    (True, 0.5)
    """
    moves, start = tuple(moves), jnp.asarray(start, float)
    if not moves or num_sweeps < 1:
        raise InputError("there is nothing to do: give at least one move and num_sweeps of at least 1")
    if start.ndim != 2:
        raise InputError(f"start must have the shape (chains, dimension), got {start.shape}: add an axis for chains")
    moves = tuple(_at(m, np.asarray(m.blocks), m.context, start.shape[1]) for m in moves)
    if not np.isfinite(density := np.asarray(_densities(log_density, start))).all():
        chain = int(np.flatnonzero(~np.isfinite(density))[0])
        raise InputError(f"chain {chain} starts where the log density is {density[chain]}: start where it is finite")
    return _run(log_density, moves, start, _noise(moves, start, key, num_sweeps))


@eqx.filter_jit
def _densities(log_density: Callable, states: Array) -> Array:
    return jax.vmap(log_density)(states)


def _at(move: BlockMove, blocks: np.ndarray, context: Callable, dimension: int) -> BlockMove:
    """The move with checked indices as its blocks, and all numbers as arrays."""
    if blocks.dtype.kind not in "iu" or blocks.min() < 0 or blocks.max() >= dimension:
        raise InputError(f"blocks must be indices from 0 to {dimension - 1} into the state, got {blocks.tolist()}")
    if any(len(set(row)) < len(row) for row in blocks.tolist()):
        raise InputError("a block names an entry of the state twice: its latents must be different")
    return BlockMove(move.proposal, blocks, context, jax.tree.map(jnp.asarray, move.parameters))


# The engine


class _ProgramDensity(eqx.Module):
    """A program's log density as a function of one vector of its latents' values."""

    conditioned: ConditionedModel
    structure: Structure

    def values(self, state: Array) -> dict[str, Array]:
        found = self.structure.unflatten(state)
        return found | {s.name: found[s.name].astype(int) for s in self.conditioned.discrete}

    def __call__(self, state: Array) -> Array:
        return self.conditioned.log_density(self.values(state))


class _ProgramContext(eqx.Module):
    """A context that is given values by name."""

    context: Callable
    structure: Structure

    def __call__(self, state: Array, parameters: Any) -> Array:
        return self.context(self.structure.unflatten(state), parameters)


class LearnedProposals(Engine):
    """Blocks of latents moved by proposals that were learned elsewhere, from random models with the same motif.

    It takes finite and real latents together. Each proposal costs one evaluation of the whole program, wherever its
    block is. How often each block moved is the statistic `accept_prob`, its mean over the blocks of a sweep.

    Args:
        moves: the motifs in this model. Their blocks are labels of latents, such as `"z[0,1]"` or `"mu"`, that
            together name every latent; their contexts are given the latents' values by name instead of a vector.
        num_chains: run at once; 4 are needed to trust R-hat.
        num_warmup: sweeps not kept; the chains start from the prior, and nothing is adapted.
        num_samples: sweeps kept per chain.

    Source: as `train_proposal`'s.
    """

    name: ClassVar[str] = "learned_proposals"
    takes_discrete: ClassVar[bool] = True

    moves: tuple[BlockMove, ...]
    num_chains: int = 4
    num_warmup: int = 200
    num_samples: int = 1000

    def __check_init__(self):
        check_counts(self, "num_chains", "num_samples")
        if self.num_warmup < 0:
            raise InputError(f"num_warmup must be at least 0, got {self.num_warmup}")
        if not isinstance(self.moves, tuple) or not all(isinstance(m, BlockMove) for m in self.moves):
            raise InputError("moves must be a tuple of BlockMove")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_proper("chains that start from the prior")
        _check_sites(conditioned)
        structure = Structure(tuple(s.name for s in conditioned.latents), tuple(s.shape for s in conditioned.latents))
        moves = _placed(self.moves, conditioned, structure)
        density = _ProgramDensity(conditioned, structure)
        states = _starts(density, jax.random.fold_in(key, 0), self.num_chains)
        total, draws, accepted, done = self.num_warmup + self.num_samples, [], [], 0
        stopped: tuple[str, ...] = ()
        with ProgressBar(self.name, total) as bar:
            try:
                while done < total:
                    noise = _noise(moves, states, jax.random.fold_in(key, 1 + done), _PIECE)
                    found = _run(density, moves, states, noise)
                    states = found.draws[:, -1]
                    kept = slice(max(0, self.num_warmup - done), total - done)
                    draws.append(np.asarray(found.draws[:, kept]))
                    accepted.append(np.asarray(found.accepted[:, kept].mean(-1)))
                    done += _PIECE
                    bar(min(done, total))
            except KeyboardInterrupt:
                if done <= self.num_warmup:
                    raise
                have = done - self.num_warmup
                stopped = (f"interrupted after {have} of {self.num_samples} draws per chain: run it again",)
        statistics = {"accept_prob": np.concatenate(accepted, 1)}
        sites = jax.tree.map(np.asarray, density.values(jnp.asarray(np.concatenate(draws, 1))))
        posterior = posterior_of(self, conditioned, sites, key=key, statistics=statistics)
        return posterior.doubted(stopped + doubts_of_chains(posterior.draws, statistics))


def _check_sites(conditioned: ConditionedModel) -> None:
    """Refuse sites whose values a proposal could not take as they are."""
    from numpyro import handlers

    if conditioned.subsampled:
        raise InputError(f"the plates {list(conditioned.subsampled)} take a new part of the data in each run: use sgld")
    trace = handlers.trace(handlers.seed(conditioned.model, jax.random.key(0))).get_trace(**conditioned.arguments)
    for site in conditioned.latents:
        if not site.discrete and site.support != "real":
            raise InputError(
                f"{site.name!r} ({site.family}) is not real-valued, as normal proposals are: write it as a function "
                "of a real latent (numpyro.infer.reparam.TransformReparam)"
            )
        if not site.discrete:
            continue
        if site.support_size is None:
            raise InputError(f"{site.name!r} has infinitely many values: bound it (a truncated distribution)")
        places = np.ravel(trace[site.name]["fn"].enumerate_support(expand=False))
        if not np.array_equal(places, np.arange(site.support_size)):
            raise InputError(f"the values of {site.name!r} do not count from 0, as proposals do: shift them")


def _placed(moves: tuple[BlockMove, ...], conditioned: ConditionedModel, structure: Structure) -> tuple[BlockMove, ...]:
    """The moves with indices in place of labels, and contexts of vectors."""
    where = {label: i for i, label in enumerate(structure.labels)}
    entries = zip(conditioned.latents, structure.sizes, strict=True)
    sizes = np.array([(s.support_size if s.discrete else 0) for s, count in entries for _ in range(count)])
    placed = []
    for move in moves:
        if unknown := [n for row in move.blocks for n in row if n not in where]:
            raise InputError(f"blocks name {unknown[0]!r}, and the model's latents are {list(where)[:20]}")
        blocks = np.array([[where[n] for n in row] for row in move.blocks])
        for row in blocks[(sizes[blocks] != np.array(move.proposal.sizes)).any(1)]:
            raise InputError(
                f"the latents {[structure.labels[i] for i in row]} have {sizes[row].tolist()} values (0 where they "
                f"are continuous), and the proposal is for {list(move.proposal.sizes)}"
            )
        placed.append(_at(move, blocks, _ProgramContext(move.context, structure), len(sizes)))
    still = set(range(len(sizes))) - {int(i) for m in placed for i in np.ravel(m.blocks)}
    if still:
        raise InputError(f"no block moves {[structure.labels[i] for i in sorted(still)][:20]}: give moves for all")
    return tuple(placed)


def _starts(density: _ProgramDensity, key: Any, count: int) -> Array:
    """Draws from the prior at which the density is not zero."""
    states, log_densities = _prior_states(density, key, max(_TRIES, count))
    fine = np.flatnonzero(np.isfinite(np.asarray(log_densities)))
    if not len(fine):
        raise InputError(
            f"the density is zero or not a number at all of {len(states)} draws from the prior: look for observations "
            "that the model excludes, or widen its priors"
        )
    return states[np.resize(fine, count)]


@eqx.filter_jit
def _prior_states(density: _ProgramDensity, key: Any, count: int) -> tuple[Array, Array]:
    from numpyro import handlers

    def one(key: Any) -> tuple[Array, Array]:
        program = handlers.seed(density.conditioned.model, key)
        trace = handlers.trace(program).get_trace(**density.conditioned.arguments)
        state = density.structure.flatten({n: trace[n]["value"] for n in density.structure.names}).astype(float)
        return state, density(state)

    return jax.vmap(one)(jax.random.split(key, count))
