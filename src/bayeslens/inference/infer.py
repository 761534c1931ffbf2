"""`infer`: any NumPyro model, any engine, one posterior."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bayeslens.core.conditioned_model import ConditionedModel, conditioned_model
from bayeslens.core.engine import Engine
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.inference.gaussian_block import draw_block, integrated_out
from bayeslens.inference.pymc_models import as_program
from bayeslens.inference.reparameterization import reparameterized

# name -> module and class; loaded when asked for
ENGINES = {
    "enumeration": ("enumeration", "Enumeration"),
    "exact": ("exact", "Exact"),
    "flow": ("variational", "Flow"),
    "full_rank": ("variational", "FullRank"),
    "gibbs": ("numpyro_kernel", "Gibbs"),
    "hmc": ("hamiltonian", "HMC"),
    "implicit": ("implicit_variational", "ImplicitVariational"),
    "laplace": ("laplace", "Laplace"),
    "mean_field": ("variational", "MeanField"),
    "nested": ("nested_sampling", "NestedSampling"),
    "neural_nested": ("neural_nested_sampling", "NeuralNestedSampling"),
    "nuts": ("nuts", "NUTS"),
    "pathfinder": ("pathfinder", "Pathfinder"),
    "sghmc": ("stochastic_gradient", "SGHMC"),
    "sgld": ("stochastic_gradient", "SGLD"),
    "smc": ("sequential_monte_carlo", "SMC"),
    "tempering": ("parallel_tempering", "ParallelTempering"),
}


def settings_of_engine(name: str) -> tuple[str, ...]:
    """Names of the settings of an engine.

    >>> settings_of_engine("exact")
    ('num_samples',)
    """
    return tuple(f.name for f in dataclasses.fields(_class_of(name)))


def _class_of(name: str) -> type[Engine]:
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}: use auto or one of {', '.join(sorted(ENGINES))}")
    module, kind = ENGINES[name]
    return getattr(importlib.import_module(f"bayeslens.inference.{module}"), kind)


def engine_named(name: str, **settings: Any) -> Engine:
    """The engine of a name, with settings.

    Raises:
        InputError: no such engine, or no such setting.

    >>> engine_named("nuts", num_chains=2).num_chains
    2
    """
    made = _class_of(name)
    known = settings_of_engine(name)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(f"the engine {name} has no settings {unknown}; it has {sorted(known)}")
    return made(**settings)


def infer(
    model: Callable, data: dict[str, Any] | None = None, *, key: Any, engine: str | Engine = "auto", **settings: Any
) -> Posterior:
    """The posterior of a NumPyro model given data.

    Args:
        model: a NumPyro program, or a `pymc.Model` (extra `pymc`).
        data: the model's arguments by name; none for a PyMC model, which holds its own.
        key: a `jax.random.key`.
        engine: the name of an engine, or one made with its settings, such as `NUTS(num_samples=500)`. `"auto"` does
            what `plan` says.
        settings: of the engine named, such as `num_samples=500`.

    Returns:
        A `Posterior` of every latent and deterministic site. Its `warnings` say when not to trust it, its `settings`
        hold the data of the key: `jax.random.wrap_key_data(np.uint32(settings["key"]))` gives it back.

    Raises:
        InputError: a model without latents or observations, or that fails on these data or is not reproducible; an
            observation outside its support; NaN; unknown names; a site that the engine cannot take.

    >>> import jax, numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> posterior = infer(model, {"y": 1.0}, key=jax.random.key(0), num_warmup=200, num_samples=200, num_chains=2)
    >>> bool(abs(posterior["mu"].mean() - 0.5) < 0.3)
    True
    """
    program = as_program(model)
    conditioned, plan, block = conditioned_model(program, data if data is not None else {}), None, None
    whole, prepare = conditioned, lambda conditioned: conditioned
    if isinstance(engine, str) and engine == "auto":
        from bayeslens.inference.planning import plan_for

        plan = plan_for(conditioned, settings)
        if sys.stderr.isatty():
            print(plan, file=sys.stderr)
        engine = plan.engine
        if engine == "nuts":
            if any(site.treatment == "solved exactly" for site in plan.sites):
                conditioned, block = integrated_out(conditioned)
            prepare = functools.partial(reparameterized, key=jax.random.fold_in(key, 2))
    if isinstance(engine, str):
        engine = engine_named(engine, **settings)
    elif settings:
        raise InputError(f"give the settings {sorted(settings)} to the engine itself: {type(engine).__name__}(...)")
    posterior = _run(_as_engine(engine), conditioned, key, prepare)
    draws = posterior.draws
    if block is not None:
        rest = {s.name: draws[s.name] for s in whole.latents if s.name in draws}
        draws = rest | _for_each(functools.partial(draw_block, whole, block), rest, jax.random.fold_in(key, 4))
    return dataclasses.replace(posterior, draws=draws, plan=plan, model=program)


def _as_engine(engine: Any) -> Engine:
    """An engine, or NumPyro's kernel or guide as one."""
    from numpyro.infer.autoguide import AutoGuide
    from numpyro.infer.mcmc import MCMCKernel

    kind = engine if isinstance(engine, type) else type(engine)
    if issubclass(kind, Engine):
        return engine() if isinstance(engine, type) else engine
    if issubclass(kind, MCMCKernel):
        from bayeslens.inference.numpyro_kernel import NumPyroKernel

        return NumPyroKernel(engine)
    if issubclass(kind, AutoGuide):
        from bayeslens.inference.numpyro_guide import NumPyroGuide

        return NumPyroGuide(engine)
    raise InputError(
        f"{kind.__name__} is no engine: give one of {', '.join(sorted(ENGINES))}, an engine of bayeslens.inference, "
        "or a NumPyro kernel or guide"
    )


def _run(engine: Engine, conditioned: ConditionedModel, key: Any, prepare: Callable) -> Posterior:
    """Run an engine, on the model with its finite latents summed out where it takes continuous ones only.

    Before it runs the model is prepared; what is sampled in place of a site of the model is not shown.
    """
    if engine.takes_discrete or not conditioned.discrete:
        prepared = prepare(conditioned)
        try:
            return _without_hidden(engine(prepared, key=key), prepared)
        except ValueError as error:
            if "Pure callbacks do not support" not in str(error):
                raise
            raise InputError(
                f"the model calls plain Python, which has no gradient, and engine {engine.name} needs one: use engine "
                "smc or nested"
            ) from error
    names = [s.name for s in conditioned.discrete]
    infinite = [s.name for s in conditioned.discrete if s.support_size is None]
    if infinite:
        raise InputError(
            f"the sites {infinite} are discrete with infinitely many values, which the engine {engine.name} cannot "
            "take: bound them (a truncated distribution), or sum them out of the model"
        )
    if not conditioned.continuous:
        raise InputError(f"the sites {names} are discrete, and there are no others: use engine enumeration")
    from bayeslens.inference.enumeration import marginalize

    summed = prepare(conditioned_model(marginalize(conditioned.model), conditioned.given))
    posterior = _without_hidden(engine(summed, key=jax.random.fold_in(key, 0)), summed)
    values = {s.name: posterior.draws[s.name] for s in conditioned.continuous}
    drawn = _for_each(functools.partial(_draw_discrete, conditioned), values, jax.random.fold_in(key, 1))
    return dataclasses.replace(
        posterior,
        draws=posterior.draws | drawn,
        settings=posterior.settings | {"key": np.asarray(jax.random.key_data(key)).tolist()},
        model=conditioned.model,
    )


def _without_hidden(posterior: Posterior, conditioned: ConditionedModel) -> Posterior:
    hidden = getattr(conditioned.model, "hidden", ())
    if not hidden:
        return posterior
    return dataclasses.replace(posterior, draws={n: v for n, v in posterior.draws.items() if n not in hidden})


def _for_each(function: Callable, values: dict[str, Any], key: Any) -> dict[str, np.ndarray]:
    """What a function of draws along one axis, and of as many keys, gives for all draws of all chains."""
    values = {n: jnp.asarray(v) for n, v in values.items()}
    shape = np.shape(next(iter(values.values())))[:2]
    flat = {n: v.reshape(-1, *v.shape[2:]) for n, v in values.items()}
    drawn = function(flat, jax.random.split(key, shape[0] * shape[1]))
    return {n: np.asarray(v).reshape(*shape, *v.shape[1:]) for n, v in drawn.items()}


_DRAWS_AT_ONCE = 500  # of discrete sites: long chains take memory


@eqx.filter_jit
def _draw_discrete(conditioned: ConditionedModel, values: dict[str, Array], keys: Any) -> dict[str, Array]:
    """Exact draws of the discrete sites, given those of the continuous ones."""
    from bayeslens.inference.enumeration import sample_discrete

    def one(pair: Any) -> dict[str, Array]:
        return sample_discrete(conditioned.model, conditioned.arguments, *pair)

    return jax.lax.map(one, (values, keys), batch_size=min(_DRAWS_AT_ONCE, len(keys)))
