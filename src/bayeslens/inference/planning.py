"""`plan`: what `infer` will do with each site of a model, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bayeslens.core.conditioned_model import ConditionedModel, conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.core.plan import Plan, PlannedSite
from bayeslens.inference.enumeration import marginalize
from bayeslens.inference.exact import solve_exactly
from bayeslens.inference.gaussian_block import integrated_out
from bayeslens.inference.pymc_models import as_program
from bayeslens.inference.reparameterization import hierarchical_sites

_SAMPLED_BY = "nuts"
_APART = "its location or scale is a latent: partly non-centred, as far as the data ask for"


def plan(model: Callable, data: dict[str, Any] | None = None) -> Plan:
    """What `infer(model, data, engine="auto")` will do with each site, and why.

    Finite latents alone are enumerated; conjugate and affine-Gaussian models are solved exactly; finite latents
    beside continuous ones are summed out; effects that are Gaussian given their scales are integrated out; the rest is
    sampled by NUTS, latents whose location or scale is a latent as far from their parents as the data ask for. Models
    that call plain Python go to sequential Monte Carlo, those with subsampled plates to stochastic gradient Hamiltonian
    Monte Carlo.

    Args:
        model: a NumPyro program, or a `pymc.Model`.
        data: the model's arguments by name; none for a PyMC model, which holds its own.

    Raises:
        InputError: a model that cannot be used, as for `infer`; a discrete site with infinitely many values.

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
    return plan_for(conditioned_model(as_program(model), data if data is not None else {}))


def plan_for(conditioned: ConditionedModel, settings: Iterable[str] = ()) -> Plan:
    """The plan of a conditioned model, among engines that have all of some settings."""
    from bayeslens.inference.infer import settings_of_engine

    def has(engine: str) -> bool:
        return set(settings) <= set(settings_of_engine(engine))

    infinite = [s.name for s in conditioned.discrete if s.support_size is None]
    if infinite:
        raise InputError(
            f"the sites {infinite} have infinitely many values, and no engine is known for them: bound them "
            "(a truncated distribution), or sum them out of the model"
        )
    if conditioned.subsampled:
        why = f"the plates {', '.join(conditioned.subsampled)} take a new part of the data in each step"
        return _all(conditioned, "sghmc", "sampled", why)
    if conditioned.continuous and not conditioned.discrete and conditioned.plain_python:
        return _all(conditioned, "smc", "sampled", "the model calls plain Python, which has no gradient")
    if not conditioned.continuous and has("enumeration"):
        sizes = " and ".join(f"{s.name} takes {s.support_size} values" for s in conditioned.discrete[:3])
        return _all(conditioned, "enumeration", "enumerated", sizes)
    if conditioned.discrete:
        apart = hierarchical_sites(conditioned_model(marginalize(conditioned.model), conditioned.given))
        why = {
            s.name: _APART if s.name in apart else f"{s.family}, the finite sites summed out"
            for s in conditioned.latents
        }
        sites = tuple(
            PlannedSite(s.name, s.shape, "marginalized", "enumeration", f"takes {s.support_size} values")
            if s.discrete
            else PlannedSite(s.name, s.shape, "sampled", _SAMPLED_BY, why[s.name])
            for s in conditioned.latents
        )
        return Plan(_SAMPLED_BY, sites)
    solution, why = solve_exactly(conditioned)
    if solution is not None and has("exact"):
        return _all(conditioned, "exact", "solved exactly", why)
    if solution is not None:
        why = f"the settings {', '.join(sorted(settings))} ask for it; engine exact would solve it"
    left, gaussian, apart = conditioned, (), hierarchical_sites(conditioned)
    if apart:  # effects and their scale make funnels; coefficients alone are sampled well, without a Hessian
        left, block = integrated_out(conditioned)
        if block is not None and set(block.structure.names) & set(apart):
            gaussian, apart = block.structure.names, hierarchical_sites(left)
        else:
            left = conditioned
    given = ", ".join(s.name for s in left.latents)
    sites = tuple(
        PlannedSite(s.name, s.shape, "solved exactly", "exact", f"Gaussian given {given}: integrated out, then drawn")
        if s.name in gaussian
        else PlannedSite(s.name, s.shape, "sampled", _SAMPLED_BY, _APART if s.name in apart else why)
        for s in conditioned.latents
    )
    return Plan(_SAMPLED_BY, sites)


def _all(conditioned: ConditionedModel, engine: str, treatment: str, why: str) -> Plan:
    return Plan(engine, tuple(PlannedSite(s.name, s.shape, treatment, engine, why) for s in conditioned.latents))
