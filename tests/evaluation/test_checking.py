"""`check` of posteriors, engines and draws: right ones pass, wrong ones do not, and each has its pictures."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayeslens
from bayeslens.core.errors import InputError
from bayeslens.report import plot

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MU = RNG.normal(size=(400, 2))
Y = MU + RNG.normal(size=(400, 2))


def line(x, y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def test_draws_made_elsewhere():
    """The exact posterior passes at 1%; one whose standard deviation is 30% too small does not."""
    noise = np.sqrt(0.5) * RNG.normal(size=(400, 99, 2))
    right = bayeslens.check(MU, draws=Y[:, None] / 2 + noise, data=Y, key=KEY)
    assert right.calibration.p_value > 0.01 and right.coverage.p_value > 0.01
    wrong = bayeslens.check(MU, draws=Y[:, None] / 2 + 0.7 * noise, data=Y, key=KEY)
    assert wrong.calibration.p_value < 0.01 and wrong.coverage.p_value < 0.01
    assert "too narrow" in str(wrong)
    plot(wrong).canvas.draw()


def test_an_engine():
    x = np.array([1.0, 2.0])

    def lens(observed, *, key):
        precision = 1 + x @ x
        return {"slope": x @ observed["y"] / precision + np.asarray(jax.random.normal(key, (60,))) / precision**0.5}

    found = bayeslens.check(line, data={"x": x, "y": np.zeros(2)}, engine=lens, count=60, key=KEY)
    assert found.calibration.names == ("slope", "log joint density") and found.calibration.p_value > 0.01


def test_a_posterior():
    x = np.linspace(-2, 2, 30)
    data = {"x": x, "y": 0.5 * x + np.random.default_rng(1).normal(size=30)}
    posterior = bayeslens.infer(line, data, key=KEY, engine="exact")
    found = bayeslens.check(posterior, key=KEY)
    assert found.sensitivity.diagnosis == ("-",)
    assert (found.predictive.table["p_value"] > 0.01).all()
    plot(found).canvas.draw()
    with pytest.raises(InputError, match="give a key"):
        bayeslens.check(posterior)
    with pytest.raises(InputError, match="got int"):
        bayeslens.check(3)
