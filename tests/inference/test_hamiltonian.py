"""Scales, leapfrog steps, warm-up and HMC, against algebra, autodiff and exact posteriors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import special

import bayeslens
from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.hamiltonian import HMC
from bayeslens.inference.leapfrog import Chains, Scale, leapfrog
from bayeslens.inference.nuts import TREES
from bayeslens.inference.warmup import StepSize, approach, fisher_scale, rank_of, warm_up

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def random_scale(dimension, rank):
    vectors, _ = np.linalg.qr(RNG.normal(size=(dimension, rank)))
    return Scale(RNG.uniform(0.5, 2.0, dimension), vectors, RNG.uniform(0.1, 5.0, rank))


def covariance(dimension):
    rotation, _ = np.linalg.qr(RNG.normal(size=(dimension, dimension)))
    units = np.exp(RNG.normal(size=dimension))
    return (rotation * RNG.uniform(0.05, 5.0, dimension)) @ rotation.T * units * units[:, None]


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_maps_of_a_scale(rank):
    scale, vectors = random_scale(5, rank), RNG.normal(size=(3, 5))
    matrix = scale.forward(np.eye(5)).T
    np.testing.assert_allclose(scale.forward(vectors), vectors @ matrix.T)
    np.testing.assert_allclose(scale.backward(vectors), vectors @ matrix)
    np.testing.assert_allclose(scale.inverse(scale.forward(vectors)), vectors)
    np.testing.assert_allclose(scale.backward_inverse(scale.backward(vectors)), vectors)


@pytest.mark.parametrize("dimension", [1, 4, 12])
def test_the_scale_of_a_gaussian_is_exact_from_few_points_anywhere(dimension):
    exact = covariance(dimension)
    points = 3 + 5 * RNG.standard_t(3, size=(dimension + 2, dimension))  # no draws of it
    gradients = -np.linalg.solve(exact, points.T).T
    found = fisher_scale(points, gradients, np.zeros(len(points), int), dimension)
    matrix = found.forward(np.eye(dimension))
    ratios = np.linalg.eigvals(np.linalg.solve(exact, matrix.T @ matrix)).real
    np.testing.assert_allclose(ratios, 1, rtol=0.02)


def test_a_scale_of_low_rank_takes_the_direction_that_matters():
    dimension = 40
    direction = np.ones(dimension) / np.sqrt(dimension)
    exact = np.eye(dimension) + 400 * np.outer(direction, direction)
    points = RNG.multivariate_normal(np.zeros(dimension), exact, 30)  # fewer than dimensions
    found = fisher_scale(points, -np.linalg.solve(exact, points.T).T, np.zeros(30, int), 2)
    assert found.vectors.shape == (40, 2)
    stretched = found.diagonal * found.vectors[:, 0] * found.stretch[0]
    assert abs(stretched @ direction) / np.linalg.norm(stretched) > 0.99
    assert np.linalg.norm(found.forward(found.inverse(direction)) - direction) < 1e-6
    # Along it the standard deviation is the root of 401; whitened it must be about one.
    assert 0.5 < np.linalg.norm(found.backward(direction)) / np.sqrt(401) < 2


def test_means_are_taken_off_group_by_group():
    points = np.concatenate([RNG.normal(size=(20, 2)), 100 + RNG.normal(size=(20, 2))])
    gradients = np.concatenate([-points[:20], 100 - points[20:]])  # two modes of unit scale
    found = fisher_scale(points, gradients, np.repeat([0, 1], 20), 2)
    np.testing.assert_allclose(found.forward(np.eye(2)).T @ found.forward(np.eye(2)), np.eye(2), atol=1e-3)


def test_a_scale_from_nothing_is_one():
    found = fisher_scale(np.ones((3, 2)), np.full((3, 2), np.nan), np.zeros(3, int), 1)
    np.testing.assert_array_equal(found.forward(np.eye(2)), np.eye(2))


def test_leapfrog_steps_of_an_oscillator():
    scale = Scale(jnp.array([2.0]), jnp.zeros((1, 0)), jnp.zeros(0))
    value_and_grad = jax.vmap(jax.value_and_grad(lambda q: -0.5 * jnp.sum(q**2)))
    step = 0.3
    start = jnp.array([[[1.0]], [[0.5]], [[-2.0]]])  # position, momentum, whitened gradient
    leaf = leapfrog(value_and_grad, start, jnp.array([step]), scale)
    half = 0.5 - 0.5 * step * 2.0
    position = 1.0 + step * 2.0 * half
    momentum = half - 0.5 * step * 2.0 * position
    np.testing.assert_allclose(leaf.point[:, 0, 0], [position, momentum, -2 * position], rtol=1e-6)
    np.testing.assert_allclose(leaf.energy, 0.5 * position**2 + 0.5 * momentum**2, rtol=1e-6)
    back = leapfrog(value_and_grad, leaf.point, jnp.array([-step]), scale)
    np.testing.assert_allclose(back.point, start, atol=1e-6)


@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_the_step_of_a_target_acceptance(curvature, target):
    step = StepSize(target)
    accepted = lambda e: 2 * special.ndtr(-curvature * e**2)  # noqa: E731
    for _ in range(60):
        step.learn(np.full(10, accepted(step.step)))
    assert abs(accepted(step.step) - target) < 0.02


def regression(x, y):
    beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
    numpyro.sample("y", dist.Normal(beta[0] + beta[1] * x, sigma), obs=y)


def two_modes(log_ratio):
    """Two narrow modes, one with so much more mass than the other."""
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    right, left = (dist.Normal(c, 0.1).log_prob(x).sum() for c in (1.5, -1.5))
    numpyro.factor("modes", jnp.logaddexp(right + log_ratio, left))


def warmed(model, data, num_warmup=300):
    conditioned = conditioned_model(model, data)
    chains = Chains(conditioned, TREES, 4, 1024.0, rank_of("low_rank", conditioned.dimension), KEY)
    return chains, warm_up(chains, num_warmup, 0.8, lambda done, text: None)


def test_warm_up_far_from_the_posterior_is_short():
    x = RNG.normal(66.0, 4.0, 300)
    y = 1000.0 * x - 40_000 + RNG.normal(0, 20_000, 300)
    chains, took = warmed(regression, {"x": x, "y": y})
    assert took < 200
    drawn = chains.run()
    # Mean acceptance over some hundred transitions has a standard error below 0.02.
    assert abs(drawn.acceptance.mean() - 0.8) < 0.1
    assert drawn.scalars["num_steps"].mean() < 8  # with a diagonal scale it is above 30


def test_chains_leave_a_mode_of_no_mass_and_keep_one_of_equal_mass():
    for log_ratio, both in ((60.0, False), (0.0, True)):
        chains, took = warmed(two_modes, {"log_ratio": log_ratio})
        drawn = chains.run()
        sides = {bool(drawn.position[drawn.chain == c].mean() > 0) for c in range(4)}
        assert sides == ({True, False} if both else {True})
        assert (took >= 300) == both  # warm-up ends early only where chains agree


def funnel():
    scale = numpyro.sample("scale", dist.Normal(0.0, 3.0))
    numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(scale / 2)).to_event(1))
    numpyro.factor("nothing", 0.0)


@pytest.mark.slow
def test_the_search_for_a_mode_stops_where_there_is_none():
    conditioned = conditioned_model(funnel, {})
    chains = Chains(conditioned, TREES, 4, 1024.0, 0, KEY)
    positions, *_ = approach(chains)
    # The density grows into the neck as far as -40.
    assert np.abs(positions[:, 0]).max() < 30
    chains, _ = warmed(funnel, {})
    assert np.abs(chains.positions[:, 0]).max() < 12


def normal_model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)


def test_hmc_on_a_conjugate_model():
    y = np.linspace(0.0, 2.0, 10)
    found = bayeslens.infer(normal_model, {"y": y}, key=KEY, engine=HMC(num_samples=500))
    precision = np.eye(2) / 4 + 10 * np.ones((2, 2))
    exact = np.linalg.inv(precision)
    mean = exact @ np.full(2, y.sum())
    draws = np.asarray(found["mu"]).reshape(-1, 2)
    assert found.warnings == ()
    # Over 800 effective draws: five standard errors, false alarms below 1e-5.
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * np.sqrt(exact[0, 0] / 800))
    np.testing.assert_allclose(np.cov(draws.T), exact, atol=5 * exact[0, 0] * np.sqrt(2 / 800))
    steps, size = found.statistics["num_steps"], found.statistics["step_size"]
    assert steps.min() < steps.max() <= np.round(1.5 * np.pi / 2 / size.min())
    assert set(found.statistics) >= {"diverging", "energy", "accept_prob", "lp"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trajectory_length": 0.0}, "trajectory_length"),
        ({"mass_matrix": "full"}, "mass_matrix must be"),
        ({"target_acceptance": 1.0}, "target_acceptance"),
        ({"effective": 0}, "effective"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        HMC(**settings)
