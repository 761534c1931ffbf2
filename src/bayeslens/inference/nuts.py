"""The No-U-Turn sampler: NumPyro's NUTS on the unconstrained vector, all chains in one program."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import jax
import numpy as np

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.inference.diagnostics import doubts_of_chains


class NUTS(Engine):
    """The No-U-Turn sampler, which needs no tuning: for continuous latents of up to thousands of dimensions.

    Args:
        num_chains: run at once, in one compiled program; 4 are needed to trust R-hat.
        num_warmup: steps of adaptation, not kept.
        num_samples: draws kept per chain.

    Source: M. Hoffman, A. Gelman, "The No-U-Turn sampler" (2014); D. Phan, N. Pradhan, M. Jankowiak, "Composable
    effects for flexible and accelerated probabilistic programming in NumPyro" (2019).
    """

    name: ClassVar[str] = "nuts"

    num_chains: int = 4
    num_warmup: int = 1000
    num_samples: int = 1000

    def __check_init__(self):
        for name in ("num_chains", "num_warmup", "num_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        from numpyro import infer

        conditioned.check_continuous("NUTS")
        mcmc = infer.MCMC(
            infer.NUTS(potential_fn=lambda vector: -conditioned.log_prob(vector)),
            num_warmup=self.num_warmup,
            num_samples=self.num_samples,
            num_chains=self.num_chains,
            chain_method="vectorized",
            progress_bar=sys.stderr.isatty(),
        )
        start = conditioned.start(key, self.num_chains)
        mcmc.run(
            jax.random.fold_in(key, 1),
            init_params=start if self.num_chains > 1 else start[0],
            extra_fields=("diverging", "energy", "num_steps", "accept_prob"),
        )
        statistics = {n: np.asarray(v) for n, v in mcmc.get_extra_fields(group_by_chain=True).items()}
        posterior = posterior_of(
            self, conditioned, mcmc.get_samples(group_by_chain=True), key=key, statistics=statistics
        )
        return posterior.doubted(doubts_of_chains(posterior.draws, statistics))
