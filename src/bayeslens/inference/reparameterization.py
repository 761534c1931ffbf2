"""Centred or not: how far each site of a hierarchical model is taken off its parents, by how much the data say of it.

Where the location or scale of a latent is a latent itself, chains walk in a funnel if the data say little of it and its
own value is the coordinate, and along a ridge if they say much and its standardized value is. Between the two lies
`value = location + scale^(1 - c) (x - c location)` with a weight c from 0 to 1 for each entry. The posterior of a
normal site has the least dependence on its parents at c = h scale^2 / (1 + h scale^2), where h is the precision that
all but its own prior has for it.

Source: O. Papaspiliopoulos, G. Roberts, M. Skold, "A general framework for the parametrization of hierarchical models"
(2007); M. Gorinova, D. Moore, M. Hoffman, "Automatic reparameterisation of probabilistic programs" (2020), who learn
the weights with a guide instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel, conditioned_model
from bayeslens.core.program_sites import family_of
from bayeslens.inference.enumeration import Marginalized
from bayeslens.inference.pathfinder import pathfinder_starts

_SHAPES: dict[str, tuple[str, ...]] = {"Normal": (), "StudentT": ("df",), "Cauchy": (), "Laplace": (), "Gumbel": ()}
_LOOKS = 4  # draws of a quick approximation at which the precisions are averaged
_SUFFIX = "_decentered"  # NumPyro's, of the sites that are sampled instead


def hierarchical_sites(conditioned: ConditionedModel) -> tuple[str, ...]:
    """The location-scale latents whose location or scale depends on other latents; nothing is compiled.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     level = numpyro.sample("level", dist.Normal(0.0, scale))
    ...     numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
    >>> hierarchical_sites(conditioned_model(model, {"y": 1.0}))
    ('level',)
    """
    names = [s.name for s in conditioned.continuous if s.family in _SHAPES]
    if not names or conditioned.subsampled or conditioned.discrete:
        return ()
    masked: set[str] = set()

    def parameters(vector: Array) -> list[tuple[Array, Array]]:
        trace = conditioned.trace(vector)
        masked.update(n for n in names if _is_masked(trace[n]["fn"]))
        return [_parameters(trace[n]) for n in names]

    traced = jax.make_jaxpr(parameters)(jnp.zeros(conditioned.dimension))
    moving = set(traced.jaxpr.invars)
    for equation in traced.jaxpr.eqns:
        if any(not hasattr(v, "val") and v in moving for v in equation.invars):
            moving.update(equation.outvars)
    outputs = [not hasattr(v, "val") and v in moving for v in traced.jaxpr.outvars]
    # The density of a site that depends on sites which were summed out is not its own.
    return tuple(
        n for n, pair in zip(names, np.reshape(outputs, (-1, 2)), strict=True) if pair.any() and n not in masked
    )


def reparameterize(model: Callable, data: dict[str, Any], *, key: Any) -> Callable:
    """The program with its hierarchical sites partly non-centred, each entry as far as the data ask for.

    The sites keep their names, as deterministic ones; what is sampled is called `NAME_decentered`.

    Args:
        model: a NumPyro program.
        data: its arguments by name.
        key: a `jax.random.key`, for the quick approximation at which the precisions are looked at.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     level = numpyro.sample("level", dist.Normal(0.0, scale))
    ...     numpyro.sample("y", dist.Normal(level, 100.0), obs=y)
    >>> changed = reparameterize(model, {"y": 1.0}, key=jax.random.key(0))
    >>> bool(changed.weights["level"] < 0.01)  # the data say nothing: non-centred
    True
    """
    return reparameterized(conditioned_model(model, data), key=key).model


def reparameterized(conditioned: ConditionedModel, *, key: Any) -> ConditionedModel:
    """What `reparameterize` does, for a program that has its data; the same object where there is nothing to do.

    Of a program without its finite sites (`marginalize`) the program itself is changed, and they are summed out again.
    """
    names = hierarchical_sites(conditioned)
    if not names:
        return conditioned
    model, data = conditioned.model, conditioned.given

    def changed(weights: dict[str, Any]) -> ConditionedModel:
        if isinstance(model, Marginalized):
            return conditioned_model(Marginalized(Reparameterized(model.model, weights)), data)
        return conditioned_model(Reparameterized(model, weights), data)

    apart = changed(dict.fromkeys(names, 0.0))
    vectors, _ = pathfinder_starts(apart, key, _LOOKS)
    return changed({n: np.asarray(v) for n, v in _weights(conditioned, apart, vectors, names).items()})


class Reparameterized:
    """A program some of whose sites are partly non-centred; `weights` are 1 for centred entries, 0 for others."""

    def __init__(self, model: Callable, weights: dict[str, Any]):
        functools.update_wrapper(self, model)
        self.model, self.weights = model, weights

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that are sampled instead."""
        return tuple(f"{name}{_SUFFIX}" for name in self.weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from numpyro import handlers
        from numpyro.infer.reparam import LocScaleReparam

        def config(site: dict[str, Any]) -> LocScaleReparam | None:
            if site["name"] not in self.weights:
                return None
            return LocScaleReparam(self.weights[site["name"]], _SHAPES[family_of(site["fn"])])

        return handlers.reparam(self.model, config=config)(*args, **kwargs)


def _is_masked(law: Any) -> bool:
    while type(law).__name__ in ("Independent", "ExpandedDistribution"):
        law = law.base_dist
    return type(law).__name__ == "MaskedDistribution"


def _parameters(site: dict[str, Any]) -> tuple[Array, Array]:
    base = site["fn"]
    while not hasattr(base, "loc"):
        base = base.base_dist
    return jnp.asarray(base.loc), jnp.asarray(base.scale)


@eqx.filter_jit
def _weights(
    conditioned: ConditionedModel, apart: ConditionedModel, vectors: Float[Array, "looks dimension"],
    names: tuple[str, ...],
) -> dict[str, Array]:  # fmt: skip
    def look(vector: Array) -> dict[str, Array]:
        found = apart.constrain(vector)
        center = conditioned.unconstrain({n: found[n] for n in conditioned.structure.names})
        trace, weights = conditioned.trace(center), {}
        values = conditioned.structure.unflatten(center)
        for name in names:
            shape, value = jnp.shape(values[name]), jnp.ravel(values[name])
            prior = trace[name]["fn"]

            def rest(x: Array, name: str = name, shape: tuple = shape, prior: Any = prior) -> Array:
                moved = conditioned.structure.flatten(values | {name: x.reshape(shape)})
                return conditioned.log_prob(moved) - jnp.sum(prior.log_prob(x.reshape(shape)))

            def curvature(unit: Array, rest: Callable = rest, value: Array = value) -> Array:
                # Reverse over reverse, since programs with differential equations have no forward derivative.
                _, pull = jax.vjp(jax.grad(rest), value)
                return -(pull(unit)[0] @ unit)

            precision = jax.lax.map(curvature, jnp.eye(value.size), batch_size=min(value.size, 64)).reshape(shape)
            known = jnp.maximum(precision, 0.0) * jnp.broadcast_to(_parameters(trace[name])[1], shape) ** 2
            weights[name] = jnp.where(jnp.isfinite(known), known / (1 + known), 1.0)
        return weights

    return jax.tree.map(lambda w: w.mean(0), jax.lax.map(look, vectors))
