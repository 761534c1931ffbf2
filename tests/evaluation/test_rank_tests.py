"""Ranks, bands and tests against enumeration and simulation; simulated posteriors against conjugate ones."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.evaluation import rank_tests as sbc
from bayeslens.evaluation.credible_coverage import expected_coverage
from bayeslens.evaluation.simulated_posteriors import LOG_JOINT, simulate_posteriors
from bayeslens.report.check_pictures import calibration_check_panels, coverage_panels
from bayeslens.report.pictures import lay_out

KEY = jax.random.key(0)


def gaussian(rng, rows=300, draws=60, dimension=3, factor=1.0, shift=0.0):
    """Parameters and draws whose posteriors have correlations 0.7 and standard deviations `factor` times the right."""
    root = np.linalg.cholesky(0.7 + 0.3 * np.eye(dimension))
    mean = rng.normal(size=(rows, dimension))
    parameters = mean + rng.normal(size=mean.shape) @ root.T
    noise = rng.normal(size=(rows, draws, dimension)) @ root.T
    return parameters, mean[:, None] + shift + factor * noise


def test_ranks_count_the_smaller_items():
    items = np.random.default_rng(0).normal(size=(4, 9, 2))
    ranks = sbc.ranks_of_all(items, np.random.default_rng(1))
    np.testing.assert_array_equal(ranks, (items[:, :, None] > items[:, None]).sum(2))


def test_ties_are_broken_evenly():
    ranks = sbc.ranks_of_all(np.zeros((6000, 3, 1)), np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(ranks[..., 0], 1), np.tile(np.arange(3), (6000, 1)))
    # binomial shares of 6000; false alarms below 1e-5
    assert abs((ranks[:, 0, 0] == 0).mean() - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 6000)


def test_the_chance_of_leaving_the_band_by_enumeration():
    rows, size = 5, 4
    found = sbc.uniform_ecdf(rows, size)
    least = []
    for ranks in itertools.product(range(size), repeat=rows):
        below = [sum(r < c for r in ranks) for c in found.cuts]
        least.append(found.tails[np.arange(len(below)), below].min())
    for level in (0.1, 0.4):
        inside = found.tails > level
        exact = np.mean([v <= level for v in least])
        np.testing.assert_allclose(sbc._leaving(inside, found.probability, rows), exact, atol=1e-12)


def test_bands_hold_all_of_the_curve_as_often_as_they_say():
    rows, size, repeats = 200, 1000, 4000
    uniform = sbc.uniform_ecdf(rows, size)
    ranks = np.sort(np.random.default_rng(0).integers(size, size=(repeats, rows)), 1)
    below = np.stack([np.searchsorted(r, uniform.cuts) for r in ranks]) / rows
    lower, upper = uniform.band(0.9)
    inside = ((below >= lower - 1e-9) & (below <= upper + 1e-9)).all(1).mean()
    # discrete counts make bands a little wide; standard error 0.005, false alarms below 1e-4
    assert 0.88 < inside < 0.94
    p_values = uniform.p_value(uniform.tails[np.arange(len(uniform.cuts)), (below * rows).round().astype(int)].min(1))
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p_values <= level).mean() < level + 4 * np.sqrt(level / repeats)
        assert (p_values <= level).mean() > 0.6 * level - 4 * np.sqrt(level / repeats)


def test_bands_are_wider_than_pointwise_ones_and_narrower_than_kolmogorov_smirnov():
    lower, upper = sbc.uniform_ecdf(500, 1000).band(0.95)
    half = 24  # at one half
    width = (upper - lower)[half] / 2
    assert stats.norm.ppf(0.975) * np.sqrt(0.25 / 500) < width < 1.2 * stats.kstwo.ppf(0.95, 500)
    assert (upper - lower)[1] / 2 < 0.5 * stats.kstwo.ppf(0.95, 500)


def test_p_values_of_uniform_ranks_are_uniform():
    ranks = np.random.default_rng(0).integers(200, size=(4000, 100, 1))
    for column, p_values in enumerate(sbc._statistics(ranks, 200)[:, 0].T):
        for level in (0.01, 0.05, 0.3):
            error = 4 * np.sqrt(level / 4000)  # false alarms below 1e-3
            assert (p_values <= level).mean() < level + error, column
            assert (p_values <= level).mean() > (0.6 if column == 2 else 0.9) * level - error, column


@pytest.mark.parametrize("repeat", [0, 1, 2])
def test_folded_ranks_are_nearly_the_chi_squared_test_of_known_posteriors(repeat):
    parameters, draws = gaussian(np.random.default_rng(repeat), 500, 200, 1, factor=0.85)
    standardized = (parameters - np.random.default_rng(repeat).normal(size=(500, 1)))[:, 0] / 0.85
    tests = sbc.simulation_based_calibration(parameters, draws, key=KEY, thin=1).tests
    # ranks among 200 draws cut the tails, which costs less than a tenth
    np.testing.assert_allclose(tests.spread[0] ** 2, (standardized**2).mean(), rtol=0.08)
    exact = 2 * stats.chi2.sf((standardized**2).sum(), 500)
    assert exact < tests.p_spread[0] < exact**0.6 and tests.p_location[0] > 0.01


def test_the_level_holds_for_dependent_parameters():
    rejected = []
    for repeat in range(60):
        rng = np.random.default_rng(repeat)
        found = sbc.simulation_based_calibration(*gaussian(rng, 60, 40), key=jax.random.key(repeat), thin=1)
        rejected.append(found.p_value <= 0.2)
    # exact level 0.2; binomial(60), false alarms 1e-3 on either side
    assert stats.binom.ppf(1e-3, 60, 0.2) <= sum(rejected) <= stats.binom.ppf(1 - 1e-3, 60, 0.2)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"factor": 0.85}, "narrow"), ({"factor": 1.2}, "wide"), ({"shift": 0.3}, "too high")],
)
def test_wrong_posteriors_are_found_and_named(wrong, what):
    found = sbc.simulation_based_calibration(*gaussian(np.random.default_rng(0), **wrong), key=KEY, thin=1)
    assert found.p_value < 0.01 and what in found.verdict
    assert str(found).startswith(" ") and "adjusted_p_value" in found.table
    lay_out(calibration_check_panels(found), 2)


def test_location_and_spread_are_those_of_the_posterior():
    parameters, draws = gaussian(np.random.default_rng(0), 2000, 400, factor=0.8, shift=-0.4)
    tests = sbc.simulation_based_calibration(parameters, draws, key=KEY, thin=1).tests
    # parameters lie 0.4 / 0.8 above; the spread of normal scores is that of N(0.5, 1 / 0.8)
    expected = np.sqrt((1 / 0.8) ** 2 + 0.5**2)
    assert (np.abs(tests.location[:3] - 0.5) < 5 * tests.location_error[:3]).all()  # false alarms below 1e-5
    assert (np.abs(tests.spread[:3] - expected) < 0.06).all()  # ranks among 400 draws cut the tails


def test_markov_chains_are_thinned():
    rng = np.random.default_rng(0)
    parameters, draws = gaussian(rng, 200, 1000, 1)
    mean = draws.mean(1, keepdims=True)
    chain = np.empty_like(draws)
    chain[:, 0] = draws[:, 0] - mean[:, 0]
    for t in range(1, 1000):
        chain[:, t] = 0.9 * chain[:, t - 1] + np.sqrt(1 - 0.81) * (draws[:, t] - mean[:, 0])
    found = sbc.simulation_based_calibration(parameters, chain + mean, key=KEY)
    assert 30 < found.draws < 80  # the autocorrelation time is 19
    assert sbc.simulation_based_calibration(parameters, draws, key=KEY).draws > 300


def test_ranks_of_density_find_a_posterior_that_ignores_the_data():
    rng = np.random.default_rng(0)
    parameters, prior = rng.normal(size=200), rng.normal(size=(200, 50))
    data = parameters + 0.5 * rng.normal(size=200)
    items = np.concatenate([parameters[:, None], prior], 1)
    quantities = {"log likelihood": -((data[:, None] - items) ** 2) / 0.5}
    blind = sbc.simulation_based_calibration(parameters, prior, key=KEY, thin=1)
    seeing = sbc.simulation_based_calibration(parameters, prior, key=KEY, thin=1, quantities=quantities)
    assert blind.p_value > 0.05 and seeing.p_value < 0.01 and "log likelihood" in seeing.verdict


def test_expected_coverage_is_exact_for_highest_density_regions():
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=4000), 0.7 * rng.normal(size=(4000, 199))
    found = expected_coverage(-((truth / 0.7) ** 2) / 2, -((draws / 0.7) ** 2) / 2, key=KEY)
    exact = 2 * stats.norm.cdf(0.7 * stats.norm.ppf((1 + found.table.credibility) / 2)) - 1
    assert (np.abs(found.table.coverage - exact) < 5 * found.table.standard_error).all()  # false alarms below 1e-5
    assert found.p_value < 0.01 and "too seldom" in found.verdict and "prior" in str(found)
    lay_out(coverage_panels(found), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, d: sbc.simulation_based_calibration(p, d[:, :5], key=KEY), "at least 9 nearly independent"),
        (lambda p, d: sbc.simulation_based_calibration(p[:10], d[:10], key=KEY), "at least 20 simulations"),
        (lambda p, d: sbc.simulation_based_calibration(p, d[..., :1], key=KEY), "need draws of shape"),
        (lambda p, d: sbc.simulation_based_calibration(p, None, key=KEY), "give draws"),
        (lambda p, d: sbc.simulation_based_calibration(p, d, key=KEY, names=("a",)), "1 names"),
        (lambda p, d: sbc.simulation_based_calibration(p, d, key=KEY, thin=0), "thin must be"),
        (lambda p, d: sbc.simulation_based_calibration(p, d, key=KEY, quantities={"q": d[..., 0]}), "'q' needs shape"),
        (lambda p, d: sbc.simulation_based_calibration(np.where(np.arange(40)[:, None] == 7, np.nan, p), d, key=KEY),
         "simulation 7"),
        (lambda p, d: expected_coverage(p[:, 0], d[:30, :, 0], key=KEY), "need log densities"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=message):
        call(rng.normal(size=(40, 2)), rng.normal(size=(40, 30, 2)))


# ---- simulated posteriors ----------------------------------------------------------------------------------------


def line(x, y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    level = numpyro.sample("level", dist.Normal(1.0, 2.0))
    numpyro.sample("y", dist.Normal(level + x @ slope, 0.5), obs=y)


X = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
EXAMPLE = {"x": X, "y": np.zeros(6, np.float32)}


def exact_lens(factor=1.0, count=60):
    """The conjugate posterior of `line`, its standard deviations times a factor."""
    design = np.column_stack([np.ones(6), X])
    covariance = np.linalg.inv(np.diag([0.25, 1, 1]) + design.T @ design / 0.25)
    prior = np.array([0.25, 0, 0])

    def lens(observed, *, key):
        mean = covariance @ (prior + design.T @ observed["y"] / 0.25)
        noise = np.random.default_rng(np.asarray(jax.random.key_data(key))).normal(size=(count, 3))
        draws = mean + factor * noise @ np.linalg.cholesky(covariance).T
        return {"level": draws[:, 0], "slope": draws[:, 1:]}

    return lens


@pytest.fixture(scope="module")
def simulated():
    return simulate_posteriors(line, EXAMPLE, exact_lens(), key=KEY, count=200)


def test_simulations_are_of_the_model(simulated):
    assert simulated.names == ("level", "slope[0]", "slope[1]") and simulated.draws.shape == (200, 60, 3)
    residual = simulated.data - simulated.parameters[:, :1] - simulated.parameters[:, 1:] @ X.T
    assert abs(residual.std() - 0.5) < 5 * 0.5 / np.sqrt(2 * 1200)  # false alarms below 1e-5
    assert abs(simulated.parameters[:, 0].mean() - 1) < 5 * 2 / np.sqrt(200)


def test_log_joint_density_is_that_of_the_model(simulated):
    items = np.concatenate([simulated.parameters[:, None], simulated.draws], 1)[3]
    expected = stats.norm.logpdf(items[:, 0], 1, 2) + stats.norm.logpdf(items[:, 1:]).sum(1)
    expected += stats.norm.logpdf(simulated.data[3], items[:, :1] + items[:, 1:] @ X.T, 0.5).sum(1)
    np.testing.assert_allclose(simulated.quantities[LOG_JOINT][3], expected, rtol=1e-4)


def test_a_right_lens_passes_and_a_narrow_one_fails(simulated):
    assert sbc.simulation_based_calibration(simulated, key=KEY).p_value > 0.01  # false alarms 1%
    narrow = simulate_posteriors(line, EXAMPLE, exact_lens(0.8), key=KEY, count=200)
    assert sbc.simulation_based_calibration(narrow, key=KEY).p_value < 0.01


def test_an_engine_gives_the_conjugate_posterior():
    found = simulate_posteriors(line, EXAMPLE, "exact", key=KEY, count=2, draws=400)
    lens = simulate_posteriors(line, EXAMPLE, exact_lens(count=20_000), key=KEY, count=2)
    np.testing.assert_allclose(found.parameters, lens.parameters)  # the same simulations
    error = lens.draws.std(1) / np.sqrt(400)
    assert (np.abs(found.draws.mean(1) - lens.draws.mean(1)) < 5 * error).all()  # false alarms below 1e-5


def test_what_is_done_is_kept_when_interrupted():
    lens, calls = exact_lens(), []

    def stopping(observed, *, key):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return lens(observed, key=key)

    found = simulate_posteriors(line, EXAMPLE, stopping, key=KEY, count=200)
    assert len(found.parameters) == 4 and "interrupted after 4 of 200" in found.warnings[0]


def test_executors_and_posteriors_with_weights():
    from concurrent.futures import ThreadPoolExecutor

    def weighted(observed, *, key):
        draws = exact_lens()(observed, key=key)
        log_weights = np.where(np.arange(60) == 0, 0.0, -100.0)[None]
        return Posterior({n: v[None] for n, v in draws.items()}, log_weights)

    with ThreadPoolExecutor(1) as executor:
        found = simulate_posteriors(line, EXAMPLE, weighted, key=KEY, count=2, executor=executor)
    assert (np.ptp(found.draws, axis=1) == 0).all()  # one particle has all the weight


def improper(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def factors(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("f", -((y - mu) ** 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate_posteriors(improper, {"y": 0.0}, "exact", key=KEY, count=2), "improper"),
        (lambda: simulate_posteriors(factors, {"y": 0.0}, "exact", key=KEY, count=2), "no observed site"),
        (lambda: simulate_posteriors(line, EXAMPLE, exact_lens(), key=KEY, count=0), "count must be"),
        (lambda: simulate_posteriors(line, EXAMPLE, exact_lens(), key=KEY, count=2, draws=99), "has 60"),
        (lambda: simulate_posteriors(line, EXAMPLE, lambda o, key: {"level": np.zeros(9)}, key=KEY, count=2),
         r"lacks the sites \['slope'\]"),
    ],
)  # fmt: skip
def test_simulations_that_cannot_be(call, message):
    with pytest.raises(InputError, match=message):
        call()
