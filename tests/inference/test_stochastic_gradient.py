"""SGLD and SGHMC on a regression whose posterior is exact, seen 101 rows at a time."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayeslens
from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.stochastic_gradient import SGHMC, SGLD, Plates

KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
X = np.c_[np.ones(2000), RNG.normal(size=(2000, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])]
Y = X @ [4.0, 1.0, -2.0] + RNG.normal(size=2000)
DATA = {"x": X, "y": Y}


def regression(x, y, taken=101):
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=taken) as rows:
        numpyro.sample("y", dist.Normal(x[rows] @ beta, 1.0), obs=y[rows])


COVARIANCE = np.linalg.inv(X.T @ X + np.eye(3) / 100)
MEAN = COVARIANCE @ X.T @ Y


@pytest.mark.slow
@pytest.mark.parametrize("engine", [SGHMC(num_samples=500), SGLD(num_samples=500)])
def test_the_posterior_of_a_regression(engine):
    found = engine(conditioned_model(regression, DATA), key=KEY)
    draws = np.asarray(found["beta"], np.float64).reshape(-1, 3)
    effective = found.summary()["ess_bulk"].to_numpy()
    # Five standard errors of six scalars each, false alarms below 1e-5; a tenth of that for the steps' own error.
    error = (draws.mean(0) - MEAN) / np.sqrt(np.diag(COVARIANCE))
    assert (np.abs(error) < 5.5 / np.sqrt(effective)).all()
    assert (np.abs(draws.std(0) / np.sqrt(np.diag(COVARIANCE)) - 1) < 5.5 / np.sqrt(2 * effective) + 0.02).all()
    exact = COVARIANCE[1, 2] / np.sqrt(COVARIANCE[1, 1] * COVARIANCE[2, 2])
    assert np.corrcoef(draws.T)[1, 2] == pytest.approx(exact, abs=0.05)
    assert found.warnings == () or all("effective" in w for w in found.warnings)


@pytest.mark.slow
def test_a_pass_over_all_parts_is_the_gradient_of_all_data():
    def two_plates(x, y, z, taken=101):
        regression(x, y, taken)
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("others", 7, subsample_size=None if taken == 2000 else 3) as rows:
            numpyro.sample("z", dist.StudentT(3.0, level, 1.0), obs=z[rows])

    data = DATA | {"z": np.arange(7.0)}
    with jax.enable_x64(True):
        part, whole = (conditioned_model(two_plates, data | {"taken": t}) for t in (101, 2000))
        point = jnp.array([1.0, 2.0, 3.0, 0.5])
        plates = Plates.of((("rows", 2000, 101), ("others", 7, 3)))
        found = eqx.filter_jit(plates.slope)(part, point)
        # Shares are kept in float32.
        np.testing.assert_allclose(found, jax.grad(whole.log_prob)(point), rtol=1e-5)


@pytest.mark.slow
def test_auto_takes_dynamics_and_too_small_parts_are_warned_of():
    found = bayeslens.infer(regression, DATA, key=KEY, num_samples=50, num_warmup=500, num_chains=2)
    assert found.engine == "sghmc" and "rows" in found.plan.sites[0].why

    def noisy(y):  # with heavy tails a single row tells next to nothing of the others, whatever the control variate
        level = numpyro.sample("level", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", len(y), subsample_size=1) as rows:
            numpyro.sample("y", dist.Cauchy(level, 0.1), obs=y[rows])

    y = np.random.default_rng(0).standard_cauchy(500)
    few = SGHMC(num_samples=20, num_warmup=500, num_chains=2)(conditioned_model(noisy, {"y": y}), key=KEY)
    assert any("noise of the gradients" in w for w in few.warnings)


def local(y):
    with numpyro.plate("rows", len(y), subsample_size=2) as rows:
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(level, 1.0), obs=y[rows])


def whole(y):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(level, 1.0), obs=y)


def crossed(y):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 3, subsample_size=2) as i, numpyro.plate("columns", 3, subsample_size=2) as j:
        numpyro.sample("y", dist.Normal(level, 1.0), obs=y[i][:, j])


@pytest.mark.parametrize(
    "model, y, message",
    [
        (local, np.zeros(4), r"'level'\] belong to rows of the plates"),
        (whole, np.zeros(4), "subsample_size and take the rows"),
        (crossed, np.zeros((3, 3)), r"'y'\] are in two subsampled plates"),
    ],
)
def test_bad_models(model, y, message):
    with pytest.raises(InputError, match=message):
        SGLD()(conditioned_model(model, {"y": y}), key=KEY)


@pytest.mark.parametrize("engine", ["nuts", "hmc", "laplace", "smc"])
def test_engines_that_need_all_data_refuse_parts(engine):
    with pytest.raises(InputError, match=r"'rows'.*use engine sgld or sghmc"):
        bayeslens.infer(regression, DATA, key=KEY, engine=engine)


def test_bad_settings():
    with pytest.raises(InputError, match="thinning must be at least 1"):
        SGLD(thinning=0)
    with pytest.raises(InputError, match="step_size must lie between 0 and 1"):
        SGHMC(step_size=2.0)
