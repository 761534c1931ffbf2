"""Latents that are Gaussian given the others, integrated out: the rest is sampled, and they are drawn exactly.

Which latents these are is proved from the traced program. Each is written as location + scale x standard normal, and
the log density of everything else must be a polynomial of degree two in the standard normals together, while the priors
of the others must not depend on them. So coefficients of a regression whose noise scale is unknown, group effects and
their mean, and the values of a Gaussian process are all found. What is left is their scales, without funnels: with the
standard normals u, l(u) the log density of the data, b its gradient and J its negated Hessian at zero,

    log p(rest, data) = log p(rest) + l(0) + b' (I + J)^-1 b / 2 - log |I + J| / 2.

Source: D. Bates, M. Machler, B. Bolker, S. Walker, "Fitting linear mixed-effects models using lme4" (2015), who
integrate standardized effects out likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.primitives import Messenger

from bayeslens.core.conditioned_model import PRIOR_FACTOR, ConditionedModel, conditioned_model, site_log_prob
from bayeslens.core.structure import Structure
from bayeslens.inference.polynomial_degree import polynomial_degrees

_FAMILIES = {"Normal", "MultivariateNormal", "GaussianRandomWalk"}
_LARGEST = 100  # entries: the Hessian is dense, and taken anew at each point
_FACTOR = "log_integral_over_gaussian_block"
_LOOKS = 3  # values of the other latents at which the density is compared with the Gaussian
_TOLERANCE = 1e-8  # of the log density, in double precision


class GaussianBlock(NamedTuple):
    """Latents that are Gaussian given the others, in coordinates in which single precision suffices.

    Attributes:
        structure: their names and shapes.
        center: standardized values about which the density is expanded, so that the terms are small.
        scaling: a lower triangle L: the coordinates are v with u = center + L'^-1 v, of precision near the identity.
    """

    structure: Structure
    center: np.ndarray
    scaling: np.ndarray

    def standardized(self, v: Float[Array, " size"]) -> dict[str, Array]:
        """Standard normals by site."""
        scaling = jnp.asarray(self.scaling, v.dtype)
        u = jnp.asarray(self.center, v.dtype) + jax.scipy.linalg.solve_triangular(scaling, v, lower=True, trans=1)
        return self.structure.unflatten(u)


def gaussian_sites(conditioned: ConditionedModel) -> tuple[str, ...]:
    """The latents in which together the log density is quadratic, given the others; nothing is compiled.

    Sites join from the last of the program to the first, since parents can join after their children only, as long as
    the density stays quadratic. Some latents must be left.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     level = numpyro.sample("level", dist.Normal(0.0, scale))
    ...     numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
    >>> gaussian_sites(conditioned_model(model, {"y": 1.0}))
    ('level',)
    """
    if conditioned.subsampled or conditioned.discrete or conditioned.plain_python:
        return ()
    values = {s.name: jax.ShapeDtypeStruct(s.shape, jnp.result_type(float)) for s in conditioned.latents}
    found: tuple[str, ...] = ()
    for site in reversed(conditioned.latents):
        if site.family not in _FAMILIES or site.support != "real":
            continue
        names = (site.name, *found)
        size = sum(int(np.prod(values[n].shape)) for n in names)
        if size <= _LARGEST and len(names) < len(values) and _is_quadratic(conditioned, values, names):
            found = names
    return found


def _is_quadratic(conditioned: ConditionedModel, values: dict[str, Any], names: tuple[str, ...]) -> bool:
    def densities(block: dict[str, Any], rest: dict[str, Any]) -> list[Array]:
        trace = _trace(conditioned.model, conditioned.arguments, rest, block)
        return [_log_density(trace, set(rest)), _log_density(trace, _others(trace, rest, block))]

    inside = {n: v for n, v in values.items() if n in names}
    others, data = polynomial_degrees(densities, inside, {n: v for n, v in values.items() if n not in names})
    return others == 0 and data <= 2


def _trace(
    model: Callable, arguments: dict[str, Any], rest: dict[str, Any], standardized: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The program's trace at values of the other latents and standard normals, whatever handlers are around."""
    from numpyro import handlers

    def value(site: dict[str, Any]) -> Any:
        if site["type"] != "sample" or site["name"] not in standardized:
            return None
        u, step = standardized[site["name"]], site["infer"].get("_scan_current_index")
        if step is not None and jnp.ndim(u) > len(site["fn"].shape()):
            u = u[step]  # in `scan`, a site holds the values of all steps
        return _scaled(site["fn"], u)

    program = handlers.substitute(handlers.substitute(model, substitute_fn=value), data=rest)
    with handlers.block():
        return handlers.trace(handlers.seed(program, jax.random.key(0))).get_trace(**arguments)


def _scaled(law: Any, u: Array) -> Array:
    """The value of a Gaussian distribution whose standardized value is u."""
    while type(law).__name__ in ("Independent", "ExpandedDistribution"):
        law = law.base_dist
    match type(law).__name__:
        case "Normal":
            return law.loc + law.scale * u
        case "MultivariateNormal":
            return law.loc + jnp.einsum("...ij,...j->...i", law.scale_tril, u)
        case _:
            return jnp.cumsum(jnp.expand_dims(law.scale, -1) * u, -1)


def _others(trace: dict[str, dict[str, Any]], rest: dict[str, Any], block: dict[str, Any]) -> set[str]:
    return {n for n, s in trace.items() if s["type"] == "sample"} - set(rest) - set(block)


def _log_density(trace: dict[str, dict[str, Any]], names: set[str]) -> Array:
    return sum((jnp.sum(site_log_prob(trace[n])) for n in sorted(names)), jnp.zeros(()))


def gaussian_block(conditioned: ConditionedModel) -> GaussianBlock | None:
    """The block of `gaussian_sites`, checked in double precision; None where there is none.

    It is None as well where the precision is not positive definite, or the density differs from the Gaussian's.
    """
    names = gaussian_sites(conditioned)
    if not names:
        return None
    shapes = {s.name: s.shape for s in conditioned.latents}
    structure = Structure(names, tuple(shapes[n] for n in names))
    size = structure.size
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1.0, 1.0, (_LOOKS, conditioned.dimension))
    vectors[0] = 0.0
    with jax.enable_x64(True):
        data = {n: jnp.asarray(v) for n, v in conditioned.data.items()}
        doubled = eqx.tree_at(lambda c: c.data, conditioned, data)
        points = rng.normal(size=(_LOOKS, size))
        plain = GaussianBlock(structure, np.zeros(size), np.eye(size))
        made = [np.asarray(v) for v in _expanded(doubled, plain, jnp.asarray(vectors), jnp.asarray(points))]
    values, slopes, curvatures, direct = made
    if not all(np.isfinite(v).all() for v in made):
        return None
    quadratic = values + (slopes * points).sum(1) - 0.5 * np.einsum("li,lij,lj->l", points, curvatures, points)
    if (np.abs(quadratic - direct) > _TOLERANCE * (1 + np.abs(direct) + np.abs(values))).any():
        return None
    try:
        factors = np.linalg.cholesky(np.eye(size) + curvatures)
    except np.linalg.LinAlgError:
        return None
    return GaussianBlock(structure, np.linalg.solve(np.eye(size) + curvatures[0], slopes[0]), factors[0])


@eqx.filter_jit
def _expanded(conditioned: ConditionedModel, block: GaussianBlock, vectors: Array, points: Array) -> tuple[Array, ...]:
    """Value, gradient and negated Hessian at zero of the log density of the data, and its value at a point."""

    def look(pair: tuple[Array, Array]) -> tuple[Array, ...]:
        vector, point = pair
        values = conditioned.constrain(vector)
        rest = {s.name: values[s.name] for s in conditioned.latents if s.name not in block.structure.names}
        density = _data_density(conditioned.model, conditioned.arguments, block, rest)
        return *_expansion(density, jnp.zeros(len(point))), density(point)

    return jax.lax.map(look, (vectors, points))


def _data_density(model: Callable, arguments: dict[str, Any], block: GaussianBlock, rest: dict[str, Any]) -> Callable:
    """The log density of the data as a function of the block's coordinates."""

    def density(v: Array) -> Array:
        standardized = block.standardized(v)
        trace = _trace(model, arguments, rest, standardized)
        return _log_density(trace, _others(trace, rest, standardized))

    return density


def _expansion(density: Callable, point: Array) -> tuple[Array, Array, Array]:
    value, slope = jax.value_and_grad(density)(point)
    return value, slope, -jax.hessian(density)(point)


class IntegratedOut:
    """A program with its Gaussian block integrated out: see `integrate_out`."""

    def __init__(self, model: Callable, block: GaussianBlock):
        functools.update_wrapper(self, model)
        self.model, self.block = model, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import numpyro
        from numpyro import handlers

        names = set(self.block.structure.names)
        rest = _Rest(names)
        with rest:
            result = handlers.substitute(self.model, substitute_fn=lambda site: _at_its_mean(site, names))(
                *args, **kwargs
            )
        run = functools.partial(self.model, *args, **kwargs)
        integral, _, _ = conditional(run, {}, self.block, rest.found)
        numpyro.factor(_FACTOR, integral)
        return result


def _at_its_mean(site: dict[str, Any], names: set[str]) -> Any:
    inside = site["type"] == "sample" and site["name"] in names
    return _scaled(site["fn"], jnp.zeros(site["fn"].shape())) if inside else None


class _Rest(Messenger):
    """Hides the block and what is computed from it, and takes the densities of observations away."""

    def __init__(self, block: set[str]):
        super().__init__()
        self.block, self.found = block, {}

    def process_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "deterministic" or message.get("name") in self.block:
            message["stop"] = True
        elif message["type"] == "sample" and message["is_observed"] and not message["name"].startswith(PRIOR_FACTOR):
            message["fn"] = message["fn"].mask(False)

    def postprocess_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "sample" and not message["is_observed"] and message["name"] not in self.block:
            self.found[message["name"]] = message["value"]


def conditional(
    model: Callable, arguments: dict[str, Any], block: GaussianBlock, rest: dict[str, Any]
) -> tuple[Float[Array, ""], Float[Array, " size"], Float[Array, "size size"]]:
    """The Gaussian of a block given the other latents, in its coordinates.

    Args:
        model: the program.
        arguments: of the program, by name.
        block: of the program.
        rest: values of the other latents.

    Returns:
        log density of the data given the other latents; mean; and the lower Cholesky factor of the precision.
    """
    zero = jnp.zeros(block.structure.size)
    value, slope, curvature = _expansion(_data_density(model, arguments, block, rest), zero)
    # The prior is standard normal in u = center + L'^-1 v.
    inverse = jax.scipy.linalg.solve_triangular(jnp.asarray(block.scaling, zero.dtype), jnp.eye(len(zero)), lower=True)
    center = jnp.asarray(block.center, zero.dtype)
    factor = jnp.linalg.cholesky(curvature + inverse @ inverse.T)
    slope = slope - inverse @ center
    whitened = jax.scipy.linalg.solve_triangular(factor, slope, lower=True)
    mean = jax.scipy.linalg.solve_triangular(factor, whitened, lower=True, trans=1)
    log_det = jnp.log(jnp.diagonal(factor)).sum() - jnp.log(jnp.diagonal(inverse)).sum()
    return value - 0.5 * center @ center + 0.5 * whitened @ whitened - log_det, mean, factor


def integrate_out(model: Callable, data: dict[str, Any]) -> Callable:
    """The program with the latents that are Gaussian given the others integrated out; itself where there are none.

    Deterministic sites are left out, since they may depend on the block.

    Args:
        model: a NumPyro program.
        data: its arguments by name.

    >>> import numpyro, numpyro.distributions as dist
    >>> from numpyro.infer.util import log_density
    >>> def model(y):
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     level = numpyro.sample("level", dist.Normal(0.0, scale))
    ...     numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
    >>> found, _ = log_density(integrate_out(model, {"y": 1.0}), (1.0,), {}, {"scale": 2.0})
    >>> exact = dist.HalfNormal(1.0).log_prob(2.0) + dist.Normal(0.0, 5.0**0.5).log_prob(1.0)
    >>> round(float(found - exact), 5)
    0.0
    """
    return integrated_out(conditioned_model(model, data))[0].model


def integrated_out(conditioned: ConditionedModel) -> tuple[ConditionedModel, GaussianBlock | None]:
    """What `integrate_out` does for a program that has its data, and the block; the same object without one."""
    block = gaussian_block(conditioned)
    if block is None:
        return conditioned, None
    return conditioned_model(IntegratedOut(conditioned.model, block), conditioned.given), block


@eqx.filter_jit
def draw_block(
    conditioned: ConditionedModel, block: GaussianBlock, values: dict[str, Array], keys: Any
) -> dict[str, Array]:
    """Exact draws of the block, and the deterministic sites, for each draw of the other latents.

    Args:
        conditioned: the program that has the block.
        block: what `gaussian_block` found in it.
        values: draws of the other latents, with one leading axis.
        keys: as many keys as draws.
    """

    def one(pair: tuple[dict[str, Array], Any]) -> dict[str, Array]:
        rest, key = pair
        _, mean, factor = conditional(conditioned.model, conditioned.arguments, block, rest)
        noise = jax.random.normal(key, mean.shape)
        v = mean + jax.scipy.linalg.solve_triangular(factor, noise, lower=True, trans=1)
        trace = _trace(conditioned.model, conditioned.arguments, rest, block.standardized(v))
        return {n: trace[n]["value"] for n in (*block.structure.names, *conditioned.deterministic)}

    return jax.lax.map(one, (values, keys), batch_size=min(len(keys), 200))
