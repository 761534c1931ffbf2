"""PyMC models as NumPyro programs, through their JAX log density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bayeslens.core.conditioned_model import PRIOR_FACTOR
from bayeslens.core.errors import InputError


def is_pymc(model: Any) -> bool:
    """Whether something is a `pymc.Model`, without importing PyMC."""
    return type(model).__module__.split(".")[0] == "pymc" and hasattr(model, "free_RVs")


class PyMCProgram:
    """The NumPyro program of a PyMC model: see `pymc_program`."""

    def __init__(self, model: Any):
        try:
            from pymc.sampling.jax import get_jaxified_graph
        except ImportError as error:
            raise InputError("a PyMC model needs the extra: pip install 'bayeslens[pymc]'") from error
        discrete = [v.name for v in model.discrete_value_vars]
        if discrete:
            raise InputError(
                f"the sites {discrete} of the PyMC model are discrete: sum them out (pymc_extras.marginalize), or "
                "write the model in NumPyro"
            )
        if not model.free_RVs:
            raise InputError("the PyMC model has no free random variable")
        if not model.observed_RVs and not model.potentials:
            raise InputError("the PyMC model observes nothing: give observed= to a variable, or add a Potential")
        values = list(model.value_vars)
        start = model.initial_point()
        self.shapes = {v.name: tuple(start[v.name].shape) for v in values}
        self.observed = tuple(v.name for v in model.observed_RVs) + tuple(v.name for v in model.potentials)
        named = [v for v in model.unobserved_value_vars if v.name not in self.shapes]
        self.named = tuple(v.name for v in named)
        graph = [
            model.logp(vars=model.free_RVs),
            *model.logp(vars=model.observed_RVs, sum=False),
            *model.replace_rvs_by_values(model.potentials),
            *named,
        ]
        self.function = get_jaxified_graph(inputs=values, outputs=graph)
        self.__name__ = model.name or "pymc_model"

    @property
    def hidden(self) -> tuple[str, ...]:
        """Unconstrained values that a transformed variable stands for."""
        return tuple(n for n in self.shapes if n.endswith("__"))

    def __call__(self) -> None:
        import numpyro
        import numpyro.distributions as dist
        from numpyro.distributions import constraints

        values = [
            numpyro.sample(name, dist.ImproperUniform(constraints.real, (), shape))
            for name, shape in self.shapes.items()
        ]
        prior, *rest = (jnp.asarray(v, float) for v in self.function(*values))
        numpyro.factor(f"{PRIOR_FACTOR}pymc", prior)
        for name, value in zip((*self.observed, *self.named), rest, strict=True):
            if name in self.observed:
                numpyro.factor(name, value)
            else:
                numpyro.deterministic(name, value)


def pymc_program(model: Any) -> Callable[[], None]:
    """A PyMC model as a NumPyro program without arguments: the data are those that the model holds.

    Its latents are PyMC's unconstrained value variables with their joint density; the variables themselves and the
    deterministic ones are deterministic sites of the same names. Densities of the observed variables stay apart, entry
    by entry, so that models can be compared by leaving out observations.

    Args:
        model: a `pymc.Model` whose free variables are continuous.

    Raises:
        InputError: PyMC is not installed; discrete free variables; no free or no observed variable.
    """
    return PyMCProgram(model)


def as_program(model: Any) -> Callable:
    """A model as a NumPyro program, which it already is unless it is a PyMC model."""
    return pymc_program(model) if is_pymc(model) else model
