"""NumPyro's automatic guides as an engine."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.randomness import fast_key
from bayeslens.core.training import train
from bayeslens.inference.variational import (
    BATCH,
    CHECK_EVERY,
    PATIENCE,
    adam_until_plateau,
    posterior_of_ratios,
)


class NumPyroGuide(Engine):
    """Variational inference with an automatic guide of NumPyro, such as `AutoNormal` or `AutoIAFNormal`.

    Args:
        guide: a class of guides, or one that was made, whose model is replaced by the one at hand.
        num_samples: independent draws.
        num_steps: at most; training stops when the evidence bound no longer improves.
        learning_rate: of Adam. Automatic guides do not whiten, so that it may have to be chosen.

    Source: M. Hoffman, D. Blei, C. Wang, J. Paisley, "Stochastic variational inference" (2013); D. Wingate, T. Weber,
    "Automated variational inference in probabilistic programming" (2013).
    """

    name: ClassVar[str] = "numpyro_guide"

    guide: Any
    num_samples: int = 4000
    num_steps: int = 5000
    learning_rate: float = 0.02

    def __check_init__(self):
        check_counts(self, "num_samples", "num_steps")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")
        from numpyro.infer.autoguide import AutoGuide

        kind = self.guide if isinstance(self.guide, type) else type(self.guide)
        if not issubclass(kind, AutoGuide):
            raise InputError(f"the guide must be an AutoGuide of NumPyro, a class or an instance; got {self.guide!r}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("variational inference")
        fast = fast_key(key)
        svi = _Svi(self.guide, conditioned)
        trained, history = train(
            _svi_loss, _SviProblem(svi.parameters, svi, jax.tree.map(np.asarray, conditioned)), None, key=fast,
            num_steps=self.num_steps, optimizer=adam_until_plateau(self.learning_rate), patience=PATIENCE,
            check_every=CHECK_EVERY,
        )  # fmt: skip
        keys = jax.random.split(jax.random.fold_in(fast, 1), self.num_samples)
        draws, ratios = _svi_draws(trained, keys)
        draws = {n: np.asarray(v)[None] for n, v in draws.items()}
        return posterior_of_ratios(
            self, conditioned, draws, np.asarray(ratios, np.float64), key, history.stopped == "interrupted"
        )


class _Svi:
    """An automatic guide for a model, and its parameters without constraints; a static part of what is trained."""

    def __init__(self, guide: Any, conditioned: ConditionedModel):
        from numpyro import handlers
        from numpyro.distributions import biject_to

        self.latents = tuple(s.name for s in conditioned.latents)
        if isinstance(guide, type):
            self.guide = guide(conditioned.model)
        else:
            self.guide = copy.copy(guide)
            self.guide.model = conditioned.model
            self.guide.prototype_trace = None  # of the model that it was made for
        arguments = conditioned.arguments
        trace = handlers.trace(handlers.seed(self.guide, jax.random.key(0))).get_trace(**arguments)
        sites = {n: s for n, s in trace.items() if s["type"] == "param"}
        real = {n: s["kwargs"].get("constraint") for n, s in sites.items()}
        self.transforms = {n: biject_to(c) for n, c in real.items() if c is not None}
        self.parameters = {
            n: jnp.asarray(self.transforms[n].inv(s["value"]) if n in self.transforms else s["value"], float)
            for n, s in sites.items()
        }

    def draw(self, parameters: dict[str, Array], conditioned: ConditionedModel, key: Any) -> tuple[dict, Array]:
        """Values of all latent sites and their log importance ratio."""
        from numpyro import handlers

        values = {n: self.transforms[n](v) if n in self.transforms else v for n, v in parameters.items()}
        program = handlers.seed(handlers.substitute(self.guide, data=values), key)
        trace = handlers.trace(program).get_trace(**conditioned.arguments)
        log_q = sum(jnp.sum(s["fn"].log_prob(s["value"])) for s in trace.values() if s["type"] == "sample")
        draw = {n: trace[n]["value"] for n in self.latents}
        return draw, conditioned.log_density(draw) - log_q


class _SviProblem(NamedTuple):
    """What is trained: the parameters. NumPy arrays and the guide's program stay as they are."""

    parameters: dict[str, Array]
    svi: _Svi
    conditioned: ConditionedModel


def _svi_loss(problem: _SviProblem, batch: None, key: Any) -> Float[Array, ""]:
    """The negative evidence bound, over a few draws."""
    keys = jax.random.split(key, BATCH // 8)
    ratios = jax.vmap(lambda k: problem.svi.draw(problem.parameters, problem.conditioned, k)[1])(keys)
    return -ratios.mean()


@eqx.filter_jit
def _svi_draws(problem: _SviProblem, keys: Any) -> tuple[dict[str, Array], Array]:
    draw = lambda k: problem.svi.draw(problem.parameters, problem.conditioned, k)  # noqa: E731
    draws, ratios = jax.lax.map(draw, keys, batch_size=min(len(keys), 250))
    return draws, jnp.where(jnp.isnan(ratios), -jnp.inf, ratios)
