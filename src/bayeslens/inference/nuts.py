"""The No-U-Turn sampler: NumPyro's NUTS, all chains in one program, with an honest word on its draws."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior, current_versions

_R_HAT, _EFFECTIVE = 1.01, 400  # Vehtari et al. 2021


def infer(
    model: Callable,
    data: dict[str, Any],
    *,
    key: Any,
    engine: str = "auto",
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_samples: int = 1000,
) -> Posterior:
    """The posterior of a NumPyro model given data.

    Args:
        model: a NumPyro program.
        data: the model's arguments by name.
        key: a `jax.random.key`.
        engine: `"nuts"`, which `"auto"` means.
        num_chains: run at once, in one compiled program; 4 are needed to trust R-hat.
        num_warmup: steps of adaptation, not kept.
        num_samples: draws kept per chain.

    Returns:
        A `Posterior` with draws of every latent and deterministic site. Its `warnings` say when not to trust it, its
        `settings` hold the data of the key: `jax.random.wrap_key_data(np.uint32(settings["key"]))` gives it back.

    Raises:
        InputError: a model without latents, with discrete latents or that fails on these data; NaN; unknown names.

    Source: Hoffman and Gelman 2014; Phan, Pradhan and Jankowiak 2019 (NumPyro).

    >>> import jax, numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> posterior = infer(model, {"y": 1.0}, key=jax.random.key(0), num_warmup=200, num_samples=200, num_chains=2)
    >>> bool(abs(posterior["mu"].mean() - 0.5) < 0.3)
    True
    """
    from numpyro.infer import MCMC, NUTS

    if engine not in ("auto", "nuts"):
        raise InputError(f"unknown engine {engine!r}: use auto or nuts")
    for name, number in (("num_chains", num_chains), ("num_warmup", num_warmup), ("num_samples", num_samples)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    _check_data(model, data)
    _check_model(model, data, key)
    mcmc = MCMC(
        NUTS(model),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=sys.stderr.isatty(),
    )
    try:
        mcmc.run(key, **data, extra_fields=("diverging", "energy", "num_steps", "accept_prob"))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the model failed on these data: {error}") from error
    draws = {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}
    statistics = {n: np.asarray(v) for n, v in mcmc.get_extra_fields(group_by_chain=True).items()}
    settings = {"num_chains": num_chains, "num_warmup": num_warmup, "num_samples": num_samples}
    settings["key"] = np.asarray(jax.random.key_data(key)).tolist()
    return Posterior(
        draws,
        engine="nuts",
        settings=settings,
        statistics=statistics,
        warnings=_doubts(draws, statistics),
        versions=current_versions(),
        model=model,
    )


def _check_data(model: Callable, data: dict[str, Any]) -> None:
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


def _check_model(model: Callable, data: dict[str, Any], key: Any) -> None:
    from numpyro import handlers

    try:
        trace = handlers.trace(handlers.seed(model, key)).get_trace(**data)
    except Exception as error:
        raise InputError(f"the model failed on these data: {type(error).__name__}: {error}") from error
    latent = [s for s in trace.values() if s["type"] == "sample" and not s["is_observed"]]
    if not latent:
        raise InputError("the model has no latent site: sample something without obs=")
    discrete = [s["name"] for s in latent if s["fn"].is_discrete]
    if discrete:
        raise InputError(f"the sites {discrete} are discrete, which NUTS cannot sample: sum them out of the model")


def _doubts(draws: dict[str, np.ndarray], statistics: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Sentences on why the draws should not be trusted."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    found = []
    diverging = int(statistics["diverging"].sum())
    if diverging:
        found.append(
            f"{diverging} transitions diverged: parts of the posterior may be missed; "
            "try a non-centred parameterization or a tighter prior"
        )
    moving = {n: v for n, v in draws.items() if v.size and v.dtype.kind == "f" and np.ptp(v) > 0}
    if next(iter(draws.values())).shape[1] < 4:
        return (*found, "too few draws to diagnose: raise num_samples")
    if not moving:
        return tuple(found)
    r_hat = max(float(np.nanmax(split_gelman_rubin(v))) for v in moving.values())
    effective = min(float(np.nanmin(effective_sample_size(v))) for v in moving.values())
    if r_hat > _R_HAT:
        found.append(
            f"R-hat is {r_hat:.3f}, above {_R_HAT}: the chains disagree; raise num_warmup, or look at the model"
        )
    if effective < _EFFECTIVE:
        found.append(f"the least effective sample size is {effective:.0f}, below {_EFFECTIVE}: raise num_samples")
    return tuple(found)
