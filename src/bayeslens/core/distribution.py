"""Taking NumPyro distributions apart by name, and evaluating them row by row in compiled, padded calls.

A distribution taken apart is a `Parts`: its family's name and its arrays, every array with the full batch
shape. Parts can be indexed, joined, padded, saved and handed to `jax.jit`, whatever the family; leaf order is
by name, so that it never depends on the interpreter's hash seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Int
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError

FAMILIES: dict[str, type] = {}  # families of this library, by registered name

_NUMPYRO = {
    family.__name__: family
    for family in (
        dist.Normal, dist.LogNormal, dist.StudentT, dist.Laplace, dist.Logistic, dist.Cauchy, dist.Gumbel,
        dist.HalfNormal, dist.Gamma, dist.InverseGamma, dist.Beta, dist.Exponential, dist.Uniform, dist.Weibull,
        dist.Poisson, dist.NegativeBinomial2, dist.GammaPoisson, dist.BernoulliProbs, dist.BernoulliLogits,
        dist.CategoricalProbs, dist.CategoricalLogits, dist.Dirichlet, dist.MultivariateNormal, dist.Delta,
        dist.MultivariateStudentT,
    )
}  # fmt: skip
# Families with alternative parameters: the ones that rebuild them.
_ARGUMENTS = {"MultivariateNormal": ("loc", "scale_tril")}


class Parts(eqx.Module):
    """A distribution taken apart: family, arrays by name (batch axes first), nested parts, static settings."""

    family: str = eqx.field(static=True)
    arrays: dict[str, Any]
    children: tuple[Parts, ...] = ()
    settings: tuple = eqx.field(static=True, default=())


def register_family(cls: type) -> type:
    """Make a family of this library known to `take_apart` and `put_together`, under its class name.

    The class has `parts(self) -> (arrays, children, settings)` and a classmethod
    `from_parts(arrays, children, settings)`.
    """
    FAMILIES[cls.__name__] = cls
    return cls


def _broadcast(value: Any, shape: tuple[int, ...]) -> Any:
    return jnp.broadcast_to(value, shape) if isinstance(value, jax.Array) else np.broadcast_to(value, shape)


def take_apart(distribution: Distribution) -> Parts:
    """The parts of a distribution.

    >>> sorted(take_apart(dist.StudentT(np.full(3, 4.0), 0.0, 1.0)).arrays)
    ['df', 'loc', 'scale']

    Raises:
        InputError: the family is unknown.
    """
    name = type(distribution).__name__
    batch = distribution.batch_shape
    if FAMILIES.get(name) is type(distribution):
        arrays, children, settings = distribution.parts()
        arrays = {k: _broadcast(v, (*batch, *np.shape(v)[-e:]) if e else batch) for k, (v, e) in arrays.items()}
        return Parts(name, arrays, tuple(take_apart(c) for c in children), settings)
    if isinstance(distribution, dist.Independent):
        return Parts(
            "Independent", {}, (take_apart(distribution.base_dist),), (distribution.reinterpreted_batch_ndims,)
        )
    if isinstance(distribution, dist.ExpandedDistribution):
        rank = len(distribution.base_dist.batch_shape)
        return jax.tree.map(
            lambda a: _broadcast(a.reshape(*[1] * (len(batch) - rank), *a.shape), (*batch, *a.shape[rank:])),
            take_apart(distribution.base_dist),
        )
    if isinstance(distribution, dist.Delta):  # its parameters' event rank is that of each instance
        event = distribution.event_shape
        arrays = {"v": (distribution.v, event), "log_density": (distribution.log_density, ())}
        return Parts(name, {k: _broadcast(a, (*batch, *e)) for k, (a, e) in arrays.items()}, (), (len(event),))
    if isinstance(distribution, dist.MixtureSameFamily):
        probs = distribution.mixing_distribution.probs
        arrays = {"probs": _broadcast(probs, (*batch, np.shape(probs)[-1]))}
        components = distribution.component_distribution
        return Parts(
            name,
            arrays,
            (
                take_apart(
                    components.expand(np.broadcast_shapes(components.batch_shape, (*batch, 1)))
                    if components.batch_shape[:-1] != batch
                    else components
                ),
            ),
        )
    if _NUMPYRO.get(name) is not type(distribution):
        raise InputError(
            f"a {name} cannot be taken apart: use one of {', '.join(sorted(_NUMPYRO))}, a mixture of these, "
            "or a family registered with `bayeslens.core.register_family`"
        )
    arrays = {}
    for argument in _ARGUMENTS.get(name, tuple(distribution.arg_constraints)):
        value, event_dim = getattr(distribution, argument), distribution.arg_constraints[argument].event_dim
        event = np.shape(value)[np.ndim(value) - event_dim :] if event_dim else ()
        arrays[argument] = _broadcast(value, (*batch, *event))
    return Parts(name, arrays)


def put_together(parts: Parts) -> Distribution:
    """The distribution that `take_apart` took apart.

    >>> d = put_together(take_apart(dist.Laplace(np.zeros(2), 3.0)))
    >>> type(d).__name__, d.scale.tolist()
    ('Laplace', [3.0, 3.0])
    """
    children = [put_together(child) for child in parts.children]
    if parts.family == "Independent":
        return dist.Independent(children[0], parts.settings[0])
    if parts.family == "MixtureSameFamily":
        weights = build(dist.CategoricalProbs, probs=parts.arrays["probs"])
        return build(dist.MixtureSameFamily, mixing_distribution=weights, component_distribution=children[0])
    if parts.family == "Delta":
        return build(dist.Delta, **parts.arrays, event_dim=parts.settings[0])
    if parts.family in FAMILIES:
        return FAMILIES[parts.family].from_parts(parts.arrays, children, parts.settings)
    if parts.family not in _NUMPYRO:
        raise InputError(f"unknown distribution family {parts.family!r}; was it made by a newer bayeslens?")
    return build(_NUMPYRO[parts.family], **parts.arrays)


def build(family: type[Distribution], **parameters: Any) -> Distribution:
    """A distribution whose parameters are known to be right.

    NumPyro's check of arguments compiles a small program per shape, even for NumPy arrays.

    >>> build(dist.Normal, loc=np.zeros(3), scale=np.ones(3)).batch_shape
    (3,)
    """
    from numpyro import validation_enabled

    with validation_enabled(False):
        return family(**parameters)


def take_rows(distribution: Distribution, rows: Int[Array, " taken"] | slice) -> Distribution:
    """The distribution of some rows: entries of the first batch axis.

    >>> take_rows(dist.Normal(np.arange(4.0), 1.0), np.array([3, 1])).loc.tolist()
    [3.0, 1.0]
    """
    return put_together(jax.tree.map(lambda a: a[rows], take_apart(distribution)))


def concatenate(distributions: Sequence[Distribution]) -> Distribution:
    """Join distributions of one family along their rows.

    Raises:
        InputError: they are of different families or different numbers of components.
    """
    parts = [take_apart(d) for d in distributions]
    structures = {str(jax.tree.structure(p)) for p in parts}
    if len(structures) > 1:
        raise InputError(f"cannot join rows of different families: {sorted({p.family for p in parts})}")
    return put_together(jax.tree.map(lambda *a: np.concatenate([np.asarray(x) for x in a]), *parts))


def bucket(rows: int) -> int:
    """The padded number of rows: the next of 32, 48, 64, 96, 128, …, so that few programs serve every size.

    >>> [bucket(n) for n in (3, 33, 88, 100)]
    [32, 48, 96, 128]
    """
    size = 32
    while size < rows:
        if size * 3 // 2 >= rows:
            return size * 3 // 2
        size *= 2
    return size


def pad_rows(array: Any, size: int) -> np.ndarray:
    """Repeat the last row until there are `size` rows: padding that is as valid as the data."""
    array = np.asarray(array)
    if array.shape[0] == size:
        return array
    return np.concatenate([array, np.broadcast_to(array[-1:], (size - array.shape[0], *array.shape[1:]))])


@functools.partial(jax.jit, static_argnums=0)
def _compiled(function: Callable, parts: Parts, arguments: tuple, shared: tuple) -> Any:
    return function(put_together(parts), *arguments, *shared)


def rowwise(
    function: Callable, distribution: Distribution, *arguments: Any, shared: tuple = (), chunk: int = 16384
) -> Any:
    """Evaluate `function(distribution, *arguments, *shared)` for all rows, compiled once per padded size.

    Args:
        function: a module-level function whose results all have rows as their first axis.
        distribution: batch shape (rows, ...).
        arguments: arrays whose first axis is rows.
        shared: arrays that all rows share.
        chunk: rows per call, which bounds the memory used.

    >>> rowwise(lambda d, y: d.log_prob(y), dist.Normal(np.zeros(5), 1.0), np.zeros(5)).shape
    (5,)
    """
    parts = take_apart(distribution)
    rows = distribution.batch_shape[0]
    results = []
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        size = bucket(stop - start)
        part, given = jax.tree.map(
            lambda a, start=start, stop=stop, size=size: pad_rows(np.asarray(a[start:stop], _dtype(a)), size),
            (parts, tuple(np.asarray(a) for a in arguments)),
        )
        result = _compiled(function, part, given, shared)
        results.append(jax.tree.map(lambda a, count=stop - start: np.asarray(a)[:count], result))
    return jax.tree.map(lambda *a: np.concatenate(a), *results)


def _dtype(array: Any) -> Any:
    kind = np.asarray(array[:0]).dtype
    return jax.dtypes.canonicalize_dtype(kind)
