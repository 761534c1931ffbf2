"""NUTS against exact posteriors, its trees against their definition, and what `infer` says about bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayeslens
from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.inference.leapfrog import Chains, Transitions
from bayeslens.inference.nuts import NUTS, TREES, _turned

KEY = jax.random.key(0)


def normal_model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", 10):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def beta_model(successes, trials):
    p = numpyro.sample("p", dist.Beta(2.0, 3.0))
    numpyro.sample("successes", dist.Binomial(trials, p), obs=successes)


def nowhere_model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(-1.0 - mu**2)), obs=y)


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
    squared = posterior.push(lambda s: s["mu"] ** 2, name="square")
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


@pytest.mark.slow
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
        (nowhere_model, {"y": 3.0}, {}, r"comes from y \(not a number\)"),
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


def test_turns_of_all_parts_of_a_subtree():
    """A leaf ends parts of 2, 4, 8, ... leaves, each aligned; each is looked at from its first to its last leaf."""
    momenta = np.random.default_rng(3).normal((0.7, 0.0), 1.0, (64, 2))
    checkpoints, total, turns = jnp.zeros((2, 10, 1, 2)), np.zeros(2), 0
    for leaf, momentum in enumerate(momenta):
        total = total + momentum
        found, checkpoints = _turned(checkpoints, jnp.array([momentum]), jnp.array([total]), jnp.array([float(leaf)]))
        expected = False
        size = 2
        while (leaf + 1) % size == 0:
            part = momenta[leaf + 1 - size : leaf + 1]
            inner = part.sum(0) - (part[0] + part[-1]) / 2
            expected |= part[0] @ inner <= 0 or part[-1] @ inner <= 0
            size *= 2
        assert bool(found[0]) == expected, leaf
        turns += expected
    assert 5 < turns < 30


def correlated():
    covariance = jnp.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 4.0]])
    numpyro.sample("x", dist.MultivariateNormal(jnp.array([1.0, 2.0, 3.0]), covariance))
    numpyro.factor("nothing", 0.0)


@pytest.fixture(scope="module")
def unscaled():
    """Many transitions with a step of 0.4 and unit mass."""
    chains = Chains(conditioned_model(correlated, {}), TREES, 4, 1024.0, 0, KEY)
    chains.rescale(chains.scale, np.zeros((4, 3)))
    chains.step = np.full(4, 0.4)
    return Transitions.joined([chains.run() for _ in range(120)])


def test_trees_leave_a_gaussian_as_it_is(unscaled):
    by_chain = [unscaled.position[unscaled.chain == c] for c in range(4)]
    draws = np.concatenate(by_chain)
    # At least 4,000 effective draws of twelve thousand: five standard errors, false alarms below 1e-5.
    np.testing.assert_allclose(draws.mean(0), [1, 2, 3], atol=5 * 2 / np.sqrt(4000))
    np.testing.assert_allclose(np.cov(draws.T), [[1, 0.9, 0], [0.9, 1, 0], [0, 0, 4]], atol=5 * 4 * np.sqrt(2 / 4000))
    precision = np.linalg.inv([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 4]])
    np.testing.assert_allclose(unscaled.gradient, -(unscaled.position - [1, 2, 3]) @ precision, atol=1e-4)


@pytest.mark.slow
def test_trees_are_as_large_as_those_of_numpyro(unscaled):
    from numpyro import infer

    kernel = infer.NUTS(correlated, step_size=0.4, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = infer.MCMC(kernel, num_warmup=50, num_samples=4000, progress_bar=False)
    mcmc.run(KEY, extra_fields=("num_steps", "accept_prob"))
    theirs = mcmc.get_extra_fields()
    # Standard errors are about 0.06 steps and 0.002: five of them, false alarms below 1e-5.
    assert abs(unscaled.scalars["num_steps"].mean() - float(theirs["num_steps"].mean())) < 0.4
    assert abs(unscaled.acceptance.mean() - float(theirs["accept_prob"].mean())) < 0.012


def banana(curvature):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(curvature * (x**2 - 1), 0.5))
    numpyro.factor("nothing", 0.0)


@pytest.mark.parametrize("mass_matrix", ["diagonal", "dense", "low_rank"])
def test_every_mass_matrix_finds_a_curved_posterior(mass_matrix):
    engine = NUTS(mass_matrix=mass_matrix, num_samples=9600, effective=1500, target_acceptance=0.9)
    found = bayeslens.infer(banana, {"curvature": 0.7}, key=KEY, engine=engine)
    x, y = (np.asarray(found[n]).ravel() for n in ("x", "y"))
    # Exact: x is standard normal, y has mean 0 and variance 0.25 + 0.49 * 2. Five standard errors of 1,500 draws,
    # whose squares are worth a quarter; false alarms below 1e-4.
    assert abs(x.mean()) < 5 / np.sqrt(1500) and abs(x.var() - 1) < 5 * np.sqrt(2 / 400)
    assert abs(y.mean()) < 5 * np.sqrt(1.23 / 1500) and abs(y.var() - 1.23) < 5 * 1.23 * np.sqrt(8 / 400)
    table = found.summary()
    assert table[["ess_bulk", "ess_tail"]].to_numpy().min() > 1400  # ArviZ counts a little differently
    assert len(found["x"][0]) < 9600


def test_statistics(posterior):
    found = posterior.statistics
    assert {n: v.shape for n, v in found.items()} == dict.fromkeys(
        ("diverging", "energy", "lp", "num_steps", "accept_prob", "step_size", "tree_depth"), (4, 1000)
    )
    mu, y = np.asarray(posterior["mu"]), np.linspace(0.0, 2.0, 10)
    exact = -0.5 * (mu / 2) ** 2 - np.log(2) - 0.5 * ((y - mu[..., None]) ** 2).sum(-1) - 5.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(found["lp"], exact, atol=1e-3)
    assert (found["energy"] >= -found["lp"] - 1e-3).all()
    depths, steps = found["tree_depth"], found["num_steps"]
    assert (steps >= 2**depths - 1).all() and (steps <= 2 ** (depths + 1) - 1).all()


def test_trees_are_no_deeper_than_allowed():
    engine = NUTS(max_tree_depth=2, num_warmup=60, num_samples=100, num_chains=2)
    found = bayeslens.infer(correlated, {}, key=KEY, engine=engine)
    assert found.statistics["num_steps"].max() <= 3 and found["x"].shape == (2, 100, 3)


def test_in_float64():
    with jax.enable_x64(True):
        found = bayeslens.infer(beta_model, {"successes": 7, "trials": 10}, key=KEY, effective=400, num_samples=2000)
    assert found["p"].dtype == np.float64 and found.statistics["lp"].dtype == np.float64
    assert abs(found["p"].mean() - 0.6) < 5 * 0.122 / np.sqrt(400)


def test_interrupted(posterior, monkeypatch):
    run, calls = Chains.run, []

    def interrupted(chains, *arguments):
        calls.append(arguments)
        if len([c for c in calls if not c]) > 1:  # calls without a number of steps are those of sampling
            raise KeyboardInterrupt
        return run(chains, *arguments)

    monkeypatch.setattr(Chains, "run", interrupted)
    data = {"y": np.linspace(0.0, 2.0, 10)}
    found = bayeslens.infer(normal_model, data, key=KEY, num_warmup=300, num_samples=1000)
    kept = found["mu"].shape[1]
    assert 20 < kept < 1000 and any("interrupted after" in w for w in found.warnings)
    np.testing.assert_array_equal(found["mu"], posterior["mu"][:, :kept])

    def at_once(chains, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chains, "run", at_once)
    with pytest.raises(KeyboardInterrupt):
        bayeslens.infer(normal_model, data, key=KEY, engine="nuts")


def test_data_of_the_same_shape_compile_nothing():
    runs = []

    def model(y):
        runs.append(0)
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def count(y):
        runs.clear()
        bayeslens.infer(model, {"y": y}, key=KEY, num_warmup=60, num_samples=50)
        return len(runs)

    assert count(np.zeros(3)) > count(np.ones(3)) == count(np.full(3, 2.0))


@pytest.mark.parametrize("settings", [{"max_tree_depth": 11}, {"mass_matrix": "full"}, {"target_acceptance": 0.0}])
def test_bad_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        NUTS(**settings)
