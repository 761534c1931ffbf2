"""Chains of Hamiltonian Monte Carlo that advance by leapfrog steps, in one compiled loop.

Chains do not wait for each other: each begins its next transition the moment its last one ends. The same program, with
one gradient in it, looks at starting points, warms up and samples; what differs between these are arrays. Random
numbers come from NumPy, seeded by the key, since the compiled form of JAX's would be larger than the sampler itself.

Source: R. Neal, "MCMC using Hamiltonian dynamics" (2011).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.randomness import host_generator

BLOCK = 256  # leapfrog steps of a call: long enough that calls cost little, short enough to be interrupted
DIVERGENCE = 1000.0  # the error of the energy from which on a trajectory counts as divergent
LARGEST_LOG_WEIGHT = 60.0  # keeps sums of weights finite in float32
_TRIES = 25  # rounds of starting points before the model is asked for some
POSITION, MOMENTUM, GRADIENT = range(3)  # rows of a point


class Scale(NamedTuple):
    """A linear map L from whitened coordinates to positions; the inverse mass matrix is L L'.

    L is diag(diagonal) (I + V diag(stretch - 1) V'), where the columns of V are orthonormal: a diagonal scale after
    a stretch along some directions. Momenta and gradients are kept in whitened coordinates, where the mass is one.
    """

    diagonal: Float[np.ndarray, " dimension"]
    vectors: Float[np.ndarray, "dimension rank"]
    stretch: Float[np.ndarray, " rank"]

    def forward(self, vectors: Float[Array, "... dimension"]) -> Float[Array, "... dimension"]:
        """L v."""
        return self.diagonal * self._stretched(vectors, self.stretch - 1)

    def backward(self, vectors: Float[Array, "... dimension"]) -> Float[Array, "... dimension"]:
        """L' v: the gradient in whitened coordinates of a function whose gradient is v."""
        return self._stretched(self.diagonal * vectors, self.stretch - 1)

    def inverse(self, vectors: Float[Array, "... dimension"]) -> Float[Array, "... dimension"]:
        """The v for which `forward(v)` gives these."""
        return self._stretched(vectors / self.diagonal, 1 / self.stretch - 1)

    def backward_inverse(self, vectors: Float[Array, "... dimension"]) -> Float[Array, "... dimension"]:
        """The v for which `backward(v)` gives these."""
        return self._stretched(vectors, 1 / self.stretch - 1) / self.diagonal

    def _stretched(self, vectors: Array, factors: Array) -> Array:
        if not self.stretch.shape[0]:
            return vectors
        return vectors + (factors * (vectors @ self.vectors)) @ self.vectors.T


class Noise(NamedTuple):
    """Random numbers of a block: uniform ones for each leapfrog step, and momenta in the order of their use."""

    uniforms: Float[np.ndarray, "steps 3 chains"]
    momenta: Float[np.ndarray, "rows chains dimension"]
    kinetic: Float[np.ndarray, "rows chains"]


class Controls(NamedTuple):
    """What a block is to do.

    Attributes:
        begin: only look at the positions of the leaves: the step is zero, and transitions start from there.
        step: leapfrog step of each chain's next transition.
        limit: of the machine: leaves of a tree, or the length of a trajectory.
    """

    begin: Bool[np.ndarray, ""]
    step: Float[np.ndarray, " chains"]
    limit: Float[np.ndarray, ""]


class Machine(NamedTuple):
    """A kind of transition, as a step of all chains by one leaf.

    Attributes:
        names: of the scalars of a chain.
        blank: state of (chains, dimension, dtype): a NamedTuple of arrays, among them `leaf` and `proposal` (three rows
            of (chains, dimension)) and `scalars` (names, chains).
        iterate: the state after one more leaf: of log density and gradient, state, the number of the step, `Scale`,
            `Controls`, uniform numbers of this step, and `Noise`.
    """

    names: tuple[str, ...]
    blank: Callable[[int, int, Any], Any]
    iterate: Callable[..., Any]


class Leaf(NamedTuple):
    """A point that a leapfrog step has reached."""

    point: Float[Array, "3 chains dimension"]
    potential: Float[Array, " chains"]
    energy: Float[Array, " chains"]


def leapfrog(value_and_grad: Callable, front: Any, step: Float[Array, " chains"], scale: Scale) -> Leaf:
    """One leapfrog step of all chains, backwards where the step is negative."""
    step = step[:, None]
    half = front[MOMENTUM] + 0.5 * step * front[GRADIENT]
    position = front[POSITION] + step * scale.forward(half)
    value, gradient = value_and_grad(position)
    gradient = scale.backward(gradient)
    momentum = half + 0.5 * step * gradient
    return Leaf(jnp.stack([position, momentum, gradient]), -value, 0.5 * jnp.square(momentum).sum(-1) - value)


def weight_of(error: Float[Array, " chains"]) -> tuple[Float[Array, " chains"], Bool[Array, " chains"]]:
    """The weight of a leaf whose energy is off by this, and whether the trajectory has diverged."""
    error = jnp.where(jnp.isnan(error), jnp.inf, error)
    return jnp.exp(jnp.minimum(-error, LARGEST_LOG_WEIGHT)), error > DIVERGENCE


def next_momentum(noise: Noise, row: Float[Array, " chains"]) -> tuple[Array, Array]:
    """Each chain's next momentum, and its kinetic energy."""
    where = row.astype(jnp.int32), jnp.arange(row.shape[0])
    return noise.momenta.at[where].get(mode="promise_in_bounds"), noise.kinetic.at[where].get(mode="promise_in_bounds")


def packed(values: tuple, step: Int[Array, ""]) -> Float[Array, "names chains"]:
    """Scalars as one array, by one compiled loop: stacked, each would repeat the computation of all.

    The number of the step, which is not negative, keeps the compiler from storing a mask for each row.
    """
    dtype = jnp.result_type(float)
    rows = lax.broadcasted_iota(jnp.int32, (len(values), values[0].shape[0]), 0) + jnp.minimum(step, 0)
    found = jnp.broadcast_to(values[0].astype(dtype), rows.shape)
    for index, value in enumerate(values[1:], 1):
        found = jnp.where(rows == index, value.astype(dtype), found)
    return found


def _advance(
    conditioned: ConditionedModel,
    machine: Machine,
    state: Any,
    scale: Scale,
    controls: Controls,
    noise: Noise,
    num_steps: Int[Array, ""],
) -> tuple[Any, Array, Array]:
    """The state after some steps; at each step, each chain's proposal and scalars, as they were before it."""
    value_and_grad = jax.vmap(jax.value_and_grad(functools.partial(_log_prob, conditioned)))
    length = noise.uniforms.shape[0]
    proposals = jnp.zeros((length, *state.proposal.shape), state.proposal.dtype)
    scalars = jnp.zeros((length, *state.scalars.shape), state.scalars.dtype)

    def body(index: Array, carry: tuple) -> tuple:
        state, proposals, scalars = carry
        scalars = _put(scalars, state.scalars, index)
        uniforms = _row(noise.uniforms, index)
        state = machine.iterate(value_and_grad, state, index, scale, controls, uniforms, noise)
        return state, _put(proposals, state.proposal, index), scalars

    return lax.fori_loop(0, num_steps, body, (state, proposals, scalars))


# XLA's older way of compiling loops takes half the time, and its code for such small loops is as fast.
_COMPILED = [
    eqx.filter_jit(_advance, compiler_options={"xla_cpu_use_fusion_emitters": False}),
    eqx.filter_jit(_advance),
]


def _run(*arguments: Any) -> tuple[Any, Array, Array]:
    try:
        return _COMPILED[0](*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        del _COMPILED[0]  # another version of XLA
        return _COMPILED[0](*arguments)


def _log_prob(conditioned: ConditionedModel, vector: Float[Array, " dimension"]) -> Float[Array, ""]:
    """Log joint density; not a number where an observation is outside its support, of which NumPyro takes no notice."""
    trace = conditioned.trace(vector)
    inside = [jnp.array(True)]
    for site in trace.values():
        if site["type"] == "sample" and site["is_observed"] and not hasattr(site["fn"], "log_factor"):
            try:
                inside.append(jnp.all(site["fn"].support(site["value"])))
            except (NotImplementedError, TypeError):
                continue  # a support that cannot be asked
    return jnp.where(jnp.stack(inside).all(), sum(conditioned.log_terms_of(trace)), jnp.nan)


# Without the checks of jnp's indexing, which are compiled too.
def _row(array: Array, index: Array) -> Array:
    start = (index,) + (np.int32(0),) * (array.ndim - 1)
    return lax.dynamic_slice(array, start, (1, *array.shape[1:]), allow_negative_indices=False)[0]


def _put(array: Array, value: Array, index: Array) -> Array:
    return lax.dynamic_update_slice(
        array, value[None], (index,) + (np.int32(0),) * value.ndim, allow_negative_indices=False
    )


class Transitions(NamedTuple):
    """Finished transitions, ordered by when they finished.

    Attributes:
        chain: to which each belongs.
        position: drawn.
        gradient: of the log density there.
        scalars: by the machine's names.
    """

    chain: Int[np.ndarray, " transitions"]
    position: Float[np.ndarray, "transitions dimension"]
    gradient: Float[np.ndarray, "transitions dimension"]
    scalars: dict[str, Float[np.ndarray, " transitions"]]

    @property
    def acceptance(self) -> Float[np.ndarray, " transitions"]:
        """Mean acceptance probability over the leaves of each."""
        return self.scalars["accept_sum"] / self.scalars["num_steps"]

    @classmethod
    def joined(cls, parts: list[Transitions]) -> Transitions:
        """One after another."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


class Chains:
    """Chains on the host: what the compiled loop needs, and what comes out of it.

    Args:
        conditioned: the model with its data.
        machine: the kind of transition.
        num_chains: of them.
        limit: of the machine.
        rank: of the scale.
        key: a `jax.random.key`.

    Raises:
        InputError: no place of finite density and gradient was found, or an observation is outside its support.
    """

    def __init__(
        self, conditioned: ConditionedModel, machine: Machine, num_chains: int, limit: float, rank: int, key: Any
    ):
        self.conditioned, self.machine, self.num_chains, self.limit = conditioned, machine, num_chains, limit
        self.dimension, self.dtype = conditioned.dimension, jax.dtypes.canonicalize_dtype(float)
        self.random = host_generator(key)
        self.scale = Scale(np.ones(self.dimension), np.zeros((self.dimension, rank)), np.ones(rank))
        self.step, self.num_gradients = np.full(num_chains, 0.1), 0
        self.state = machine.blank(num_chains, self.dimension, self.dtype)
        self.momenta = self._normal(BLOCK + 1)
        self._start(key)

    def _start(self, key: Any) -> None:
        """Uniform in [-2, 2] in each unconstrained dimension, until density and gradient are finite."""
        fine = np.zeros(self.num_chains, bool)
        positions = np.zeros((self.num_chains, self.dimension))
        for _ in range(_TRIES):
            positions[~fine] = self.random.uniform(-2.0, 2.0, ((~fine).sum(), self.dimension))
            self.look(positions)
            fine = np.isfinite(self.log_probs) & np.isfinite(self.gradients).all(1)
            if fine.all():
                return
        self.look(np.asarray(self.conditioned.start(key, self.num_chains)))  # says what is wrong

    def _normal(self, rows: int) -> np.ndarray:
        return self.random.standard_normal((rows, self.num_chains, self.dimension), np.float32).astype(self.dtype)

    @property
    def positions(self) -> Float[np.ndarray, "chains dimension"]:
        """Where the chains are."""
        return np.asarray(self.state.proposal)[POSITION]

    def look(self, positions: Float[np.ndarray, "chains dimension"]) -> None:
        """Go to positions: the next transitions start there, `log_probs` and `gradients` are those there."""
        self.state = self.machine.blank(self.num_chains, self.dimension, self.dtype)
        self.state.leaf[POSITION] = positions
        self._call(1, begin=True)
        self.gradients = self.scale.backward_inverse(np.asarray(self.state.leaf[GRADIENT], np.float64))
        self.log_probs = -np.asarray(self.state.scalars[self._index("potential")], np.float64)
        self.state = self.state._replace(proposal=self.state.leaf)

    def run(self, num_steps: int = BLOCK) -> Transitions:
        """Some leapfrog steps of every chain, and the transitions that have finished."""
        proposals, scalars = self._call(num_steps)
        step, chain = np.nonzero(scalars[:, self._index("finished")])
        points = proposals[step, :, chain]
        gradients = self.scale.backward_inverse(points[:, GRADIENT].astype(np.float64))
        found = dict(zip(self.machine.names, scalars[step, :, chain].T, strict=True))
        return Transitions(chain, points[:, POSITION], gradients, found)

    def rescale(self, scale: Scale, positions: Float[np.ndarray, "chains dimension"]) -> None:
        """Give up trajectories that are under way, and go on from here with another scale."""
        self.scale = scale
        self.look(positions)

    def _call(self, num_steps: int, begin: bool = False) -> tuple[np.ndarray, np.ndarray]:
        row, scalars = self._index("row"), np.array(self.state.scalars)
        used = int(scalars[row].max())
        self.momenta[:used] = self._normal(used)
        scalars[row] = 0
        uniforms = self.random.random((BLOCK, 3, self.num_chains), np.float32)
        noise = Noise(uniforms, self.momenta, 0.5 * np.square(self.momenta).sum(-1))
        controls = Controls(np.bool_(begin), self.step, np.asarray(self.limit))
        settings = jax.tree.map(
            lambda a: a if a.dtype == bool else a.astype(self.dtype, copy=False), (self.scale, controls, noise)
        )
        state = self.state._replace(scalars=scalars)
        self.state, *found = _run(self.conditioned, self.machine, state, *settings, np.int32(num_steps))
        self.num_gradients += num_steps * self.num_chains
        return tuple(np.asarray(a)[:num_steps] for a in found)

    def _index(self, name: str) -> int:
        return self.machine.names.index(name)
