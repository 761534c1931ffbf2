"""Posterior predictive checks against exact predictive distributions."""

from __future__ import annotations

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.evaluation.predictive_checks import (
    check_posterior,
    loo_pit,
    posterior_predictive_check,
    replicate,
)
from bayeslens.report.check_pictures import predictive_panels
from bayeslens.report.pictures import lay_out

KEY = jax.random.key(0)


def normal_mean(seed, y, draws=4000):
    """Posterior draws of the mean of y with unit noise and a flat prior."""
    return np.random.default_rng(seed).normal(y.mean(), 1 / np.sqrt(len(y)), draws)


def test_p_values_are_those_of_the_exact_predictive_distribution():
    y = np.random.default_rng(0).normal(size=20) + 0.4
    mu = normal_mean(1, y, 20_000)
    replicated = mu[:, None] + np.random.default_rng(2).normal(size=(20_000, 20))
    first = {"first": lambda v: v[..., 0], "variance": lambda v: v.var(-1) * 20}
    found = posterior_predictive_check(y, replicated, key=KEY, statistics=first)
    exact = [stats.norm.sf(y[0], y.mean(), np.sqrt(1 + 1 / 20)), stats.chi2.sf(20 * y.var(), 19)]
    assert (np.abs(found.p_values - exact) < 5 * found.standard_errors).all()  # false alarms below 1e-5
    np.testing.assert_allclose(
        found.standard_errors, np.sqrt(np.multiply(exact, np.subtract(1, exact)) / 2e4), rtol=0.2
    )


def test_standard_errors_know_of_slow_chains():
    rng = np.random.default_rng(0)
    y = rng.normal(size=50)
    slow = np.repeat(normal_mean(1, y, 50), 20)[:, None] + 1e-3 * rng.normal(size=(1000, 50))
    mean = {"mean": lambda v: v.mean(-1)}
    found = posterior_predictive_check(y, slow, key=KEY, statistics=mean)
    assert (
        found.standard_errors[0]
        > 2 * posterior_predictive_check(y, slow, key=KEY, statistics=mean, thin=1).standard_errors[0]
    )


def test_leave_one_out_values_are_those_of_exact_refits():
    y = np.random.default_rng(0).normal(size=12)
    mu = normal_mean(1, y, 20_000)
    replicated = mu[:, None] + np.random.default_rng(2).normal(size=(20_000, 12))
    found, k_hats = loo_pit(y, replicated, stats.norm.logpdf(y, mu[:, None]), key=KEY)
    rest = (y.sum() - y) / 11
    exact = stats.norm.cdf(y, rest, np.sqrt(1 + 1 / 11))
    np.testing.assert_allclose(found, exact, atol=0.02)  # standard errors below 0.005
    assert (k_hats < 0.7).all()


def test_counts_with_too_many_zeros_are_found():
    rng = np.random.default_rng(0)
    y = rng.poisson(3, 150) * (rng.random(150) < 0.75)
    rate = rng.gamma(y.sum() + 1, 1 / 151, 500)
    found = posterior_predictive_check(
        y, rng.poisson(rate[:, None], (500, 150)), key=KEY, log_likelihood=stats.poisson.logpmf(y, rate[:, None])
    )
    assert "share of zeros" in found.verdict and "not calibrated" in found.verdict
    assert found.loo_pit_p_value < 0.01 and found.standard_errors.min() > 0
    lay_out(predictive_panels(found), 3)
    right = rng.poisson(3, 150)
    rate = rng.gamma(right.sum() + 1, 1 / 151, 500)
    log_likelihood = stats.poisson.logpmf(right, rate[:, None])
    found = posterior_predictive_check(
        right, rng.poisson(rate[:, None], (500, 150)), key=KEY, log_likelihood=log_likelihood
    )
    assert found.loo_pit_p_value > 0.01 and "data like these" in found.verdict  # false alarms about 10%


def model(x, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(mu + x, 1.0), obs=y)


def two_sites(y, z):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    numpyro.sample("z", dist.Normal(mu, 1.0), obs=z)


def test_replicated_data_of_a_posterior_are_the_model_s():
    x = np.linspace(0, 5, 8).astype(np.float32)
    y = (x + np.random.default_rng(0).normal(size=8)).astype(np.float32)
    mu = normal_mean(1, y - x, 4000).astype(np.float32).reshape(2, 2000)
    posterior = Posterior({"mu": mu, "twice": 2 * mu}, model=model, data={"x": x, "y": y})
    data, replicated, log_likelihood = replicate(posterior, key=KEY)
    np.testing.assert_array_equal(data, y)
    residual = replicated - mu.reshape(-1, 1) - x
    assert abs(residual.mean()) < 5 / np.sqrt(32_000) and abs(residual.std() - 1) < 5 / np.sqrt(64_000)
    expected = stats.norm.logpdf(y, mu.reshape(-1, 1) + x)
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-4, atol=1e-4)
    found = check_posterior(posterior, key=KEY)
    assert found.loo_pit.shape == (8,) and found.replicated.shape == (4000, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: posterior_predictive_check(y, np.zeros((100, 9)), key=KEY), "need replicated data"),
        (lambda y: posterior_predictive_check(y, np.zeros((10, 10)), key=KEY), "at least 50 draws"),
        (lambda y: posterior_predictive_check(y * np.nan, np.zeros((100, 10)), key=KEY), "observation 0"),
        (lambda y: posterior_predictive_check(y, np.zeros((100, 10)), key=KEY, statistics={"m": np.mean}), "'m'"),
        (lambda y: posterior_predictive_check(
            y, np.zeros((100, 10)), key=KEY, log_likelihood=np.zeros((99, 10))), "log likelihoods need"),
        (lambda y: replicate(Posterior({"mu": np.zeros((1, 60))}), key=KEY), "model and data is needed"),
        (lambda y: replicate(Posterior({"mu": np.zeros((1, 60))}, model=two_sites, data={"y": 0.0, "z": 0.0}), key=KEY),
         "by site="),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(np.random.default_rng(0).normal(size=10))
