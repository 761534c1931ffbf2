"""Gradients of normal expectations, structured normals and deep latent Gaussian models against closed forms."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions.batch_util import promote_batch_shape

from bayeslens.core.distribution import put_together, take_apart
from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.inference.stochastic_backpropagation import (
    DeepLatentGaussian,
    StructuredGaussian,
    deep_latent_gaussian,
    free_energy,
    gaussian_gradient,
)

KEY = jax.random.key(0, impl="rbg")  # quick to compile
RNG = np.random.default_rng(0)
ROOT = np.array([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 0.5]])
MEAN = np.array([0.3, -0.2, 0.1])
A = np.array([0.5, -0.4, 0.7], np.float32)
LINEAR_X = RNG.normal(size=(40, 2)) @ RNG.normal(size=(2, 5)) + 0.5 * RNG.normal(size=(40, 5)) + 3.0


def wave(x):
    """E exp(a'x) is exp(a'm + a'C a / 2)."""
    return jnp.exp(x @ A)


@pytest.mark.parametrize("identity", ["bonnet_price", "reparameterization"])
def test_gradients_are_those_of_the_closed_form(identity):
    def closed(mean, root):
        spread = root.T @ A
        return jnp.exp(mean @ A + spread @ spread / 2)

    by_mean, by_root = jax.jit(jax.grad(closed, argnums=(0, 1)))(jnp.asarray(MEAN), jnp.asarray(ROOT))
    value = float(closed(MEAN, jnp.asarray(ROOT)))
    by_covariance = value * np.outer(A, A) / 2
    settings = {"num_samples": 500, "identity": identity}
    found = jax.jit(jax.vmap(lambda k: gaussian_gradient(wave, MEAN, ROOT, key=k, **settings)))(
        jax.random.split(KEY, 200)
    )
    for name, exact in (("mean", by_mean), ("root", by_root), ("covariance", by_covariance)):
        values = np.asarray(getattr(found, name), np.float64)
        error = values.std(0) / np.sqrt(len(values))
        # 21 numbers at five standard errors: false alarms below 2e-5.
        assert (np.abs(values.mean(0) - np.asarray(exact)) < 5 * error).all(), name


def test_price_is_exact_for_quadratics_and_keeps_roots_that_are_not_triangular():
    curvature = jnp.asarray(ROOT @ ROOT.T)
    turned = ROOT @ np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    found = gaussian_gradient(lambda x: x @ curvature @ x / 2, MEAN, turned, key=KEY, num_samples=2)
    np.testing.assert_allclose(found.covariance, curvature / 2, atol=1e-6)
    np.testing.assert_allclose(found.root, curvature @ turned, atol=1e-6)


@pytest.mark.parametrize("length", [0.0, 1.0, 100.0])
def test_a_structured_normal_is_the_dense_one(length):
    with jax.enable_x64(True):
        loc, diagonal, direction = jnp.asarray(MEAN), jnp.array([0.5, 2.0, 1.0]), length * jnp.array([1.0, -2.0, 0.3])
        d = StructuredGaussian(loc, diagonal, direction)
        covariance = np.linalg.inv(np.diag(diagonal) + np.outer(direction, direction))
        dense = dist.MultivariateNormal(loc, covariance)
        x = jnp.asarray(RNG.normal(size=(4, 3)))
        np.testing.assert_allclose(d.log_prob(x), dense.log_prob(x), rtol=1e-9)
        np.testing.assert_allclose(d.entropy(), dense.entropy(), rtol=1e-9)
        np.testing.assert_allclose(d.variance, np.diag(covariance), rtol=1e-7)
        # The map from noise to draws is linear: its matrix is a root of the covariance.
        draws = np.asarray(d.sample(KEY, (3,)) - loc)
        noise = np.asarray(jax.random.normal(KEY, (3, 3)))
        root = np.linalg.solve(noise, draws).T
        np.testing.assert_allclose(root @ root.T, covariance, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_structured_normals_pass_through_jit_vmap_and_models(tmp_path):
    d = StructuredGaussian(jnp.zeros((4, 1, 3)), jnp.ones(3), jnp.ones((2, 3)))
    assert d.batch_shape == (4, 2) and d.mean.shape == (4, 2, 3) and d.has_rsample
    x = d.sample(KEY, (5,))
    assert x.shape == (5, 4, 2, 3)
    np.testing.assert_allclose(jax.jit(lambda d, x: d.log_prob(x))(d, x), d.log_prob(x), rtol=1e-4)
    np.testing.assert_allclose(put_together(take_apart(d)).log_prob(x), d.log_prob(x), rtol=1e-5)
    mapped = promote_batch_shape(jax.vmap(lambda u: StructuredGaussian(jnp.zeros(3), jnp.ones(3), u))(jnp.ones((6, 3))))
    assert mapped.batch_shape == (6,)
    save(d, tmp_path / "d.bayes")
    np.testing.assert_array_equal(load(tmp_path / "d.bayes").log_prob(x), d.log_prob(x))
    with numpyro.handlers.seed(rng_seed=0), numpyro.plate("rows", 2):
        assert numpyro.sample("x", StructuredGaussian(jnp.zeros(3), jnp.ones(3), jnp.ones(3))).shape == (2, 3)


@pytest.fixture(scope="module")
def linear():
    """A linear model: probabilistic principal components, with a recognition network that is not trained."""
    model = DeepLatentGaussian.initial(LINEAR_X, key=KEY, latents=2, depth=0)
    decoder = model.generator[0].layers[-1]
    weight = np.asarray(decoder.weight @ model.roots[0], np.float64)
    scale = 0.9
    model = eqx.tree_at(lambda m: m.log_scale, model, jnp.log(scale).astype(jnp.float32))
    # The exact recognition network: precision W'W / s^2 + 1 = diag + u u', in two dimensions.
    precision = weight.T @ weight / scale**2 + np.eye(2)
    covariance = np.linalg.inv(precision)
    u = np.array([1.0, np.sign(precision[0, 1])]) * np.sqrt(abs(precision[0, 1]))
    u = u * np.array(
        [np.sqrt(precision[0, 0] / precision[1, 1]) ** 0.5, np.sqrt(precision[1, 1] / precision[0, 0]) ** 0.5]
    )
    diagonal = np.diag(precision) - u**2
    matrix = np.zeros((6, 5))
    matrix[:2] = covariance @ weight.T / scale**2 * model.spread
    bias = np.concatenate(
        [covariance @ weight.T @ (model.center - np.asarray(decoder.bias)) / scale**2, np.log(diagonal), u]
    )
    model = eqx.tree_at(
        lambda m: (m.recognition.layers[-1].weight, m.recognition.layers[-1].bias),
        model,
        (jnp.asarray(matrix, jnp.float32), jnp.asarray(bias, jnp.float32)),
    )
    law = dist.MultivariateNormal(np.asarray(decoder.bias), weight @ weight.T + scale**2 * np.eye(5))
    return model, law, covariance


@pytest.mark.slow
def test_bounds_are_the_evidence_where_recognition_is_exact(linear):
    model, law, covariance = linear
    evidence = np.asarray(law.log_prob(LINEAR_X))
    # With the exact posterior every importance weight is the same.
    np.testing.assert_allclose(model.log_likelihood_bound(LINEAR_X, 3, key=KEY), evidence, rtol=1e-3)
    found = np.asarray(model.elbo(LINEAR_X, key=KEY, num_samples=400))
    # Its own noise alone: a likelihood's standard deviation of about 1.5 over the root of 400.
    assert np.abs(found - evidence).max() < 0.5 and abs((found - evidence).mean()) < 0.05
    assert float(-free_energy(model, jnp.asarray(LINEAR_X), KEY)) == pytest.approx(evidence.mean(), abs=1.0)
    np.testing.assert_allclose(model.posterior(LINEAR_X)[0].variance[0], np.diag(covariance), rtol=1e-4)
    assert len(model.sample(KEY, (7,))) == 7


@pytest.mark.slow
def test_the_importance_bound_grows_towards_the_evidence(linear):
    model, law, _ = linear
    wrong = eqx.tree_at(lambda m: m.recognition.layers[-1].bias, model, replace_fn=lambda b: b + 0.3)
    evidence = float(np.asarray(law.log_prob(LINEAR_X)).mean())
    bounds = [float(wrong.log_likelihood_bound(LINEAR_X, n, key=KEY).mean()) for n in (3, 300)]
    assert bounds[0] < bounds[1] - 0.02 and bounds[1] == pytest.approx(evidence, abs=0.05)


@pytest.mark.slow
def test_imputation_is_gibbs_sampling_where_recognition_is_exact(linear):
    model, law, _ = linear
    mean, covariance = np.asarray(law.mean, np.float64), np.asarray(law.covariance_matrix, np.float64)
    x = np.asarray(LINEAR_X[:2]).copy()
    x[:, 3:] = np.nan
    draws = np.asarray(model.impute(np.repeat(x, 100, 0), key=KEY, num_samples=60, burn_in=40))
    assert (draws[..., :3] == np.float32(x[:, :3].repeat(100, 0))).all()
    gain = np.linalg.solve(covariance[:3, :3], covariance[:3, 3:]).T
    exact = mean[3:] + (x[:, :3] - mean[:3]) @ gain.T
    spread = np.sqrt(np.diag(covariance[3:, 3:] - gain @ covariance[:3, 3:]))
    rows = draws[..., 3:].mean(0).reshape(2, 100, 2)  # chains are independent
    # Four numbers at five standard errors from a hundred chains: false alarms below 1e-4.
    assert (np.abs(rows.mean(1) - exact) < 5 * rows.std(1) / 10).all()
    np.testing.assert_allclose(
        draws[..., 3:].reshape(60, 2, 100, 2).std((0, 2)), np.broadcast_to(spread, (2, 2)), rtol=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [pytest.param("normal", marks=pytest.mark.slow), "bernoulli"])
def test_two_layers_are_trained_saved_and_sampled(likelihood, tmp_path):
    x = LINEAR_X if likelihood == "normal" else (LINEAR_X > 3).astype(float)
    settings = {"latents": (3, 2), "likelihood": likelihood, "width": 8, "num_steps": 200}
    model, history = deep_latent_gaussian(x, key=KEY, learning_rate=1e-2, **settings)
    assert history.losses[-20:].mean() < history.losses[:5].mean() - 0.3
    assert [q.event_shape for q in model.posterior(x)] == [(3,), (2,)]
    drawn = np.asarray(model.sample(KEY, (50,)))
    assert drawn.shape == (50, 5) and (likelihood == "normal" or set(np.unique(drawn)) <= {0.0, 1.0})
    # Both are bounds from below, the second tighter; the noise of 40 rows with 200 draws each is about 0.01.
    bound = float(model.elbo(x, key=KEY, num_samples=200).mean())
    assert bound < float(model.log_likelihood_bound(x, 300, key=KEY).mean()) + 0.05
    save(model, tmp_path / "m.bayes")
    again = load(tmp_path / "m.bayes")
    np.testing.assert_array_equal(again.elbo(x, key=KEY, num_samples=200).mean(), bound)


def test_bad_input():
    with pytest.raises(InputError, match="unknown identity 'stein'"):
        gaussian_gradient(wave, MEAN, ROOT, key=KEY, identity="stein")
    with pytest.raises(InputError, match="root a square of its size"):
        gaussian_gradient(wave, MEAN, ROOT[:2], key=KEY)
    with pytest.raises(InputError, match="equally many entries"):
        StructuredGaussian(jnp.zeros(3), jnp.ones(2), jnp.ones(3))
    with pytest.raises(InputError, match="bernoulli features lie in 0 to 1"):
        deep_latent_gaussian(LINEAR_X, key=KEY, likelihood="bernoulli")
    with pytest.raises(InputError, match="unknown likelihood 'poisson'"):
        deep_latent_gaussian(LINEAR_X, key=KEY, likelihood="poisson")
    with pytest.raises(InputError, match="1 NaN or infinite"):
        deep_latent_gaussian(np.array([[1.0, np.nan]]), key=KEY)
    with pytest.raises(InputError, match="latents"):
        deep_latent_gaussian(LINEAR_X, key=KEY, latents=0)
    model = DeepLatentGaussian.initial(LINEAR_X, key=KEY)
    with pytest.raises(InputError, match="row 1 has no known feature"):
        model.impute(np.array([[1.0] * 5, [np.nan] * 5]), key=KEY)
    with pytest.raises(InputError, match="num_samples must be at least 1"):
        model.elbo(LINEAR_X, key=KEY, num_samples=0)
