"""Composing statistical models composes their likelihoods and their learners.

Claim: models with noise compose by stacking their parameters and their noises. The likelihood of the composite is
then the integral of one likelihood against the other, and the maximum-likelihood learner of the composite is the
composite of the learners: the gradients that a layer receives are the requests of the layer after it.

Source: D. Shiebler, "Categorical stochastic processes and likelihood" (2021).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bayeslens.core.parametric_kernel import Layer, ParametricKernel, maximum_likelihood_learner
from bayeslens.gallery import Evidence

PAPER = "S342"
CLAIM = "Likelihoods compose by integration when noises are stacked, and learners of composites are composed learners."
NOT_CHECKED = "Noise that is not Gaussian; the paper's general construction of learners (here: one common noise scale)."


def check(*, control: bool = False) -> Evidence:
    """Both laws; the control shares one noise between the layers, and forgets the noise scale in a request."""
    affine = ParametricKernel((Layer(lambda p, x: p[0] * x + p[1], 1, 0.8),))
    curved = ParametricKernel((Layer(lambda p, x: jnp.tanh(p[0] * x + p[1]), 1, 0.8),))
    with jax.enable_x64(True):
        p = ((jnp.array(0.9), jnp.array(0.3)), (jnp.array(0.7), jnp.array(-0.2)))
        x, y = jnp.array([1.2]), jnp.array([0.1])
        composite = affine >> affine
        made = float(composite.log_prob(p, x, y, nodes=60))
        # The composite is affine in the noises, so their two slopes are its standard deviation ...
        zero, one = jnp.zeros(1), jnp.ones(1)
        mean = composite.apply(p, (zero, zero), x)[0]
        slopes = [composite.apply(p, noise, x)[0] - mean for noise in ((one, zero), (zero, one))]
        # ... their squares add when the noises are stacked; they add themselves when one noise is shared
        deviation = float(abs(slopes[0] + slopes[1]) if control else jnp.hypot(*slopes))
        exact = -float((y[0] - mean) ** 2) / (2 * deviation**2) - np.log(deviation) - np.log(2 * np.pi) / 2

        first, second = maximum_likelihood_learner(affine, 0.1), maximum_likelihood_learner(curved, 0.1)
        whole = maximum_likelihood_learner(affine >> curved, 0.1).update(p, x, y)
        if control:
            honest = second.request
            second = second._replace(request=lambda p, x, y: x + (honest(p, x, y) - x) / 0.8**2)
        parts = (first >> second).update(p, x, y)
        learners = max(float(abs(a - b)) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True))
    numbers = {"likelihoods": float(abs(made - exact)), "learners": learners}
    shown = f"log likelihoods differ by {numbers['likelihoods']:.1e}, learned parameters by {learners:.1e}; exact is 0"
    return Evidence(bool(numbers["likelihoods"] < 1e-8 and learners < 1e-14), shown, numbers)
