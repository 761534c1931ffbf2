"""Parallel tempering against exact evidences, weights of modes, rejections and round trips; its parts by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import special, stats

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.nuts import NUTS
from bayeslens.inference.parallel_tempering import Exchanged, ParallelTempering, bridged_evidence, exchange, rounds
from bayeslens.inference.replica_exchange import Ladders, _exchanged, equal_rejection, joined, rejection_rates

KEY = jax.random.key(0)
Y = np.linspace(2.0, 4.0, 40)


def normal_model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", 40):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def tempered(beta):
    """Mean and standard deviation of prior * likelihood^beta."""
    precision = 0.01 + beta * len(Y)
    return beta * Y.sum() / precision, precision**-0.5


def log_likelihood(mu):
    squares = ((Y - Y.mean()) ** 2).sum() + len(Y) * (Y.mean() - mu) ** 2
    return -0.5 * squares - 0.5 * len(Y) * np.log(2 * np.pi)


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(normal_model, {"y": Y})


@pytest.fixture(scope="module")
def found(conditioned) -> Exchanged:
    return exchange(conditioned, ParallelTempering(num_rungs=16, num_samples=2000), key=KEY)


def batch_error(values):
    """Standard error of the mean of (scans, ..., chains), from ten parts of each of four chains."""
    parts = np.stack([p.mean(0) for p in np.array_split(values, 10)], -1)
    parts = np.moveaxis(parts, -2, -1).reshape(*parts.shape[:-2], -1)
    return parts.std(-1, ddof=1) / np.sqrt(parts.shape[-1])


def test_every_rung_draws_from_its_tempered_posterior(found):
    # Of log likelihoods on 16 rungs, by errors of 40 parts: false alarms below 1e-3 at five of them.
    mean, deviation = tempered(found.betas)
    squares = ((Y - Y.mean()) ** 2).sum() + len(Y) * ((Y.mean() - mean) ** 2 + deviation**2)
    exact = -0.5 * squares - 0.5 * len(Y) * np.log(2 * np.pi)
    error = batch_error(found.log_likelihood)
    assert (np.abs(found.log_likelihood.mean((0, 2)) - exact) < 5 * error).all()
    # The foot is drawn anew each time: 8,000 pairs of neighbours in time, five standard errors.
    foot = stats.norm.ppf(stats.rankdata(found.log_likelihood[:, 0]) / (found.log_likelihood[:, 0].size + 1))
    foot = foot.reshape(-1, 4)
    assert abs((foot[1:] * foot[:-1]).mean()) < 5 / np.sqrt(8000)
    assert found.betas[0] == 0 and found.betas[-1] == 1 and (np.diff(found.betas) > 0).all()
    draws = found.draws[..., 0].T
    assert abs(draws.mean() - mean[-1]) < 5 * batch_error(draws) < 0.02
    assert abs(draws.std() - deviation[-1]) < 0.1 * deviation[-1]


def test_rejections_are_those_of_independent_draws(found):
    rates = rejection_rates(found.log_likelihood, found.betas)

    def exact(lower, upper):
        grid = special.ndtri((np.arange(1000) + 0.5) / 1000)
        (mean, deviation), (other, spread) = tempered(lower), tempered(upper)
        below, above = mean + deviation * grid[:, None], other + spread * grid
        return 1 - np.exp(np.minimum((upper - lower) * (log_likelihood(below) - log_likelihood(above)), 0)).mean()

    expected = np.array([exact(*pair) for pair in zip(found.betas[:-1], found.betas[1:], strict=True)])
    # Errors of means of 8,000 numbers from 0 to 1, worth at least 1,000: five of them, and what quadrature misses.
    np.testing.assert_allclose(rates, expected, atol=5 * 0.5 / np.sqrt(1000))
    # The ladder was set to equal rejection by a round half as long: spread by the errors of both.
    assert np.abs(rates - rates.mean()).max() < 0.1


def round_trip_rate(found_or_trace, betas, reversible):
    """Draws of the prior that come up per scan, and the number expected (Syed et al. 2022, corollary 1)."""
    rates = rejection_rates(found_or_trace.log_likelihood, betas)
    expected = 1 / (2 * (len(rates) if reversible else 1) + 2 * (rates / (1 - rates)).sum())
    return found_or_trace.round_trips.mean(), expected


def test_round_trips_are_as_many_as_theory_says_and_reversible_exchanges_make_fewer(found, conditioned):
    rate, expected = round_trip_rate(found, found.betas, False)
    # Theory assumes that moves forget where they were; 8,000 scans give more than 800 trips: 15% is four errors.
    assert abs(rate / expected - 1) < 0.2
    ladders = Ladders(conditioned, 4, 16, KEY, reversible=True)
    for length in rounds(500):
        ladders.adapt(joined([ladders.run(np.full(8, 0.1)) for _ in range(0, length, 8)]))
    # Near the best step of a standard normal: the scales are those of the tempered posteriors.
    assert (np.abs(ladders.log_steps - np.log(1.3)) < np.log(2)).all()
    slow, expected_slow = round_trip_rate(joined([ladders.run() for _ in range(250)]), ladders.betas, True)
    assert abs(slow / expected_slow - 1) < 0.35  # 200 trips
    assert rate > 3 * slow


def test_evidence_of_a_conjugate_model(found, conditioned):
    exact = stats.multivariate_normal(np.zeros(len(Y)), np.eye(len(Y)) + 100).logpdf(Y)
    value, error = bridged_evidence(found.log_likelihood, found.betas)
    assert abs(value - exact) < 4 * error < 0.4
    posterior = ParallelTempering()(conditioned, key=jax.random.key(1))
    assert abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_error < 0.6
    assert posterior.warnings == () and posterior["mu"].shape == (4, 1000)
    statistics = posterior.statistics
    assert {v.shape for v in statistics.values()} == {(4, 1000)}
    mu = np.asarray(posterior["mu"], float)
    np.testing.assert_allclose(statistics["log_likelihood"], log_likelihood(mu), atol=1e-3)
    np.testing.assert_allclose(statistics["lp"], log_likelihood(mu) + stats.norm(0, 10).logpdf(mu), atol=1e-3)
    assert statistics["num_rungs"][0, 0] == 8 and 1 < statistics["barrier"][0, 0] < 3


def test_the_error_of_the_evidence_is_its_error(found):
    """Bridges over independent normal draws: the stated error covers as often as it says."""
    betas, random = found.betas[::3], np.random.default_rng(0)
    mean, deviation = (a[:, None] for a in tempered(betas))
    exact = stats.multivariate_normal(np.zeros(len(Y)), np.eye(len(Y)) + 100).logpdf(Y)
    scores = []
    for _ in range(200):
        mu = mean + deviation * random.standard_normal((80, len(betas), 4))
        value, error = bridged_evidence(log_likelihood(mu), betas)
        scores.append((value - exact) / error)
    # 95% +- 1.5%: four standard errors.
    assert abs(np.mean(np.abs(scores) < 2) - 0.95) < 0.06
    assert bridged_evidence(log_likelihood(mu[:4, :, :1]), betas)[1] == np.inf


def test_exchanges_leave_the_product_as_it_is():
    """The chances of an exchange and of its reversal are as the densities of the product of all rungs."""
    betas, states = jnp.array([0.0, 0.2, 1.0, 1.0]), np.array([-3.0, 1.0, 2.5])
    grid = (np.arange(2000) + 0.5) / 2000
    uniforms, swap = jnp.asarray(np.broadcast_to(grid, (4, 2000))), jax.jit(_exchanged)

    def chance(lower, upper, pair):
        heights = np.zeros((4, 2000))
        heights[pair], heights[pair + 1] = lower, upper
        source = np.asarray(swap(heights, betas, uniforms, pair % 2, 3))
        others = [k for k in range(4) if k not in (pair, pair + 1)]
        assert (source[others] == np.array(others)[:, None]).all()
        assert (np.sort(source, 0) == np.arange(4)[:, None]).all()
        return (source[pair] == pair + 1).mean()

    for pair in (0, 1):
        gap = float(betas[pair + 1] - betas[pair])
        for a in states:
            for b in states:
                forth, back = chance(a, b, pair), chance(b, a, pair)
                # Density of (a below, b above) times chance, both ways.
                assert abs(forth - back * np.exp(gap * (b - a) * -1)) < 2e-3 * max(1, np.exp(gap * (a - b)))
                assert max(forth, back) == 1
    # Rungs from the top on are padding: nothing goes there.
    assert chance_of_padding(betas) == 0
    impossible = _exchanged(jnp.array([[-jnp.inf], [0.0], [0.0], [0.0]]), betas, jnp.full((4, 1), 1e-30), 0, 3)
    assert np.asarray(impossible)[:2, 0].tolist() == [0, 1]


def chance_of_padding(betas):
    source = _exchanged(jnp.zeros((4, 1)), betas, jnp.full((4, 1), 0.5), 0, 3)
    return int(np.asarray(source)[2, 0] != 2)


def test_ladders_of_equal_rejection():
    betas = np.linspace(0, 1, 41)
    rejections = np.diff(betas**0.5)  # a barrier that grows as the root
    np.testing.assert_allclose(equal_rejection(betas, rejections, 6), np.linspace(0, 1, 6) ** 2, atol=2e-3)
    nothing = equal_rejection(betas, np.zeros(40), 4)
    np.testing.assert_allclose(nothing, [0, 1 / 3, 2 / 3, 1], atol=1e-6)


def modes(num_dimensions, spread):
    x = numpyro.sample("x", dist.Normal(0.0, 10.0).expand([num_dimensions]).to_event(1))
    left = dist.Normal(-5.0, 0.5).log_prob(x).sum() + jnp.log(0.2)
    right = dist.Normal(5.0, spread).log_prob(x).sum() + jnp.log(0.8)
    numpyro.factor("likelihood", jnp.logaddexp(left, right))


def exact_modes(num_dimensions, spread):
    """Posterior weight of the right mode, and the log evidence."""
    left, right = (num_dimensions * stats.norm(0, np.hypot(10, s)).logpdf(5) for s in (0.5, spread))
    evidence = np.logaddexp(np.log(0.2) + left, np.log(0.8) + right)
    return np.exp(np.log(0.8) + right - evidence), evidence


@pytest.mark.parametrize(
    ("num_dimensions", "spread", "num_samples"),
    [
        (1, 1.0, 1000),
        pytest.param(2, 1.0, 1000, marks=pytest.mark.slow),
        # In eight dimensions a mode half as wide weighs 256 times less near the prior, which takes many more draws.
        pytest.param(8, 0.5, 4000, marks=pytest.mark.slow),
    ],
)
def test_weights_of_distant_modes(num_dimensions, spread, num_samples):
    program = conditioned_model(modes, {"num_dimensions": num_dimensions, "spread": spread})
    posterior = ParallelTempering(num_samples=num_samples)(program, key=KEY)
    weight, evidence = exact_modes(num_dimensions, spread)
    trips = posterior.statistics["round_trip"].sum()
    share = (np.asarray(posterior["x"])[..., 0] > 0).mean()
    # Each round trip brings a mode that has nothing to do with the last: four standard errors, false alarms 1e-4.
    assert abs(share - weight) < 4 * np.sqrt(weight * (1 - weight) / trips) < 0.13
    assert abs(posterior.log_evidence - evidence) < 4 * posterior.log_evidence_error < 0.6


@pytest.mark.slow
def test_nuts_does_not_find_these_weights():
    program = conditioned_model(modes, {"num_dimensions": 2, "spread": 1.0})
    shares = (np.asarray(NUTS(num_samples=500)(program, key=KEY)["x"])[..., 0] > 0).mean(1)
    # Each chain believes in one mode alone, so that no share is that of the posterior.
    assert np.isin(shares, [0.0, 1.0]).all()


def test_too_few_rungs_are_said_to_be_too_few(conditioned):
    posterior = ParallelTempering(num_rungs=2, num_samples=100, num_warmup=40)(conditioned, key=KEY)
    assert any("exponents 0 and 1 are rejected" in w for w in posterior.warnings)
    assert any("draws of the prior have come up" in w for w in posterior.warnings)


def test_interrupted(conditioned, monkeypatch):
    run, calls = Ladders.run, []

    def interrupted(ladders, gains=None):
        calls.append(gains)
        if sum(g is None for g in calls) > 6:  # the first looks at the starting points
            raise KeyboardInterrupt
        return run(ladders, gains)

    monkeypatch.setattr(Ladders, "run", interrupted)
    posterior = ParallelTempering(num_rungs=16, num_warmup=8)(conditioned, key=KEY)
    assert posterior["mu"].shape == (4, 40) and "interrupted after 40 of 1000 draws" in posterior.warnings[0]
    calls.extend([None] * 6)
    with pytest.raises(KeyboardInterrupt):
        ParallelTempering(num_rungs=16, num_warmup=8)(conditioned, key=KEY)


def test_data_of_the_same_shape_compile_nothing():
    traced = []

    def model(y):
        traced.append(0)
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 0.1), obs=y)

    def count(y):
        traced.clear()
        ParallelTempering(num_warmup=24, num_samples=20)(conditioned_model(model, {"y": y}), key=KEY)
        return len(traced)

    # The second needs a longer ladder.
    assert count(np.zeros(3)) > count(np.full(3, 4.0)) == count(np.ones(3))


@pytest.mark.slow
def test_in_float64():
    with jax.enable_x64(True):
        program = conditioned_model(normal_model, {"y": Y})
        posterior = ParallelTempering()(program, key=KEY)
    exact = stats.multivariate_normal(np.zeros(len(Y)), np.eye(len(Y)) + 100).logpdf(Y)
    assert posterior["mu"].dtype == np.float64
    assert abs(posterior.log_evidence - exact) < 4 * posterior.log_evidence_error < 0.6


def improper(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def counts(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"), [(improper, r"\['mu'\] have improper priors"), (counts, r"\['k'\] are discrete")]
)
def test_models_that_it_cannot_take(model, message):
    with pytest.raises(InputError, match=message):
        ParallelTempering()(conditioned_model(model, {"y": 1.0}), key=KEY)


@pytest.mark.parametrize("settings", [{"num_rungs": 1}, {"num_chains": 0}, {"num_warmup": 0}, {"num_samples": 0}])
def test_bad_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        ParallelTempering(**settings)
