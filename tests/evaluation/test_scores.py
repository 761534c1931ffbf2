"""Scores: closed forms against quadrature, propriety, and rounding cells."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from scipy.integrate import quad

from bayeslens.core.distribution import take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.quantile import cdf, quantile
from bayeslens.core.transformed import Dequantized
from bayeslens.evaluation.scores import (
    LEVELS,
    brier_loss,
    coverage,
    crps_loss,
    crps_loss_from_quantiles,
    crps_loss_from_samples,
    interval_loss,
    log_score,
    pit,
)

WEIGHTS, LOC, SCALE = np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.5, 1.5])
MIXTURE = dist.MixtureSameFamily(dist.CategoricalProbs(WEIGHTS[None]), dist.Normal(LOC[None], SCALE[None]))
CLOSED = {
    "normal": (dist.Normal(np.array([1.0]), 2.0), st.norm(1, 2).cdf),
    "lognormal": (dist.LogNormal(np.array([0.2]), 0.7), st.lognorm(0.7, scale=np.exp(0.2)).cdf),
    "laplace": (dist.Laplace(np.array([1.0]), 2.0), st.laplace(1, 2).cdf),
    "mixture": (MIXTURE, lambda y: WEIGHTS @ st.norm(LOC, SCALE).cdf(y)),
}
OTHERS = {
    "student": (dist.StudentT(5.0, np.array([1.0]), 2.0), st.t(5, 1, 2).cdf),
    "gamma": (dist.Gamma(np.array([3.0]), 0.5), st.gamma(3, scale=2).cdf),
}


def crps_by_quadrature(cdf, y):
    """Integral of (F(x) - 1{x >= y})^2."""
    below = quad(lambda x: cdf(x) ** 2, -80, y, points=[y - 3, y - 0.5], limit=500)[0]
    above = quad(lambda x: (1 - cdf(x)) ** 2, y, 80, points=[y + 0.5, y + 3], limit=500)[0]
    return below + above


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("y", [-2.0, 0.3, 1.0, 6.0])
def test_closed_crps_is_its_integral(name, y):
    distribution, cdf = CLOSED[name]
    if name == "lognormal" and y <= 0:
        pytest.skip("outside the support")
    np.testing.assert_allclose(crps_loss(distribution, np.array([y]))[0], crps_by_quadrature(cdf, y), rtol=1e-6)


@pytest.mark.parametrize("y", [-2.0, 0.0])
def test_crps_outside_the_support(y):
    """The log-normal puts everything above: CRPS is E X - y - E|X - X'| / 2."""
    distribution, cdf = CLOSED["lognormal"]
    np.testing.assert_allclose(crps_loss(distribution, np.array([y]))[0], crps_by_quadrature(cdf, y), rtol=1e-6)


@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_crps_from_quantiles_is_near(name):
    distribution, cdf = (CLOSED | OTHERS)[name]
    for y in (0.3, 3.0):
        got = crps_loss_from_quantiles(quantile(distribution, LEVELS), LEVELS, np.array([y]))[0]
        np.testing.assert_allclose(got, crps_by_quadrature(cdf, y), rtol=0.03, atol=0.005)
        np.testing.assert_allclose(crps_loss(distribution, np.array([y]))[0], got, rtol=0.03, atol=0.005)


def test_crps_from_samples():
    """Unbiased: the mean over 400 sets of 10 draws is within 4 standard errors (false alarm rate 6e-5)."""
    draws = np.random.default_rng(0).normal(1.0, 2.0, (10, 400))
    losses = crps_loss_from_samples(draws, np.full(400, 0.5))
    expected = crps_loss(dist.Normal(np.array([1.0]), 2.0), np.array([0.5]))[0]
    assert abs(losses.mean() - expected) < 4 * losses.std() / 20
    # The definition, pair by pair.
    x = draws[:, 0]
    pairs = np.abs(x[:, None] - x).sum() / (10 * 9)
    np.testing.assert_allclose(losses[0], np.abs(x - 0.5).mean() - pairs / 2)
    with pytest.raises(InputError, match="two draws"):
        crps_loss_from_samples(np.zeros((1, 3)), np.zeros(3))


TRUTH = dist.Normal(np.array([1.0]), 2.0)
GRID = np.linspace(-15, 17, 4001)
DENSITY = st.norm(1, 2).pdf(GRID) * (GRID[1] - GRID[0])
RIVALS = [dist.Normal(np.array([1.3]), 2.0), dist.Normal(np.array([1.0]), 2.3), dist.Normal(np.array([1.0]), 1.7)]
RIVALS += [dist.Laplace(np.array([1.0]), 1.5), dist.StudentT(4.0, np.array([1.0]), 1.7)]


def expected(loss, forecast):
    """Expectation of a loss of the forecast under the truth, by quadrature."""
    return DENSITY @ loss(take_rows(forecast, np.zeros(len(GRID), int)), GRID)


@pytest.mark.parametrize(
    "loss",
    [
        lambda d, y: -log_score(d, y),
        lambda d, y: -log_score(d, np.round(y), 1.0),
        lambda d, y: crps_loss(d, y),
    ],
    ids=["log", "cell", "crps"],
)
def test_truth_has_the_best_expected_score(loss):
    best = expected(loss, TRUTH)
    assert all(expected(loss, rival) > best + 1e-4 for rival in RIVALS)


def test_true_interval_has_the_least_expected_loss():
    low, high = st.norm(1, 2).interval(0.9)

    def mean_loss(low, high):
        return DENSITY @ interval_loss(np.full(len(GRID), low), np.full(len(GRID), high), GRID, 0.9)

    best = mean_loss(low, high)
    assert all(mean_loss(low + a, high + b) > best for a, b in ((0.3, 0), (-0.3, 0), (0, 0.3), (0, -0.3)))


def test_brier_is_proper_and_between_zero_and_two():
    truth = np.array([0.2, 0.5, 0.3])

    def mean_loss(forecast):
        return truth @ brier_loss(np.tile(forecast, (3, 1)), np.arange(3))

    rivals = np.random.default_rng(0).dirichlet(np.ones(3), 200)
    assert all(mean_loss(r) >= mean_loss(truth) for r in rivals)
    np.testing.assert_allclose(brier_loss(np.array([[1.0, 0.0], [0.0, 1.0]]), [0, 0]), [0.0, 2.0])


@pytest.mark.parametrize("step", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_cells_sum_to_one(name, step):
    distribution, _ = (CLOSED | OTHERS)[name]
    cells = np.arange(-4000, 4001) * step
    cells = cells[np.abs(cells) <= 400]
    repeated = take_rows(distribution, np.zeros(len(cells), int))
    np.testing.assert_allclose(np.exp(log_score(repeated, cells, step)).sum(), 1.0, atol=1e-4)


def test_far_cells_keep_their_digits():
    # The difference of two cdfs is zero here; the density over the cell is not.
    distribution = dist.Normal(np.zeros(1), 1.0)
    for y in (9.0, -9.0, 30.0):
        near, far = st.norm.logsf(abs(y) + np.array([-0.05, 0.05]))
        inside = near + np.log1p(-np.exp(far - near))
        np.testing.assert_allclose(log_score(distribution, np.array([y]), 0.1)[0], inside, rtol=1e-3)


def test_counts_and_cells_are_one_measure():
    counts = np.array([0.0, 3.0, 7.0])
    poisson = dist.Poisson(np.full(3, 2.5))
    expected = st.poisson(2.5).logpmf(counts)
    np.testing.assert_allclose(log_score(poisson, counts, 1.0), expected)
    np.testing.assert_allclose(log_score(Dequantized(poisson), counts, 1.0), expected, atol=1e-6)
    # Without a step a cell one wide has its probability as its density.
    np.testing.assert_allclose(log_score(Dequantized(poisson), counts), expected, atol=1e-6)


def test_pit_of_truth_is_uniform():
    """Kolmogorov-Smirnov with a fixed seed; false alarm rate 1e-4."""
    rng = np.random.default_rng(0)
    loc, scale = rng.normal(size=3000), rng.gamma(2, size=3000) + 0.1
    y = rng.normal(loc, scale)
    assert st.kstest(pit(dist.Normal(loc, scale), y), "uniform").pvalue > 1e-4
    np.testing.assert_allclose(pit(dist.Normal(loc, scale), y), cdf(dist.Normal(loc, scale), y))


def test_interval_loss_and_coverage():
    np.testing.assert_allclose(interval_loss([0, 0, 0], [1, 1, 1], [0.5, -1, 3], 0.8), [1, 11, 21])
    assert coverage([0, 0], [1, 1], [0.0, 1.0])[0] == 1.0  # ends belong
