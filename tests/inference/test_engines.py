"""The battery of engines: the same model through every one of them, against quadrature. A new engine joins the list."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoMultivariateNormal

import bayeslens
from bayeslens.inference.infer import ENGINES
from bayeslens.inference.numpyro_guide import NumPyroGuide

slow = pytest.mark.slow
# Settings, and by how much posterior means may be off, in posterior standard deviations, besides the error of the
# draws: approximations by normal densities miss the skewness of this posterior, and a mode is not a mean.
CASES = {
    "nuts": ({"num_samples": 500}, 0.0),
    "hmc": ({"num_samples": 500}, 0.0),
    "smc": ({"num_particles": 128}, 0.0),
    "tempering": ({"num_samples": 500}, 0.0),
    "nested": ({"num_live": 200}, 0.0),
    "neural_nested": ({"num_live": 200}, 0.0),
    "laplace": ({}, 0.6),
    "pathfinder": ({}, 0.3),
    "mean_field": ({}, 0.3),
    "full_rank": ({}, 0.3),
    "flow": ({}, 0.0),
    "implicit": ({}, 0.1),
}
SLOW = {"hmc", "neural_nested", "flow", "implicit", "full_rank", "smc", "nested"}
ELSEWHERE = {"enumeration", "exact", "gibbs", "sgld", "sghmc"}  # they take other models
Y = np.array([0.5, 1.5, 2.0, 0.2, 1.1, -0.6])


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    numpyro.deterministic("top", mu + sigma)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def quadrature():
    """Means and deviations of mu and sigma, and the log evidence, on a grid."""
    mu, sigma = np.linspace(-6, 6, 601)[:, None], np.linspace(0.005, 8, 1600)
    log = (
        -0.5 * (mu / 2) ** 2 - 0.5 * np.log(2 * np.pi * 4) - 0.5 * (sigma / 2) ** 2 + np.log(2 / np.sqrt(2 * np.pi * 4))
    )
    squares = ((Y - Y.mean()) ** 2).sum() + len(Y) * (Y.mean() - mu) ** 2
    log = log - 0.5 * squares / sigma**2 - len(Y) * np.log(sigma * np.sqrt(2 * np.pi))
    weight = np.exp(log)
    total = weight.sum()
    means = np.array([(weight * mu).sum(), (weight * sigma).sum()]) / total
    squares = np.array([(weight * mu**2).sum(), (weight * sigma**2).sum()]) / total
    return means, np.sqrt(squares - means**2), np.log(total * 0.02 * (sigma[1] - sigma[0]))


def test_every_engine_is_in_the_battery():
    assert set(CASES) | ELSEWHERE == set(ENGINES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) if n in SLOW else n for n in CASES])
def test_an_engine(name, tmp_path):
    settings, allowed = CASES[name]
    found = bayeslens.infer(model, {"y": Y}, key=jax.random.key(3), engine=name, **settings)
    means, deviations, evidence = quadrature()

    assert found.engine == name and found.settings["key"] and found.versions["jax"] == jax.__version__
    shape = found["mu"].shape[:2]
    assert (
        set(found.draws) == {"mu", "sigma", "top"} and found["sigma"].shape[:2] == shape and (found["sigma"] > 0).all()
    )
    np.testing.assert_allclose(found["top"], found["mu"] + found["sigma"], rtol=1e-5)
    summary = found.summary()
    weights = np.ones(shape) if found.log_weights is None else np.exp(found.log_weights - np.max(found.log_weights))
    independent = weights.sum() ** 2 / (weights**2).sum()
    for i, site in enumerate(("mu", "sigma")):
        chain = name in ("nuts", "hmc")
        effective = summary.loc[site, "ess_bulk"] if chain else independent
        # Particles descend from few ancestors, so that they count for less than their weights say.
        effective = effective / 4 if name in ("smc", "nested", "neural_nested") else effective
        error = abs(np.average(np.asarray(found[site], float), weights=weights) - means[i]) / deviations[i]
        # Five standard errors of 22 means: false alarms below 1e-4.
        assert error < allowed + 5 / np.sqrt(effective)
    if name in ("smc", "nested", "neural_nested", "flow", "tempering"):
        assert abs(found.log_evidence - evidence) < 5 * found.log_evidence_error < 1.5
    if found.log_evidence_bound is not None and name != "implicit":
        assert found.log_evidence_bound < evidence + 0.05

    bayeslens.save(found, tmp_path / "found.bayes")
    again = bayeslens.load(tmp_path / "found.bayes")
    np.testing.assert_array_equal(again["mu"], found["mu"])
    assert again.engine == name and again.warnings == found.warnings
    same = bayeslens.infer(model, {"y": Y}, key=jax.random.key(3), engine=name, **settings)
    np.testing.assert_array_equal(same["mu"], found["mu"])


@slow
def test_a_guide_of_numpyro_is_an_engine():
    found = bayeslens.infer(model, {"y": Y}, key=jax.random.key(0), engine=NumPyroGuide(AutoMultivariateNormal))
    means, deviations, _ = quadrature()
    assert abs(np.mean(np.asarray(found["mu"], float)) - means[0]) < 0.3 * deviations[0]
    by_class = bayeslens.infer(model, {"y": Y}, key=jax.random.key(0), engine=AutoMultivariateNormal)
    assert by_class.engine == found.engine == "numpyro_guide"
