"""Conjugate priors as an equation between channels.

Claim: a prior channel c is conjugate to a likelihood channel d by an update h of hyperparameters when
c(p)(t) d(t)(y) = predictive(p)(y) c(h(p, y))(t) for all p, t and y; then h gives the exact posterior, and updating
observation by observation is updating once.

Source: B. Jacobs, "A channel-based perspective on conjugate priors" (2020).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bayeslens.core.conjugate import CONJUGATE_PAIRS, NormalInverseGamma, certify, conjugate_pair
from bayeslens.gallery import Evidence

PAPER = "S376"
CLAIM = "The standard conjugate pairs satisfy the channel equation; repeated updates are one update."
NOT_CHECKED = "The paper's logical formulation; the equation is compared at random points, not proved."

RATES, SHARES = np.array([0.1, 0.5, 2.0, 5.0]), np.array([0.05, 0.3, 0.6, 0.9])
SIMPLEX = np.array([[0.2, 0.3, 0.5], [0.8, 0.1, 0.1], [0.05, 0.9, 0.05]])
# prior, likelihood, hyperparameters, three observations, what is known, parameters at which to compare
EXAMPLES = [
    (dist.Beta, dist.BernoulliProbs, {"concentration1": 2.0, "concentration0": 0.5}, [1, 0, 1], {}, SHARES),
    (
        dist.Beta, dist.BinomialProbs, {"concentration1": 1.0, "concentration0": 3.0},
        [4, 0, 9], {"total_count": 9}, SHARES,
    ),
    (dist.Dirichlet, dist.CategoricalProbs, {"concentration": np.array([0.5, 1.0, 2.0])}, [2, 0, 2], {}, SIMPLEX),
    (
        dist.Dirichlet, dist.MultinomialProbs, {"concentration": np.array([0.5, 1.0, 2.0])},
        [[1, 2, 0], [0, 0, 3], [1, 1, 1]], {"total_count": 3}, SIMPLEX,
    ),
    (dist.Gamma, dist.Poisson, {"concentration": 2.0, "rate": 0.5}, [3, 0, 7], {}, RATES),
    (dist.Gamma, dist.Exponential, {"concentration": 2.0, "rate": 0.5}, [0.3, 1.0, 4.0], {}, RATES),
    (dist.Normal, dist.Normal, {"loc": 1.0, "scale": 2.0}, [0.3, 4.0, -1.0], {"scale": 0.7}, RATES - 2),
    (
        NormalInverseGamma, dist.Normal,
        {"loc": np.array([0.5]), "precision": np.array([[0.4]]), "concentration": 1.5, "rate": 2.0},
        [0.3, 4.0, -1.0], {}, np.array([[0.0, 1.0], [2.0, 0.3], [-1.0, 4.0]]),
    ),
]  # fmt: skip


def check(*, control: bool = False) -> Evidence:
    """The equation and sequential updating for every pair; the control counts each observation twice."""
    numbers, holds = {}, len(EXAMPLES) == len(CONJUGATE_PAIRS)
    for prior, likelihood, p, observations, known, parameters in EXAMPLES:
        pair = conjugate_pair(prior, likelihood)
        if control:
            honest = pair.update
            pair = pair._replace(update=lambda p, y, h=honest, **known: h(p, jnp.concatenate([y, y]), **known))

        def measure(p, y, pair=pair, parameters=parameters, known=known):
            one_by_one = p
            for i in range(len(y)):
                one_by_one = pair.update(one_by_one, y[i : i + 1], **known)
            together = pair.update(p, y, **known)
            return certify(pair, p, y[0], parameters, **known), one_by_one, together

        with jax.enable_x64(True):
            many = {name: np.asarray(value) for name, value in p.items()}
            made = jax.jit(measure)(many, np.asarray(observations))
            certificate, *updates = jax.tree.map(np.asarray, made)
        gap = max(float(np.abs(updates[0][name] - updates[1][name]).max()) for name in p)
        numbers[f"{prior.__name__}-{likelihood.__name__}"] = float(certificate.residual)
        holds &= bool(certificate.holds) and gap < 1e-12
    worst = max(numbers.values())
    # Certificates allow a millionth of the terms: JAX's log-beta function is that exact even in float64.
    return Evidence(
        holds, f"largest residual of log densities {worst:.1e} over {len(numbers)} pairs; exact is 0", numbers
    )
