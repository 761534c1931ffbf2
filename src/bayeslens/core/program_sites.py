"""The sites of a NumPyro program, seen by running it abstractly: nothing is compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.structure import Structure

NEEDS_CONCRETE_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class LatentSite(NamedTuple):
    """A latent site of a model, as its trace shows it.

    Attributes:
        name: of the site.
        shape: of its value.
        family: name of its distribution's class, such as `"Normal"`.
        discrete: whether its values are.
        support_size: how many values an entry can take, None where they are infinitely many.
        proper: whether its prior can be drawn from.
        support: of an entry: "real", "positive", "unit" (interval), "simplex", "finite", or "" for others.
    """

    name: str
    shape: tuple[int, ...]
    family: str
    discrete: bool
    support_size: int | None
    proper: bool
    support: str


def check_data(model: Callable, data: dict[str, Any]) -> None:
    """Refuse data that are no arguments of the program, or hold NaN.

    Args:
        model: the program.
        data: its arguments by name.

    Raises:
        InputError: names that are unknown or lacking, or NaN.
    """
    if not isinstance(data, dict):
        raise InputError(f"data is a dict of the model's arguments by name, got {type(data).__name__}")
    parameters = inspect.signature(model).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise InputError(f"the model has no arguments {unknown}; it has {known}")
    lacking = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    lacking = [name for name in lacking if name not in data]
    if lacking:
        raise InputError(f"the model needs the arguments {lacking}: give them in data")
    for name, value in data.items():
        array = np.asarray(value) if not callable(value) else np.zeros(())
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise InputError(f"data {name!r} holds {int(np.isnan(array).sum())} NaN: drop or model missing values")


class Sites(NamedTuple):
    """The sites of a program.

    Attributes:
        latents: in the order of the program.
        observed: names of the observed ones, factors included.
        structure: names and unconstrained shapes of the continuous latents.
        subsampled: names of the plates that take a part of the data.
        deterministic: names of the deterministic sites.
    """

    latents: tuple[LatentSite, ...]
    observed: tuple[str, ...]
    structure: Structure
    subsampled: tuple[str, ...]
    deterministic: tuple[str, ...]


def look_through(model: Callable, data: dict[str, Any]) -> Sites:
    """The sites of a program, from an abstract run; a failure names the site."""
    from numpyro import handlers
    from numpyro.primitives import Messenger

    class Watch(Messenger):
        last, seen = "the first site", None

        def process_message(self, message: dict[str, Any]) -> None:
            if message["type"] == "sample":
                self.last = repr(message["name"])

    watch = Watch()

    def run(key: Any, data: dict[str, Any]) -> list[Any]:
        somewhere = handlers.substitute(substitute_fn=feasible)
        with watch, handlers.trace() as trace, handlers.seed(rng_seed=key), somewhere:
            model(**data)
        samples = {n: s for n, s in trace.items() if s["type"] == "sample"}
        for name, site in samples.items():
            watch.last = repr(name)
            _check_shapes(site)
        latents = tuple(_latent(s) for s in samples.values() if not s["is_observed"])
        shapes = {s.name: _unconstrained_shape(samples[s.name]) for s in latents if not s.discrete}
        plates = [s for s in trace.values() if s["type"] == "plate"]
        watch.seen = Sites(
            latents,
            tuple(n for n, s in samples.items() if s["is_observed"]),
            Structure(tuple(shapes), tuple(shapes.values())),
            tuple(s["name"] for s in plates if s["args"][1] is not None and s["args"][1] < s["args"][0]),
            tuple(n for n, s in trace.items() if s["type"] == "deterministic"),
        )
        return []

    try:
        try:
            jax.eval_shape(lambda key: run(key, data), jax.random.key(0))
        except jax.errors.TracerArrayConversionError:  # NumPy arrays cannot be indexed by a draw
            converted = {
                n: jnp.asarray(v) if isinstance(v, np.ndarray) and is_numeric(v) else v for n, v in data.items()
            }
            jax.eval_shape(lambda key: run(key, converted), jax.random.key(0))
    except InputError:
        raise
    except NEEDS_CONCRETE_VALUES as error:
        raise InputError(
            f"the model looks at the value of a latent, at or after {watch.last}: a program for every value is needed; "
            f"use jnp.where or numpyro.contrib.control_flow.cond instead of `if` ({type(error).__name__})"
        ) from error
    except Exception as error:
        raise InputError(
            f"the model failed on these data, at or after {watch.last}: {type(error).__name__}: {error}"
        ) from error
    return watch.seen


def feasible(site: dict[str, Any]) -> Any:
    """Some value of a site that cannot be drawn."""
    if site["type"] != "sample" or family_of(site["fn"]) != "ImproperUniform":
        return None
    from numpyro.distributions import biject_to

    transform = biject_to(site["fn"].support)
    return transform(jnp.zeros(transform.inverse_shape(site["fn"].shape())))


def _check_shapes(site: dict[str, Any]) -> None:
    """An observation that a distribution would silently repeat, or be repeated for, is a mistake."""
    if not site["is_observed"] or family_of(site["fn"]) == "Unit":
        return
    value, expected = jnp.shape(site["value"]), tuple(site["fn"].shape())
    if value != expected and value != () and np.broadcast_shapes(value, expected) not in (value, expected):
        raise ValueError(f"the observation has shape {value}, its distribution {expected}")


def _latent(site: dict[str, Any]) -> LatentSite:
    distribution = site["fn"]
    return LatentSite(
        site["name"],
        tuple(jnp.shape(site["value"])),
        family_of(distribution),
        bool(distribution.is_discrete),
        _support_size(distribution),
        family_of(distribution) not in ("ImproperUniform", "Unit"),
        _support(distribution),
    )


def _support(distribution: Any) -> str:
    """The kind of support, as far as engines look at it."""
    from numpyro.distributions import constraints

    if distribution.is_discrete:
        return "finite" if _support_size(distribution) is not None else ""
    support = distribution.support
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    if support is constraints.real or support is constraints.real_vector:
        return "real"
    if support is constraints.positive or support is constraints.nonnegative:
        return "positive"
    if support is constraints.simplex:
        return "simplex"
    bounds = [getattr(support, b, None) for b in ("lower_bound", "upper_bound")]
    # Bounds that are drawn themselves have no value here.
    known = all(isinstance(b, int | float) or (is_array(b) and not isinstance(b, jax.core.Tracer)) for b in bounds)
    return "unit" if known and all(np.all(np.asarray(b) == v) for b, v in zip(bounds, (0, 1), strict=True)) else ""


def family_of(distribution: Any) -> str:
    """The class of a distribution, without what only changes its shape."""
    base = distribution
    while type(base).__name__ in ("ExpandedDistribution", "Independent", "MaskedDistribution"):
        base = base.base_dist
    return type(base).__name__.removesuffix("Probs").removesuffix("Logits")


def _support_size(distribution: Any) -> int | None:
    if not (distribution.is_discrete and getattr(distribution, "has_enumerate_support", False)):
        return None
    try:
        return int(distribution.enumerate_support(expand=False).shape[0])
    except NotImplementedError:
        return None


def _unconstrained_shape(site: dict[str, Any]) -> tuple[int, ...]:
    from numpyro.distributions import biject_to

    try:
        return tuple(biject_to(site["fn"].support).inverse_shape(jnp.shape(site["value"])))
    except NotImplementedError:
        raise InputError(
            f"the support of {site['name']!r} ({site['fn'].support}) has no map to real numbers: "
            "reparameterize the site (numpyro.handlers.reparam)"
        ) from None


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy or JAX."""
    return isinstance(value, np.ndarray | jax.Array)


def is_numeric(value: Any) -> bool:
    """Whether an array holds numbers."""
    return np.asarray(value).dtype.kind in "fiub"
