"""Densities given by networks, as NumPyro distributions: the one adapter, and its conditional form.

An Equinox module has functions among its leaves, so that a distribution holding it cannot pass `jax.jit` or `scan`.
Here a network's arrays are the distribution's data and all else is static; leading axes of arrays are batch axes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.util import validate_sample

from bayeslens.core.distribution import register_family
from bayeslens.core.errors import InputError
from bayeslens.core.kernel import Kernel

_INEXACT = ("log_prob_bound", "log_prob_estimate", "energy")


def over_leading_axes(function: Callable, *ndims: int, result_ndim: int = 0) -> Callable:
    """The function of one example, for arrays with any leading axes, which broadcast.

    Args:
        function: takes arrays, the i-th with `ndims[i]` axes, and returns one with `result_ndim`.

    >>> over_leading_axes(jnp.dot, 1, 1)(jnp.ones((4, 1, 3)), jnp.ones((2, 3))).shape
    (4, 2)
    """
    names = [",".join(f"a{i}_{j}" for j in range(ndim)) for i, ndim in enumerate(ndims)]
    result = ",".join(f"r{j}" for j in range(result_ndim))
    return jnp.vectorize(function, signature=f"{','.join(f'({n})' for n in names)}->({result})")


class _Shared:
    """A network that all rows share: equal only to itself, so that it can be a static setting."""

    def __init__(self, network: Any):
        self.network = network


@eqx.filter_jit
def _evaluate(
    method: str, static: Any, arrays: Any, condition: Any, names: tuple[str, ...], ndims: tuple[int, ...],
    result_ndim: int, inputs: list[Array],
) -> Array:  # fmt: skip
    """A network's method over all batch axes, in one program: networks are slow when run operation by operation."""
    leaves, structure = jax.tree.flatten(arrays)
    given = [] if condition is None else [condition]

    def one(*values: Array) -> Array:
        network = eqx.combine(structure.unflatten(values[: len(leaves)]), static)
        arguments = dict(zip(names, values[len(leaves) + len(given) :], strict=True))
        if given:
            arguments["condition"] = values[len(leaves)]
        # The first input goes by position: networks name it as they like.
        return getattr(network, method)(arguments.pop(names[0]), **arguments)

    return over_leading_axes(one, *ndims, result_ndim=result_ndim)(*leaves, *given, *inputs)


@register_family
class Density(Distribution):
    """The density of a network.

    The network is an Equinox module for ONE example: `sample(key)`, and `log_prob(x)` if its density is exact;
    otherwise any of `log_prob_bound(x, key=key)`, `log_prob_estimate(x, key=key)` and `energy(x)`. Where it is
    conditional, each takes `condition` as well. Flows of flowjax are such modules.

    Args:
        network: as above; its arrays may have leading batch axes, if `network_ndims` says how many axes are its own.
        condition: what is given, shape (*batch, ...), or None.
        event_shape: of one x; by default the network's own `shape`.
        condition_ndim: axes of one condition.
        support: a NumPyro constraint; by default all reals.
        batch_shape: a larger batch shape than the arrays have.

    Raises:
        InputError: an event shape that is not known, a condition with too few axes; and from `log_prob` where there
            is no exact density.

    >>> class Shifted(eqx.Module):
    ...     center: jax.Array
    ...     shape = ()
    ...     def log_prob(self, x):
    ...         return jax.scipy.stats.norm.logpdf(x - self.center)
    ...     def sample(self, key):
    ...         return self.center + jax.random.normal(key)
    >>> d = Density(Shifted(jnp.array(2.0)))
    >>> round(float(d.log_prob(2.0)), 4), d.sample(jax.random.key(0), (5,)).shape
    (-0.9189, (5,))
    """

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("arrays", "condition")
    pytree_aux_fields = ("static", "condition_ndim", "network_ndims", "_ndims", "_support")

    def __init__(
        self,
        network: Any,
        condition: Any = None,
        *,
        event_shape: tuple[int, ...] | None = None,
        condition_ndim: int = 1,
        support: Any = None,
        network_ndims: tuple[int, ...] | None = None,
        batch_shape: tuple[int, ...] = (),
        validate_args: bool | None = None,
    ):
        event_shape = getattr(network, "shape", None) if event_shape is None else event_shape
        if event_shape is None:
            raise InputError(f"give the event_shape of the {type(network).__name__}, which has no attribute shape")
        self.arrays, self.static = eqx.partition(network, eqx.is_array)
        leaves = jax.tree.leaves(self.arrays)
        # Axes that belong to the network itself: what stands before them is batch.
        self.network_ndims = tuple(a.ndim for a in leaves) if network_ndims is None else tuple(network_ndims)
        self.condition = None if condition is None else jnp.asarray(condition)
        self.condition_ndim = condition_ndim
        if condition is not None and self.condition.ndim < condition_ndim:
            raise InputError(
                f"a condition has {condition_ndim} axes and batch axes before them, got {self.condition.shape}"
            )
        self._support = support
        self._ndims = tuple(a.ndim for a in self._batched())
        shapes = [a.shape[: a.ndim - n] for a, n in zip(self._batched(), self._own_ndims(), strict=True)]
        batch_shape = np.broadcast_shapes(tuple(batch_shape), *shapes)
        super().__init__(batch_shape, tuple(event_shape), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """All reals, unless another one was given."""
        if self._support is not None:
            return self._support
        return constraints.independent(constraints.real, self.event_dim) if self.event_dim else constraints.real

    @property
    def network(self) -> Any:
        """The Equinox module."""
        return eqx.combine(self.arrays, self.static)

    def _batched(self) -> list[Array]:
        return [*jax.tree.leaves(self.arrays), *([] if self.condition is None else [self.condition])]

    def _own_ndims(self) -> tuple[int, ...]:
        return self.network_ndims if self.condition is None else (*self.network_ndims, self.condition_ndim)

    def _call(self, method: str, *inputs: tuple[str, Any, int], result_ndim: int = 0) -> Array:
        """A method of the network, over all batch axes. Inputs are (name, array, own axes); `x` and `key` first."""
        names, ndims = tuple(name for name, *_ in inputs), (*self._own_ndims(), *(ndim for *_, ndim in inputs))
        return _evaluate(method, self.static, self.arrays, self.condition, names, ndims, result_ndim,
                         [array for _, array, _ in inputs])  # fmt: skip

    def _at(self, method: str, x: Any, key: Array | None = None) -> Array:
        if not hasattr(self.static, method):
            offered = [m for m in ("log_prob", *_INEXACT) if hasattr(self.static, m)]
            raise InputError(
                f"a {type(self.static).__name__} has no {'exact ' * (method == 'log_prob')}{method}; it offers "
                f"{' and '.join(offered) if offered else 'samples only'}"
            )
        x = jnp.asarray(x)
        shape = np.broadcast_shapes(x.shape[: x.ndim - self.event_dim], self.batch_shape)
        inputs = [("x", x, self.event_dim)]
        if key is not None:
            keys = jax.random.split(key, shape)
            inputs.append(("key", keys, keys.ndim - len(shape)))
        return jnp.broadcast_to(self._call(method, *inputs), shape)

    @validate_sample
    def log_prob(self, value: Any) -> Float[Array, "*batch"]:
        """Exact log density."""
        return self._at("log_prob", value)

    def log_prob_bound(self, x: Any, *, key: Array) -> Float[Array, "*batch"]:
        """A random lower bound, in expectation, of the log density."""
        return self._at("log_prob_bound", x, key)

    def log_prob_estimate(self, x: Any, *, key: Array) -> Float[Array, "*batch"]:
        """A random estimate of the log density."""
        return self._at("log_prob_estimate", x, key)

    def energy(self, x: Any) -> Float[Array, "*batch"]:
        """The negative log density up to a constant."""
        return self._at("energy", x)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (*sample_shape, *self.batch_shape)
        keys = jax.random.split(key, shape)
        return self._call("sample", ("key", keys, keys.ndim - len(shape)), result_ndim=self.event_dim)

    def expand(self, batch_shape: tuple[int, ...]) -> Density:
        """The same density with a larger batch shape; nothing is copied."""
        try:
            fits = np.broadcast_shapes(self.batch_shape, tuple(batch_shape)) == tuple(batch_shape)
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"a batch of shape {self.batch_shape} cannot be expanded to {tuple(batch_shape)}")
        expanded = copy.copy(self)
        expanded._batch_shape = tuple(batch_shape)
        return expanded

    def parts(self) -> tuple:
        """See `register_family`. A network without batch axes is shared by all rows, and is not copied for each."""
        leaves, ndims = jax.tree.leaves(self.arrays), self.network_ndims
        arrays = {"batch": (np.zeros(self.batch_shape, np.int8), 0)}
        if self.condition is not None:
            arrays["condition"] = (self.condition, self.condition_ndim)
        traced = any(isinstance(a, jax.core.Tracer) for a in leaves)
        if traced or tuple(a.ndim for a in leaves) != ndims:
            arrays |= {f"network.{i:04d}": (a, n) for i, (a, n) in enumerate(zip(leaves, ndims, strict=True))}
            network: Any = (self.static, jax.tree.structure(self.arrays))
        else:
            network = self.__dict__.setdefault("_shared", _Shared(self.network))
        return arrays, (), (network, self.event_shape, self.condition_ndim, self._support, ndims)

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> Density:
        """Rebuild from parts."""
        network, event_shape, condition_ndim, support, ndims = settings
        shared = network if isinstance(network, _Shared) else None
        if shared is None:
            static, structure = network
            leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays) if name.startswith("network.")]
            network = eqx.combine(structure.unflatten(leaves), static)
        density = cls(
            network if shared is None else shared.network,
            arrays.get("condition"),
            event_shape=event_shape,
            condition_ndim=condition_ndim,
            support=support,
            network_ndims=ndims,
            batch_shape=np.shape(arrays["batch"]),
            validate_args=False,
        )
        if shared is not None:
            density._shared = shared
        return density

    def saved_fields(self) -> dict[str, Any]:
        """The arguments that make this density again: what `save` stores."""
        if self._support is not None:
            raise InputError("a Density with a support of its own cannot be saved: leave its support out")
        return {
            "network": self.network,
            "condition": self.condition,
            "event_shape": self.event_shape,
            "condition_ndim": self.condition_ndim,
            "network_ndims": self.network_ndims,
            "batch_shape": self.batch_shape,
        }


@promote_batch_shape.register
def _promote(density: Density) -> Density:
    """New leading axes, as `vmap` leaves them, become batch axes."""
    arrays, rank = density._batched(), len(density.batch_shape)
    added = max((a.ndim - n for a, n in zip(arrays, density._ndims, strict=True)), default=0)
    if added == 0:
        return density
    lifted, shapes = [], []
    for array, ndim, own in zip(arrays, density._ndims, density._own_ndims(), strict=True):
        if array.ndim > ndim:
            shapes.append(array.shape[:added])
            between = rank - (ndim - own)
            array = array.reshape(*array.shape[:added], *[1] * between, *array.shape[added:])
        lifted.append(array)
    promoted = copy.copy(density)
    promoted.__dict__.pop("_shared", None)
    structure = jax.tree.structure(density.arrays)
    promoted.arrays = structure.unflatten(lifted[: len(density.network_ndims)])
    promoted.condition = None if density.condition is None else lifted[-1]
    promoted._ndims = tuple(a.ndim for a in lifted)
    promoted._batch_shape = (*np.broadcast_shapes(*shapes), *density.batch_shape)
    return promoted


class ConditionalDensity(Kernel):
    """p(y given x) by a network that takes a condition.

    Args:
        network: as `Density` wants it, with `condition` in its methods.
        embed: a network for one x, whose result is the condition; None conditions on x itself.
        x_ndim: axes of one x; the axes before them are batch axes.
        event_shape: of one y; by default the network's own `shape`.
        condition_ndim: axes of one condition; 1.

    Source: the form is that of conditional normalizing flows (Winkler, Worrall, Hoogeboom and Welling 2019).
    """

    network: Any
    embed: Any = None
    x_ndim: int = eqx.field(static=True, default=1)
    event_shape: tuple[int, ...] | None = eqx.field(static=True, default=None)
    condition_ndim: int = eqx.field(static=True, default=1)

    def __call__(self, x: Any) -> Density:
        """The density of y for every x; x's leading axes are the batch shape.

        Raises:
            InputError: x has too few axes.
        """
        x = jnp.asarray(x)
        if x.ndim < self.x_ndim:
            raise InputError(f"x needs {self.x_ndim} axes of its own, after any batch axes; got shape {x.shape}")
        condition = x
        if self.embed is not None:
            condition = over_leading_axes(self.embed, self.x_ndim, result_ndim=self.condition_ndim)(x)
        return Density(self.network, condition, event_shape=self.event_shape, condition_ndim=self.condition_ndim)
