"""Weights of centring against closed forms, and hierarchical models by `infer`."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import bayeslens
from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.inference.reparameterization import hierarchical_sites, reparameterize

KEY = jax.random.key(0)
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def known_scale(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    theta = numpyro.sample("theta", dist.Normal(mu, 2.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


@pytest.mark.slow
def test_weights_are_the_share_of_what_the_data_know():
    sigma = np.array([0.1, 2.0, 50.0])
    changed = reparameterize(known_scale, {"y": np.zeros(3), "sigma": sigma}, key=KEY)
    np.testing.assert_allclose(changed.weights["theta"], 4 / (4 + sigma**2), rtol=1e-4)


@pytest.mark.slow
def test_the_density_and_the_posterior_stay():
    """At the same values the two programs differ by the Jacobian of the map, a constant where the scale is known."""
    data = {"y": np.array([1.0, 0.0, -1.0]), "sigma": np.array([0.5, 2.0, 5.0])}
    changed = reparameterize(known_scale, data, key=KEY)
    before, after = conditioned_model(known_scale, data), conditioned_model(changed, data)
    rng, gaps = np.random.default_rng(0), []
    for _ in range(3):
        vector = np.asarray(rng.normal(size=4), np.float32)
        found = after.constrain(vector)
        gaps.append(float(after.log_prob(vector) - before.log_density({n: found[n] for n in ("mu", "theta")})))
    weights = changed.weights["theta"]
    np.testing.assert_allclose(gaps, np.sum((1 - weights) * np.log(2.0)), atol=1e-4)


def nearly_normal_schools(y, sigma):  # of normal effects, auto integrates out
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.StudentT(200.0, mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.mark.slow
def test_auto_samples_eight_schools_without_a_funnel():
    data = {"y": Y, "sigma": SIGMA}
    found = bayeslens.infer(nearly_normal_schools, data, key=KEY)
    assert "theta" in found.draws and not any("decentered" in n for n in found.draws)
    planned = {s.name: s for s in found.plan.sites}
    assert "non-centred" in planned["theta"].why and "non-centred" not in planned["mu"].why
    # Centred, a tenth of the transitions diverge; the scale of theta hardly exceeds the errors of y.
    assert found.statistics["diverging"].mean() < 0.01
    assert found.statistics["num_steps"].mean() < 20
    # From quadrature over tau with mu integrated out: posterior mean of tau, by 400 effective draws.
    tau = np.geomspace(1e-3, 500, 20_000)
    precision = 1 / (SIGMA**2 + tau[:, None] ** 2)
    total = precision.sum(1) + 1 / 25
    mean = (precision * Y).sum(1) / total
    log = 0.5 * np.log(precision).sum(1) - 0.5 * np.log(total) - 0.5 * ((precision * Y**2).sum(1) - total * mean**2)
    weight = np.exp(log - log.max()) / (1 + (tau / 5) ** 2) * np.gradient(tau)
    exact = (weight * tau).sum() / weight.sum()
    deviation = np.sqrt((weight * tau**2).sum() / weight.sum() - exact**2)
    assert abs(found["tau"].mean() - exact) < 5 * deviation / np.sqrt(400)
    assert callable(found.model) and found.model is nearly_normal_schools


def contaminated_schools(y, sigma):
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(0.0, tau))
        wild = numpyro.sample("wild", dist.Bernoulli(0.1))
        numpyro.sample("y", dist.Normal(theta, sigma * (1 + 4 * wild)), obs=y)


@pytest.mark.slow
def test_beside_finite_sites():
    """The effects are non-centred where other sites are summed out; the mean of tau is exact by quadrature."""
    data = {"y": Y, "sigma": SIGMA}
    found = bayeslens.infer(contaminated_schools, data, key=KEY)
    assert set(found.draws) == {"tau", "theta", "wild"}
    planned = {s.name: s for s in found.plan.sites}
    assert planned["wild"].treatment == "marginalized"
    assert "non-centred" in planned["theta"].why and "non-centred" not in planned["tau"].why
    # Centred, fewer than 300 are effective, and none comes near zero.
    assert found.summary().loc["tau", "ess_bulk"] > 1000
    tau = np.geomspace(1e-3, 500, 20_000)[:, None]
    parts = [w * norm.pdf(Y, 0, np.sqrt(tau**2 + (c * SIGMA) ** 2)) for w, c in ((0.9, 1.0), (0.1, 5.0))]
    tau = tau[:, 0]
    weight = np.exp(np.log(sum(parts)).sum(1)) / (1 + (tau / 5) ** 2) * np.gradient(tau)
    exact = (weight * tau).sum() / weight.sum()
    deviation = np.sqrt((weight * tau**2).sum() / weight.sum() - exact**2)
    # By 400 effective draws.
    assert abs(found["tau"].mean() - exact) < 5 * deviation / np.sqrt(400)


def flat(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_models_without_hierarchy_stay_as_they_are():
    assert hierarchical_sites(conditioned_model(flat, {"y": 1.0})) == ()
    assert reparameterize(flat, {"y": 1.0}, key=KEY) is flat


@pytest.mark.slow
@pytest.mark.parametrize("family", [dist.StudentT, dist.Laplace])
def test_other_families(family):
    def model(y):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        shape = (4.0,) if family is dist.StudentT else ()
        theta = numpyro.sample("theta", family(*shape, 0.0, tau).expand([2]))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    changed = reparameterize(model, {"y": np.zeros(2)}, key=KEY)
    assert ((changed.weights["theta"] > 0) & (changed.weights["theta"] < 1)).all()
    assert conditioned_model(changed, {"y": np.zeros(2)}).structure.names == ("tau", "theta_decentered")
