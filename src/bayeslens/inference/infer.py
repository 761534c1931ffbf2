"""`infer`: any NumPyro model, any engine, one posterior."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.engine import Engine
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior

# name -> module and class; loaded when asked for
ENGINES = {"nuts": ("nuts", "NUTS")}


def engine_named(name: str, **settings: Any) -> Engine:
    """The engine of a name, with settings.

    Raises:
        InputError: no such engine, or no such setting.

    >>> engine_named("nuts", num_chains=2).num_chains
    2
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}: use auto or one of {', '.join(sorted(ENGINES))}")
    module, kind = ENGINES[name]
    made = getattr(importlib.import_module(f"bayeslens.inference.{module}"), kind)
    unknown = sorted(set(settings) - set(made.__dataclass_fields__))
    if unknown:
        raise InputError(f"the engine {name} has no settings {unknown}; it has {sorted(made.__dataclass_fields__)}")
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
    if isinstance(engine, str):
        engine = engine_named("nuts" if engine == "auto" else engine, **settings)
    elif settings:
        raise InputError(f"give the settings {sorted(settings)} to the engine itself: {type(engine).__name__}(...)")
    return engine(conditioned_model(model, data), key=key)
