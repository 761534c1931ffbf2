"""A model together with its data: the density of its latents, as a function of one unconstrained vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError
from bayeslens.core.program_sites import (
    NEEDS_CONCRETE_VALUES,
    LatentSite,
    check_data,
    family_of,
    feasible,
    is_array,
    is_numeric,
    look_through,
)
from bayeslens.core.structure import Structure

_TRIES = 100  # starting points looked at before giving up

# Factors whose names begin so count as prior density, such as Jacobians; others as likelihood.
PRIOR_FACTOR = "_log_det_of_"


class ConditionedModel(eqx.Module):
    """A NumPyro program with its data: the joint density of its latents at these data.

    Continuous latents become one vector of real numbers, by NumPyro's own transforms of their supports; densities
    include the Jacobian. It is a pytree whose leaves are the arrays in the data, so that a function compiled for one
    data set serves others of the same shapes. Make it with `conditioned_model`.

    Attributes:
        model: the program.
        data: its arguments by name.
        latents: its latent sites, in the order of the program.
        observed: names of the observed sites, factors among them.
        structure: of the unconstrained vector: parts are continuous sites.
        subsampled: plates of which a part is drawn anew in each run.
        deterministic: names of the deterministic sites.
        plain_python: whether the program calls plain Python (`black_box`), which has no gradient.
    """

    model: Callable = eqx.field(static=True)
    data: dict[str, Any]
    latents: tuple[LatentSite, ...] = eqx.field(static=True)
    observed: tuple[str, ...] = eqx.field(static=True)
    structure: Structure
    subsampled: tuple[str, ...] = eqx.field(static=True)
    deterministic: tuple[str, ...] = eqx.field(static=True)
    fixed: Any = eqx.field(static=True)  # arguments whose values the program looks at while it is traced
    plain_python: bool = eqx.field(static=True, default=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """The program's arguments by name, as it is run with them."""
        return {n: jnp.asarray(v) for n, v in self.data.items()} | (self.fixed.value if self.fixed is not None else {})

    @property
    def given(self) -> dict[str, Any]:
        """The arguments as they were given, in their own precision."""
        return self.data | (self.fixed.value if self.fixed is not None else {})

    @property
    def dimension(self) -> int:
        """Length of the unconstrained vector."""
        return self.structure.size

    @property
    def continuous(self) -> tuple[LatentSite, ...]:
        """Its continuous latent sites."""
        return tuple(s for s in self.latents if not s.discrete)

    @property
    def discrete(self) -> tuple[LatentSite, ...]:
        """Its discrete latent sites."""
        return tuple(s for s in self.latents if s.discrete)

    def log_terms(
        self, vector: Float[Array, " dimension"], rows: dict[str, Any] | None = None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Log prior density of the unconstrained vector, and log likelihood of the data, factors included.

        Args:
            vector: unconstrained.
            rows: of each subsampled plate, indices of the part of the data that it takes.

        Raises:
            InputError: there are such plates, and no rows.
        """
        return self.log_terms_of(self.trace(vector, rows))

    @staticmethod
    def log_terms_of(trace: dict[str, dict[str, Any]]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The same, of a trace that `trace` gave."""
        prior, likelihood = [jnp.zeros(())], [jnp.zeros(())]
        for name, site in trace.items():
            if site["type"] == "sample":
                is_prior = not site["is_observed"] or name.startswith(PRIOR_FACTOR)
                (prior if is_prior else likelihood).append(jnp.sum(site_log_prob(site)))
        return sum(prior), sum(likelihood)

    def log_prob(self, vector: Float[Array, " dimension"], rows: dict[str, Any] | None = None) -> Float[Array, ""]:
        """Log joint density of the unconstrained vector and the data; `rows` as for `log_terms`."""
        prior, likelihood = self.log_terms(vector, rows)
        return prior + likelihood

    def log_likelihood(self, vector: Float[Array, " dimension"]) -> Float[Array, ""]:
        """Log likelihood of the data, factors included."""
        return self.log_terms(vector)[1]

    def log_prior(self, vector: Float[Array, " dimension"]) -> Float[Array, ""]:
        """Log prior density of the unconstrained vector."""
        return self.log_terms(vector)[0]

    def log_density(self, values: dict[str, Any]) -> Float[Array, ""]:
        """Log joint density of values of all latent sites and the data, with respect to the sites' own measures."""
        from numpyro import handlers

        trace = self._run(handlers.substitute(self.model, data=values))
        return sum(jnp.sum(site_log_prob(s)) for s in trace.values() if s["type"] == "sample")

    def constrain(self, vector: Float[Array, " dimension"]) -> dict[str, Array]:
        """Values of the latent and deterministic sites."""
        names = set(self.structure.names)
        return {
            name: site["value"]
            for name, site in self.trace(vector, {}).items()
            if name in names or site["type"] == "deterministic"
        }

    def unconstrain(self, values: dict[str, Any]) -> Float[Array, " dimension"]:
        """The unconstrained vector of values of all continuous sites."""
        from numpyro import handlers
        from numpyro.distributions import biject_to

        values = {n: jnp.asarray(values[n]) for n in self.structure.names}
        trace = self._run(handlers.substitute(self.model, data=values))
        return self.structure.flatten({n: biject_to(trace[n]["fn"].support).inv(v) for n, v in values.items()})

    def sample_prior(self, key: Any) -> Float[Array, " dimension"]:
        """An unconstrained vector drawn from the prior.

        Raises:
            InputError: a site has an improper prior.
        """
        from numpyro import handlers
        from numpyro.distributions import biject_to

        self.check_proper("draws from the prior")
        trace = handlers.trace(handlers.seed(self.model, key)).get_trace(**self.arguments)
        values = {n: trace[n] for n in self.structure.names}
        return self.structure.flatten(
            {n: biject_to(s["fn"].support).inv(s["value"]) for n, s in values.items()}
        ).astype(float)

    def check_proper(self, user: str) -> None:
        """Refuse improper priors.

        Args:
            user: what needs a proper prior, for the message.

        Raises:
            InputError: a site has an improper prior.
        """
        improper = [s.name for s in self.latents if not s.proper]
        if improper:
            raise InputError(
                f"the sites {improper} have improper priors, and {user} need proper ones: "
                "give them a distribution that integrates to one, however wide"
            )

    def check_continuous(self, user: str) -> None:
        """Refuse discrete latents.

        Args:
            user: what needs continuous latents, for the message.

        Raises:
            InputError: a latent is discrete.
        """
        names = [s.name for s in self.discrete]
        if names:
            raise InputError(f"the sites {names} are discrete, which {user} cannot take: sum them out of the model")

    def trace(self, vector: Float[Array, " dimension"], rows: dict[str, Any] | None = None) -> dict[str, Any]:
        """NumPyro's trace of the program at an unconstrained vector; `rows` as for `log_terms`.

        Where rows do not matter, as for the values of latents, `{}` takes some fixed ones. Terms that belong to the
        change of variables are extra observed sites.

        Raises:
            InputError: there are subsampled plates, and rows are None: densities would be those of a part of the data.
        """
        from numpyro import handlers

        if self.subsampled and rows is None:
            raise InputError(
                f"the plates {list(self.subsampled)} take a new part of the data in each run: "
                "use engine sgld or sghmc, or a plate without subsample_size"
            )
        unconstrained = self.structure.unflatten(vector)
        program = handlers.substitute(self.model, substitute_fn=lambda site: _constrained(unconstrained, site))
        return self._run(handlers.substitute(program, data=rows) if rows else program)

    def start(self, key: Any, count: int) -> Float[Array, "count dimension"]:
        """Starting points of finite density and gradient, uniform in [-2, 2] in each unconstrained dimension.

        Raises:
            InputError: the density is zero or not a number wherever it was looked at, or an observation is outside
                its support everywhere.
        """
        kept = np.zeros((0, self.dimension))
        for attempt in range(_TRIES // 8):
            points, fine, inside = _candidates(self, jax.random.fold_in(key, attempt), max(count, 8))
            if attempt == 0:
                self._check_observations(inside, points[0])
            kept = np.concatenate([kept, np.asarray(points)[np.asarray(fine)]])
            if len(kept) >= count:
                break
        if not len(kept):
            raise InputError(self._explain(points[0]))
        return jnp.asarray(np.resize(kept, (count, self.dimension)), points.dtype)

    def check_observations(self, key: Any) -> None:
        """Refuse observations that are outside their support whatever the latents are.

        Raises:
            InputError: there is such an observation.
        """
        points, _, inside = _candidates(self, key, 8)
        self._check_observations(inside, points[0])

    def _check_observations(self, inside: dict[str, Any], vector: Any) -> None:
        for name, entries in inside.items():
            if not (entries := np.asarray(entries)).all():
                site = self.trace(vector, {})[name]
                value = np.broadcast_to(np.asarray(site["value"]), entries.shape + site["fn"].event_shape)[~entries]
                raise InputError(
                    f"the observation of {name!r} has {int((~entries).sum())} values outside the support of "
                    f"{family_of(site['fn'])}, such as {value[0]}: correct the data or choose another likelihood"
                )

    def _explain(self, vector: Any) -> str:
        """Why the density is nowhere finite."""
        # Compiled, since NumPyro refuses invalid parameters when it sees their values.
        sums = {n: float(v) for n, v in _site_sums(self, vector).items()}
        bad = [f"{n} ({'not a number' if np.isnan(v) else v})" for n, v in sums.items() if not np.isfinite(v)]
        where = f"it comes from {', '.join(bad)}" if bad else "its gradient is not"
        return (
            f"no starting point has a finite log density and gradient; {where}: "
            "look for divisions by zero, logarithms of negative numbers and observations that the model excludes"
        )

    def _run(self, program: Callable) -> dict[str, dict[str, Any]]:
        from numpyro import handlers

        # Draws that are left, such as of a subsample, must not change from call to call.
        return handlers.trace(handlers.seed(program, jax.random.key(0))).get_trace(**self.arguments)


class _Fixed:
    """Arguments that are part of the program, told apart by identity."""

    def __init__(self, value: dict[str, Any]):
        self.value = value


def _constrained(unconstrained: dict[str, Any], site: dict[str, Any]) -> Any:
    """The value of a site, and its Jacobian as a factor of the program."""
    import numpyro
    from numpyro.distributions import biject_to
    from numpyro.distributions.util import sum_rightmost

    if site["name"] not in unconstrained or site["type"] != "sample":
        return None
    real, transform = unconstrained[site["name"]], biject_to(site["fn"].support)
    step = site["infer"].get("_scan_current_index")
    if step is not None and jnp.ndim(real) > len(transform.inverse_shape(site["fn"].shape())):
        real = real[step]  # in `scan`, a site holds the values of all steps
    value = transform(real)
    log_det = transform.log_abs_det_jacobian(real, value)
    log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + len(site["fn"].event_shape))
    numpyro.factor(f"{PRIOR_FACTOR}{site['name']}", log_det)
    return value


def site_log_prob(site: dict[str, Any]) -> Array:
    """Log density of a site of a trace, scaled as its plates say."""
    value = site["fn"].log_prob(site["value"])
    return value if site["scale"] is None else site["scale"] * value


@eqx.filter_jit
def _candidates(conditioned: ConditionedModel, key: Any, count: int) -> tuple[Array, Array, dict[str, Array]]:
    """Points, whether each has a finite density and gradient, and which observed values lie inside their support."""
    points = jax.random.uniform(key, (count, conditioned.dimension), minval=-2.0, maxval=2.0)

    def evaluate(point: Array) -> tuple[Array, dict[str, Array]]:
        trace = conditioned.trace(point, {})
        return sum(conditioned.log_terms_of(trace)), _inside(trace)

    (values, inside), slopes = jax.vmap(jax.value_and_grad(evaluate, has_aux=True))(points)
    return points, jnp.isfinite(values) & jnp.isfinite(slopes).all(-1), {n: v.any(0) for n, v in inside.items()}


@eqx.filter_jit
def _site_sums(conditioned: ConditionedModel, vector: Any) -> dict[str, Array]:
    trace = conditioned.trace(vector, {})
    samples = {n: s for n, s in trace.items() if s["type"] == "sample" and not n.startswith(PRIOR_FACTOR)}
    return {n: jnp.sum(site_log_prob(s)) for n, s in samples.items()}


def _inside(trace: dict[str, dict[str, Any]]) -> dict[str, Array]:
    """For observed sites, which values lie inside the support."""
    found = {}
    for name, site in trace.items():
        if site["type"] == "sample" and site["is_observed"] and family_of(site["fn"]) != "Unit":
            try:
                found[name] = jnp.asarray(site["fn"].support(site["value"]))
            except (NotImplementedError, TypeError):
                continue  # a support that cannot be asked
    return found


def conditioned_model(model: Callable, data: dict[str, Any]) -> ConditionedModel:
    """A NumPyro program with its data, looked through without compiling anything.

    Args:
        model: the program.
        data: its arguments by name. Arrays whose values it needs while it is traced (as a size, or in an `if`) are
            found out.

    Raises:
        InputError: data that do not fit the program, NaN, no latent or no observed site, a latent without a map to
            real numbers, a program that branches on a latent or gives another answer when it is run again.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     numpyro.sample("y", dist.Normal(0.0, scale), obs=y)
    >>> conditioned = conditioned_model(model, {"y": 0.5})
    >>> conditioned.structure.labels, conditioned.latents[0].family
    (('scale',), 'HalfNormal')
    >>> {k: round(float(v), 3) for k, v in conditioned.constrain(jnp.zeros(1)).items()}
    {'scale': 1.0}
    """
    check_data(model, data)
    seen = look_through(model, data)
    if not seen.latents:
        raise InputError("the model has no latent site: sample something without obs=")
    if not seen.observed:
        raise InputError(
            "the model observes nothing: give data that reach an obs=, or a numpyro.factor; "
            "numpyro.infer.Predictive draws from a prior"
        )
    arrays = {n: v for n, v in data.items() if is_array(v) and is_numeric(v)}
    rest = {n: v for n, v in data.items() if n not in arrays}
    found = ConditionedModel(model, arrays, *seen, _Fixed(rest) if rest else None)
    try:
        first = _constants(found)
    except NEEDS_CONCRETE_VALUES:
        found = ConditionedModel(model, {}, *seen, _Fixed(dict(data)))
        first = _constants(found)
    if not _same(first, _constants(found)):
        raise InputError(
            "the model is not reproducible: traced again on the same data it gives another density; it must not read "
            "a clock, a file that changes, NumPy's random numbers or global state"
        )
    plain = any(isinstance(operation, str) and operation == "pure_callback" for operation in first)
    return dataclasses.replace(found, plain_python=True) if plain else found


def _constants(conditioned: ConditionedModel) -> list[Any]:
    """The operations of the log density and the numbers in them, as far as a program brings its own."""
    arrays, rest = eqx.partition(conditioned, is_array)

    def log_terms(arrays: Any, vector: Any) -> Any:
        if conditioned.subsampled or conditioned.discrete:
            from numpyro import handlers

            program = handlers.seed(handlers.substitute(conditioned.model, substitute_fn=feasible), jax.random.key(0))
            trace = handlers.trace(program).get_trace(**eqx.combine(arrays, rest).arguments)
            return [site_log_prob(s) for s in trace.values() if s["type"] == "sample"]
        return eqx.combine(arrays, rest).log_terms(vector)

    closed = jax.make_jaxpr(log_terms)(arrays, jnp.zeros(conditioned.dimension))
    return [*closed.consts, *_literals(closed.jaxpr)]


def _literals(jaxpr: Any) -> Iterable[Any]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield from (v.val for v in equation.invars if hasattr(v, "val"))
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                yield from getattr(part, "consts", ())
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _literals(inner)


def _same(first: list[Any], second: list[Any]) -> bool:
    if len(first) != len(second):
        return False
    pairs = zip(first, second, strict=True)
    return all(a is b or np.array_equal(_plain(a), _plain(b), equal_nan=_plain(a).dtype.kind == "f") for a, b in pairs)


def _plain(value: Any) -> np.ndarray:
    key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if key else value)


def complete_draws(conditioned: ConditionedModel, draws: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draws of all latent sites, each of shape (chains, draws, ...), together with the deterministic sites."""
    if conditioned.deterministic:
        draws = draws | _deterministic_sites(conditioned, {n: jnp.asarray(v) for n, v in draws.items()})
    return {n: np.asarray(v) for n, v in draws.items()}


@eqx.filter_jit
def _deterministic_sites(conditioned: ConditionedModel, draws: dict[str, Array]) -> dict[str, Array]:
    from numpyro import handlers

    def one(values: dict[str, Array]) -> dict[str, Array]:
        trace = conditioned._run(handlers.substitute(conditioned.model, data=values))
        return {n: s["value"] for n, s in trace.items() if s["type"] == "deterministic"}

    return jax.vmap(jax.vmap(one))(draws)


def constrain_draws(conditioned: ConditionedModel, vectors: Iterable) -> dict[str, np.ndarray]:
    """Draws of the latent and deterministic sites from unconstrained vectors of shape (chains, draws, dimension)."""
    return {n: np.asarray(v) for n, v in _constrain_all(conditioned, jnp.asarray(vectors)).items()}


@eqx.filter_jit
def _constrain_all(conditioned: ConditionedModel, vectors: Array) -> dict[str, Array]:
    return jax.vmap(jax.vmap(conditioned.constrain))(vectors)
