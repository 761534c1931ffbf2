"""Tempered sequential Monte Carlo against exact evidences and posteriors; its parts against what they must preserve."""

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
from bayeslens.inference import sequential_monte_carlo as smc
from bayeslens.inference.sequential_monte_carlo import SMC, Population, mean_evidence, systematic, temper

KEY = jax.random.key(0)
Y = np.linspace(-1.0, 3.0, 10)


def normal_model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact_normal(y, temperature=1.0):
    """Mean and standard deviation of prior * likelihood^temperature, and the log evidence."""
    precision = 0.25 + temperature * len(y)
    evidence = stats.multivariate_normal(np.zeros(len(y)), np.eye(len(y)) + 4).logpdf(y)
    return temperature * y.sum() / precision, precision**-0.5, evidence


def two_modes(height):
    x = numpyro.sample("x", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    near = dist.Normal(-4.0, 0.2).log_prob(x).sum() + jnp.log(0.25)
    numpyro.factor("likelihood", jnp.logaddexp(near, dist.Normal(4.0, 0.2).log_prob(x).sum() + jnp.log(0.75)) + height)


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(normal_model, {"y": Y})


@pytest.fixture(scope="module")
def posterior(conditioned):
    return SMC()(conditioned, key=KEY)


def test_resampling_is_unbiased():
    weights = np.array([0.07, 0.4, 0.0, 0.33, 0.2])
    indices = jax.vmap(lambda key: systematic(key, jnp.log(weights)))(jax.random.split(KEY, 20_000))
    counts = (np.asarray(indices)[:, :, None] == np.arange(5)).sum(1)
    assert (np.abs(counts - 5 * weights) < 1).all()
    # A count is one of two neighbouring numbers: five standard errors, false alarms below 1e-5.
    assert (np.abs(counts.mean(0) - 5 * weights) < 5 * 0.5 / np.sqrt(20_000)).all()


def test_standard_error_covers():
    rng = np.random.default_rng(0)
    found = [mean_evidence(np.log1p(0.1 * rng.normal(size=8))) for _ in range(4000)]
    covered = np.mean([abs(z) < 2 * error for z, error in found])
    # 95.4%, and five standard errors of 0.33% around it: false alarms below 1e-5.
    assert 0.938 < covered < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_moves_leave_the_tempered_target_as_it_is(conditioned, gradient):
    mean, sd, _ = exact_normal(Y, 0.5)
    points = mean + sd * jax.random.normal(KEY, (8, 512, 1))
    prior, likelihood, _ = smc.evaluate(conditioned, points.reshape(-1, 1))
    start = Population(points, prior.reshape(8, 512), likelihood.reshape(8, 512))
    zero = jnp.zeros((), int)
    moves = smc._Moves(start, zero, jnp.array(0.0), jnp.zeros(()), zero, jnp.array(False))
    moves = smc._move(conditioned, start, moves, np.asarray(0.5), KEY, np.asarray(50), gradient)
    moved = np.asarray(moves.population.points).ravel()
    assert moves.done and moves.count < 50
    assert abs(np.corrcoef(moved, np.asarray(points).ravel())[0, 1]) < 0.1
    # 4,096 exact draws, moved: Kolmogorov-Smirnov, false alarms below 1e-4.
    assert stats.kstest((moved - mean) / sd, "norm").pvalue > 1e-4
    again, densities, _ = smc.evaluate(conditioned, moves.population.points.reshape(-1, 1))
    np.testing.assert_allclose(np.ravel(moves.population.log_prior), again, rtol=1e-4)
    np.testing.assert_allclose(np.ravel(moves.population.log_likelihood), densities, rtol=1e-4)


def test_conjugate_normal(posterior, conditioned):
    mean, sd, evidence = exact_normal(Y)
    # Four errors: false alarms 0.3% by Student's t with seven degrees of freedom.
    assert abs(posterior.log_evidence - evidence) < 4 * posterior.log_evidence_error
    assert posterior.log_evidence_error < 0.1
    assert posterior["mu"].shape == (8, 512)
    weights = special.softmax(posterior.log_weights).ravel()
    draws = posterior["mu"].ravel()
    # Resampled particles are worth a few times fewer draws: five standard errors of 1,000, false alarms below 1e-5.
    assert abs(weights @ draws - mean) < 5 * sd / np.sqrt(1000)
    assert abs(np.sqrt(weights @ (draws - mean) ** 2) - sd) < 5 * sd / np.sqrt(2000)
    assert posterior.warnings == () and posterior.engine == "smc"
    pointwise = jax.vmap(conditioned.log_likelihood)(draws[:, None])
    np.testing.assert_allclose(posterior.statistics["log_likelihood"].ravel(), pointwise, rtol=1e-4)


def test_temperatures_keep_the_effective_sample_size(conditioned):
    found = temper(conditioned, SMC(target_ess=0.8, num_particles=128), key=KEY)
    assert found.temperatures[0] == 0 and found.temperatures[-1] == 1 and np.all(np.diff(found.temperatures) > 0)
    points = 2 * np.random.default_rng(0).normal(size=100_000)
    height = -0.5 * ((Y - points[:, None]) ** 2).sum(1)
    weights = np.exp(found.temperatures[1] * (height - height.max()))
    # 1,024 particles know the share of effective ones within about a twentieth.
    assert abs(weights.sum() ** 2 / (weights**2).sum() / 100_000 - 0.8) < 0.06


@pytest.mark.slow
def test_two_modes_keep_their_shares():
    found = SMC()(conditioned_model(two_modes, {"height": np.float64(0.0)}), key=KEY)
    assert abs(found.log_evidence + np.log(400)) < 4 * found.log_evidence_error
    assert found.log_evidence_error < 0.2
    share = special.softmax(found.log_weights)[found["x"][..., 0] > 0].sum()
    assert abs(share - 0.75) < 0.1  # five times the spread of the share of 500 independent draws


@pytest.mark.slow
def test_gradients_in_float64():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 8))
    y = x @ rng.normal(size=8) + 0.5 * rng.normal(size=30)

    def regression(x, y):
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)

    with jax.enable_x64(True):
        found = SMC(gradient=True, num_particles=256)(conditioned_model(regression, {"x": x, "y": y}), key=KEY)
    assert found["beta"].dtype == np.float64
    exact = stats.multivariate_normal(np.zeros(30), x @ x.T + 0.25 * np.eye(30)).logpdf(y)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error and found.log_evidence_error < 0.2
    covariance = np.linalg.inv(np.eye(8) + 4 * x.T @ x)
    weights = special.softmax(found.log_weights)
    error = np.tensordot(weights, found["beta"], 2) - covariance @ (4 * x.T @ y)
    assert (np.abs(error) < 5 * np.sqrt(np.diag(covariance) / 400)).all()


def test_an_interruption_returns_what_there_is(conditioned, monkeypatch):
    true, calls = smc._reweight, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(smc, "_reweight", interrupted)
    found = SMC()(conditioned, key=KEY)
    assert "interrupted" in found.warnings[0]
    assert abs(found.log_evidence - exact_normal(Y)[2]) < 1


def flat(y):
    from numpyro.distributions import constraints

    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def discrete(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def counts(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Poisson(rate), obs=y)


def impossible(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("y", jnp.where(mu > 100 + y, 0.0, -jnp.inf))


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (flat, 1.0, "improper priors, and sequential Monte Carlo"),
        (discrete, 1.0, "'k'. are discrete"),
        (counts, -1.0, "'y' has 1 values outside the support"),
        (impossible, 1.0, "zero or not a number at all"),
    ],
)
def test_bad_models(model, y, message):
    with pytest.raises(InputError, match=message):
        SMC(num_particles=8)(conditioned_model(model, {"y": y}), key=KEY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_particles": 1}, "num_particles"),
        ({"num_islands": 1}, "num_islands"),
        ({"max_moves": 0}, "max_moves"),
        ({"target_ess": 1.0}, "target_ess"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SMC(**settings)
