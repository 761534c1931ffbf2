"""Evidences of sequential Monte Carlo and nested sampling against exact ones: do they keep to the errors they state?

    python benchmarks/evidence.py [--runs 100] [--engines smc nested]

Each engine runs with its defaults on each model with the keys 0 to 99. Counted are the runs whose log evidence is
within two of their own standard errors of the exact one: of normal errors that are rightly stated these are 95 of 100,
and under 89 come by chance once in 200 times. The largest stated error is to stay under 0.2 nats. Neural nested
sampling, which trains networks in each run, joins when it is named.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from record import record
from scipy import special, stats

from bayeslens.core.conditioned_model import ConditionedModel, conditioned_model
from bayeslens.core.engine import Engine
from bayeslens.inference.enumeration import marginalize
from bayeslens.inference.nested_sampling import NestedSampling
from bayeslens.inference.neural_nested_sampling import NeuralNestedSampling
from bayeslens.inference.sequential_monte_carlo import SMC

ENGINES = {"smc": SMC(), "nested": NestedSampling(), "neural_nested": NeuralNestedSampling()}
RNG = np.random.default_rng(0)
Y = RNG.normal(1.5, 1.0, 20)
X = RNG.normal(size=(40, 5))
Z = X @ np.array([1.0, -0.5, 0.0, 2.0, 0.3]) + 0.7 * RNG.normal(size=40)
COUNTS = RNG.poisson(3.5, 15)
TRIALS, SUCCESSES = np.array([20, 12, 30]), np.array([13, 9, 17])


def normal_mean(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape), obs=y)


def linear_regression(x, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ beta, 0.7), obs=y)


def gamma_poisson(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 0.5))
    numpyro.sample("y", dist.Poisson(rate).expand(y.shape), obs=y)


def beta_binomial(trials, y):
    share = numpyro.sample("share", dist.Beta(2.0, 2.0))
    numpyro.sample("y", dist.Binomial(trials, share), obs=y)


def two_modes(height):
    """A likelihood that integrates to one, of two narrow peaks, under a uniform prior on a square of 20 by 20."""
    x = numpyro.sample("x", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    low = dist.Normal(-4.0, 0.2).log_prob(x).sum() + jnp.log(0.25)
    high = dist.Normal(4.0, 0.2).log_prob(x).sum() + jnp.log(0.75)
    numpyro.factor("likelihood", jnp.logaddexp(low, high) + height)


def outliers(y):
    """A normal mean; each observation is an outlier or not, which is summed out before an engine sees the model."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("rows", len(y)):
        outlier = numpyro.sample("outlier", dist.Bernoulli(0.2))
        numpyro.sample("y", dist.Normal(mu, jnp.where(outlier == 1, 5.0, 1.0)), obs=y)


def exact_outliers(y: np.ndarray) -> float:
    """The sum over all assignments of which are outliers, each with its conjugate evidence."""
    terms = []
    for number in range(2 ** len(y)):
        which = (number >> np.arange(len(y))) & 1
        covariance = np.diag(np.where(which, 25.0, 1.0)) + 9.0
        prior = stats.bernoulli.logpmf(which, 0.2).sum()
        terms.append(prior + stats.multivariate_normal.logpdf(y, np.zeros(len(y)), covariance))
    return float(special.logsumexp(terms))


def problems() -> dict[str, tuple[ConditionedModel, float]]:
    """Models with their data, and exact log evidences."""
    total, n = COUNTS.sum(), len(COUNTS)
    of_counts = 2 * np.log(0.5) + special.gammaln(2 + total) - (2 + total) * np.log(0.5 + n)
    successes, failures = SUCCESSES.sum(), (TRIALS - SUCCESSES).sum()
    of_successes = special.betaln(2 + successes, 2 + failures) - special.betaln(2, 2)
    log_choices = -special.betaln(SUCCESSES + 1, TRIALS - SUCCESSES + 1) - np.log(TRIALS + 1)
    some = Y[:8] * np.array([1, 1, 4, 1, 1, -3, 1, 1])
    normal = stats.multivariate_normal.logpdf

    def made(model: Callable, **data: np.ndarray) -> ConditionedModel:
        return conditioned_model(model, data)

    return {
        "normal mean": (made(normal_mean, y=Y), normal(Y, np.zeros(20), np.eye(20) + 100)),
        "linear regression, 5 slopes": (
            made(linear_regression, x=X, y=Z),
            normal(Z, np.zeros(40), X @ X.T + 0.49 * np.eye(40)),
        ),
        "gamma-Poisson": (made(gamma_poisson, y=COUNTS), of_counts - special.gammaln(COUNTS + 1).sum()),
        "beta-binomial": (made(beta_binomial, trials=TRIALS, y=SUCCESSES), of_successes + log_choices.sum()),
        "two modes": (made(two_modes, height=np.array(0.0)), -np.log(400)),
        "outliers, summed out": (made(marginalize(outliers), y=some), exact_outliers(some)),
    }


def measure(engine: Engine, conditioned: ConditionedModel, exact: float, runs: int) -> dict:
    """How far the evidences of all runs are from the exact one, in nats and in their own errors."""
    engine(conditioned, key=jax.random.key(runs))  # compiles
    began = time.perf_counter()
    found = [engine(conditioned, key=jax.random.key(seed)) for seed in range(runs)]
    seconds = time.perf_counter() - began
    off = np.array([p.log_evidence for p in found]) - exact
    errors = np.array([p.log_evidence_error for p in found])
    return {
        "exact": round(float(exact), 4),
        "within_two_errors": int((np.abs(off) <= 2 * errors).sum()),
        "runs": runs,
        "mean_deviation": round(float(off.mean()), 4),
        "root_mean_square_deviation": round(float(np.sqrt((off**2).mean())), 4),
        "mean_stated_error": round(float(errors.mean()), 4),
        "largest_stated_error": round(float(errors.max()), 4),
        "mean_evaluations": round(float(np.mean([p.statistics["num_evaluations"].sum() for p in found]))),
        "runs_with_warnings": sum(bool(p.warnings) for p in found),
        "seconds_per_run": round(seconds / runs, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--engines", nargs="+", default=["smc", "nested"], choices=ENGINES)
    chosen = parser.parse_args()
    for engine in chosen.engines:
        results = {}
        for name, (conditioned, exact) in problems().items():
            results[name] = measure(ENGINES[engine], conditioned, exact, chosen.runs)
            print(engine, name, json.dumps(results[name]), flush=True)
        record("evidence", {engine: results}, keep_others=True)


if __name__ == "__main__":
    main()
