"""Discrete latents of NumPyro programs, summed out exactly.

The program is traced once with its discrete sites as inputs. Which of them each term of the log density depends on is
proved from the traced program, entry by entry, so that terms are tabulated over what they depend on and the sum is
done by variable elimination: plates stay plates, `numpyro.contrib.control_flow.scan` becomes a Markov chain that is
summed in time linear in its length, and any deterministic code may stand between sites.

Sources: F. Obermeyer and others, "Tensor variable elimination for plated factor graphs" (2019), for sums over discrete
sites in plates; L. Rabiner, "A tutorial on hidden Markov models" (1989), for chains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bayeslens.core.conditioned_model import PRIOR_FACTOR, ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.inference.discrete_program import DiscreteProgram, Summed

_PRIOR, _LIKELIHOOD = f"{PRIOR_FACTOR}discrete_sites", "log_sum_over_discrete_sites"
_ROUNDING = 1e-6  # of a density; what is wrongly factored is off by more
_CHECKS = 4  # assignments at which the engine compares the factors with the program


class Marginalized:
    """A NumPyro program without the discrete latents of another: see `marginalize`. Equal for equal programs."""

    def __init__(self, model: Callable):
        functools.update_wrapper(self, model)
        self.model = model

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that are sampled in place of others."""
        return getattr(self.model, "hidden", ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Marginalized) and self.model == other.model

    def __hash__(self) -> int:
        return hash((Marginalized, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import numpyro

        program = DiscreteProgram(functools.partial(self.model, *args, **kwargs), given=None)
        if not program.discrete:
            return self.model(*args, **kwargs)
        run = Summed(program)
        with run:
            result = self.model(*args, **kwargs)
        inputs = program.inputs(run.found)
        tables = program.factorization.tables(inputs, program.tied_terms)
        total = program.factorization.log_sum(tables, inputs)
        # What the continuous sites among them say is prior density.
        prior = jnp.zeros(())
        if program.tied_latents:
            own = {t: tables[t] for t in program.tied_terms if program.terms[t].is_prior}
            prior = program.factorization.log_sum(own, inputs)
            numpyro.factor(_PRIOR, prior)
        numpyro.factor(_LIKELIHOOD, jnp.where(jnp.isfinite(prior), total - prior, 0.0))
        return result


def marginalize(model: Callable) -> Marginalized:
    """The NumPyro program in which all discrete latents of finite support are summed out, exactly.

    Continuous latents stay sample statements, so that any engine runs on it, under `jit` and `grad`. Sites that
    depend on discrete ones keep their names and values, but their densities move into one `numpyro.factor`;
    deterministic sites that depend on them are left out: `sample_discrete` has them.

    Args:
        model: a NumPyro program. Discrete sites may stand in plates, in nested ones, in
            `numpyro.contrib.control_flow.scan` (where a step may depend on the step before), or be indexed by an
            array (`z[group]`).

    Raises:
        InputError: when it runs, for a discrete latent of infinite support, a plate with a subsample, or discrete
            sites that depend on each other so closely that no table of at most 2^27 entries can sum them out.

    The density is the sum of the program's own: a site that `numpyro.handlers.mask` takes out counts its values.

    >>> import numpyro, numpyro.distributions as dist
    >>> def mixture(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    ...     with numpyro.plate("rows", 2):
    ...         z = numpyro.sample("z", dist.Bernoulli(0.25))
    ...         numpyro.sample("y", dist.Normal(mu + 4.0 * z, 1.0), obs=y)
    >>> from numpyro.infer.util import log_density
    >>> density = jax.jit(lambda y, mu: log_density(marginalize(mixture), (y,), {}, {"mu": mu})[0])
    >>> found = density(jnp.array([0.0, 4.0]), 0.0)
    >>> mean, y = jnp.array([0.0, 4.0]), jnp.array([[0.0], [4.0]])
    >>> sides = dist.Normal(mean, 1.0).log_prob(y) + jnp.log(jnp.array([0.75, 0.25]))
    >>> exact = jax.nn.logsumexp(sides, axis=1).sum() + dist.Normal(0.0, 3.0).log_prob(0.0)
    >>> round(float(found - exact), 5)
    0.0
    """
    return Marginalized(model)


def sample_discrete(model: Callable, data: dict[str, Any], values: dict[str, Any], key: Any) -> dict[str, Array]:
    """One exact draw of all discrete latents together, given the data and the continuous latents.

    It may be mapped over draws: `jax.lax.map` with a `batch_size` keeps memory small where chains are long.

    Args:
        model: the program, not marginalized.
        data: its arguments by name.
        values: continuous latents by name; others are ignored.
        key: a `jax.random.key`.

    Returns:
        values of the discrete latents, and of the deterministic sites that depend on them.

    Raises:
        InputError: as `marginalize`; a continuous latent without a value.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     z = numpyro.sample("z", dist.DiscreteUniform(1, 6))
    ...     numpyro.sample("y", dist.Normal(z, 0.01), obs=y)
    >>> draw = jax.jit(lambda key: sample_discrete(model, {"y": 4.0}, {}, key))
    >>> {k: int(v) for k, v in draw(jax.random.key(0)).items()}
    {'z': 4}
    """
    program = DiscreteProgram(functools.partial(model, **data), given=values)
    inputs = program.inputs(values)
    tables = program.factorization.tables(inputs, program.tied_terms)
    return _draw(program, inputs, tables, key, program.tied_deterministic)


def discrete_marginals(model: Callable, data: dict[str, Any], values: dict[str, Any]) -> dict[str, Array]:
    """Log posterior probabilities of the values of each discrete latent, given data and continuous latents.

    Args:
        model: the program, not marginalized.
        data: its arguments by name.
        values: continuous latents by name; others are ignored.

    Returns:
        site -> shape (*shape of the site, number of values), in the order of `enumerate_support`.

    Raises:
        InputError: as `marginalize`; a continuous latent without a value.
    """
    program = DiscreteProgram(functools.partial(model, **data), given=values)
    inputs = program.inputs(values)
    tables = program.factorization.tables(inputs, program.tied_terms)
    return _logits(program, _sum_and_slopes(program, inputs, tables, _zeros(program))[1])


class Enumeration(Engine):
    """Exact posteriors of programs whose latents are all discrete and finite.

    It knows the log evidence, each site's marginal distribution, and independent draws of all sites together, which
    are one chain. Marginals are `Categorical` over the places of the values in the site's support: these are the
    values where they count from 0, as `Bernoulli`, `Categorical` and `Binomial` do; with a `DiscreteUniform(1, 6)`
    place 0 is the value 1.

    Args:
        num_samples: independent draws.

    Source: as `marginalize`.
    """

    name: ClassVar[str] = "enumeration"
    takes_discrete: ClassVar[bool] = True

    num_samples: int = 4000

    def __check_init__(self):
        check_counts(self, "num_samples")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        import numpyro.distributions as dist

        continuous = [s.name for s in conditioned.continuous]
        if continuous:
            raise InputError(
                f"the sites {continuous} are continuous, and enumeration sums over finitely many values: use another "
                "engine on marginalize(model), which sums out the discrete sites"
            )
        evidence, logits, draws, gap = _solve(conditioned, key, self.num_samples)
        if not np.isfinite(evidence):
            raise InputError(
                f"the log evidence of these data is {float(evidence)}: the model excludes them, or a density is not "
                "a number; look at the observations and the distributions' parameters"
            )
        # Constants of a program may be in single precision where the rest is in double.
        if not gap <= max(1e3 * float(np.finfo(evidence.dtype).eps), _ROUNDING):
            raise InputError(
                f"the factors found in this model do not multiply to its density (they differ by {float(gap):.2g} of "
                "it): it cannot be summed out exactly; please report the model"
            )
        return posterior_of(
            self,
            conditioned,
            {n: v[None] for n, v in draws.items()},
            key=key,
            log_evidence=float(evidence),
            marginals={n: dist.Categorical(logits=v) for n, v in logits.items()},
        )


@eqx.filter_jit
def _solve(conditioned: ConditionedModel, key: Any, count: int) -> tuple[Array, dict, dict, Array]:
    """Log evidence, marginals, draws, and how far the factors are from the program's density at some assignments."""
    program = DiscreteProgram(functools.partial(conditioned.model, **conditioned.arguments))
    inputs = program.inputs({})
    tables = program.factorization.tables(inputs, program.tied_terms)
    free = program.density(inputs, [t for t in range(len(program.terms)) if t not in program.tied_terms])
    keys = jax.random.split(key, count)
    draws = jax.lax.map(
        lambda k: _draw(program, inputs, tables, k, program.deterministic), keys, batch_size=min(count, 500)
    )
    some = [draws[s.name][:_CHECKS] for s in program.discrete]
    # The sum, and the product of factors at some draws: by one loop, which is compiled once.
    potentials = {i: _picked(v, s.support) for i, (v, s) in enumerate(zip(some, program.discrete, strict=True))}
    potentials = jax.tree.map(lambda zero, picked: jnp.concatenate([zero[None], picked]), _zeros(program), potentials)
    totals, slopes = jax.lax.map(functools.partial(_sum_and_slopes, program, inputs, tables), potentials)
    rest = inputs[len(program.discrete) :]
    direct = jax.vmap(lambda values: program.density([*values, *rest], program.tied_terms))(some)
    gaps = jnp.abs(totals[1:] - direct) / (1 + jnp.abs(direct))
    return totals[0] + free, _logits(program, jax.tree.map(lambda v: v[0], slopes)), draws, gaps.max()


def _picked(values: Array, support: np.ndarray) -> Array:
    """Logarithms of the indicator of values, one row per draw."""
    return jnp.where(jnp.moveaxis(values[..., None] == support, -1, 1), 0.0, -jnp.inf)


def _sum_and_slopes(program: DiscreteProgram, inputs: list, tables: dict, potentials: dict) -> tuple[Array, dict]:
    return jax.value_and_grad(lambda p: program.factorization.log_sum(tables, inputs, potentials=p))(potentials)


def _logits(program: DiscreteProgram, slopes: dict) -> dict[str, Array]:
    return {s.name: jnp.log(jnp.moveaxis(slopes[i], 0, -1)) for i, s in enumerate(program.discrete)}


def _draw(
    program: DiscreteProgram, inputs: list, tables: dict, key: Any, deterministic: dict[str, int]
) -> dict[str, Array]:
    drawn = jax.grad(lambda potentials: program.factorization.log_sum(tables, inputs, potentials=potentials, key=key))(
        _zeros(program)
    )
    values = [jnp.asarray(s.support)[drawn[i].argmax(0)] for i, s in enumerate(program.discrete)]
    found = {s.name: v for s, v in zip(program.discrete, values, strict=True)}
    outputs = list(deterministic.values())
    made = program.factorization.evaluated(outputs, [*values, *inputs[len(values) :]]) if outputs else []
    return found | dict(zip(deterministic, made, strict=True))


def _zeros(program: DiscreteProgram) -> dict[int, Array]:
    return {i: jnp.zeros((len(s.support), *s.shape)) for i, s in enumerate(program.discrete)}
