"""NUTS against exact posteriors, and what `infer` says about bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayeslens
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior

KEY = jax.random.key(0)


def normal_model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", 10):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def beta_model(successes, trials):
    p = numpyro.sample("p", dist.Beta(2.0, 3.0))
    numpyro.sample("successes", dist.Binomial(trials, p), obs=successes)


def counts_model(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


@pytest.fixture(scope="module")
def posterior():
    y = np.linspace(0.0, 2.0, 10)
    return bayeslens.infer(normal_model, {"y": y}, key=KEY, num_warmup=300, num_samples=1000)


def test_conjugate_normal(posterior):
    # Exact: precision 1/4 + 10. Over 1,000 effective draws: five standard errors, false alarms below 1e-5.
    precision = 0.25 + 10
    mean, sd = 10 / precision, precision**-0.5
    draws = np.asarray(posterior["mu"])
    assert draws.shape == (4, 1000)
    assert abs(draws.mean() - mean) < 5 * sd / np.sqrt(1000)
    assert abs(draws.std() - sd) < 5 * sd / np.sqrt(2 * 1000)
    assert posterior.warnings == ()


def test_the_key_of_the_run_is_recorded(posterior):
    key = jax.random.wrap_key_data(np.uint32(posterior.settings["key"]))
    assert all(type(number) is int for number in posterior.settings["key"])
    again = bayeslens.infer(normal_model, {"y": np.linspace(0.0, 2.0, 10)}, key=key, num_warmup=300, num_samples=1000)
    np.testing.assert_array_equal(again["mu"], posterior["mu"])
    assert posterior.push(lambda s: s["mu"] ** 2).settings == posterior.settings


def test_conjugate_beta():
    found = bayeslens.infer(beta_model, {"successes": 7, "trials": 10}, key=KEY, num_warmup=300, num_samples=1000)
    exact = dist.Beta(9.0, 6.0)
    assert abs(np.asarray(found["p"]).mean() - float(exact.mean)) < 5 * float(exact.variance) ** 0.5 / np.sqrt(700)


def test_summary_push_predict_and_sample(posterior):
    table = posterior.summary()
    assert list(table.index) == ["mu"]
    assert table.loc["mu", "r_hat"] < 1.02 and table.loc["mu", "ess_bulk"] > 400
    squared = posterior.push(lambda s: s["mu"] ** 2, "square")
    np.testing.assert_allclose(squared["square"], np.asarray(posterior["mu"]) ** 2, rtol=1e-6)
    predicted = posterior.predict({"y": None}, key=KEY)["y"]
    assert predicted.shape == (4000, 10)
    assert abs(float(predicted.var()) - 1.1) < 0.1
    assert posterior.sample(KEY, (7,))["mu"].shape == (7,)


def test_arviz_and_files(posterior, tmp_path):
    again = Posterior.from_arviz(posterior.to_arviz())
    np.testing.assert_array_equal(again["mu"], posterior["mu"])
    bayeslens.save(posterior, tmp_path / "p.bayes")
    loaded = bayeslens.load(tmp_path / "p.bayes", model=normal_model)
    np.testing.assert_array_equal(loaded["mu"], posterior["mu"])
    assert loaded.settings == posterior.settings
    assert loaded.predict({"y": None}, key=KEY)["y"].shape == (4000, 10)


def test_particles_are_weighted():
    particles = Posterior({"x": np.array([[0.0, 1.0]])}, log_weights=np.log([[0.2, 0.8]]))
    # 10,000 draws of a coin: five standard errors.
    assert abs(float(particles.sample(KEY, (10_000,))["x"].mean()) - 0.8) < 0.02


def test_a_bad_sampler_is_said_to_be_bad():
    def funnel():
        scale = numpyro.sample("scale", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(jnp.zeros(5), jnp.exp(scale / 2)).to_event(1))
        numpyro.factor("nothing", 0.0)

    assert bayeslens.infer(funnel, {}, key=KEY, num_warmup=100, num_samples=100).warnings


@pytest.mark.parametrize(
    ("model", "data", "settings", "message"),
    [
        (lambda: None, {}, {}, "no latent"),
        (normal_model, {"z": 1.0}, {}, "no arguments"),
        (beta_model, {"trials": 3}, {}, "needs the arguments"),
        (normal_model, {"y": np.full(10, np.nan)}, {}, "NaN"),
        (normal_model, {"y": np.zeros(3)}, {}, "failed on these data"),
        (normal_model, {"y": np.zeros(10)}, {"engine": "magic"}, "unknown engine"),
        (normal_model, {"y": np.zeros(10)}, {"num_samples": 0}, "num_samples"),
        (normal_model, {"y": None}, {}, "observes nothing"),
        (beta_model, {"successes": 11, "trials": 10}, {}, "'successes' has 1 values outside the support"),
        (counts_model, {"y": 3}, {"engine": "nuts"}, "'k'. are discrete"),
    ],
)
def test_bad_input(model, data, settings, message):
    with pytest.raises(InputError, match=message):
        bayeslens.infer(model, data, key=KEY, **settings)


def test_posterior_refuses_nonsense():
    with pytest.raises(InputError, match="shape"):
        Posterior({"a": np.zeros(3)})
    with pytest.raises(InputError, match="no site"):
        Posterior({"a": np.zeros((1, 3))})["b"]
