"""Power and level of posterior checks on a conjugate Gaussian with correlated parameters.

    python benchmarks/evaluation_posterior.py [--repeats 200] [--simulations 500] [--draws 200]

Parameters have a Gaussian prior with correlations of one half; data are the parameters plus noise. Draws are of the
exact posterior, with standard deviations times a factor. For each factor the share of repeats in which a check rejects
at the 5% level is printed with its binomial standard error: simulation-based calibration of all parameters and their
Mahalanobis distance together, the folded ranks of the parameters alone (the smallest p-value times the number of
parameters), TARP with references that depend on the data and with uniform ones, and, for comparison, the
Kolmogorov-Smirnov test of ranks and of TARP's shares as other software runs it.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import numpy as np
from record import record
from scipy import stats

from bayeslens.evaluation.random_points import tarp
from bayeslens.evaluation.rank_tests import simulation_based_calibration

CASES = ((5, 1.0), (5, 0.9), (5, 1.1), (1, 1.0), (1, 0.75), (1, 0.9))
NOISE_VARIANCE = 0.5


def simulations(
    rng: np.random.Generator, dimension: int, factor: float, count: int, draws: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, data, and draws of posteriors whose standard deviations are `factor` times the right ones."""
    prior = 0.5 * np.ones((dimension, dimension)) + 0.5 * np.eye(dimension)
    parameters = rng.multivariate_normal(np.zeros(dimension), prior, count)
    data = parameters + np.sqrt(NOISE_VARIANCE) * rng.normal(size=parameters.shape)
    covariance = np.linalg.inv(np.linalg.inv(prior) + np.eye(dimension) / NOISE_VARIANCE)
    noise = rng.normal(size=(count, draws, dimension)) @ np.linalg.cholesky(covariance).T
    return parameters, data, (data @ covariance / NOISE_VARIANCE)[:, None] + factor * noise


def p_values(repeat: int, dimension: int, factor: float, count: int, draws: int) -> dict[str, float]:
    """Of each check, for one set of simulations."""
    rng, key = np.random.default_rng([repeat, dimension, int(100 * factor)]), jax.random.key(repeat)
    parameters, data, posterior = simulations(rng, dimension, factor, count, draws)
    began = time.perf_counter()
    ranked = simulation_based_calibration(parameters, posterior, key=key, thin=1)
    seconds = time.perf_counter() - began
    near, far = tarp(parameters, posterior, key=key, data=data), tarp(parameters, posterior, key=key)
    level = (ranked.ranks[:, :dimension] + rng.random((count, dimension))) / (ranked.draws + 1)
    uniform = (far.ranks + rng.random(count)) / (far.draws + 1)
    return {
        "sbc": ranked.p_value,
        "sbc folded ranks": min(1.0, dimension * ranked.tests.p_spread[:dimension].min()),
        "sbc Kolmogorov-Smirnov": min(1.0, dimension * min(stats.kstest(u, "uniform").pvalue for u in level.T)),
        "tarp": near.p_value,
        "tarp uniform references": far.p_value,
        "tarp uniform references, Kolmogorov-Smirnov": stats.kstest(uniform, "uniform").pvalue,
        "seconds of sbc": seconds,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args(argv)
    results = {"repeats": arguments.repeats, "simulations": arguments.simulations, "draws": arguments.draws}
    for dimension, factor in CASES:
        found = [
            p_values(r, dimension, factor, arguments.simulations, arguments.draws) for r in range(arguments.repeats)
        ]
        name = f"{dimension} parameters, standard deviations times {factor}"
        results[name] = {}
        for check in found[0]:
            values = np.array([f[check] for f in found])
            if check == "seconds of sbc":
                results[name][check] = round(float(np.median(values)), 3)
                continue
            share = float((values <= 0.05).mean())
            error = np.sqrt(share * (1 - share) / len(values))
            results[name][check] = {"rejected": round(share, 3), "standard_error": round(float(error), 3)}
        print(name, json.dumps(results[name]), flush=True)
    record("evaluation_posterior", results)


if __name__ == "__main__":
    main()
