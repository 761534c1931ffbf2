"""Scores: closed forms against quadrature, propriety, and rounding cells."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from scipy.integrate import quad

from bayeslens.core.distribution import take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.foreign import Empirical
from bayeslens.core.quantiles import cdf, quantile
from bayeslens.core.transformed import Dequantized
from bayeslens.evaluation.scores import (
    LEVELS,
    brier_loss,
    coverage,
    crps_loss,
    crps_loss_from_quantiles,
    crps_loss_from_samples,
    dawid_sebastiani_loss,
    interval_loss,
    log_score,
    pit,
    quantile_loss,
    ranked_probability_loss,
    spherical_score,
    threshold_weighted_crps_loss,
)

WEIGHTS, LOC, SCALE = np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.5, 1.5])
MIXTURE = dist.MixtureSameFamily(dist.CategoricalProbs(WEIGHTS[None]), dist.Normal(LOC[None], SCALE[None]))
CLOSED = {
    "normal": (dist.Normal(np.array([1.0]), 2.0), st.norm(1, 2).cdf),
    "lognormal": (dist.LogNormal(np.array([0.2]), 0.7), st.lognorm(0.7, scale=np.exp(0.2)).cdf),
    "laplace": (dist.Laplace(np.array([1.0]), 2.0), st.laplace(1, 2).cdf),
    "mixture": (MIXTURE, lambda y: st.norm.cdf(np.asarray(y)[..., None], LOC, SCALE) @ WEIGHTS),
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


def test_crps_of_the_empirical_distribution_is_its_integral():
    draws = np.array([[0.0], [1.0], [1.0], [4.0]])
    for y in (-2.0, 1.0, 2.5, 6.0):
        # (F(z) - 1{y <= z})^2 is constant between draws and outcome.
        edges = np.unique([*draws[:, 0], y])
        share = (draws[:, 0] <= edges[:-1, None]).mean(1)
        exact = np.diff(edges) @ (share - (y <= edges[:-1])) ** 2
        np.testing.assert_allclose(crps_loss_from_samples(draws, np.array([y]), fair=False), exact)
    np.testing.assert_array_equal(
        crps_loss(Empirical(draws.T), np.array([2.0])), crps_loss_from_samples(draws, np.array([2.0]))
    )
    with pytest.raises(InputError, match="use the CRPS"):
        log_score(Empirical(draws.T), np.array([0.0]))


RANGES = [(-np.inf, np.inf), (2.0, np.inf), (-np.inf, 0.5), (-0.5, 2.0), (6.0, np.inf)]


def integral(function, low, high):
    """By Gauss and Legendre, 5 nodes in each of 400 panels."""
    nodes, weights = np.polynomial.legendre.leggauss(5)
    edges = np.linspace(low, high, 401)
    half = np.diff(edges)[:, None] / 2
    return (half * weights * function(edges[:-1, None] + half * (1 + nodes))).sum()


@pytest.mark.parametrize(("lower", "upper"), RANGES)
@pytest.mark.parametrize("name", ["normal", "laplace", "mixture", "student"])
def test_threshold_weighted_crps_is_its_integral(name, lower, upper):
    """To rounding in closed form; elsewhere to half a hundredth of the scale, which is what 181 levels reach."""
    distribution, cdf = (CLOSED | OTHERS)[name]
    for y in (-2.0, 1.3, 7.0):
        low, high = np.clip([lower, upper], -80, 80)
        middle = np.clip(y, low, high)
        exact = integral(lambda z: cdf(z) ** 2, low, middle) + integral(lambda z: (1 - cdf(z)) ** 2, middle, high)
        got = threshold_weighted_crps_loss(distribution, np.array([y]), lower=lower, upper=upper)[0]
        np.testing.assert_allclose(got, exact, **({"rtol": 1e-6} if name == "normal" else {"atol": 0.005}))


def test_threshold_weighted_crps_of_draws_and_parts():
    rng = np.random.default_rng(0)
    draws, y = rng.normal(size=(50, 3)), np.array([-1.0, 0.2, 3.0])
    clipped = np.clip(draws, 0.0, 1.0)
    expected = np.abs(clipped - np.clip(y, 0, 1)).mean(0) - np.abs(clipped[:, None] - clipped).sum((0, 1)) / 50 / 49 / 2
    got = threshold_weighted_crps_loss(Empirical(draws.T), y, lower=0.0, upper=1.0)
    np.testing.assert_allclose(got, expected)
    parts = [(-np.inf, 0.0), (0.0, 1.0), (1.0, np.inf)]
    normal = dist.Normal(np.zeros(3), 1.0)
    for d in (normal, Empirical(draws.T)):
        total = sum(threshold_weighted_crps_loss(d, y, lower=a, upper=b) for a, b in parts)
        np.testing.assert_allclose(total, crps_loss(d, y), atol=1e-12)
    with pytest.raises(InputError, match="lower must be below upper"):
        threshold_weighted_crps_loss(normal, y, lower=1.0, upper=0.0)


@pytest.mark.parametrize("rival", RIVALS)
def test_truth_has_the_least_expected_tail_loss(rival):
    tail = lambda d, y: threshold_weighted_crps_loss(d, y, lower=2.0)  # noqa: E731
    assert expected(tail, rival) > expected(tail, TRUTH) + 1e-4


def test_scoring_only_extreme_outcomes_is_improper():
    """The forecaster's dilemma (Lerch et al. 2017): among rows whose outcome was extreme, a wrong forecast wins."""
    extreme = GRID > 3.5
    alarmist = dist.Normal(np.array([4.0]), 2.0)
    losses = [crps_loss(take_rows(d, np.zeros(extreme.sum(), int)), GRID[extreme]) for d in (TRUTH, alarmist)]
    assert DENSITY[extreme] @ losses[1] < DENSITY[extreme] @ losses[0]


@pytest.mark.parametrize(
    "loss",
    [lambda p, k: -spherical_score(p, k), ranked_probability_loss],
    ids=["spherical", "ranked probability"],
)
def test_class_scores_are_strictly_proper(loss):
    truth = np.array([0.2, 0.5, 0.3])
    rivals = np.concatenate([np.random.default_rng(0).dirichlet(np.ones(3), 200), truth[None] + [[0.01, -0.01, 0]]])
    mean_loss = [truth @ loss(np.tile(p, (3, 1)), np.arange(3)) for p in rivals]
    assert min(mean_loss) > truth @ loss(np.tile(truth, (3, 1)), np.arange(3))


def test_ranked_probability_is_the_crps_of_the_codes():
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 5)
    labels = np.array([0, 1, 2, 3, 1])
    distance = np.abs(np.arange(4)[:, None] - np.arange(4))
    expected = (probs * distance[labels]).sum(1) - np.einsum("ri,ij,rj->r", probs, distance, probs) / 2
    np.testing.assert_allclose(ranked_probability_loss(probs, labels), expected)


def test_quantile_loss():
    y = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    mean_loss = [quantile_loss(np.full(5, q), 0.7, y).mean() for q in y]
    assert np.argmin(mean_loss) == 3  # the 0.7-quantile of five values
    levels, quantiles = np.array([0.05, 0.95]), np.array([[-1.0, 2.0]] * 5)
    both = sum(quantile_loss(quantiles[:, i], levels[i], y) for i in (0, 1))
    np.testing.assert_allclose(2 / 0.1 * both, interval_loss(-1.0, 2.0, y, 0.9))  # the interval loss is their sum
    with pytest.raises(InputError, match="between 0 and 1"):
        quantile_loss(y, 1.0, y)


def test_dawid_sebastiani_is_the_normal_log_score():
    loc, scale, y = np.array([1.0, -2.0]), np.array([0.5, 3.0]), np.array([0.0, 4.0])
    expected = -2 * st.norm(loc, scale).logpdf(y) - np.log(2 * np.pi)
    np.testing.assert_allclose(dawid_sebastiani_loss(dist.Normal(loc, scale), y), expected)
    with pytest.raises(InputError, match="row 1 has the predicted variance 0"):
        dawid_sebastiani_loss(Empirical(np.array([[0.0, 1.0], [2.0, 2.0]])), y)


def test_log_score_of_vectors():
    covariance = np.array([[2.0, 0.6], [0.6, 1.0]])
    y = np.array([[0.0, 1.0], [2.0, -1.0]])
    got = log_score(dist.MultivariateNormal(np.zeros((2, 2)), covariance), y)
    np.testing.assert_allclose(got, st.multivariate_normal(np.zeros(2), covariance).logpdf(y), rtol=1e-5)
