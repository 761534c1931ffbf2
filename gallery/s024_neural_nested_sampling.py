"""Nested sampling in which a network, trained on the live points, takes the place of a slow likelihood.

Claim: feedforward networks trained during the run on the current live points, with architectures that a genetic
algorithm proposes, can replace the likelihood once they are accurate. Evidence and posterior stay those of the true
likelihood, for toy problems of one and of many modes and for the expansion history of the universe, while the true
likelihood is computed less often.

Source: I. Gomez-Vargas, J. A. Vazquez, "Deep learning and genetic algorithms for cosmological Bayesian inference
speed-up" (2024).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import special

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.gallery import Evidence
from bayeslens.inference.nested_sampling import NestedSampling
from bayeslens.inference.neural_nested_sampling import NeuralNestedSampling

PAPER = "S024"
CLAIM = "A network trained on live points replaces the likelihood: same evidence and posterior, fewer likelihoods."
NOT_CHECKED = (
    "The paper's observed data sets and Boltzmann codes, its seconds, and live points proposed by a genetic algorithm. "
    "New points get their true likelihood here, which the paper does only now and then."
)
NUM_LIVE = 1000
Z = np.linspace(0.07, 1.97, 31)  # redshifts like those of cosmic chronometers
SPREAD = 5.0 + 10.0 * Z  # of the Hubble rates, in km/s/Mpc


def toy(kind, low, high, rates):
    """One of three likelihoods of two parameters, by number, so that they are one program."""
    x = numpyro.sample("x", dist.Uniform(low, high).to_event(1))
    covariance = 0.1 * jnp.array([[1.0, 0.6], [0.6, 1.0]])
    gaussian = dist.MultivariateNormal(jnp.array([1.0, -1.0]), covariance).log_prob(x)
    # Eighteen peaks of equal height.
    eggbox = (2 + jnp.cos(x[0] / 2) * jnp.cos(x[1] / 2)) ** 5
    # Hubble rates of a flat universe of matter and a cosmological constant; 100 h is the rate today.
    rate = 100 * x[1] * jnp.sqrt(x[0] * (1 + Z) ** 3 + 1 - x[0])
    expansion = dist.Normal(rate, SPREAD).log_prob(rates).sum()
    numpyro.factor("likelihood", jnp.select([kind == 0, kind == 1], [gaussian, eggbox], expansion))


def problems():
    """The likelihoods with their data, and the sides of the rectangles of their uniform priors."""
    noise = SPREAD * np.random.default_rng(0).normal(size=len(Z))
    rates = 70 * np.sqrt(0.3 * (1 + Z) ** 3 + 0.7) + noise
    sides = {
        "Gaussian": [(-5, 5), (-5, 5)],
        "eggbox": [(0, 10 * np.pi), (0, 10 * np.pi)],
        "H(z)": [(0.1, 0.5), (0.4, 0.9)],
    }
    found = {}
    for kind, (name, side) in enumerate(sides.items()):
        low, high = np.array(side, float).T
        found[name] = conditioned_model(toy, {"kind": np.array(kind), "low": low, "high": high, "rates": rates}), side
    return found


def quadrature(conditioned, sides, cells=400):
    """Log evidence, and mean and standard deviation of the first coordinate's posterior, by a fine grid."""
    axes = [low + (high - low) * (np.arange(cells) + 0.5) / cells for low, high in sides]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)

    values = np.asarray(_on_grid(conditioned, jnp.asarray(grid, jnp.float32)), np.float64)
    weights = special.softmax(values)
    mean = weights @ grid[:, 0]
    return special.logsumexp(values) - 2 * np.log(cells), mean, np.sqrt(weights @ (grid[:, 0] - mean) ** 2)


@eqx.filter_jit
def _on_grid(conditioned, grid):
    return jax.vmap(lambda x: conditioned.log_likelihood(conditioned.unconstrain({"x": x})))(grid)


def compared(conditioned, sides, accuracy):
    """Plain and neural nested sampling of one problem: likelihoods that each took, and the second's errors."""
    exact, mean, spread = quadrature(conditioned, sides)
    plain = NestedSampling(num_live=NUM_LIVE)(conditioned, key=jax.random.key(1))
    neural = NeuralNestedSampling(num_live=NUM_LIVE, accuracy=accuracy)(conditioned, key=jax.random.key(1))
    weights = special.softmax(neural.log_weights).ravel()
    return {
        "share of likelihoods": neural.statistics["num_evaluations"].sum() / plain.statistics["num_evaluations"].sum(),
        "evidence off in errors": abs(neural.log_evidence - exact) / neural.log_evidence_error,
        "evidence off": abs(neural.log_evidence - exact),
        "mean off in spreads": abs(weights @ neural["x"][0, :, 0] - mean) / spread,
    }


def check(*, control: bool = False) -> Evidence:
    """Networks against plain runs and quadrature; the control never lets a network in, by an accuracy out of reach."""
    found = {name: compared(*p, 1e-9 if control else 0.05) for name, p in problems().items()}
    shares = [f["share of likelihoods"] for f in found.values()]
    # Three errors: one false alarm in a hundred for three problems. Means of some 400 draws: five errors.
    right = all(f["evidence off in errors"] < 3 and f["mean off in spreads"] < 0.25 for f in found.values())
    said = "; ".join(
        f"{name}: log evidence off by {f['evidence off']:.2f} ({f['evidence off in errors']:.1f} standard errors), "
        f"{f['share of likelihoods']:.0%} of the likelihoods"
        for name, f in found.items()
    )
    shown = f"{said} of plain nested sampling (below 100%, and under 3 standard errors, was to be shown)"
    numbers = {f"{name}: {k}": round(float(v), 4) for name, f in found.items() for k, v in f.items()}
    return Evidence(bool(right and max(shares) < 1), shown, numbers)
