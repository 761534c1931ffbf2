"""Posteriors without an engine: access, weights, pushing, files, ArviZ and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.saving import load, save, show

KEY = jax.random.key(0)
rng = np.random.default_rng(0)
DRAWS = {"mu": rng.normal(2.0, 1.0, (4, 250)), "beta": rng.normal(0.0, 3.0, (4, 250, 2))}


def model(x, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(mu + x @ beta, 1e-3), obs=y)


def test_draws_are_a_dict_with_a_flat_view():
    posterior = Posterior(DRAWS)
    assert posterior["beta"] is DRAWS["beta"] and posterior.names == ("beta", "mu")
    flat = np.asarray(posterior.flat)
    assert flat.shape == (1000, 3)
    np.testing.assert_allclose(flat[:, 2], DRAWS["mu"].ravel(), rtol=1e-6)
    np.testing.assert_allclose(flat[:, :2], DRAWS["beta"].reshape(-1, 2), rtol=1e-6)


def test_samples_keep_sites_together():
    linked = Posterior({"a": DRAWS["mu"], "b": DRAWS["mu"] * 2})
    drawn = linked.sample(KEY, (50, 3))
    assert drawn["a"].shape == (50, 3)
    np.testing.assert_allclose(drawn["b"], 2 * drawn["a"], rtol=1e-6)


def test_pushed_functions_act_on_one_draw():
    pushed = Posterior(DRAWS, log_evidence=-3.0).push(lambda s: {"sum": s["mu"] + s["beta"].sum(), "two": s["beta"]})
    np.testing.assert_allclose(pushed["sum"], DRAWS["mu"] + DRAWS["beta"].sum(-1), atol=1e-5)  # float32
    assert pushed["two"].shape == (4, 250, 2) and pushed.log_evidence == -3.0


def test_predictions_use_every_draw_once():
    x = jnp.array([[1.0, 0.0], [1.0, -1.0]])
    predicted = Posterior(DRAWS, model=model).predict({"x": x}, key=KEY)["y"]
    flat = DRAWS["beta"].reshape(-1, 2)
    # The noise has deviation 0.001: six of these.
    np.testing.assert_allclose(predicted[:, 1], DRAWS["mu"].ravel() + flat[:, 0] - flat[:, 1], atol=0.006)
    with pytest.raises(InputError, match=r"load\(path, model=\.\.\.\)"):
        Posterior(DRAWS).predict({"x": x}, key=KEY)


def test_summary_of_every_scalar():
    table = Posterior(DRAWS).summary()
    assert list(table.index) == ["beta[0]", "beta[1]", "mu"]
    np.testing.assert_allclose(table.loc["mu", "mean"], DRAWS["mu"].mean(), rtol=1e-5)
    np.testing.assert_allclose(table.loc["beta[1]", "95%"], np.quantile(DRAWS["beta"][..., 1], 0.95), rtol=1e-5)
    # Independent draws: about 1000 effective ones, and R-hat about 1 (fixed data, so there is no false alarm).
    assert (table["ess_bulk"] > 600).all() and (table["r_hat"] < 1.02).all()


def test_particles_are_resampled_and_it_is_said():
    weights = np.log(np.where(DRAWS["mu"] > 2, 1.0, 1e-30))
    with pytest.warns(UserWarning, match="resampled"):
        data = Posterior(DRAWS, log_weights=weights).to_arviz()
    assert float(data.posterior["mu"].min()) > 2


def test_arviz_and_files_round_trip(tmp_path):
    posterior = Posterior(DRAWS, log_evidence=-1.5, engine="nuts", settings={"num_chains": 4}, warnings=("careful",))
    np.testing.assert_array_equal(Posterior.from_arviz(posterior.to_arviz())["beta"], DRAWS["beta"])
    path = tmp_path / "p.bayes"
    save(Posterior(DRAWS, engine="nuts", log_evidence=-1.5, warnings=("careful",), model=model), path)
    again = load(path, model=model)
    np.testing.assert_array_equal(again["beta"], DRAWS["beta"])
    assert (again.model, again.log_evidence, again.warnings) == (model, -1.5, ("careful",))
    assert load(path).model is None and "model: given to load as model" in show(path)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Posterior({}), "at least one site"),
        (lambda: Posterior({"a": np.zeros((2, 3)), "b": np.zeros((2, 4))}), "one shape"),
        (lambda: Posterior(DRAWS)["nu"], "no site 'nu'; it has beta, mu"),
        (lambda: Posterior.from_arviz(object()), "no group 'posterior'"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(InputError, match=message):
        act()
