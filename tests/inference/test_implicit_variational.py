"""Linearized entropies against closed forms, and implicit posteriors against exact ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.implicit_variational import (
    ImplicitVariational,
    MatrixSampler,
    NeuralSampler,
    entropy_bound,
    linearized_entropy,
)

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(20, 2)) @ np.array([[1.0, 0.0], [0.9, 0.4]])
Y = X @ np.array([1.0, -0.5]) + np.random.default_rng(1).normal(size=20)


def regression(x, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def two_modes(y):
    x = numpyro.sample("x", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(jnp.abs(x), 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "latent"), [(3, 3), (5, 3), (3, 5)])
def test_the_entropy_of_a_linear_sampler_is_exact(size, latent):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        matrix = jnp.asarray(rng.normal(size=(size, latent)))
        covariance = matrix @ matrix.T + 0.1**2 * jnp.eye(size)
        exact = dist.MultivariateNormal(jnp.zeros(size), covariance).entropy()
        z = jnp.asarray(rng.normal(size=latent))
        assert float(linearized_entropy(lambda z: matrix @ z, z, 0.1)) == pytest.approx(float(exact), abs=1e-9)
        if size >= latent:
            bound = float(entropy_bound(lambda z: matrix @ z, z, 0.1))
            smallest = jnp.linalg.svd(matrix)[1].min()
            rest = (size - latent) * jnp.log(0.01)
            by_hand = 0.5 * (size * np.log(2 * np.pi * np.e) + latent * jnp.log(smallest**2 + 0.01) + rest)
            assert bound == pytest.approx(float(by_hand), abs=1e-9) and bound <= float(exact)


@pytest.mark.slow
def test_the_bound_holds_for_many_latents_and_has_the_right_gradient():
    with jax.enable_x64(True):
        sampler = NeuralSampler.identity(60, 40, np.random.default_rng(0), width=16)
        rng = np.random.default_rng(1)
        sampler = jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape), sampler)
        z = jnp.asarray(rng.normal(size=40))
        exact, bound = linearized_entropy(sampler, z, 0.1), entropy_bound(sampler, z, 0.1)
        smallest = jnp.linalg.svd(jax.jacfwd(sampler)(z))[1].min()
        ideal = 0.5 * (60 * np.log(2 * np.pi * np.e) + 40 * jnp.log(smallest**2 + 0.01) + 20 * jnp.log(0.01))
        # Twelve iterations for forty dimensions: an estimate from above of the bound, and below the entropy.
        assert float(ideal) - 1e-9 <= float(bound) <= float(exact)
    with jax.enable_x64(True):
        # With as many iterations as dimensions, the gradient is that of the singular value itself.
        small = jax.tree.map(
            lambda a: a + 0.2 * rng.normal(size=a.shape),
            NeuralSampler.identity(6, 4, np.random.default_rng(0), width=8),
        )
        z = jnp.asarray(rng.normal(size=4))

        def by_decomposition(sampler):
            smallest = jnp.linalg.svd(jax.jacfwd(sampler)(z), compute_uv=False).min()
            return 2 * jnp.log(smallest**2 + 0.01)

        ours = jax.grad(lambda s: entropy_bound(s, z, 0.1))(small)
        theirs = jax.grad(by_decomposition)(small)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)


def test_a_matrix_sampler_is_far_smaller_than_what_it_samples():
    sampler = MatrixSampler.random(10_000, 16, np.random.default_rng(0))
    weights = sum(a.size for a in jax.tree.leaves(sampler)) - sampler.location.size
    assert weights < 3 * 10_000 and sampler.latent == 16
    draws = jax.vmap(sampler)(jax.random.normal(KEY, (200, 16)))
    assert draws.shape == (200, 10_000)
    # Variances near one to begin with, within the factor of two that the added tanh brings to either side.
    assert 0.3 < float(draws.var()) < 6.0


@pytest.mark.slow
def test_a_normal_posterior_is_found():
    covariance = np.linalg.inv(np.eye(2) / 4 + X.T @ X)
    mean = covariance @ X.T @ Y
    marginal = np.eye(20) + 4 * X @ X.T
    evidence = -0.5 * (Y @ np.linalg.solve(marginal, Y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    posterior = ImplicitVariational(num_steps=1000)(conditioned_model(regression, {"x": X, "y": Y}), key=KEY)
    draws = np.asarray(posterior["beta"], np.float64)[0]
    # A tenth of a standard deviation, three times the error of 4,000 draws and the last steps of training.
    assert (np.abs(draws.mean(0) - mean) < 0.1 * np.sqrt(np.diag(covariance))).all()
    np.testing.assert_allclose(np.cov(draws.T), covariance, rtol=0.15)
    # The bound is a mean of 6,400 draws, the best of ten: it may exceed the evidence by rounding of that order.
    assert posterior.log_evidence_bound == pytest.approx(evidence, abs=0.05)
    assert posterior.k_hat is None and posterior.log_evidence is None


@pytest.mark.slow
def test_two_modes_are_kept():
    posterior = ImplicitVariational(num_steps=3000)(conditioned_model(two_modes, {"y": 3.0}), key=KEY)
    draws = np.asarray(posterior["x"])[0]
    assert 0.2 < (draws > 0).mean() < 0.8
    # Exact: |x| is normal with precision 1 + 1/4, but for the fold.
    assert np.abs(draws).mean() == pytest.approx(2.4, abs=0.15)


@pytest.mark.slow
def test_hundreds_of_dimensions_through_the_bound():
    def wide(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([600]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    y = np.linspace(-3, 3, 600)
    posterior = ImplicitVariational(num_steps=300, num_samples=500, latent=64)(
        conditioned_model(wide, {"y": y}), key=KEY
    )
    # The exact mean is y / 2; the network need not reach it in 300 steps, only come near.
    assert np.abs(np.asarray(posterior["x"])[0].mean(0) - y / 2).mean() < 0.2


def test_bad_settings():
    with pytest.raises(InputError, match="latent must be at least 1"):
        ImplicitVariational(latent=0)
