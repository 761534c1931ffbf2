"""Any MCMC kernel of NumPyro as an engine, and Gibbs sampling of discrete sites beside NUTS."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import jax
import numpy as np

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.inference.diagnostics import doubts_of_chains

_STATISTICS = ("diverging", "energy", "num_steps", "accept_prob")


class NumPyroKernel(Engine):
    """A NumPyro MCMC kernel, such as `numpyro.infer.BarkerMH` or `HMCECS(NUTS(model))`, run on the model.

    Args:
        kernel: a class of kernels, which is given the model, or a kernel made with it.
        num_chains: run at once; 4 are needed to trust R-hat.
        num_warmup: steps of adaptation, not kept.
        num_samples: draws kept per chain.
    """

    name: ClassVar[str] = "numpyro_kernel"
    takes_discrete: ClassVar[bool] = True

    kernel: Any
    num_chains: int = 4
    num_warmup: int = 1000
    num_samples: int = 1000

    def __check_init__(self):
        check_counts(self, "num_chains", "num_warmup", "num_samples")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        kernel = self.kernel(conditioned.model) if isinstance(self.kernel, type) else self.kernel
        return run_kernel(self, kernel, conditioned, key)


class Gibbs(Engine):
    """Discrete sites of finite support by Gibbs steps, given the continuous ones, which NUTS moves.

    Summing discrete sites out, as other engines do, mixes far better where it can be done; Gibbs takes models whose
    discrete sites depend on too many others for that.

    Args:
        num_chains: run at once; 4 are needed to trust R-hat.
        num_warmup: steps of adaptation, not kept.
        num_samples: draws kept per chain.

    Source: J. Liu, "Peskun's theorem and a modified discrete-state Gibbs sampler" (1996), in NumPyro's version.

    >>> import jax, numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     k = numpyro.sample("k", dist.Categorical(np.array([0.5, 0.5])))
    ...     mu = numpyro.sample("mu", dist.Normal(2.0 * k, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> engine = Gibbs(num_chains=2, num_warmup=100, num_samples=300)
    >>> conditioned = conditioned_model(model, {"y": 2.0})
    >>> posterior = engine(conditioned, key=jax.random.key(0))  # doctest: +SKIP
    >>> engine.name, [site.name for site in conditioned.discrete]
    ('gibbs', ['k'])
    """

    name: ClassVar[str] = "gibbs"
    takes_discrete: ClassVar[bool] = True

    num_chains: int = 4
    num_warmup: int = 1000
    num_samples: int = 1000

    def __check_init__(self):
        check_counts(self, "num_chains", "num_warmup", "num_samples")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        from numpyro.infer import NUTS, DiscreteHMCGibbs

        infinite = [s.name for s in conditioned.discrete if s.support_size is None]
        if infinite:
            raise InputError(f"the sites {infinite} have infinitely many values: bound them (a truncated distribution)")
        if not conditioned.discrete:
            raise InputError("Gibbs steps are for discrete sites, and this model has none: use engine nuts")
        if not conditioned.continuous:
            raise InputError("Gibbs steps beside NUTS need a continuous site, and this model has none: use enumeration")
        kernel = DiscreteHMCGibbs(NUTS(conditioned.model), modified=True)
        return run_kernel(self, kernel, conditioned, key)


def run_kernel(engine: Any, kernel: Any, conditioned: ConditionedModel, key: Any) -> Posterior:
    """Run a NumPyro kernel by an engine's numbers of chains and draws."""
    from numpyro.infer import HMC, MCMC

    vectorized = isinstance(kernel, HMC)  # the others take one key at a time, and are mapped over chains
    mcmc = MCMC(
        kernel,
        num_warmup=engine.num_warmup,
        num_samples=engine.num_samples,
        num_chains=engine.num_chains,
        chain_method="vectorized" if vectorized else jax.vmap,
        progress_bar=vectorized and sys.stderr.isatty(),
    )
    try:
        mcmc.run(key, extra_fields=_STATISTICS if vectorized else (), **conditioned.arguments)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"NumPyro's {type(kernel).__name__} failed on this model: {error}") from error
    statistics = {n: np.asarray(v) for n, v in mcmc.get_extra_fields(group_by_chain=True).items()}
    sites = {s.name for s in conditioned.latents}
    draws = {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items() if n in sites}
    posterior = posterior_of(engine, conditioned, draws, key=key, statistics=statistics)
    return posterior.doubted(doubts_of_chains(posterior.draws, statistics))
