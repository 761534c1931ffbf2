"""What engines that begin with draws from the prior share: plain-Python likelihoods, and ones that are no numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import special, stats

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.nested_sampling import NestedSampling
from bayeslens.inference.sequential_monte_carlo import SMC

KEY = jax.random.key(0)
Y = np.linspace(-1.0, 3.0, 10)
EVIDENCE = stats.multivariate_normal(np.zeros(10), np.eye(10) + 4).logpdf(Y)
CALLS = []


def python_likelihood(mu, y):
    CALLS.append(np.size(mu))
    return np.asarray(-0.5 * ((np.asarray(y) - np.asarray(mu)[..., None]) ** 2).sum(-1), np.float32)


def python_model(y, method):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    shape = jax.ShapeDtypeStruct((), np.float32)
    numpyro.factor("y", jax.pure_callback(python_likelihood, shape, mu, y, vmap_method=method))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [SMC(num_particles=32), NestedSampling(num_live=40, num_steps=2)])
@pytest.mark.parametrize("method", ["expand_dims", "sequential"])
def test_likelihoods_in_plain_python_are_called_as_often_as_is_said(engine, method):
    CALLS.clear()
    found = engine(conditioned_model(python_model, {"y": Y, "method": method}), key=KEY)
    exact = EVIDENCE + 5 * np.log(2 * np.pi)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error
    assert sum(CALLS) == round(found.statistics["num_evaluations"].sum())


def test_gradients_of_plain_python_are_refused():
    conditioned = conditioned_model(python_model, {"y": Y, "method": "expand_dims"})
    with pytest.raises(InputError, match="set gradient=False"):
        SMC(num_particles=32, gradient=True)(conditioned, key=KEY)


def half_not_a_number(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.factor("y", jnp.log(mu) - jnp.log(jnp.abs(mu)) + dist.Normal(mu, 1.0).log_prob(y))


@pytest.mark.parametrize(
    "engine", [SMC(num_particles=128), pytest.param(NestedSampling(num_live=200), marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_likelihoods_that_are_not_numbers_count_as_zero(engine):
    found = engine(conditioned_model(half_not_a_number, {"y": 1.0}), key=KEY)
    # The evidence is that of the half of the prior where the logarithm exists; the other is a plateau.
    exact = stats.norm(0, 5**0.5).logpdf(1.0) + stats.norm.logsf(0, 0.8, 0.8**0.5)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_error
    assert special.softmax(found.log_weights)[found["mu"] <= 0].sum() == 0
    if isinstance(engine, SMC):
        assert (found["mu"] > 0).all()
    assert any("not a number" in w for w in found.warnings)
