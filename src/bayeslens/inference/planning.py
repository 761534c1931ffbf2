"""`plan`: what `infer` will do with each site of a model, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bayeslens.core.conditioned_model import ConditionedModel, conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.core.plan import Plan, PlannedSite
from bayeslens.inference.exact import solve_exactly

_SAMPLED_BY = "nuts"


def plan(model: Callable, data: dict[str, Any]) -> Plan:
    """What `infer(model, data, engine="auto")` will do with each site, and why.

    Conjugate and affine-Gaussian models are solved exactly, others are sampled by NUTS.

    Args:
        model: a NumPyro program.
        data: the model's arguments by name.

    Raises:
        InputError: a model that cannot be used, as for `infer`; discrete latents; a subsampled plate.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ...     numpyro.sample("y", dist.Normal(mu, scale), obs=y)
    >>> print(plan(model, {"y": 1.0}))
    engine: nuts
    site   shape   treatment  by    why
    mu     scalar  sampled    nuts  HalfNormal scale has no conjugate form
    scale  scalar  sampled    nuts  HalfNormal scale has no conjugate form
    """
    return plan_for(conditioned_model(model, data))


def plan_for(conditioned: ConditionedModel, settings: Iterable[str] = ()) -> Plan:
    """The plan of a conditioned model, among engines that have all of some settings."""
    from bayeslens.inference.infer import settings_of_engine

    def has(engine: str) -> bool:
        return set(settings) <= set(settings_of_engine(engine))

    if conditioned.discrete:
        names = [s.name for s in conditioned.discrete]
        raise InputError(f"the sites {names} are discrete: sum them out of the model, or use engine gibbs")
    if conditioned.subsampled:
        raise InputError(
            f"the plates {list(conditioned.subsampled)} take a new part of the data in each run, and no engine is "
            "known for that: leave out subsample_size"
        )
    solution, why = solve_exactly(conditioned)
    if solution is not None and has("exact"):
        return _all(conditioned, "exact", "solved exactly", why)
    if solution is not None:
        why = f"the settings {', '.join(sorted(settings))} ask for it; engine exact would solve it"
    return _all(conditioned, _SAMPLED_BY, "sampled", why)


def _all(conditioned: ConditionedModel, engine: str, treatment: str, why: str) -> Plan:
    return Plan(engine, tuple(PlannedSite(s.name, s.shape, treatment, engine, why) for s in conditioned.latents))
