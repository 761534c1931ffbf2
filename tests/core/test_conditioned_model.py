"""The unconstrained density against NumPyro's own, and what is said about programs that cannot be used."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import potential_energy

from bayeslens.core.conditioned_model import conditioned_model, constrain_draws
from bayeslens.core.errors import InputError

KEY = jax.random.key(0)
Y = np.arange(5.0)


def every_kind(y, groups, index):
    """Transforms that change sizes, a plate, a scan, a site whose support depends on another, and a factor."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    top = numpyro.sample("top", dist.Uniform(0.0, scale))
    with numpyro.plate("groups", groups):
        effect = numpyro.sample("effect", dist.Normal(0.0, scale))
    numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))

    def step(level, y):
        level = numpyro.sample("level", dist.LogNormal(jnp.log(level), 0.3))
        numpyro.sample("seen", dist.Normal(level, 1.0), obs=y)
        return level, None

    scan(step, 1.0, y)
    numpyro.deterministic("double", 2 * effect)
    numpyro.factor("penalty", -top)
    with numpyro.handlers.scale(scale=2.0):
        numpyro.sample("y", dist.Normal(effect[index], 1.0), obs=y)


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(every_kind, {"y": Y, "groups": 4, "index": np.array([0, 1, 2, 3, 3])})


def test_density_is_that_of_numpyro(conditioned):
    point = jnp.linspace(-1.0, 1.0, conditioned.dimension)

    @eqx.filter_jit
    def everything(conditioned, point):
        by_site = conditioned.structure.unflatten(point)
        expected = -potential_energy(every_kind, (), conditioned.arguments, by_site)
        values = conditioned.constrain(point)
        back = conditioned.unconstrain(values)
        return expected, conditioned.log_prob(point), conditioned.log_terms(point), values, back

    expected, found, (prior, likelihood), values, back = everything(conditioned, point)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(prior + likelihood, expected, rtol=1e-5)
    seen = dist.Normal(values["level"], 1.0).log_prob(Y).sum() - values["top"]
    seen += 2 * dist.Normal(values["effect"][np.array([0, 1, 2, 3, 3])], 1.0).log_prob(Y).sum()
    np.testing.assert_allclose(likelihood, seen, rtol=1e-5)
    np.testing.assert_allclose(values["double"], 2 * values["effect"])
    np.testing.assert_allclose(back, point, atol=1e-5)


def test_what_is_seen(conditioned):
    kinds = {s.name: (s.family, s.shape, s.discrete) for s in conditioned.latents}
    assert kinds["weights"] == ("Dirichlet", (3,), False) and kinds["level"] == ("LogNormal", (5,), False)
    assert dict(zip(conditioned.structure.names, conditioned.structure.shapes, strict=True))["weights"] == (2,)
    assert conditioned.observed == ("seen", "penalty", "y")
    assert set(conditioned.data) == {"y", "index"} and conditioned.fixed.value == {"groups": 4}


def test_one_program_for_all_data_of_one_shape(conditioned):
    count = itertools.count()

    @eqx.filter_jit
    def density(conditioned, point):
        next(count)
        return conditioned.log_prob(point)

    point = jnp.zeros(conditioned.dimension)
    other = conditioned_model(every_kind, conditioned.arguments | {"y": Y + 1})
    first = density(conditioned, point)
    # The fixed arguments are part of the program: the same object must stand for the same program.
    second = density(eqx.tree_at(lambda c: c.data["y"], conditioned, other.data["y"]), point)
    assert next(count) == 1 and float(first) != float(second)


@pytest.mark.slow
def test_draws_of_the_prior(conditioned):
    keys = jax.random.split(KEY, 2000)
    drawn = constrain_draws(conditioned, eqx.filter_jit(lambda c: jax.vmap(c.sample_prior)(keys))(conditioned)[None])
    assert drawn["weights"].shape == (1, 2000, 3) and (drawn["top"] < drawn["scale"]).all()
    # Mean of a half-normal; five standard errors: false alarms below 1e-6.
    assert abs(drawn["scale"].mean() - np.sqrt(2 / np.pi)) < 5 * np.sqrt((1 - 2 / np.pi) / 2000)


def test_data_that_a_program_looks_at(conditioned):
    def model(y, index):
        effect = numpyro.sample("effect", dist.Normal(jnp.zeros(int(index.max()) + 1), 1.0))
        numpyro.sample("y", dist.Normal(effect[index], 1.0), obs=y)

    found = conditioned_model(model, {"y": Y, "index": np.array([0, 0, 1, 2, 2])})
    assert found.dimension == 3 and not found.data
    assert np.isfinite(eqx.filter_jit(lambda c, v: c.log_prob(v))(found, jnp.zeros(3)))


def test_starting_points(conditioned):
    starts = conditioned.start(KEY, 3)
    assert np.isfinite(eqx.filter_jit(lambda c: jax.vmap(c.log_prob)(starts))(conditioned)).all()

    def half_impossible(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        numpyro.factor("wall", jnp.where(mu < 0, -jnp.inf, 0.0))

    starts = conditioned_model(half_impossible, {"y": 1.0}).start(KEY, 10)
    assert starts.shape == (10, 1) and (starts > 0).all()


def normal(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def unrepeatable(y):
    mu = numpyro.sample("mu", dist.Normal(np.random.default_rng().normal(), 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def branching(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(1.0 if mu > 0 else 0.0, 1.0), obs=y)


def shapes_disagree(y):
    with numpyro.plate("rows", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def nowhere(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, jnp.log(-1.0 - mu**2)), obs=y)


def on_the_sphere(y):
    direction = numpyro.sample("direction", dist.ProjectedNormal(jnp.ones(3)))
    numpyro.sample("y", dist.Normal(direction[0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (normal, [1.0], "data is a dict"),
        (normal, {"y": 1.0, "z": 2.0}, "no arguments.*'z'"),
        (normal, {}, "needs the arguments.*'y'"),
        (normal, {"y": np.array([1.0, np.nan])}, "'y' holds 1 NaN"),
        (normal, {"y": None}, "observes nothing"),
        (lambda y: numpyro.sample("y", dist.Normal(), obs=y), {"y": 1.0}, "no latent"),
        (unrepeatable, {"y": 1.0}, "not reproducible"),
        (branching, {"y": 1.0}, "after 'mu'.*jnp.where"),
        (shapes_disagree, {"y": Y}, "after 'y'"),
        (on_the_sphere, {"y": 1.0}, "'direction'.*no map to real numbers"),
    ],
)
def test_programs_that_cannot_be_used(model, data, message):
    with pytest.raises(InputError, match=message):
        conditioned_model(model, data)


def test_no_starting_point():
    with pytest.raises(InputError, match=r"no starting point.*y \(not a number\)"):
        conditioned_model(nowhere, {"y": 1.0}).start(KEY, 2)


def test_an_impossible_observation():
    def counts(y):
        rate = numpyro.sample("rate", dist.Gamma(1.0, 1.0))
        numpyro.sample("y", dist.Poisson(rate), obs=y)

    with pytest.raises(InputError, match=r"'y' has 2 values outside the support of Poisson, such as -2"):
        conditioned_model(counts, {"y": np.array([1, -2, -3])}).check_observations(KEY)
    conditioned_model(counts, {"y": np.array([1, 0, 3])}).check_observations(KEY)


def test_improper_and_discrete_sites_are_named():
    def model(y):
        mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))
        numpyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)

    found = conditioned_model(model, {"y": 1.0})
    assert found.discrete[0].support_size == 3
    with pytest.raises(InputError, match=r"'mu'.*improper"):
        found.check_proper("draws")
    with pytest.raises(InputError, match=r"'k'.*discrete"):
        found.check_continuous("NUTS")


def test_subsamples_are_refused():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 5, subsample_size=2) as rows:
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    found = conditioned_model(model, {"y": Y})
    with pytest.raises(InputError, match=r"'rows'.*sgld"):
        found.log_prob(jnp.zeros(1))


def test_double_precision():
    with jax.enable_x64(True):
        found = conditioned_model(normal, {"y": Y})
        exact = dist.Normal(0.0, 1.0).log_prob(0.5) + dist.Normal(0.5, 1.0).log_prob(Y).sum()
        np.testing.assert_allclose(found.log_prob(jnp.array([0.5])), exact, rtol=1e-14)
