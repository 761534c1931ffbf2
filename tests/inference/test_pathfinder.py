"""Pathfinder's quasi-Newton algebra against dense matrices, its paths against exact modes, and its draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.diagnostics import pareto_smoothed
from bayeslens.inference.pathfinder import (
    Pathfinder,
    climb_from,
    pathfinder_starts,
    quasi_newton_normal,
)

KEY = jax.random.key(0)
SCALES = np.array([1e-2, 1.0, 1.0, 30.0])


def normal_model(mean):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    numpyro.sample("y", dist.Normal(mean - theta * SCALES, 1.0).to_event(1), obs=jnp.zeros(4))


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


SCHOOLS = {
    "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
}


def dense_bfgs(diagonal, steps, changes):
    """The textbook update of the inverse Hessian, pair by pair."""
    inverse = np.diag(diagonal)
    for s, y in zip(steps, changes, strict=True):
        left = np.eye(len(s)) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    return inverse


@pytest.mark.slow
def test_the_product_form_is_the_textbook_update():
    rng = np.random.default_rng(0)
    hessian = np.cov(rng.normal(size=(7, 30)))
    steps = rng.normal(size=(6, 7))
    changes = steps @ hessian
    diagonal, position, slope = rng.uniform(0.5, 2.0, 7), rng.normal(size=7), rng.normal(size=7)
    with jax.enable_x64(True):
        normal = quasi_newton_normal(*(jnp.asarray(a) for a in (position, slope, diagonal, steps, changes)))
        inverse = dense_bfgs(diagonal, steps, changes)
        root = jax.vmap(normal.root)(jnp.eye(7)).T
        np.testing.assert_allclose(root @ root.T, inverse, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(normal.mean, position - inverse @ slope, rtol=1e-9)
        np.testing.assert_allclose(normal.variances, np.diag(inverse), rtol=1e-9)
        np.testing.assert_allclose(jax.vmap(normal.solve)(root.T), np.eye(7), atol=1e-9)
        np.testing.assert_allclose(jax.vmap(normal.root_transposed)(jnp.eye(7)), root, atol=1e-12)
        np.testing.assert_allclose(normal.log_det_root, 0.5 * np.linalg.slogdet(inverse)[1], rtol=1e-9)
        expected = dist.MultivariateNormal(normal.mean, inverse).log_prob(jnp.zeros(7))
        np.testing.assert_allclose(normal.log_prob(jnp.zeros(7)), expected, rtol=1e-9)
        # A pair without positive curvature is left out.
        steps[2], changes[2] = -changes[2], changes[2]
        skipped = quasi_newton_normal(*(jnp.asarray(a) for a in (position, slope, diagonal, steps, changes)))
        fewer = dense_bfgs(diagonal, np.delete(steps, 2, 0), np.delete(changes, 2, 0))
        np.testing.assert_allclose(skipped.variances, np.diag(fewer), rtol=1e-9)


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(normal_model, {"mean": np.array([0.0, 1.0, -2.0, 3.0])})


@pytest.mark.slow
def test_paths_end_at_the_mode(conditioned):
    climbed = climb_from(conditioned, KEY, 8)
    mode = np.array([0.0, 1.0, -2.0, 3.0]) * SCALES / (1 + SCALES**2)
    deviations = 1 / np.sqrt(1 + SCALES**2)
    # float32 leaves a few thousandths of a standard deviation
    np.testing.assert_allclose((np.asarray(climbed.position) - mode) / deviations, 0.0, atol=0.01)
    assert (np.asarray(climbed.steps) < 40).all()
    # The bound of a normal posterior is its evidence, where a path has learned the curvature.
    marginal = dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4) + jnp.diag(SCALES**2))
    evidence = float(marginal.log_prob(jnp.array([0.0, 1.0, -2.0, 3.0])))
    assert np.max(climbed.best.bound) == pytest.approx(evidence, abs=0.05)


@pytest.mark.slow
def test_starts_for_chains_lie_in_the_typical_set(conditioned):
    vectors, variances = pathfinder_starts(conditioned, KEY, 4)
    mode = np.array([0.0, 1.0, -2.0, 3.0]) * SCALES / (1 + SCALES**2)
    np.testing.assert_allclose(variances, 1 / (1 + SCALES**2), rtol=0.3)
    squared = (((np.asarray(vectors) - mode) ** 2) * (1 + SCALES**2)).sum(1)
    # chi-square with 4 degrees of freedom: above 30 once in 200,000 draws
    assert vectors.shape == (4, 4) and (squared < 30).all() and len(np.unique(squared)) == 4


def test_draws_of_a_normal_posterior(conditioned):
    posterior = Pathfinder()(conditioned, key=KEY)
    draws = np.asarray(posterior["theta"], np.float64)[0]
    deviations = 1 / np.sqrt(1 + SCALES**2)
    mode = np.array([0.0, 1.0, -2.0, 3.0]) * SCALES / (1 + SCALES**2)
    # Resampled with near-equal weights, 4,000 draws hold about 2,000 different ones: five standard errors.
    assert (np.abs(draws.mean(0) - mode) < 5 * deviations / np.sqrt(2000)).all()
    np.testing.assert_allclose(draws.std(0), deviations, rtol=5 / np.sqrt(2 * 2000))
    assert posterior.k_hat < 0.7 and posterior.warnings == ()
    again = Pathfinder()(conditioned, key=KEY)
    np.testing.assert_array_equal(posterior["theta"], again["theta"])


@pytest.mark.slow
def test_eight_schools_are_found_and_doubted():
    posterior = Pathfinder()(conditioned_model(eight_schools, SCHOOLS), key=KEY)
    # Reference draws of posteriordb: mean of mu 4.4 with standard deviation 3.3. Local normals are too narrow for it.
    assert abs(posterior["mu"].mean() - 4.4) < 3.3
    assert posterior.k_hat > 0.5 and np.isfinite(posterior.log_evidence_bound)


def test_smoothing_keeps_order_and_tames_the_tail():
    rng = np.random.default_rng(0)
    # Weights of Pareto shape 1/2: smoothed tails average to the exact quantiles.
    raw = -0.5 * np.log(rng.random(10_000))
    smoothed = pareto_smoothed(raw)
    assert (np.diff(smoothed[np.argsort(raw)]) >= 0).all()
    assert smoothed.max() <= raw.max()
    quantiles = -0.5 * np.log((np.arange(300) + 0.5) / 10_000)
    np.testing.assert_allclose(np.sort(smoothed)[-300:][:-3], quantiles[::-1][:-3], atol=0.25)


def test_bad_settings():
    with pytest.raises(InputError, match="num_paths must be at least 1"):
        Pathfinder(num_paths=0)
