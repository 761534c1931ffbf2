"""Tests of accuracy with random points (TARP).

Claim: draws of posteriors, without their densities, are enough to see whether an inference is right. Around a random
reference point, the share of draws that are closer to it than the parameter that made the data is uniform for every
distribution of references if and only if the posterior is right. Where references depend on the data, this finds
posteriors that are too narrow, too wide or shifted, and also the prior given in place of the posterior, which passes
coverage by highest-density regions and every parameter's ranks.

Source: P. Lemos, A. Coogan, Y. Hezaveh, L. Perreault-Levasseur, "Sampling-based accuracy testing of posterior
estimators for general inference" (2023).
"""

from __future__ import annotations

import jax
import numpy as np
from scipy import stats

from bayeslens.evaluation.credible_coverage import expected_coverage
from bayeslens.evaluation.random_points import tarp
from bayeslens.evaluation.rank_tests import simulation_based_calibration
from bayeslens.gallery import Evidence

PAPER = "S441"
CLAIM = (
    "Coverage of balls around random points that depend on the data is right for the exact posterior alone; it finds "
    "the prior in place of the posterior, which coverage of highest-density regions does not."
)
NOT_CHECKED = (
    "The paper's learned posteriors of images and of gravitational lenses. Small shifts are seen better by ranks: one "
    "of a quarter of a standard deviation in every parameter was found in 4 of 10 runs."
)

DIMENSION, SIMULATIONS, DRAWS, REPEATS = 5, 500, 100, 30
NOISE_VARIANCE = 0.5
PRIOR = 0.5 * np.ones((DIMENSION, DIMENSION)) + 0.5 * np.eye(DIMENSION)
COVARIANCE = np.linalg.inv(np.linalg.inv(PRIOR) + np.eye(DIMENSION) / NOISE_VARIANCE)


def simulate(rng):
    """Correlated Gaussian parameters, and data that are the parameters with noise."""
    parameters = rng.multivariate_normal(np.zeros(DIMENSION), PRIOR, SIMULATIONS)
    return parameters, parameters + np.sqrt(NOISE_VARIANCE) * rng.normal(size=parameters.shape)


def posterior(rng, data, kind):
    """Draws, and the mean and covariance of each posterior: exact, or wrong in one way."""
    factor = {"10% too narrow": 0.9, "10% too wide": 1.1}.get(kind, 1.0)
    mean, covariance = data @ COVARIANCE / NOISE_VARIANCE, factor**2 * COVARIANCE
    if kind == "shifted":  # by half a standard deviation
        mean = mean + 0.5 * np.sqrt(np.diag(COVARIANCE))
    if kind == "prior":
        mean, covariance = np.zeros_like(data), PRIOR
    noise = rng.normal(size=(len(data), DRAWS, DIMENSION)) @ np.linalg.cholesky(covariance).T
    return mean[:, None] + noise, mean, covariance


def rejected(kind, references, repeats=REPEATS):
    """Share of repeats in which TARP rejects at the 5% level."""
    count = 0
    for repeat in range(repeats):
        rng = np.random.default_rng([repeat, 441])
        parameters, data = simulate(rng)
        draws, _, _ = posterior(rng, data, kind)
        seen = data if references == "from data" else None
        count += tarp(parameters, draws, key=jax.random.key(repeat), data=seen).p_value <= 0.05
    return count / repeats


def other_checks_of_the_prior():
    """p-values of highest-density coverage and of the ranks of parameters, for the prior as posterior."""
    rng = np.random.default_rng(441)
    parameters, data = simulate(rng)
    draws, mean, covariance = posterior(rng, data, "prior")
    density = stats.multivariate_normal(np.zeros(DIMENSION), covariance)
    by_density = expected_coverage(
        density.logpdf(parameters - mean), density.logpdf(draws - mean[:, None]), key=jax.random.key(0)
    )
    ranked = simulation_based_calibration(parameters, draws, key=jax.random.key(0), thin=1)
    return by_density.p_value, ranked.p_value


def check(*, control: bool = False) -> Evidence:
    """Rejections at the 5% level; the control takes references that do not look at the data."""
    references = "uniform" if control else "from data"
    exact = rejected("exact", references)
    wrong = {kind: rejected(kind, references, 10) for kind in ("10% too narrow", "10% too wide", "shifted", "prior")}
    by_density, by_ranks = other_checks_of_the_prior()
    # An exact test rejects more than this in one of a thousand runs.
    limit = stats.binom.ppf(0.999, REPEATS, 0.05) / REPEATS
    holds = exact <= limit and min(wrong.values()) >= 0.8 and wrong["prior"] == 1 and min(by_density, by_ranks) > 0.05
    numbers = {"exact": exact} | wrong | {"prior: p by highest density": by_density, "prior: p by ranks": by_ranks}
    shown = (
        f"with references {references}, TARP rejects the exact posterior in {exact:.0%} of runs (level 5%), "
        + ", ".join(f"{kind} in {share:.0%}" for kind, share in wrong.items())
        + f"; the prior passes highest-density coverage (p = {by_density:.2f}) and ranks (p = {by_ranks:.2f})"
    )
    return Evidence(bool(holds), shown, {n: float(v) for n, v in numbers.items()})
