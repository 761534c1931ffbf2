"""Laplace's approximation against exact normal posteriors, and what it says where it is wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.laplace import Laplace, mode_normal

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# Predictors whose scales differ by 1e4, and which are correlated.
X = np.column_stack([np.ones(40), 1e4 * RNG.normal(size=40), RNG.normal(size=40)])
X[:, 2] += 0.9e-4 * X[:, 1]
Y = X @ np.array([1.0, 2e-4, -0.5]) + RNG.normal(size=40)
PRIOR = np.array([2.0, 1e-3, 2.0])


def regression(x, y, prior):
    beta = numpyro.sample("beta", dist.Normal(0.0, prior).to_event(1))
    numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def exact():
    precision = np.diag(PRIOR**-2) + X.T @ X
    covariance = np.linalg.inv(precision)
    marginal = dist.MultivariateNormal(jnp.zeros(40), jnp.eye(40) + (X * PRIOR**2) @ X.T)
    return covariance @ X.T @ Y, covariance, float(marginal.log_prob(jnp.asarray(Y)))


def skewed(y):
    rate = numpyro.sample("rate", dist.Gamma(0.5, 1.0))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


def two_modes(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    numpyro.sample("y", dist.Normal(mu**2, 0.5), obs=y)


def centred(y):
    scale = numpyro.sample("scale", dist.HalfNormal(5.0))
    x = numpyro.sample("x", dist.Normal(0.0, scale).expand([5]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 10.0).to_event(1), obs=y)


@pytest.mark.slow
def test_a_normal_posterior_is_exact_in_both_precisions():
    posterior = Laplace(num_samples=4000)(conditioned_model(regression, {"x": X, "y": Y, "prior": PRIOR}), key=KEY)
    with jax.enable_x64(True):
        mean, covariance, evidence = exact()
        conditioned = conditioned_model(regression, {"x": X, "y": Y, "prior": PRIOR})
        normal = mode_normal(conditioned, jnp.zeros(3))
        np.testing.assert_allclose(normal.mode, mean, rtol=1e-9)
        np.testing.assert_allclose(normal.root @ normal.root.T, covariance, rtol=1e-8)
        assert normal.log_evidence == pytest.approx(evidence, abs=1e-9) and normal.flat == 0
        # A wrong mode is seen by the gain that a Newton step still brings.
        assert normal.decrement < 1e-12
    # In float32: log densities of some 60 nats carry 4e-6 each, sums of 40 terms more.
    assert posterior.log_evidence == pytest.approx(evidence, abs=1e-3)
    assert posterior.log_evidence_error < 0.01
    assert posterior.warnings == () and posterior.k_hat < 0.7
    draws = np.asarray(posterior["beta"], np.float64)[0]
    deviations = np.sqrt(np.diag(covariance))
    # 4,000 independent draws: five standard errors, false alarms below 1e-5.
    assert (np.abs(draws.mean(0) - mean) < 5 * deviations / np.sqrt(4000)).all()
    np.testing.assert_allclose(np.corrcoef(draws.T)[1, 2], covariance[1, 2] / deviations[1] / deviations[2], atol=0.05)
    np.testing.assert_allclose(draws.std(0), deviations, rtol=5 / np.sqrt(2 * 4000))


def test_a_skewed_posterior_is_doubted_in_proportion():
    posterior = Laplace()(conditioned_model(skewed, {"y": 0}), key=KEY)
    # Exact evidence: Gamma(1/2) / 2^(1/2) / Gamma(1/2); mode of log rate: (1/2) / 2.
    error = abs(posterior.log_evidence + 0.5 * np.log(2))
    assert 0.01 < error < 5 * posterior.log_evidence_error
    assert posterior.k_hat > 0.7 and "k-hat" in posterior.warnings[-1]


@pytest.mark.slow
def test_modes_that_are_missed_and_modes_that_do_not_exist_are_said():
    assert "another mode" in " ".join(Laplace()(conditioned_model(two_modes, {"y": 4.0}), key=KEY).warnings)
    found = Laplace(num_samples=500)(conditioned_model(centred, {"y": np.zeros(5)}), key=KEY)
    assert any("no mode" in w or "flat" in w for w in found.warnings)


def test_bad_settings():
    with pytest.raises(InputError, match="num_starts must be at least 1"):
        Laplace(num_starts=0)

    def counted(y):
        k = numpyro.sample("k", dist.Poisson(3.0))
        numpyro.sample("y", dist.Normal(k, 1.0), obs=y)

    with pytest.raises(InputError, match="'k'"):
        Laplace()(conditioned_model(counted, {"y": 1.0}), key=KEY)
