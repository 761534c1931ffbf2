"""Averages as data, against closed forms for linear models and against averages of simulated trials."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import bayeslens
from bayeslens.core.errors import InputError
from bayeslens.processes.average_data import average_data_log_likelihood, average_of, hypothetical_subjects, shifted

KEY = jax.random.key(0)
TIMES = np.linspace(0.0, 2.0, 5)
DESIGN = np.stack([np.ones(5), TIMES], 1)
EFFECTS, NOISE, SHIFT = np.array([0.7, 0.4]), 0.5, np.array([0.3, 0.2])
COVARIANCE = DESIGN @ np.diag(EFFECTS**2) @ DESIGN.T + NOISE**2 * np.eye(5)  # of one subject's data
BASE = hypothetical_subjects(2, 64, key=KEY)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def line(mean):
    return lambda effects: jnp.asarray(DESIGN) @ (mean + jnp.asarray(EFFECTS) * effects)


def test_hypothetical_subjects_are_standard_normal_to_the_last_digit_and_depend_on_the_key():
    effects = hypothetical_subjects(3, 100, key=KEY)
    assert effects.shape == (100, 3)
    np.testing.assert_allclose(effects.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(effects.T @ effects / 100, np.eye(3), atol=1e-12)
    # Sorted they are close to normal quantiles: a Kolmogorov-Smirnov distance of independent ones would be about 0.09.
    assert stats.kstest(effects[:, 2], "norm").statistic < 0.05
    assert not np.allclose(effects, hypothetical_subjects(3, 100, key=jax.random.key(1)))


@pytest.mark.slow
def test_the_likelihood_of_a_linear_model_is_exact_and_so_is_its_gradient():
    mean, averages = np.array([1.0, -0.5]), np.array([1.1, 0.7, 0.4, 0.3, -0.2])

    def found(mean):
        return average_data_log_likelihood(line(mean), BASE, averages, 40, NOISE)

    def exact(mean):
        return dist.MultivariateNormal(jnp.asarray(DESIGN) @ mean, COVARIANCE / 40).log_prob(averages)

    np.testing.assert_allclose(found(mean), exact(mean), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(found)(mean), jax.grad(exact)(mean), rtol=1e-8)


def test_nonlinear_curves_with_subjects_leaving_have_the_moments_of_simulated_trials():
    left, rng = np.array([30, 20, 20]), np.random.default_rng(0)

    def curve(effects):
        return jnp.exp(0.2 * effects[0]) * jnp.exp(-jnp.array([0.0, 0.5, 2.0]) * jnp.exp(0.4 * effects[1]))

    found = average_of(curve, hypothetical_subjects(2, key=KEY), left, 0.1)
    trials = np.asarray(jax.vmap(jax.vmap(curve))(rng.normal(size=(10_000, 30, 2))))
    trials = trials + 0.1 * rng.normal(size=trials.shape)
    averages = np.stack([trials[:, :n, t].mean(1) for t, n in enumerate(left)], 1)
    # A mean of 10,000 trials has a standard error of 1% of their standard deviation, a covariance one of about 1.4%.
    scale = averages.std(0)
    np.testing.assert_allclose(found.mean / scale, averages.mean(0) / scale, atol=0.05)
    np.testing.assert_allclose(
        found.covariance_matrix / np.outer(scale, scale), np.cov(averages.T) / np.outer(scale, scale), atol=0.06
    )


def pooled(raw, averages, base):
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    there = shifted("delta", mean, SHIFT)
    with numpyro.plate("subjects", len(raw)):
        numpyro.sample("raw", dist.MultivariateNormal(jnp.asarray(DESIGN) @ mean, COVARIANCE), obs=raw)
    numpyro.sample("averages", average_of(line(there), base, 50, NOISE), obs=averages)


def test_the_posterior_is_that_of_exact_pooling():
    rng = np.random.default_rng(1)
    raw = DESIGN @ [1.0, -0.5] + rng.multivariate_normal(np.zeros(5), COVARIANCE, 10)
    averages = DESIGN @ [1.2, -0.6] + rng.multivariate_normal(np.zeros(5), COVARIANCE / 50)
    precision, linear = np.diag([0.25, 0.25, *SHIFT**-2]), np.zeros(4)
    inverse, both = np.linalg.inv(COVARIANCE), np.hstack([DESIGN, DESIGN])
    own = np.hstack([DESIGN, np.zeros((5, 2))])
    for design, count, total in ((own, 10, raw.sum(0)), (both, 50, 50 * averages)):
        precision += count * design.T @ inverse @ design
        linear += design.T @ inverse @ total
    covariance = np.linalg.inv(precision)
    found = bayeslens.infer(pooled, {"raw": raw, "averages": averages, "base": BASE}, key=KEY, engine="nuts")
    draws = np.concatenate([found["mean"], found["delta"]], -1).reshape(-1, 4)
    scale = np.sqrt(np.diag(covariance))
    # Means of over 1000 effective draws are known to 3% of a standard deviation, standard deviations to some 3%.
    np.testing.assert_allclose((draws.mean(0) - covariance @ linear) / scale, 0, atol=0.13)
    np.testing.assert_allclose(np.cov(draws.T) / np.outer(scale, scale), covariance / np.outer(scale, scale), atol=0.13)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hypothetical_subjects(0, key=KEY), "num_effects"),
        (lambda: hypothetical_subjects(2, 65, key=KEY), "even"),
        (lambda: hypothetical_subjects(9, 32, key=KEY), "four times"),
        (lambda: average_of(line(1.0), BASE, 0, 1.0), "num_subjects"),
        (lambda: average_of(line(1.0), BASE[0], 5, 1.0), "row"),
        (lambda: average_of(lambda e: e[0], BASE, 5, 1.0), "curve"),
        (lambda: average_of(line(1.0), BASE, 5), "noise_scale"),
        (lambda: average_data_log_likelihood(line(1.0), BASE, np.zeros(4), 5, 1.0), r"\(4,\)"),
        (lambda: average_data_log_likelihood(line(1.0), BASE, np.full(5, np.nan), 5, 1.0), "missing"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
