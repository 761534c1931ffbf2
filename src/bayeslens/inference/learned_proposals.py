"""Block proposals that networks learn from random models, reused as Metropolis-Hastings moves in models unseen.

A motif is a block of latents with its Markov blanket and the parameters of the densities between them. The same motif
stands in many models, and in many places of one. A network that has seen draws from random instances approximates
the block's conditional distribution given blanket and parameters, whatever they are; Metropolis-Hastings acceptance
makes up for its errors, so that the posterior is exact in any case.

Source: T. Wang, Y. Wu, D. Moore, S. Russell, "Meta-learning MCMC proposals" (2018).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.core.structure import Structure
from bayeslens.core.training import History, train
from bayeslens.inference.diagnostics import doubts_of_chains

_LOG_TWO_PI = float(np.log(2 * np.pi))
_PIECE = 100  # sweeps in one compiled call of the engine
_MEASURED = 1000  # instances from which the scales of a proposal's inputs are taken
_TRIES = 100  # draws from the prior among which a chain starts


class BlockProposal(eqx.Module):
    """A mixture density network: the distribution of a block of latents, given numbers that describe its surroundings.

    In each component of the mixture every latent depends on those of its kind before it: the logits of a finite one are
    linear in indicators of their values, and continuous ones are jointly normal with a full covariance. The network
    gives all coefficients. Make one with `BlockProposal.random` and train it with `train_proposal`.

    Attributes:
        layers: weights and biases of the network.
        sizes: of each latent of the block, how many values it has, counted from 0; 0 for a continuous one.
        components: of the mixture.
        center, spread: of the features, which are standardized.
        middle, width: of the block's values; 0 and 1 for finite ones.
    """

    layers: tuple[tuple[Array, Array], ...]
    sizes: tuple[int, ...] = eqx.field(static=True)
    components: int = eqx.field(static=True)
    center: Float[np.ndarray, " features"]
    spread: Float[np.ndarray, " features"]
    middle: Float[np.ndarray, " block"]
    width: Float[np.ndarray, " block"]

    @classmethod
    def random(
        cls, sizes: Sequence[int], features: int, *, key: Any, components: int = 4, hidden: Sequence[int] = (128, 128)
    ) -> BlockProposal:
        """An untrained proposal.

        Args:
            sizes: of each latent of the block, how many values it has; 0 for a continuous one.
            features: how many numbers describe the surroundings.
            key: a `jax.random.key`.
            components: of the mixture: several where finite and continuous latents depend on each other, or where
                there are several modes.
            hidden: sizes of the hidden layers.

        >>> coin_and_number = BlockProposal.random((2, 0), 3, key=jax.random.key(0))
        >>> grid = np.arange(-20, 20, 0.05)
        >>> both = jnp.array([[coin, x] for coin in (0, 1) for x in grid])
        >>> total = jnp.exp(jax.vmap(coin_and_number.log_prob, (0, None))(both, jnp.ones(3))).sum() * 0.05
        >>> round(float(total), 3)
        1.0
        """
        sizes = tuple(int(s) for s in sizes)
        if not sizes or min(sizes) < 0 or 1 in sizes:
            raise InputError(f"sizes={sizes}: give 0 for a continuous latent, and at least 2 values for a finite one")
        if features < 1 or components < 1 or any(h < 1 for h in hidden):
            raise InputError("features, components and the sizes in hidden must be at least 1")
        continuous, codes = sizes.count(0), sum(s - 1 for s in sizes if s)
        each = 1 + codes + int(_earlier(sizes).sum()) + 2 * continuous + continuous * (continuous - 1) // 2
        outputs = components * each
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        made = [rng.normal(size=(b, a)) / np.sqrt(a) for a, b in itertools.pairwise((features, *hidden, outputs))]
        layers = tuple((jnp.asarray(w, float), jnp.zeros(len(w))) for w in made)
        zeros, ones = np.zeros, np.ones
        kind = layers[0][0].dtype
        return cls(
            layers, sizes, components,
            *(np.asarray(v, kind) for v in (zeros(features), ones(features), zeros(len(sizes)), ones(len(sizes)))),
        )  # fmt: skip

    @property
    def features(self) -> int:
        """How many numbers it is given."""
        return self.center.shape[0]

    def log_prob(self, value: Float[Array, " block"], features: Float[Array, " features"]) -> Float[Array, ""]:
        """Log probability of the block's values, a density in the continuous ones; minus infinity where impossible."""
        parts = self._parts(features)
        value = (value - self.middle) / self.width
        total = parts.log_weights - jnp.log(self.width).sum()
        codes = [value[i] == jnp.arange(1, self.sizes[i], dtype=value.dtype) for i in self._finite]
        if codes:
            logits = parts.logits + parts.couplings @ jnp.concatenate(codes).astype(value.dtype)
            for i, part in zip(self._finite, jnp.split(logits, self._edges, axis=1), strict=True):
                possible = value[i] == jnp.arange(self.sizes[i], dtype=value.dtype)
                total += jnp.where(possible, jax.nn.log_softmax(_with_zero(part)), -jnp.inf).max(-1)
        x = value[self._continuous]
        residual = jnp.exp(-parts.log_scale) * (x - parts.shift - parts.slopes @ x)
        total += -(0.5 * residual**2 + parts.log_scale + 0.5 * _LOG_TWO_PI).sum(-1)
        return jax.nn.logsumexp(total)

    def sample(self, key: Any, features: Float[Array, " features"]) -> Float[Array, " block"]:
        """One draw of the block's values."""
        return self.transform(jax.random.uniform(key, (self.noise_size,), self.center.dtype), features)

    @property
    def noise_size(self) -> int:
        """How many uniform numbers a draw takes."""
        return self.components + sum(self.sizes) + self.sizes.count(0)

    def transform(self, noise: Float[Array, " noise"], features: Float[Array, " features"]) -> Float[Array, " block"]:
        """The draw that uniform numbers become."""
        parts = self._parts(features)
        continuous, count = self._continuous, self.components + sum(self.sizes)
        kind = parts.log_weights.dtype
        noise = jnp.clip(noise.astype(kind), jnp.finfo(kind).tiny, 1 - jnp.finfo(kind).epsneg)
        gumbel, uniform = -jnp.log(-jnp.log(noise[:count])), noise[count:]
        chosen = jnp.argmax(parts.log_weights + gumbel[: self.components])
        value, begin = jnp.zeros(len(self.sizes), kind), self.components
        codes = jnp.zeros(parts.logits.shape[1], kind)
        for i, first in zip(self._finite, (0, *self._edges), strict=False):
            size = self.sizes[i]
            own = slice(first, first + size - 1)
            logits = parts.logits[chosen, own] + parts.couplings[chosen, own] @ codes
            drawn = jnp.argmax(_with_zero(logits) + gumbel[begin : begin + size])
            value = value.at[i].set(drawn.astype(kind))
            codes = codes.at[own].set((drawn == jnp.arange(1, size)).astype(kind))
            begin += size
        normal = jax.scipy.special.ndtri(uniform)
        for j, i in enumerate(continuous):
            along = (parts.slopes[chosen, j] * value[continuous]).sum()  # entries from j on have slope zero
            drawn = parts.shift[chosen, j] + along + jnp.exp(parts.log_scale[chosen, j]) * normal[j]
            value = value.at[i].set(drawn)
        return value * self.width + self.middle

    @property
    def _finite(self) -> tuple[int, ...]:
        return tuple(i for i, s in enumerate(self.sizes) if s)

    @property
    def _edges(self) -> tuple[int, ...]:
        """Where the indicators of the second and later finite latents begin."""
        return tuple(int(e) for e in np.cumsum([self.sizes[i] - 1 for i in self._finite])[:-1])

    @property
    def _continuous(self) -> np.ndarray:
        return np.array([i for i, s in enumerate(self.sizes) if not s], int)

    def _parts(self, features: Array) -> _Parts:
        x = (features - self.center) / self.spread
        for weight, bias in self.layers[:-1]:
            x = jax.nn.silu(weight @ x + bias)
        weight, bias = self.layers[-1]
        out = (weight @ x + bias).reshape(self.components, -1)
        m, earlier = len(self._continuous), _earlier(self.sizes)
        edges = np.cumsum([1, len(earlier), int(earlier.sum()), m, m])
        log_weights, logits, coupled, shift, log_scale, below = jnp.split(out, edges, axis=1)
        couplings = jnp.zeros((self.components, *earlier.shape), out.dtype).at[:, *np.nonzero(earlier)].set(coupled)
        slopes = jnp.zeros((self.components, m, m), out.dtype).at[:, *np.tril_indices(m, -1)].set(below)
        return _Parts(jax.nn.log_softmax(log_weights[:, 0]), logits, couplings, shift, log_scale, slopes)


def _earlier(sizes: Sequence[int]) -> Bool[np.ndarray, "codes codes"]:
    """Which indicators of finite latents' values (but 0) belong to latents before another's."""
    owner = np.array([i for i, s in enumerate(sizes) for _ in range(s - 1)], int)
    return owner[None, :] < owner[:, None]


def _with_zero(logits: Float[Array, "... others"]) -> Float[Array, "... values"]:
    """With the logit of value 0, which is 0."""
    return jnp.concatenate([jnp.zeros_like(logits[..., :1]), logits], -1)


class _Parts(NamedTuple):
    """What the network says of each component.

    Finite latents have indicators of their values but 0, with logits and couplings to those of latents before.
    Continuous ones have, given those before, intercepts, log standard deviations and slopes.
    """

    log_weights: Float[Array, " components"]
    logits: Float[Array, "components codes"]
    couplings: Float[Array, "components codes codes"]
    shift: Float[Array, "components continuous"]
    log_scale: Float[Array, "components continuous"]
    slopes: Float[Array, "components continuous continuous"]


# Training


class _Problem(NamedTuple):
    """What is trained: the proposal."""

    proposal: BlockProposal
    draw_instance: Callable
    batch_size: int


def _instances(draw_instance: Callable, key: Any, count: int) -> tuple[Array, Array]:
    """Rows of block values and of features from random instances."""
    values, features = jax.vmap(draw_instance)(jax.random.split(key, count))
    return values.reshape(-1, values.shape[-1]), features.reshape(-1, features.shape[-1])


def _loss(problem: _Problem, batch: None, key: Any) -> Float[Array, ""]:
    values, features = _instances(problem.draw_instance, key, problem.batch_size)
    return -jax.vmap(problem.proposal.log_prob)(values, features).mean()


@functools.lru_cache
def _schedule(learning_rate: float, num_steps: int) -> Any:
    """One schedule per length, so that later trainings find their program compiled."""
    import optax

    return optax.cosine_decay_schedule(learning_rate, num_steps)


def train_proposal(
    proposal: BlockProposal,
    draw_instance: Callable[[Any], tuple[Array, Array]],
    *,
    key: Any,
    num_steps: int = 3000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
) -> tuple[BlockProposal, History]:
    """Fit a proposal to the conditional distributions of a motif's block, over random models that contain it.

    It maximizes the mean log probability of the block under draws from the priors of random models, which minimizes
    the mean divergence of the proposal from the exact conditional. New instances are drawn in every step, so that
    nothing can be learned by heart.

    Args:
        proposal: untrained, or trained before. Its features and continuous values are standardized first.
        draw_instance: a traceable function of a key. It draws the parameters of a model, then values of all its
            variables, and returns the block's values, shape (..., block), and its features, (..., features). Leading
            axes are for the places of one model at which the motif stands.
        key: a `jax.random.key`.
        num_steps: of Adam, at a learning rate that falls to zero.
        batch_size: instances drawn in each step.
        learning_rate: at the start.

    Returns:
        the proposal trained, and the training's `History`.

    Raises:
        InputError: instances that do not fit the proposal, or are not finite.

    >>> def draw_instance(key):
    ...     scale, x, noise = jax.random.normal(key, (3,))
    ...     return x[None], jnp.stack([scale, x + jnp.exp(scale) * noise])
    >>> untrained = BlockProposal.random((0,), 2, key=jax.random.key(0), components=1, hidden=(16,))
    >>> trained, history = train_proposal(untrained, draw_instance, key=jax.random.key(1), num_steps=300)
    >>> bool(history.losses[-50:].mean() < history.losses[:50].mean())
    True
    """
    if num_steps < 1 or batch_size < 1:
        raise InputError("num_steps and batch_size must be at least 1")
    # A generator that is quick to compile and to run.
    fast = jax.random.key(int(np.asarray(jax.random.key_data(key)).ravel()[-1]), impl="rbg")
    values, features = (np.asarray(a) for a in _measured(draw_instance, jax.random.fold_in(fast, 0)))
    _check_instances(proposal, values, features)
    proposal = _standardized(proposal, values, features)
    trained, history = train(
        _loss, _Problem(proposal, draw_instance, batch_size), None, key=jax.random.fold_in(fast, 1),
        num_steps=num_steps, learning_rate=_schedule(learning_rate, num_steps),
        check_every=min(num_steps, max(100, num_steps // 10)),
    )  # fmt: skip
    return trained.proposal, history


@eqx.filter_jit
def _measured(draw_instance: Callable, key: Any) -> tuple[Array, Array]:
    return _instances(draw_instance, key, _MEASURED)


def _check_instances(proposal: BlockProposal, values: np.ndarray, features: np.ndarray) -> None:
    if values.shape[1] != len(proposal.sizes) or features.shape[1] != proposal.features or len(values) != len(features):
        raise InputError(
            f"draw_instance gives {values.shape[1]} block values and {features.shape[1]} features ({len(values)} and "
            f"{len(features)} rows), but the proposal is for {len(proposal.sizes)} and {proposal.features}"
        )
    if not (np.isfinite(values).all() and np.isfinite(features).all()):
        raise InputError("draw_instance gives values or features that are not finite: look for overflow in it")
    for i in proposal._finite:
        if not np.isin(values[:, i], np.arange(proposal.sizes[i])).all():
            raise InputError(
                f"entry {i} of the block must be one of 0 to {proposal.sizes[i] - 1}, and draw_instance gives "
                f"{np.setdiff1d(values[:, i], np.arange(proposal.sizes[i]))[0]}: correct it, or the proposal's sizes"
            )


def _standardized(proposal: BlockProposal, values: np.ndarray, features: np.ndarray) -> BlockProposal:
    """The proposal with its scales set by a sample."""
    kind, finite = proposal.center.dtype, np.array(proposal.sizes) > 0
    spread = lambda a: np.where(a.std(0) > 1e-6 * (1 + np.abs(a).max(0)), a.std(0), 1.0)  # noqa: E731
    scales = (
        features.mean(0), spread(features),
        np.where(finite, 0.0, values.mean(0)), np.where(finite, 1.0, spread(values)),
    )  # fmt: skip
    where = lambda p: (p.center, p.spread, p.middle, p.width)  # noqa: E731
    return eqx.tree_at(where, proposal, tuple(np.asarray(s, kind) for s in scales))


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
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
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
        for name in ("num_chains", "num_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
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
