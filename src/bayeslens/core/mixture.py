"""Mixtures of any distributions: the one place where distributions are mixed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import Distribution, constraints

from bayeslens.core.distribution import build, put_together, register_family, take_apart
from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import backend, cumulative, log_density, logsumexp, mean_and_variance, moments

_CATEGORICAL = (dist.CategoricalProbs, dist.CategoricalLogits)


@register_family
class Mixture(Distribution):
    """A mixture of distributions of any families over one event space, all discrete or all continuous.

    Args:
        probs: weights, shape (*batch, components).
        components: distributions with batch shape `batch`.

    >>> d = Mixture(np.array([0.3, 0.7]), [dist.Normal(0.0, 1.0), dist.Laplace(2.0, 1.0)])
    >>> round(float(d.mean), 4)
    1.4
    """

    arg_constraints = {"probs": constraints.simplex}
    pytree_data_fields = ("components", "probs")

    def __init__(self, probs: Any, components: Sequence[Distribution], *, validate_args: bool | None = None):
        self.components = tuple(components)
        if np.shape(probs)[-1] != len(self.components):
            raise InputError(f"{np.shape(probs)[-1]} weights for {len(self.components)} components")
        if len({c.is_discrete for c in self.components}) > 1 or len({c.event_shape for c in self.components}) > 1:
            raise InputError("a mixture needs components over one space, all discrete or all continuous")
        batch = np.broadcast_shapes(np.shape(probs)[:-1], *[c.batch_shape for c in self.components])
        self.probs = probs
        super().__init__(batch, self.components[0].event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        """The support of the first component, or the reals when components differ."""
        supports = [c.support for c in self.components]
        same = all(type(s) is type(supports[0]) for s in supports)
        return supports[0] if same else constraints.real

    @property
    def is_discrete(self) -> bool:
        return self.components[0].is_discrete

    def parts(self) -> tuple:
        """Arrays with their event ranks, components, and no settings (see `register_family`)."""
        expanded = tuple(_expand(c, self.batch_shape) for c in self.components)
        return {"probs": (self.probs, 1)}, expanded, ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> Mixture:
        """Rebuild from parts."""
        return cls(arrays["probs"], children)

    def _each(self, function: Any) -> Any:
        values = [function(c) for c in self.components]
        return backend(*values, self.probs).stack(values, -1)

    def log_prob(self, value: Any) -> Any:
        inside = self._each(lambda c: log_density(c, value))
        xp = backend(inside, self.probs)
        with np.errstate(divide="ignore"):
            return logsumexp(xp, xp.log(self.probs) + inside)

    def cdf(self, value: Any) -> Any:
        return (self.probs * self._each(lambda c: cumulative(c, value))).sum(-1)

    def moments(self) -> tuple[Any, Any]:
        """Mean and variance."""
        each = [moments(c) for c in self.components]
        shape = (*self.batch_shape, *self.event_shape)
        xp = backend(self.probs, *[a for pair in each for a in pair])
        means, variances = (xp.stack([xp.broadcast_to(pair[i], shape) for pair in each], -1) for i in (0, 1))
        probs = xp.asarray(self.probs)[(..., *[None] * len(self.event_shape), slice(None))]
        center = (probs * means).sum(-1)
        return center, (probs * (variances + xp.square(means - center[..., None]))).sum(-1)

    @property
    def mean(self) -> Any:
        return self.moments()[0]

    @property
    def variance(self) -> Any:
        return self.moments()[1]

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        which, *keys = jax.random.split(key, 1 + len(self.components))
        shape = (*sample_shape, *self.batch_shape)
        index = jax.random.categorical(which, jnp.log(self.probs), shape=shape)
        draws = [
            _expand(c, self.batch_shape).sample(k, sample_shape) for c, k in zip(self.components, keys, strict=True)
        ]
        stacked = jnp.stack(draws, axis=-1)
        index = index.reshape(*shape, *[1] * (len(self.event_shape) + 1))
        return jnp.take_along_axis(stacked, index, axis=-1)[..., 0]


@register_family
class Members(Distribution):
    """Distributions of several families side by side along a leading member axis.

    Args:
        groups: distributions with batch shapes (members_i, rows); the whole has (sum of members_i, rows).

    >>> d = Members([dist.Normal(np.zeros((2, 3)), 1.0), dist.Laplace(np.ones((1, 3)), 1.0)])
    >>> d.batch_shape, d.mean[:, 0].tolist()
    ((3, 3), [0.0, 0.0, 1.0])
    """

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("groups",)

    def __init__(self, groups: Sequence[Distribution], *, validate_args: bool | None = None):
        self.groups = tuple(groups)
        count = sum(g.batch_shape[0] for g in self.groups)
        first = self.groups[0]
        super().__init__((count, *first.batch_shape[1:]), first.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        """The reals: groups differ."""
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def is_discrete(self) -> bool:
        return self.groups[0].is_discrete

    def parts(self) -> tuple:
        """See `register_family`."""
        return {}, self.groups, ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> Members:
        """Rebuild from parts."""
        return cls(children)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Members:
        """Members whose rows are one event."""
        return Members([g.to_event(reinterpreted_batch_ndims) for g in self.groups])

    def log_prob(self, value: Any) -> Array:
        rank, shape = len(self.shape()), np.broadcast_shapes(np.shape(value), self.shape())
        edges = np.cumsum([g.batch_shape[0] for g in self.groups])[:-1]
        values = jnp.split(jnp.broadcast_to(value, shape), edges, axis=-rank)
        densities = [g.log_prob(v) for g, v in zip(self.groups, values, strict=True)]
        return jnp.concatenate(densities, axis=-len(self.batch_shape))

    @property
    def mean(self) -> Array:
        return jnp.concatenate([jnp.broadcast_to(g.mean, g.shape()) for g in self.groups])

    @property
    def variance(self) -> Array:
        return jnp.concatenate([jnp.broadcast_to(g.variance, g.shape()) for g in self.groups])

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        keys = jax.random.split(key, len(self.groups))
        draws = [g.sample(k, sample_shape) for g, k in zip(self.groups, keys, strict=True)]
        return jnp.concatenate(draws, axis=len(sample_shape))


def side_by_side(distributions: Sequence[Distribution]) -> Distribution:
    """Join distributions of batch shape (members_i, rows) along the member axis. Categoricals stay Categorical."""
    if all(isinstance(d, _CATEGORICAL) for d in distributions):
        return build(dist.CategoricalProbs, probs=np.concatenate([np.asarray(d.probs) for d in distributions]))
    return Members(distributions) if len(distributions) > 1 else distributions[0]


def member_moments(distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every member, each of shape (members, rows)."""
    if isinstance(distribution, Members):
        each = [member_moments(g) for g in distribution.groups]
        return np.concatenate([m for m, _ in each]), np.concatenate([v for _, v in each])
    swapped = put_together(jax.tree.map(lambda a: np.swapaxes(np.asarray(a), 0, 1), take_apart(distribution)))
    mean, variance = mean_and_variance(swapped)
    return mean.T, variance.T


def _expand(distribution: Distribution, batch: tuple[int, ...]) -> Distribution:
    return distribution if distribution.batch_shape == batch else distribution.expand(batch)


def mix(distributions: Sequence[Distribution], weights: Float[Array, " components"]) -> Distribution:
    """The mixture of several distributions. Categoricals stay Categorical.

    >>> a, b = dist.Categorical(np.array([1.0, 0.0])), dist.Categorical(np.array([0.0, 1.0]))
    >>> d = mix([a, b], np.array([0.25, 0.75]))
    >>> type(d).__name__, d.probs.tolist()
    ('CategoricalProbs', [0.25, 0.75])
    """
    if len(distributions) == 1:
        return distributions[0]
    if all(isinstance(d, _CATEGORICAL) for d in distributions):
        probs = sum(w * d.probs for w, d in zip(weights, distributions, strict=True))
        return build(dist.CategoricalProbs, probs=probs)
    return Mixture(weights, distributions)


def mix_members(distribution: Distribution, weights: Float[Array, " members"]) -> Distribution:
    """Mix over the leading batch axis: batch shape (members, rows) becomes (rows,).

    >>> d = mix_members(dist.Normal(np.array([[0.0, 0.0], [2.0, 4.0]]), 1.0), np.array([0.5, 0.5]))
    >>> d.mean.tolist()
    [1.0, 2.0]
    """
    if isinstance(distribution, Members):
        edges = np.cumsum([0, *(g.batch_shape[0] for g in distribution.groups)])
        shares = [weights[a:b] for a, b in itertools.pairwise(edges)]
        # A group may weigh nothing.
        mixed = [
            mix_members(g, w / backend(w).maximum(w.sum(), 1e-30))
            for g, w in zip(distribution.groups, shares, strict=True)
        ]
        return mix(mixed, np.array([w.sum() for w in shares]))
    if distribution.batch_shape[0] == 1:
        return put_together(jax.tree.map(lambda a: a[0], take_apart(distribution)))
    if isinstance(distribution, _CATEGORICAL):
        return build(dist.CategoricalProbs, probs=(weights[:, None, None] * distribution.probs).sum(0))
    parts = take_apart(distribution)
    last = len(distribution.batch_shape) - 1
    moved = jax.tree.map(lambda a: (jnp if isinstance(a, jax.Array) else np).moveaxis(a, 0, last), parts)
    mixing = build(dist.CategoricalProbs, probs=weights)
    return build(dist.MixtureSameFamily, mixing_distribution=mixing, component_distribution=put_together(moved))
