"""Mixture density networks that propose blocks of latents, trained on random models that contain the block's motif.

Source: T. Wang, Y. Wu, D. Moore, S. Russell, "Meta-learning MCMC proposals" (2018).
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
from jaxtyping import Array, Bool, Float

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import fast_key, host_generator
from bayeslens.core.training import History, train

_LOG_TWO_PI = float(np.log(2 * np.pi))
_MEASURED = 1000  # instances from which the scales of a proposal's inputs are taken


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
        rng = host_generator(key)
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
    fast = fast_key(key)
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
