"""Draws from the prior with their densities: where sequential Monte Carlo and nested sampling begin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.errors import InputError


class Population(NamedTuple):
    """Unconstrained points with their log prior density and log likelihood."""

    points: Float[Array, "*shape dimension"]
    log_prior: Float[Array, "*shape"]
    log_likelihood: Float[Array, "*shape"]


def prior_population(conditioned: ConditionedModel, user: str, key: Any, count: int) -> tuple[Population, int]:
    """Draws from the prior with their densities, and how many likelihoods were not a number or infinite.

    Raises:
        InputError: discrete latents, improper priors, observations outside of their support, or a likelihood that is
            zero at all draws.
    """
    conditioned.check_proper(user)
    conditioned.check_continuous(user)
    _check_observations(conditioned, key)
    population, impossible = _prior_population(conditioned, key, count)
    if not np.isfinite(np.asarray(population.log_likelihood)).any():
        raise InputError(
            f"the likelihood is zero or not a number at all {count} draws from the prior: look for observations that "
            "the model excludes, or narrow the prior"
        )
    return population, int(impossible)


def _check_observations(conditioned: ConditionedModel, key: Any) -> None:
    try:
        conditioned.check_observations(key)
    except InputError:
        raise
    except ValueError as error:  # a likelihood in plain Python has no gradient, which that check takes
        if "callback" not in str(error).lower():
            raise


@eqx.filter_jit
def _prior_population(conditioned: ConditionedModel, key: Any, count: int) -> tuple[Population, Int[Array, ""]]:
    points = jax.vmap(conditioned.sample_prior)(jax.random.split(key, count))
    log_prior, log_likelihood, impossible = evaluate(conditioned, points)
    return Population(points, log_prior, log_likelihood), impossible


def evaluate(
    conditioned: ConditionedModel, points: Float[Array, "count dimension"]
) -> tuple[Float[Array, " count"], Float[Array, " count"], Int[Array, ""]]:
    """Log prior density and log likelihood in one batch, and how many likelihoods were not a number or infinite.

    Those count as zero, and so do prior densities that are not a number: a sampler must not go there.
    """
    log_prior, log_likelihood = jax.vmap(conditioned.log_terms)(points)
    outside = ~(log_prior > -jnp.inf)
    bad = ~(log_likelihood < jnp.inf)
    return (
        jnp.where(outside, -jnp.inf, log_prior),
        jnp.where(bad | outside, -jnp.inf, log_likelihood).astype(log_prior.dtype),
        jnp.sum(bad & ~outside),
    )


def impossible_likelihoods(count: int, total: int) -> str:
    """The sentence on likelihoods that were not numbers."""
    return (
        f"the log likelihood was not a number or infinite at {count} of {total} points, which were treated as "
        "impossible: look for divisions by zero and logarithms of negative numbers"
    )


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """Work that Ctrl-C ends quietly, also where it meets a likelihood in plain Python, whose errors JAX wraps."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except jax.errors.JaxRuntimeError as error:
        if "KeyboardInterrupt" not in str(error):
            raise
