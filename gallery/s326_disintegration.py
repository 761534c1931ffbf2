"""Splitting a joint distribution and turning a kernel around, by their defining equations.

Claim: a joint distribution factors into a marginal, copied, followed by a conditional; and the Bayesian inverse of a
kernel is the conditional of the joint turned around. Both hold as equations between kernels, for finite distributions
and for Gaussians alike, and give what Bayes' rule gives.

Source: K. Cho, B. Jacobs, "Disintegration and Bayesian inversion via string diagrams" (2019).
"""

from __future__ import annotations

import jax
import numpy as np

from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.gallery import Evidence

PAPER = "S326"
CLAIM = "Disintegration and Bayesian inversion satisfy their defining equations, and agree with Bayes' rule."
NOT_CHECKED = "Distributions that are neither finite nor Gaussian; uniqueness almost everywhere is theorem, not test."
CASES = 100


def finite_equation(prior, probs, turned_at):
    """(x, y) by copying x and running the kernel, against copying y and running the inverse."""
    prior, kernel = FiniteKernel.state(prior), FiniteKernel(probs)
    x, y = FiniteKernel.identity(kernel.source_shape), FiniteKernel.identity(kernel.target_shape)
    inverse = kernel.invert(FiniteKernel.state(turned_at))
    forward = prior >> FiniteKernel.copy(kernel.source_shape) >> (x @ kernel)
    backward = prior >> kernel >> FiniteKernel.copy(kernel.target_shape) >> (inverse @ y)
    return forward.probs, backward.probs, inverse.probs


def gaussian_equation(mean, factor, matrix, noise, turned_at):
    """The same for y = matrix x + noise."""
    prior = LinearGaussianKernel(np.zeros((2, 0)), mean, factor)
    kernel = LinearGaussianKernel(matrix, np.zeros(2), noise)
    inverse = kernel.invert(LinearGaussianKernel(np.zeros((2, 0)), turned_at, factor))
    copy = LinearGaussianKernel.deterministic(np.vstack([np.eye(2), np.eye(2)]))
    identity = LinearGaussianKernel.identity(2)
    forward = prior >> copy >> (identity @ kernel)
    backward = prior >> kernel >> copy >> (inverse @ identity)
    return (forward.mean, forward.covariance), (backward.mean, backward.covariance)


def check(*, control: bool = False) -> Evidence:
    """Both equations on random kernels; the control turns the kernel around at another prior than the one it meets."""
    rng = np.random.default_rng(0)
    prior, probs = rng.dirichlet(np.ones(4), CASES), rng.dirichlet(np.full(3, 0.5), (CASES, 4))
    mean, gaussians = rng.normal(size=(CASES, 2)), rng.normal(size=(3, CASES, 2, 2))
    with jax.enable_x64(True):
        finite = jax.jit(jax.vmap(finite_equation))(prior, probs, prior[::-1] if control else prior)
        gaussian = jax.jit(jax.vmap(gaussian_equation))(mean, *gaussians, mean[::-1] if control else mean)
        (forward, backward, inverse), (ours, theirs) = jax.tree.map(np.asarray, (finite, gaussian))
    joint = prior[:, :, None] * probs
    bayes = (joint / joint.sum(1, keepdims=True)).swapaxes(1, 2)
    numbers = {
        "finite equation": float(np.abs(forward - backward).max()),
        "finite, against Bayes' rule": float(np.abs(inverse - bayes).max()),
        "gaussian equation": float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))),
    }
    worst = max(numbers.values())
    # float64 rounding, with room for the conditioning of a hundred random Gaussians
    return Evidence(
        worst < 1e-9, f"largest difference {worst:.1e} over {CASES} kernels of each kind; exact is 0", numbers
    )
