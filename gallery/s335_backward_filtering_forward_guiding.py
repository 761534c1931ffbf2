"""Conditioning diffusions on trees: filter backward through simpler kernels, guide forward, weigh what was wrong.

Claim: information from the leaves of a tree of Markov kernels can be pulled back to the root by a rule for each kind of
kernel, if need be through simplified kernels, and turned into a guided forward simulation whose weights are known. The
weights are equal where nothing was simplified, their mean is an unbiased estimate of the likelihood in any case, and
far more of the draws count than in forward simulation.

Source: F. van der Meulen, M. Schauer, S. Sommer, "Automatic Backward Filtering Forward Guiding for Markov processes and
graphical models" (2020).

Three trees: finite sets, by enumeration; linear-Gaussian kernels, by the exact algebra of kernels; and a branching
diffusion with several wells and noise that depends on the state, guided by a linear equation, by quadrature on a grid
with the same Euler steps. These are also refined, to show what they cost themselves.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.gallery import Evidence
from bayeslens.processes import (
    DirectedTree,
    LinearEquation,
    StochasticDifferentialEquation,
    backward_filter,
    forward_guide,
)

PAPER = "S335"
CLAIM = "Guided simulation of trees: exact for finite and Gaussian kernels, unbiased and efficient for diffusions."
NOT_CHECKED = "Continuous-time finite chains, Gamma processes, interacting particles; learning of parameters by MCMC."
DRAWS, STEPS, START, NOISE, LEFT, RIGHT = 20_000, 40, -0.2, 0.15, 1.7, 1.3
GRID = np.linspace(-6, 6, 1601)


def finite():
    """A mutation tree, and its evidence and posterior of the root by enumeration."""
    rng = np.random.default_rng(0)
    root, rows = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), (5, 3))
    parents = {"a": "root", "b": "root", "one": "a", "two": "a", "three": "b"}
    edges = dict(zip(parents, rows, strict=True))
    vertices = {"root": (None, FiniteKernel.state(root))}
    tree = DirectedTree(vertices | {v: (p, FiniteKernel(edges[v])) for v, p in parents.items()})
    leaves, exact = {"one": 0, "two": 2, "three": 1}, np.zeros(3)
    for r, a, b in itertools.product(range(3), repeat=3):
        value = {"root": r, "a": a, "b": b, **leaves}
        exact[r] += root[r] * np.prod([edges[v][value[p], value[v]] for v, p in parents.items()])
    return tree, leaves, np.log(exact.sum())


def gaussian():
    """Two branches in the plane, and their evidence by composing kernels and conditioning."""
    rng = np.random.default_rng(1)
    prior = LinearGaussianKernel.state(rng.normal(size=2), np.eye(2))
    kernels = [LinearGaussianKernel(*(rng.normal(size=s) for s in ((2, 2), 2, (2, 2)))) for _ in range(3)]
    tree = {"root": (None, prior), "inner": ("root", kernels[0])}
    tree |= {"one": ("inner", kernels[1]), "two": ("root", kernels[2])}
    leaves = {"one": rng.normal(size=2), "two": rng.normal(size=2)}
    copy = LinearGaussianKernel.deterministic(np.vstack([np.eye(2), np.eye(2)]))
    both = copy >> ((kernels[0] >> kernels[1]) @ kernels[2])
    return DirectedTree(tree), leaves, both.condition(prior, np.concatenate(list(leaves.values())))[1]


def drift(x):
    """Wells at odd multiples of pi / 2, with a barrier at 0."""
    return 2 * jnp.sin(2 * x)


def diffusion(x):
    """Noise that depends on the state."""
    return (0.7 + 0.2 * jnp.sin(x))[:, None]


def branching():
    """A diffusion that splits in two, each end seen with noise."""
    # Noise as large as the real one ever is: with less, some weights would be huge.
    towards_the_well = LinearEquation([[-1.0]], [1.5], [[0.9]])

    def edge(duration):
        return StochasticDifferentialEquation(drift, diffusion, duration, towards_the_well, STEPS)

    see = LinearGaussianKernel([[1.0]], [0.0], [[NOISE]])
    tree = {
        "start": (None, LinearGaussianKernel.deterministic(jnp.zeros((1, 0)), [START])),
        "branch": ("start", edge(0.4)),
        "left": ("branch", edge(0.5)),
        "right": ("branch", edge(0.8)),
        "left seen": ("left", see),
        "right seen": ("right", see),
    }
    return DirectedTree(tree), {"left seen": [LEFT], "right seen": [RIGHT]}


def by_quadrature(steps):
    """Likelihood, and posterior mean at the branch, by Euler steps on a grid."""

    def normal(value, mean, scale):
        return np.exp(-(((value - mean) / scale) ** 2) / 2) / (scale * np.sqrt(2 * np.pi))

    def through(duration, *functions):
        step, values = duration / steps, np.stack(functions, 1)
        scale = np.sqrt(step) * np.asarray(diffusion(GRID))
        matrix = normal(GRID[None], (GRID + step * np.asarray(drift(GRID)))[:, None], scale) * (GRID[1] - GRID[0])
        for _ in range(steps):
            values = matrix @ values
        return values.T

    left, right = through(0.5, normal(LEFT, GRID, NOISE))[0], through(0.8, normal(RIGHT, GRID, NOISE))[0]
    likelihood, moment = (np.interp(START, GRID, h) for h in through(0.4, left * right, GRID * left * right))
    return likelihood, moment / likelihood


def effective_sample_size(log_weights):
    """How many equally weighted draws they count as."""
    weights = np.exp(np.asarray(log_weights) - np.max(log_weights))
    return float(weights.sum() ** 2 / (weights**2).sum())


def check(*, control: bool = False) -> Evidence:
    """All three trees; in the control nothing is pulled back: g = 1, forward simulation weighted by the leaves."""
    numbers = {}

    def drawn(tree, leaves, blind):
        functions = backward_filter(tree, leaves)
        functions = jax.tree.map(jnp.zeros_like, functions) if blind else functions
        return forward_guide(tree, leaves, functions, key=jax.random.key(0), num_particles=DRAWS)

    with jax.enable_x64(True):
        for name, (tree, leaves, exact) in {"finite": finite(), "Gaussian": gaussian()}.items():
            draws = drawn(tree, leaves, control)
            numbers[f"{name} tree, error of the log evidence"] = float(abs(draws.log_evidence - exact))
            numbers[f"{name} tree, spread of the log weights"] = float(np.ptp(draws.log_weights))
        tree, leaves = branching()
        guided, simulated = (jax.tree.map(np.asarray, drawn(tree, leaves, blind)) for blind in (control, True))
        likelihood, mean = by_quadrature(STEPS)
        numbers["likelihood"] = float(likelihood)
        numbers["likelihood, steps four times as fine"] = float(by_quadrature(4 * STEPS)[0])
    ratio = np.exp(guided.log_weights)
    ratio *= np.exp(float(guided.log_evidence)) / ratio.mean() / likelihood
    value = np.asarray(guided.values["branch"])[:, 0]
    share = ratio / ratio.mean()
    numbers |= {
        "estimate": float(np.exp(guided.log_evidence)),
        "standard errors from the likelihood": float((ratio.mean() - 1) / (ratio.std() / np.sqrt(DRAWS))),
        "mean at the branch": float(mean),
        "mean at the branch, weighted draws": float((share * value).mean()),
        "standard errors from the mean": float(
            ((share * value).mean() - mean) / (np.std(share * (value - mean)) / np.sqrt(DRAWS))
        ),
        "standard errors from the mean, weights dropped": float((value.mean() - mean) / (value.std() / np.sqrt(DRAWS))),
        "effective draws": effective_sample_size(guided.log_weights),
        "effective draws, forward simulation": effective_sample_size(simulated.log_weights),
    }
    exactly = max(v for k, v in numbers.items() if "tree, " in k)
    gain = numbers["effective draws"] / numbers["effective draws, forward simulation"]
    off = max(abs(numbers["standard errors from the likelihood"]), abs(numbers["standard errors from the mean"]))
    dropped = abs(numbers["standard errors from the mean, weights dropped"])
    shown = (
        f"finite and Gaussian trees differ from exact answers, and their weights from each other, by {exactly:.0e} "
        f"(exact is 0); likelihood of the branching diffusion {numbers['estimate']:.4f}, on a grid {likelihood:.4f}; "
        f"it and the mean at the branch are within {off:.1f} standard errors (should be below 4), with the weights "
        f"dropped {dropped:.0f} (should be more); {numbers['effective draws']:.0f} of {DRAWS} draws count, in forward "
        f"simulation {numbers['effective draws, forward simulation']:.0f} (should be fewer)"
    )
    # Four standard errors: false alarm 6e-5 each. Effective sizes of this many draws are known to a few percent.
    holds = exactly < 1e-8 and off < 4 < dropped and gain > 1.5
    return Evidence(bool(holds), shown, numbers)
