"""Engines: ways to invert a model. Each takes the same conditioned models and returns the same posteriors."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel, complete_draws, constrain_draws
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior, current_versions


class Engine(eqx.Module):
    """A way to invert a model: fields are its settings, calling it runs it.

    Attributes:
        name: by which `infer(engine=...)` knows it.
        takes_discrete: whether it takes discrete latents; those of finite support are summed out for the others.
    """

    name: ClassVar[str]
    takes_discrete: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        """The posterior of the latents.

        Raises:
            InputError: a model that this engine cannot take, naming the site.
        """


def posterior_of(
    engine: Engine,
    conditioned: ConditionedModel,
    draws: Float[Array, "chains draws dimension"] | dict[str, Any],
    *,
    key: Any,
    **found: Any,
) -> Posterior:
    """The posterior that an engine found, with how it was made.

    Args:
        engine: its fields become `settings`.
        conditioned: the model with its data.
        draws: unconstrained vectors, which are mapped to the model's sites; or draws of all latent sites. The
            deterministic sites are added.
        key: of the run; its data are kept in the settings.
        found: other attributes of the `Posterior`: `log_weights`, `log_evidence`, `statistics`, `warnings`.
    """
    draws = complete_draws(conditioned, draws) if isinstance(draws, dict) else constrain_draws(conditioned, draws)
    return Posterior(
        draws,
        engine=engine.name,
        settings=settings_of(engine) | {"key": np.asarray(jax.random.key_data(key)).tolist()},
        versions=current_versions(),
        model=conditioned.model,
        data=conditioned.given,
        **found,
    )


def check_counts(engine: Engine, *names: str) -> None:
    """Refuse settings that count something and are below 1; None stands for a default.

    Raises:
        InputError: naming the setting.
    """
    for name in names:
        if getattr(engine, name) is not None and getattr(engine, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(engine, name)}")


def settings_of(engine: Engine) -> dict[str, Any]:
    """An engine's settings as plain values; what is no number, text or truth value is described."""
    return {f.name: _plain(getattr(engine, f.name)) for f in dataclasses.fields(engine)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return getattr(value, "__name__", type(value).__name__)
