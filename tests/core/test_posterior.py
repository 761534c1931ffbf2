"""Posteriors without an engine: access, weights, pushing, files, ArviZ and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core.conjugate import conjugate_pair, log_marginal_likelihood
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


def test_pushing_through_several_beliefs():
    """Particles of the other count by their weights: the mean is 2 * 0.75, by 1,000 draws within 5 sd of 0.061."""
    other = Posterior({"b": np.array([[0.0, 1.0]])}, log_weights=np.log([[0.25, 0.75]]))
    pushed = Posterior(DRAWS).push(lambda s, o, c: {"mu": s["mu"], "b": c * o["b"]}, other, 2.0, key=KEY)
    np.testing.assert_allclose(pushed["mu"], DRAWS["mu"], rtol=1e-6)
    assert abs(np.mean(pushed["b"]) - 1.5) < 5 * 2 * np.sqrt(0.75 * 0.25 / 1000)
    with pytest.raises(InputError, match="give a key"):
        Posterior(DRAWS).push(lambda s, o: s["mu"] + o["b"], other)


def test_pushing_keeps_how_it_was_made():
    made = {"engine": "nuts", "settings": {"num_chains": 4}, "warnings": ("careful",), "versions": {"jax": "1"}}
    pushed = Posterior(DRAWS, statistics={"diverging": DRAWS["mu"] > 2}, model=model, **made).push(lambda s: -s["mu"])
    assert {name: getattr(pushed, name) for name in made} == made
    assert pushed.model is None and pushed.density is None
    np.testing.assert_array_equal(pushed.statistics["diverging"], -np.asarray(pushed["value"]) > 2)


EXACT = {
    "mu": dist.Normal(2.0, 0.5),
    "beta": dist.MultivariateNormal(jnp.array([1.0, -1.0]), jnp.array([[2.0, 0.3], [0.3, 1.0]])),
}


def test_a_density_is_evaluated_and_drawn_on_demand():
    posterior = Posterior.from_density(EXACT, log_evidence=-3.0)
    assert posterior.names == ("beta", "mu") and posterior.log_evidence == -3.0 and posterior.engine == "exact"
    mu, beta = np.array([1.0, 2.5, 2.0]), np.array([[1.0, -1.0], [0.0, 0.0], [3.0, 1.0]])
    expected = st.norm(2.0, 0.5).logpdf(mu)
    expected += st.multivariate_normal([1.0, -1.0], [[2.0, 0.3], [0.3, 1.0]]).logpdf(beta)
    np.testing.assert_allclose(posterior.log_prob({"mu": mu, "beta": beta}), expected, rtol=1e-5)
    np.testing.assert_allclose(posterior.log_prob({"mu": mu[0], "beta": beta[0]}), expected[0], rtol=1e-5)
    drawn = posterior.sample(KEY, (5000, 2))
    assert drawn["beta"].shape == (5000, 2, 2)
    # Kolmogorov-Smirnov with a fixed key: false alarm rate 1e-4.
    assert st.kstest(np.asarray(drawn["mu"]).ravel(), st.norm(2.0, 0.5).cdf).pvalue > 1e-4
    twins = Posterior.from_density({"a": EXACT["mu"], "b": EXACT["mu"]}).sample(KEY, (10_000,))
    assert abs(np.corrcoef(twins["a"], twins["b"])[0, 1]) < 4 / np.sqrt(10_000)  # every site has a key of its own


def test_draws_of_a_density_serve_like_any_others(tmp_path):
    exact = Posterior.from_density(EXACT, model=model)
    posterior = exact.drawn(KEY, 400)
    assert posterior["beta"].shape == (1, 400, 2) and posterior.flat.shape == (400, 3)
    assert list(posterior.summary().index) == ["beta[0]", "beta[1]", "mu"]
    np.testing.assert_allclose(posterior.push(lambda s: 2 * s["mu"])["value"], 2 * posterior["mu"])
    x = jnp.array([[1.0, 1.0]])
    assert posterior.predict({"x": x}, key=KEY)["y"].shape == (400, 1)
    predicted = np.asarray(exact.predict({"x": x}, key=KEY)["y"])
    # y ~ N(2 + 1 - 1, 0.25 + 2 + 1 + 0.6) over 4,000 draws: four standard errors.
    assert predicted.shape == (4000, 1) and abs(predicted.mean() - 2.0) < 4 * np.sqrt(3.85 / 4000)
    save(exact, tmp_path / "p.bayes")
    again = load(tmp_path / "p.bayes", model=model)
    values = {"mu": 1.0, "beta": np.zeros(2)}
    assert float(again.log_prob(values)) == float(exact.log_prob(values)) and again.versions == exact.versions


def test_density_and_evidence_of_a_conjugate_posterior_obey_bayes_rule():
    # Conjugate: Gamma(2, 1) and three counts; the evidence and the density satisfy Bayes' rule at any rate.
    pair, prior, counts = (
        conjugate_pair(dist.Gamma, dist.Poisson),
        {"concentration": 2.0, "rate": 1.0},
        np.array([3, 4, 2]),
    )
    evidence = log_marginal_likelihood(pair, prior, counts)
    posterior = Posterior.from_density({"rate": pair.prior(**pair.update(prior, counts))}, log_evidence=evidence)
    rate = np.array([0.5, 2.0, 9.0])
    joint = st.gamma(2.0).logpdf(rate) + st.poisson(rate[:, None]).logpmf(counts).sum(1)
    np.testing.assert_allclose(posterior.log_prob({"rate": rate}) + posterior.log_evidence, joint, rtol=1e-5)


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
        data = Posterior(DRAWS, log_weights=weights, statistics={"energy": DRAWS["mu"]}, versions={"a": "1"}).to_arviz()
    assert float(data.posterior["mu"].min()) > 2
    # Statistics of the particles do not fit the resampled ones.
    assert not hasattr(data, "sample_stats") and data.posterior.attrs["version_a"] == "1"


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
        (lambda: Posterior.from_density({}), "at least one site"),
        (lambda: Posterior.from_density({"a": dist.Normal(np.zeros(3), 1.0)}), r"batch shape \(3,\).*to_event\(1\)"),
        (lambda: Posterior.from_density(EXACT)["mu"], r"drawn\(key\)"),
        (lambda: Posterior.from_density(EXACT).flat, r"drawn\(key\)"),
        (lambda: Posterior.from_density(EXACT).push(lambda s: s), r"drawn\(key\)"),
        (lambda: Posterior.from_density(EXACT).to_arviz(), r"drawn\(key\)"),
        (lambda: Posterior.from_density(EXACT).log_prob({"mu": 1.0}), r"each of the sites beta, mu"),
        (lambda: Posterior(DRAWS).log_prob({"mu": 1.0}), "no density"),
        (lambda: Posterior(DRAWS).drawn(KEY), "no density"),
        (lambda: Posterior({"a": np.zeros((2, 3)), "b": np.zeros((2, 4))}), "one shape"),
        (lambda: Posterior(DRAWS)["nu"], "no site 'nu'; it has beta, mu"),
        (lambda: Posterior.from_arviz(object()), "no group 'posterior'"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(InputError, match=message):
        act()
