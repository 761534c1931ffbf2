"""Nested sampling against exact evidences and posteriors; its bookkeeping and its slices each against their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import special, stats

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference import nested_sampling
from bayeslens.inference.constrained_slices import Live, slices_above
from bayeslens.inference.nested_sampling import BATCH, Dead, NestedSampling, Run, account, insertion_p_value

KEY = jax.random.key(0)
Y = np.linspace(-1.0, 3.0, 10)
MEAN, SD = Y.sum() / 10.25, 10.25**-0.5
EVIDENCE = stats.multivariate_normal(np.zeros(10), np.eye(10) + 4).logpdf(Y)


RUNS = []


def normal_model(y):
    RUNS.append(1)
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def two_modes(height):
    x = numpyro.sample("x", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    near = dist.Normal(-4.0, 0.2).log_prob(x).sum() + jnp.log(0.25)
    numpyro.factor("likelihood", jnp.logaddexp(near, dist.Normal(4.0, 0.2).log_prob(x).sum() + jnp.log(0.75)) + height)


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(normal_model, {"y": Y})


@pytest.fixture(scope="module")
def posterior(conditioned):
    return NestedSampling()(conditioned, key=KEY)


def ideal_run(rng, num_live=100, width=0.01):
    """A run whose new points are independent: the likelihood exp(-volume / width) of uniform volumes."""
    size, volumes = num_live // BATCH, rng.random(num_live)
    dead = []
    while volumes.max() > 1e-3 * width:
        volumes = np.sort(volumes)[::-1]
        dead.append(volumes[:size])
        volumes = np.concatenate([volumes[size:], volumes[size - 1] * rng.random(size)])
    gone, zeros = np.concatenate(dead), np.zeros(len(dead) * size)
    blocks = (Dead(gone[:, None], -gone / width, -gone / width, zeros, zeros, zeros.astype(int)),)
    live = Live(volumes[:, None], 0 * volumes, -volumes / width, 0 * volumes, -volumes / width)
    return Run(live, blocks, jax.random.key(rng.integers(2**31)), 1, (0, 0), (0, 0), 0)


def test_evidence_and_error_of_ideal_runs():
    # The integral of exp(-x / 0.01) over the unit interval is 0.01, the posterior mean of the volume is 0.01 too.
    rng = np.random.default_rng(0)
    found = [account(ideal_run(rng)) for _ in range(200)]
    off = np.array([a.log_evidence for a in found]) - np.log(0.01)
    errors = np.array([a.log_evidence_error for a in found])
    # Of 200 runs 95.4% lie within two errors: 89% is four standard deviations below.
    assert np.mean(np.abs(off) < 2 * errors) > 0.89
    # A ratio of standard deviations from 200 runs has a standard error of 5%, and a mean's is 7% of the error.
    assert 0.8 < off.std() / errors.mean() < 1.25
    assert abs(off.mean()) < 0.35 * errors.mean()
    # The root of information over live points, about which Skilling's formula is.
    assert abs(errors.mean() / np.sqrt((np.log(100) - 1) / 100) - 1) < 0.15
    weights = [special.softmax(a.log_weights) for a in found]
    means = [w @ a.points[:, 0] for w, a in zip(weights, found, strict=True)]
    assert abs(np.mean(means) - 0.01) < 5 * np.std(means) / np.sqrt(200)


@pytest.mark.slow
def test_slices_leave_the_prior_above_a_level_as_it_is(conditioned):
    # Where the likelihood is above that of four off the mean, the prior is a normal distribution cut to an interval.
    center = Y.mean()
    level = conditioned.log_likelihood(jnp.array([center + 4.0]))
    inside = stats.truncnorm((center - 4) / 2, (center + 4) / 2, scale=2.0)
    points = jnp.asarray(inside.rvs((3000, 1), random_state=0), jnp.float32)
    prior, likelihood = jax.vmap(conditioned.log_terms)(points)
    others = Live(points, prior, likelihood, 0 * prior, likelihood)
    parents = jnp.arange(2000)
    found = jax.jit(lambda steps: slices_above(conditioned, None, others, parents, level, 0.5, KEY, steps))(5)
    moved = np.asarray(found.points)[:, 0]
    # Kolmogorov-Smirnov on 2,000 exact draws, moved: false alarms below 1e-4.
    assert stats.kstest(moved, inside.cdf).pvalue > 1e-4
    # Five standard errors of the correlation of independent draws.
    assert abs(np.corrcoef(moved, np.asarray(points[:2000, 0]))[0, 1]) < 5 / np.sqrt(2000)
    again = jax.vmap(conditioned.log_terms)(found.points)
    np.testing.assert_allclose(found.log_prior, again[0], rtol=1e-4)
    np.testing.assert_allclose(found.level, again[1], rtol=1e-4)
    assert found.level.min() > level and (found.made == 5).all()


def test_conjugate_normal(posterior, conditioned):
    # Four errors: false alarms below 1e-4.
    assert abs(posterior.log_evidence - EVIDENCE) < 4 * posterior.log_evidence_error
    assert posterior.log_evidence_error < 0.1
    draws, weights = posterior["mu"].ravel(), special.softmax(posterior.log_weights).ravel()
    # Weighted points are worth over 1,000 draws, related ones a few times fewer: five standard errors of 300.
    assert 1 / (weights**2).sum() > 1000
    assert abs(weights @ draws - MEAN) < 5 * SD / np.sqrt(300)
    assert abs(np.sqrt(weights @ (draws - MEAN) ** 2) - SD) < 5 * SD / np.sqrt(600)
    assert posterior.warnings == () and posterior.engine == "nested"
    likelihood = posterior.statistics["log_likelihood"]
    assert (np.diff(likelihood) >= 0).all() and (np.diff(posterior.statistics["log_volume"]) < 0).all()
    np.testing.assert_allclose(likelihood[0], jax.vmap(conditioned.log_likelihood)(draws[:, None]), rtol=1e-4)


@pytest.mark.slow
def test_two_modes():
    found = NestedSampling()(conditioned_model(two_modes, {"height": np.zeros(())}), key=KEY)
    assert abs(found.log_evidence + np.log(400)) < 4 * found.log_evidence_error
    assert found.log_evidence_error < 0.2
    share = special.softmax(found.log_weights)[found["x"][..., 0] > 0].sum()
    assert abs(share - 0.75) < 0.2


def test_new_data_of_the_same_shape_take_no_new_program(posterior):
    conditioned = conditioned_model(normal_model, {"y": Y + 1})
    RUNS.clear()
    found = NestedSampling()(conditioned, key=KEY)
    assert RUNS == []
    exact = stats.multivariate_normal(np.zeros(10), np.eye(10) + 4).logpdf(Y + 1)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error


def regression(x, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


@pytest.mark.slow
def test_regression_in_float64():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 3))
    y = x @ rng.normal(size=3) + 0.5 * rng.normal(size=30)
    with jax.enable_x64(True):
        found = NestedSampling(num_live=200)(conditioned_model(regression, {"x": x, "y": y}), key=KEY)
    assert found["beta"].dtype == np.float64
    exact = stats.multivariate_normal(np.zeros(30), x @ x.T + 0.25 * np.eye(30)).logpdf(y)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error
    covariance = np.linalg.inv(np.eye(3) + 4 * x.T @ x)
    error = np.tensordot(special.softmax(found.log_weights), found["beta"], 2) - covariance @ (4 * x.T @ y)
    assert (np.abs(error) < 5 * np.sqrt(np.diag(covariance) / 150)).all()


def steps(y):
    x = numpyro.sample("x", dist.Uniform(0.0, 1.0))
    numpyro.factor("y", jnp.where(x < 0.2, 2.0, jnp.where(x < 0.5, 1.0, y)))


@pytest.mark.slow
def test_plateaus():
    found = NestedSampling(num_live=200)(conditioned_model(steps, {"y": 0.0}), key=KEY)
    assert abs(found.log_evidence - np.log(0.2 * np.e**2 + 0.3 * np.e + 0.5)) < 4 * found.log_evidence_error
    weights = special.softmax(found.log_weights)
    # The standard deviation of a share of so few live points is about 0.04.
    exact = 0.2 * np.e**2 / (0.2 * np.e**2 + 0.3 * np.e + 0.5)
    assert abs(weights[found["x"] < 0.2].sum() - exact) < 0.2
    assert found.warnings == ()


@pytest.mark.parametrize("after", [0, 3])
def test_an_interruption_returns_what_there_is(posterior, conditioned, monkeypatch, after):
    true, calls = nested_sampling.climb, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(nested_sampling, "climb", interrupted)
    found = NestedSampling()(conditioned, key=KEY)
    assert "interrupted" in found.warnings[0]
    assert np.isfinite(found.log_evidence) and found["mu"].shape[1] < posterior["mu"].shape[1]
    # 500 prior draws know the evidence within a few tenths.
    assert abs(found.log_evidence - EVIDENCE) < 1


def ranked(run, ranks):
    return dataclasses.replace(run, dead=(run.dead[0]._replace(rank=ranks),), finished=True)


def test_uneven_ranks_are_told():
    rng = np.random.default_rng(0)
    run = ideal_run(rng)
    # Of 91 places the first ten are never taken.
    even, uneven = (ranked(run, rng.integers(least, 91, run.size)) for least in (0, 10))
    assert insertion_p_value(even) > 1e-4 > insertion_p_value(uneven)
    assert nested_sampling._doubts(even) == []
    assert "not spread evenly" in nested_sampling._doubts(uneven)[0]


def test_a_likelihood_without_bound_is_told(conditioned, monkeypatch):
    monkeypatch.setattr(nested_sampling, "_DEEPEST", 2.0)
    found = NestedSampling()(conditioned, key=KEY)
    assert any("no upper bound" in w for w in found.warnings)


def test_how_blocks_are_cut_makes_no_difference(posterior, conditioned, monkeypatch):
    # Their sizes depend on the time that they take.
    monkeypatch.setattr(nested_sampling, "_BLOCK_SECONDS", 0.0)
    again = NestedSampling()(conditioned, key=KEY)
    np.testing.assert_array_equal(again["mu"], posterior["mu"])
    assert again.log_evidence == posterior.log_evidence


def flat(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def discrete(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def never_a_number(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("y", jnp.log(-1.0 - mu**2) * y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (flat, "'mu'. have improper priors, and nested sampling"),
        (discrete, "'k'. are discrete"),
        (never_a_number, "zero or not a number at all"),
    ],
)
def test_bad_models(model, message):
    with pytest.raises(InputError, match=message):
        NestedSampling(num_live=20)(conditioned_model(model, {"y": 1.0}), key=KEY)


def wide(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([11]).to_event(1))
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def test_too_few_live_points_for_the_dimension():
    with pytest.raises(InputError, match="num_live to at least 22"):
        NestedSampling(num_live=20)(conditioned_model(wide, {"y": 1.0}), key=KEY)


@pytest.mark.parametrize("settings", [{"num_live": 19}, {"num_steps": 0}, {"tolerance": 0.0}])
def test_bad_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        NestedSampling(**settings)
