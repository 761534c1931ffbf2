"""Inverting a process piece by piece: Bayesian lenses.

Claim: the Bayesian inverse of a chain of kernels is the chain of their inverses, taken backwards, each at the prior
that reaches it. On finite chains this gives brute-force Bayes, on Gaussian chains the Rauch-Tung-Striebel smoother.

Source: D. Braithwaite, J. Hedges, T. St Clere Smithe, "The compositional structure of Bayesian inference" (2023).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bayeslens.core.bayesian_lens import BayesianLens, exact_lens
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.gallery import Evidence

PAPER = "S370"
CLAIM = "The inverse of a composite is the composite of the inverses, each at the pushed-forward prior."
NOT_CHECKED = "The paper's abstract setting (fibred categories); kernels that are neither finite nor Gaussian."
CASES = 100


def invert_chain(prior, f, g, control):
    """The composite inverse; as control, every stage inverted at the uniform prior instead of the one reaching it."""
    lens = exact_lens(FiniteKernel.state(prior), FiniteKernel(f), FiniteKernel(g))
    if control:
        uniform = [FiniteKernel.state(jnp.full(k.source_shape, 1 / k.source_shape[0])) for k in lens.stages]
        inverses = tuple(k.invert(u) for k, u in zip(lens.stages, uniform, strict=True))
        lens = BayesianLens(lens.prior, lens.stages, inverses)
    return lens.inverse.probs


def smooth_by_lens(a, q, h, r, observations, control):
    """The first state of a linear dynamical system, given all observations, through lenses."""
    size, steps = a.shape[0], len(observations)
    prior = LinearGaussianKernel.state(np.zeros(size), np.eye(size))
    see = LinearGaussianKernel.from_covariance(h, np.zeros(1), r)
    move = LinearGaussianKernel.from_covariance(a, np.zeros(size), q)
    copy = LinearGaussianKernel.deterministic(np.vstack([np.eye(size)] * 2))
    # each stage passes on what has been seen: (y1 .. yt, state) to (y1 .. yt+1, next state)
    stages = [LinearGaussianKernel.identity(t) @ (copy >> (see @ move) if t < steps - 1 else see) for t in range(steps)]
    lens = exact_lens(prior, *stages)
    if control:
        blank = [LinearGaussianKernel.state(np.zeros(k.source_size), np.eye(k.source_size)) for k in stages]
        lens = BayesianLens(prior, lens.stages, tuple(k.invert(b) for k, b in zip(stages, blank, strict=True)))
    return lens(observations).mean


def smooth_by_textbook(a, q, h, r, observations):
    """Kalman's filter forwards, Rauch, Tung and Striebel's smoother backwards."""
    mean, p, filtered = np.zeros(len(a)), np.eye(len(a)), []
    for t, y in enumerate(observations):
        if t:
            mean, p = a @ mean, a @ p @ a.T + q
        gain = p @ h.T / (h @ p @ h.T + r)
        mean, p = mean + gain[:, 0] * (y - h @ mean), p - gain @ h @ p
        filtered.append((mean, p))
    for before, p in filtered[-2::-1]:
        mean = before + p @ a.T @ np.linalg.solve(a @ p @ a.T + q, mean - a @ before)
    return mean


def check(*, control: bool = False) -> Evidence:
    """Random finite chains and a dynamical system; the control inverts the stages at priors that do not reach them."""
    rng = np.random.default_rng(0)
    prior = rng.dirichlet(np.ones(4), CASES)
    f, g = rng.dirichlet(np.ones(3), (CASES, 4)), rng.dirichlet(np.ones(5), (CASES, 3))
    system = (rng.normal(size=(2, 2)), 0.3 * np.eye(2), np.array([[1.0, 0.5]]), np.array([[0.2]]), rng.normal(size=3))
    joint = np.einsum("nx,nxy,nyz->nzx", prior, f, g)
    brute_force = joint / joint.sum(-1, keepdims=True)
    with jax.enable_x64(True):
        made = np.asarray(jax.jit(jax.vmap(lambda *case: invert_chain(*case, control)))(prior, f, g))
        smoothed = np.asarray(jax.jit(lambda y: smooth_by_lens(*system[:4], y, control))(system[4]))
    numbers = {
        "finite": float(np.abs(made - brute_force).max()),
        "smoother": float(np.abs(smoothed - smooth_by_textbook(*system)).max()),
    }
    shown = f"differs from Bayes by {numbers['finite']:.1e}, from the smoother by {numbers['smoother']:.1e}; exact is 0"
    return Evidence(max(numbers.values()) < 1e-12, shown, numbers)
