"""PyMC models through every verb that takes a model."""

import jax
import numpy as np
import pytest

import bayeslens
from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.pymc_models import pymc_program

pm = pytest.importorskip("pymc")
Y = np.array([1.0, 2.0, 0.5])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    with pm.Model() as made:
        mu, sigma = pm.Normal("mu", 0.0, 1.0), pm.HalfNormal("sigma", 1.0)
        pm.Deterministic("twice", 2 * mu)
        pm.Normal("y", mu, sigma, observed=Y)
        pm.Potential("soft", -0.1 * mu**2)
    return made


def test_the_density_is_that_of_pymc(model):
    with jax.enable_x64(True):
        conditioned = conditioned_model(pymc_program(model), {})
        point = {"mu": np.array(0.3), "sigma_log__": np.array(-0.4)}
        vector = conditioned.unconstrain(point)
        np.testing.assert_allclose(conditioned.log_prob(vector), model.compile_logp()(point), rtol=1e-10)
        observed = model.compile_logp(vars=[*model.observed_RVs, *model.potentials])(point)
        np.testing.assert_allclose(conditioned.log_likelihood(vector), observed, rtol=1e-10)


@pytest.mark.slow
def test_infer_plan_and_pointwise_likelihood(model):
    assert bayeslens.plan(model).engine == "nuts"
    posterior = bayeslens.infer(model, key=KEY, engine="laplace", num_samples=500)
    assert set(posterior.draws) == {"mu", "sigma", "twice"} and (posterior["sigma"] > 0).all()
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["mu"], rtol=1e-6)


def test_bad_models():
    with pm.Model() as discrete:
        k = pm.Bernoulli("k", 0.5)
        pm.Normal("y", k, 1.0, observed=Y)
    with pytest.raises(InputError, match=r"\['k'\] of the PyMC model are discrete"):
        pymc_program(discrete)
    with pm.Model() as prior:
        pm.Normal("mu", 0.0, 1.0)
    with pytest.raises(InputError, match="observes nothing"):
        pymc_program(prior)
