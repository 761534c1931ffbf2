"""Variational families against exact normal posteriors, and where they must be doubted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.laplace import Whitening
from bayeslens.inference.numpyro_guide import NumPyroGuide
from bayeslens.inference.variational import (
    AffineLayer,
    CouplingLayers,
    Flow,
    FullRank,
    Guide,
    MeanField,
    _loss,
    _Problem,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 3)) @ np.array([[1.0, 0.0, 0.0], [0.9, 0.5, 0.0], [0.0, 0.0, 1e3]])
DATA = {"x": X, "y": X @ np.array([1.0, -0.5, 2e-3]) + RNG.normal(size=30)}


def regression(x, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def exact():
    precision = np.eye(3) / 4 + X.T @ X
    covariance = np.linalg.inv(precision)
    marginal = np.eye(30) + 4 * X @ X.T
    y = DATA["y"]
    evidence = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    return covariance @ X.T @ y, covariance, precision, evidence


def banana(y):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(a**2, 0.2))
    numpyro.sample("y", dist.Normal(b, 2.0), obs=y)


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(regression, DATA)


def check_moments(posterior, mean, deviations, count=4000):
    draws = np.asarray(posterior["beta"], np.float64)[0]
    # Independent draws: five standard errors, false alarms below 1e-5; a tenth of that for the training.
    assert (np.abs(draws.mean(0) - mean) < 5.5 * deviations / np.sqrt(count)).all()
    np.testing.assert_allclose(draws.std(0), deviations, rtol=5.5 / np.sqrt(2 * count))
    return draws


@pytest.mark.slow
@pytest.mark.parametrize("engine", [FullRank(num_steps=1000), Flow(num_steps=200)])
def test_a_normal_posterior_is_exact(conditioned, engine):
    mean, covariance, _, evidence = exact()
    posterior = engine(conditioned, key=KEY)
    draws = check_moments(posterior, mean, np.sqrt(np.diag(covariance)))
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert np.corrcoef(draws.T)[0, 1] == pytest.approx(correlation, abs=0.03)
    assert posterior.log_evidence_bound == pytest.approx(evidence, abs=0.01)
    assert posterior.log_evidence is None or posterior.log_evidence == pytest.approx(evidence, abs=1e-3)
    assert posterior.k_hat < 0.7 and posterior.warnings == ()


@pytest.mark.slow
def test_mean_field_variances_are_those_of_theory(conditioned):
    mean, covariance, precision, evidence = exact()
    posterior = MeanField()(conditioned, key=KEY)
    check_moments(posterior, mean, 1 / np.sqrt(np.diag(precision)))
    # The gap is the divergence: half of log det(precision's diagonal) - log det(precision).
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    # 4,000 log ratios: five standard errors.
    assert posterior.log_evidence_bound == pytest.approx(evidence - gap, abs=5 * 1.3 / np.sqrt(4000))
    assert (np.diag(covariance) > 1 / np.diag(precision)).all()


@pytest.mark.slow
def test_a_banana_is_bent_by_the_flow_and_not_by_a_normal():
    conditioned = conditioned_model(banana, {"y": 2.0})
    normal = FullRank(num_steps=500)(conditioned, key=KEY)
    flow = Flow(num_steps=1000)(conditioned, key=KEY)
    assert flow.k_hat < 0.7 and flow.warnings == ()
    # Exact moments by quadrature over a, with b integrated out.
    a = np.linspace(-5, 5, 4001)
    weight = np.exp(-0.5 * a**2 - 0.5 * (2.0 - a**2) ** 2 / (4 + 0.04))
    second = (weight * a**2).sum() / weight.sum()
    fourth = (weight * a**4).sum() / weight.sum()
    evidence = np.log((weight * (a[1] - a[0])).sum() / (2 * np.pi * np.sqrt(4.04)))
    # Weights have a standard error of about 0.02 nats; false alarm of five of them below 1e-6. A normal is far off.
    assert flow.log_evidence == pytest.approx(evidence, abs=5 * flow.log_evidence_error)
    assert flow.log_evidence_error < 0.05 and flow.log_evidence_bound < evidence + 0.02
    assert normal.log_evidence_bound < evidence - 0.3 and normal.log_evidence is None
    weights = np.exp(flow.log_weights - flow.log_weights.max())
    found = np.asarray(flow["a"], np.float64)
    effective = weights.sum() ** 2 / (weights**2).sum()
    error = np.sqrt((fourth - second**2) / effective)
    assert np.average(found**2, weights=weights) == pytest.approx(second, abs=5 * error)


@pytest.mark.slow
def test_layers_invert_and_know_their_determinants():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        coupling = CouplingLayers.identity(5, 4, 8, 0)
        coupling = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape) if a.ndim != 2 else a, coupling)
        affine = AffineLayer(*(jnp.asarray(0.3 * rng.normal(size=s)) for s in ((5,), (5,), (5, 5))))
        z = jnp.asarray(rng.normal(size=5))
        for layer in (coupling, affine, AffineLayer(affine.location, affine.log_diagonal, None)):
            u, log_det = layer.transform(z)
            back, inverse_log_det = layer.invert(u)
            np.testing.assert_allclose(back, z, atol=1e-9)
            jacobian = jax.jacfwd(lambda z, layer=layer: layer.transform(z)[0])(z)
            assert float(log_det) == pytest.approx(float(jnp.linalg.slogdet(jacobian)[1]), abs=1e-9)
            assert float(inverse_log_det) == pytest.approx(-float(log_det), abs=1e-9)
            assert float(jnp.abs(u - z).max()) > 0.1
        guide = Guide((coupling, affine), Whitening(np.zeros(5), np.eye(5)))
        u, log_q = guide.transform(z)
        assert float(guide.log_prob(u)) == pytest.approx(float(log_q), abs=1e-9)
        # Layers begin as the identity.
        np.testing.assert_allclose(CouplingLayers.identity(5, 4, 8, 0).transform(z)[0], z, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_the_divergence():
    """The path gradient is exact in expectation, and vanishes draw by draw at the posterior."""
    with jax.enable_x64(True):
        mean, covariance, *_ = exact()
        conditioned = jax.tree.map(np.asarray, conditioned_model(regression, DATA))
        white = Whitening(mean, np.linalg.cholesky(covariance))
        key = jax.random.key(1, impl="rbg")

        def gradient(location, log_diagonal, covering):
            def loss(parameters):
                guide = Guide((AffineLayer(*parameters, jnp.zeros((3, 3))),), white)
                return _loss(_Problem(guide, conditioned, np.asarray(covering)), None, key)

            return jax.jit(jax.grad(loss))((location, log_diagonal))

        for covering in (0.0, 1.0):
            at_optimum = gradient(jnp.zeros(3), jnp.zeros(3), covering)
            np.testing.assert_allclose(jnp.concatenate(at_optimum), 0.0, atol=1e-9)
        # KL(N(m, s^2) | N(0, 1)) has the gradients m in m and s^2 - 1 in log s.
        m, log_s = jnp.array([0.3, -0.2, 0.0]), jnp.array([0.2, 0.0, -0.3])
        found = gradient(m, log_s, 0.0)
        # Five standard errors of 256 draws, whose path gradients have deviations below 1.
        np.testing.assert_allclose(found[0], m, atol=5 / 16)
        np.testing.assert_allclose(found[1], jnp.exp(2 * log_s) - 1, atol=5 / 16)
        # The inclusive one pulls in the same direction.
        inclusive = gradient(m, log_s, 1.0)
        assert float(inclusive[0] @ m) > 0 and float(inclusive[1] @ log_s) > 0


def heavy(y):
    x = numpyro.sample("x", dist.StudentT(1.5, 0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 50.0), obs=y)


@pytest.mark.slow
def test_numpyro_guides_have_their_model_replaced_and_tails_are_missed():
    posterior = NumPyroGuide(guide=AutoNormal(regression), num_steps=500)(conditioned_model(heavy, {"y": 0.0}), key=KEY)
    # A normal proposal for tails of power 2.5, up to 50 scales out: weights without any moment there.
    assert posterior["x"].shape == (1, 4000)
    assert posterior.k_hat > 0.7 and "k-hat" in posterior.warnings[-1]
    assert 0.5 < np.asarray(posterior["x"]).std() < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoNormal])
def test_numpyro_guides_find_a_normal_posterior(guide):
    def small(x, y):
        beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        numpyro.deterministic("total", beta.sum())
        numpyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    covariance = np.linalg.inv(np.eye(2) / 4 + X[:, :2].T @ X[:, :2])
    mean = covariance @ X[:, :2].T @ DATA["y"]
    posterior = NumPyroGuide(guide=guide)(conditioned_model(small, {"x": X[:, :2], "y": DATA["y"]}), key=KEY)
    draws = np.asarray(posterior["beta"], np.float64)[0]
    variances = np.diag(covariance) if guide is AutoMultivariateNormal else 1 / np.diag(np.linalg.inv(covariance))
    assert posterior["total"].shape == (1, 4000)
    assert (np.abs(draws.mean(0) - mean) < 0.1 * np.sqrt(np.diag(covariance))).all()
    np.testing.assert_allclose(draws.var(0), variances, rtol=0.2)


def test_bad_settings():
    with pytest.raises(InputError, match="num_steps must be at least 1"):
        Flow(num_steps=0)
    with pytest.raises(InputError, match="AutoGuide"):
        NumPyroGuide("normal")
    with pytest.raises(InputError, match="learning_rate"):
        NumPyroGuide(guide=AutoNormal, learning_rate=0.0)
