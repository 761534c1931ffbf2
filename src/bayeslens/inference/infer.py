"""`infer`: any NumPyro model, any engine, one posterior."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.engine import Engine
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior

# name -> module and class; loaded when asked for
ENGINES = {
    "exact": ("exact", "Exact"),
    "gibbs": ("numpyro_kernel", "Gibbs"),
    "nuts": ("nuts", "NUTS"),
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
    model: Callable, data: dict[str, Any], *, key: Any, engine: str | Engine = "auto", **settings: Any
) -> Posterior:
    """The posterior of a NumPyro model given data.

    Args:
        model: a NumPyro program.
        data: the model's arguments by name.
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
    conditioned, plan = conditioned_model(model, data), None
    if isinstance(engine, str) and engine == "auto":
        from bayeslens.inference.planning import plan_for

        plan = plan_for(conditioned, settings)
        if sys.stderr.isatty():
            print(plan, file=sys.stderr)
        engine = plan.engine
    if isinstance(engine, str):
        engine = engine_named(engine, **settings)
    elif settings:
        raise InputError(f"give the settings {sorted(settings)} to the engine itself: {type(engine).__name__}(...)")
    return dataclasses.replace(_as_engine(engine)(conditioned, key=key), plan=plan)


def _as_engine(engine: Any) -> Engine:
    """An engine, or NumPyro's kernel or guide as one."""
    from numpyro.infer.mcmc import MCMCKernel

    kind = engine if isinstance(engine, type) else type(engine)
    if issubclass(kind, Engine):
        return engine() if isinstance(engine, type) else engine
    if issubclass(kind, MCMCKernel):
        from bayeslens.inference.numpyro_kernel import NumPyroKernel

        return NumPyroKernel(engine)
    raise InputError(
        f"{kind.__name__} is no engine: give one of {', '.join(sorted(ENGINES))}, an engine of bayeslens.inference, "
        "or a NumPyro kernel"
    )
