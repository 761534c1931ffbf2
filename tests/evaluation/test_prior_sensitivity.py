"""Power scaling against exact conjugate posteriors, quadrature and the documented results of another implementation."""

from __future__ import annotations

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.evaluation.prior_sensitivity import (
    CONFLICT,
    FINE,
    WEAK,
    cumulative_jensen_shannon,
    log_terms,
    power_scaling,
    scaled_weights,
)
from bayeslens.report.check_pictures import power_scaling_panels
from bayeslens.report.pictures import lay_out


def conjugate(seed, y, prior=1.0, noise=1.0, draws=4000):
    """Draws of mu ~ N(0, prior^2) given y with noise, with their log prior and likelihood."""
    variance = 1 / (1 / prior**2 + 1 / noise**2)
    mu = np.random.default_rng(seed).normal(variance * y / noise**2, np.sqrt(variance), draws)
    return mu, -((mu / prior) ** 2) / 2, -(((y - mu) / noise) ** 2) / 2


def test_the_distance_by_quadrature():
    draws = np.sort(np.random.default_rng(0).normal(size=20_000))
    weights = np.exp(0.3 * draws)  # the exact target is N(0.3, 1)
    found = cumulative_jensen_shannon(draws, weights / weights.sum())
    grid = np.linspace(draws[0], draws[-1], 20_001)
    exact = []
    for p, q in ((stats.norm.cdf(grid), stats.norm.cdf(grid - 0.3)), (stats.norm.sf(grid), stats.norm.sf(grid - 0.3))):
        middle = (p + q) / 2
        exact.append(np.sum(p * np.log2(p / middle) + q * np.log2(q / middle)) / np.sum(p + q))
    np.testing.assert_allclose(found, np.sqrt(max(exact)), rtol=0.03)


def test_the_distance_does_not_depend_on_sign_or_unit():
    rng = np.random.default_rng(0)
    draws, weights = rng.gamma(2.0, size=500), rng.dirichlet(np.ones(500))
    found = cumulative_jensen_shannon(draws, weights)
    np.testing.assert_allclose(cumulative_jensen_shannon(-3 * draws + 7, weights), found)
    assert 0 < found < 1


def test_weights_move_draws_to_the_scaled_posterior():
    mu, log_prior, log_likelihood = conjugate(0, 3.0, draws=40_000)
    for part, precision, mean in ((log_prior, 1.5, 3 / 2.5), (log_likelihood, 1.0, 4.5 / 2.5)):
        weights = scaled_weights(part, 1.5)
        assert abs(weights @ mu - mean) < 0.02  # standard error 0.004
        assert abs(weights @ (mu - weights @ mu) ** 2 - 1 / 2.5) < 0.02, precision


def test_diagnoses():
    agree = power_scaling(*conjugate(0, 0.5, prior=10.0))
    conflict = power_scaling(*conjugate(0, 6.0))
    weak = power_scaling(*conjugate(0, 1.0, noise=10.0))
    assert [f.diagnosis[0] for f in (agree, conflict, weak)] == [FINE, CONFLICT, WEAK]
    assert "disagree" in conflict.verdict and "data say little" in weak.verdict and "hardly" in agree.verdict
    assert (conflict.prior / conflict.prior_error > 3).all() and conflict.k_hat < 0.7
    # a prior that counts more pulls the mean to itself
    assert (np.diff(conflict.prior_path[:, 0, 0]) < 0).all() and (np.diff(conflict.likelihood_path[:, 0, 0]) > 0).all()
    assert {"prior_standard_error", "diagnosis"} <= set(conflict.table) and "quantity" in str(conflict)
    lay_out(power_scaling_panels(conflict))


def test_the_documented_example_of_priorsense():
    # y has mean 9.844 and variance 0.7697835^2; mu ~ N(0, 1), sigma ~ half-N(0, 2.5); 4000 draws.
    rows, mean, squares = 25, 9.844, 24 * 0.7697835**2
    mu, sigma = np.meshgrid(np.linspace(3, 11.5, 800), np.linspace(0.4, 8, 700), indexing="ij")

    def log_prior(mu, sigma):
        return -(mu**2) / 2 - sigma**2 / 12.5

    def log_likelihood(mu, sigma):
        return -rows * np.log(sigma) - (squares + rows * (mu - mean) ** 2) / (2 * sigma**2)

    joint = (log_prior(mu, sigma) + log_likelihood(mu, sigma)).ravel()
    weights = np.exp(joint - joint.max())
    rng, found = np.random.default_rng(0), []
    for _ in range(8):
        chosen = rng.choice(joint.size, 4000, p=weights / weights.sum())
        jitter = rng.random((2, 4000)) - 0.5
        draws = np.stack([mu.ravel()[chosen] + 8.5 / 799 * jitter[0], sigma.ravel()[chosen] + 7.6 / 699 * jitter[1]])
        one = power_scaling(draws.T, log_prior(*draws), log_likelihood(*draws))
        found.append([*one.prior, *one.likelihood])
        assert one.diagnosis == (CONFLICT, CONFLICT)
    center, spread = np.mean(found, 0), np.std(found, 0, ddof=1)
    # Its documentation prints two runs, of Stan and of JAGS; both within what such draws make (false alarms 1%).
    for documented in ([0.433, 0.360, 0.641, 0.674], [0.376, 0.252, 0.524, 0.468]):
        assert (np.abs(center - documented) < 4.5 * spread).all()


def test_terms_of_a_posterior_are_those_of_its_model():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(mu[0] + mu[1], scale), obs=y)

    rng = np.random.default_rng(0)
    draws = {"scale": rng.gamma(2.0, size=(2, 100)), "mu": rng.normal(size=(2, 100, 2))}
    posterior = Posterior(draws, model=model, data={"y": np.array([1.0, 2.0, -0.5])})
    found = log_terms(posterior)
    assert found.names == ("mu[0]", "mu[1]", "scale")
    scale, mu = draws["scale"].ravel(), draws["mu"].reshape(-1, 2)
    prior = stats.halfnorm.logpdf(scale, scale=2) + stats.norm.logpdf(mu, scale=3).sum(1)
    likelihood = stats.norm.logpdf(np.array([1.0, 2.0, -0.5]), mu.sum(1)[:, None], scale[:, None]).sum(1)
    np.testing.assert_allclose(found.log_prior, prior, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.log_likelihood, likelihood, rtol=1e-4, atol=1e-4)
    assert power_scaling(posterior).names == found.names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power_scaling(np.zeros((200, 1))), "need log_prior"),
        (lambda: power_scaling(np.zeros((50, 1)), np.zeros(50), np.zeros(50)), "at least 100 draws"),
        (lambda: power_scaling(np.zeros((200, 1)), np.zeros(100), np.zeros(200)), "need draws of shape"),
        (lambda: power_scaling(np.zeros(200), np.full(200, -np.inf), np.zeros(200)), "draw 0"),
        (lambda: power_scaling(np.zeros(200), np.zeros(200), np.zeros(200), names=("a", "b")), "2 names"),
        (lambda: power_scaling(Posterior({"mu": np.zeros((1, 200))})), "does not know its model"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
