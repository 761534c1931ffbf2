"""Gaussian blocks: what is found, its integral against closed forms, and draws against the exact posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.inference import gaussian_block as gaussian_blocks
from bayeslens.inference.gaussian_block import draw_block, gaussian_block, gaussian_sites, integrate_out, integrated_out
from bayeslens.inference.infer import infer
from bayeslens.inference.planning import plan

Y, SE = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
RNG = np.random.default_rng(0)
DESIGN = RNG.normal(100.0, 15.0, (40, 2))
OUTCOME = 20 + DESIGN @ [0.5, -0.2] + 18 * RNG.normal(size=40)
SERIES = np.cumsum(RNG.normal(size=12))


def schools(y, se):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, se), obs=y)
    numpyro.deterministic("largest", theta.max())


def regression(x, y):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 100.0))
    slopes = numpyro.sample("slopes", dist.MultivariateNormal(jnp.zeros(2), jnp.array([[4.0, 1.0], [1.0, 9.0]])))
    sigma = numpyro.sample("sigma", dist.HalfNormal(50.0))
    numpyro.sample("y", dist.Normal(intercept + x @ slopes, sigma), obs=y)


def walk(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    level = numpyro.sample("level", dist.GaussianRandomWalk(scale, num_steps=12))
    numpyro.sample("y", dist.Normal(level, 0.5), obs=y)


def chain(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(before, y):
        level = numpyro.sample("level", dist.Normal(before, scale))
        numpyro.sample("y", dist.Normal(level, 0.5), obs=y)
        return level, None

    scan(step, 0.0, y)


def _walk_covariance(scale):
    position = np.arange(1, 13)
    return scale**2 * np.minimum.outer(position, position) + 0.25 * np.eye(12)


# model, data, block, and mean and covariance of the data given the value of the only other latent
CASES = {
    "schools": (schools, {"y": Y, "se": SE}, ("mu", "theta"), "tau",
                lambda tau: (np.zeros(8), 25.0 + np.diag(tau**2 + SE**2))),
    "regression": (regression, {"x": DESIGN, "y": OUTCOME}, ("intercept", "slopes"), "sigma",
                   lambda sigma: (np.zeros(40), 1e4 + DESIGN @ np.array([[4.0, 1.0], [1.0, 9.0]]) @ DESIGN.T
                                  + sigma**2 * np.eye(40))),
    "walk": (walk, {"y": SERIES}, ("level",), "scale", lambda scale: (np.zeros(12), _walk_covariance(scale))),
    "scan": (chain, {"y": SERIES}, ("level",), "scale", lambda scale: (np.zeros(12), _walk_covariance(scale))),
}  # fmt: skip


# Covariances of the data under noise of 1e-4 are singular in double precision; effects may be as small.
VALUES = {"tau": (1e-4, 0.3, 2.0, 30.0), "sigma": (3.0, 18.0, 60.0), "scale": (1e-4, 0.3, 2.0, 30.0)}


def _exact(name, value):
    """Log density of the data given the other latent."""
    _, data, _, _, law = CASES[name]
    mean, covariance = law(value)
    return multivariate_normal(mean, covariance).logpdf(data["y"])


@pytest.mark.parametrize("name", [pytest.param("schools", marks=pytest.mark.slow), "regression", "walk", "scan"])
def test_the_integral_is_the_closed_form(name):
    model, data, block, other, _ = CASES[name]
    conditioned = conditioned_model(model, data)
    assert gaussian_sites(conditioned) == block
    with jax.enable_x64(True):
        whole, _ = integrated_out(conditioned_model(model, data))
        values = jnp.array(VALUES[other])
        found = jax.jit(jax.vmap(lambda v: log_density(whole.model, (), data, {other: v})[0]))(values)
        prior = (
            dist.HalfCauchy(5.0) if other == "tau" else dist.HalfNormal(50.0 if other == "sigma" else 1.0)
        ).log_prob
        np.testing.assert_allclose(found - prior(values), [_exact(name, float(v)) for v in values], rtol=1e-9)


@pytest.mark.parametrize("name", ["schools", "regression"])
def test_single_precision_suffices(name):
    """Also where the scale is tiny, and where the columns of a design are far from orthonormal."""
    model, data, _, other, _ = CASES[name]
    whole, _ = integrated_out(conditioned_model(model, data))
    values = np.array(VALUES[other], np.float32)
    found = jax.jit(jax.vmap(lambda v: whole.log_likelihood(jnp.log(v)[None])))(values)
    # The rounding of single precision is 6e-8.
    np.testing.assert_allclose(found, [_exact(name, float(v)) for v in values], rtol=1e-4)


def test_the_jacobian_of_the_others_is_kept():
    whole, _ = integrated_out(conditioned_model(schools, {"y": Y, "se": SE}))
    z = jnp.array([0.7])
    prior = dist.HalfCauchy(5.0).log_prob(jnp.exp(0.7)) + 0.7
    np.testing.assert_allclose(jax.jit(lambda z: whole.log_prior(z))(z), prior, rtol=1e-6)


def test_draws_of_the_block_are_exact():
    """Mean and covariance of 20,000 draws: within 5 standard errors, 1 in 30,000 by chance for 54 numbers."""
    conditioned = conditioned_model(schools, {"y": Y, "se": SE})
    block, tau, count = gaussian_block(conditioned), 3.0, 20_000
    draws = draw_block(conditioned, block, {"tau": jnp.full(count, tau)}, jax.random.split(jax.random.key(0), count))
    found = np.concatenate([np.asarray(draws["mu"])[:, None], np.asarray(draws["theta"])], 1)
    prior = np.full((9, 9), 25.0)
    prior[1:, 1:] += tau**2 * np.eye(8)
    gain = prior[:, 1:] @ np.linalg.inv(prior[1:, 1:] + np.diag(SE**2))
    mean, covariance = gain @ Y, prior - gain @ prior[1:]
    variances = np.diag(covariance)
    assert (np.abs(found.mean(0) - mean) < 5 * np.sqrt(variances / count)).all()
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert (np.abs(np.cov(found.T) - covariance) < 5 * errors).all()
    np.testing.assert_allclose(draws["largest"], draws["theta"].max(-1), rtol=1e-6)


def test_what_is_not_gaussian_is_left():
    def robust(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.StudentT(4.0, mu, 1.0), obs=y)

    def hidden(y):  # the prior of another latent depends on it
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("heavy", dist.StudentT(4.0, mu, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def everything(y):  # that is the exact engine's
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def convex(y):  # quadratic, but no density in mu
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.factor("outwards", mu**2)
        numpyro.sample("y", dist.Normal(y, scale), obs=y)

    for model in (robust, hidden, everything):
        assert gaussian_sites(conditioned_model(model, {"y": np.ones(3)})) == ()
    assert gaussian_block(conditioned_model(convex, {"y": np.ones(3)})) is None
    assert integrate_out(robust, {"y": np.ones(3)}) is robust


def test_large_blocks_are_left(monkeypatch):
    monkeypatch.setattr(gaussian_blocks, "_LARGEST", 8)
    assert gaussian_sites(conditioned_model(schools, {"y": Y, "se": SE})) == ("theta",)


def test_auto_integrates_the_block_out():
    """Against quadrature over tau; 5 standard errors of effective sizes over 1,000: 1 in 100,000 by chance."""
    data = {"y": Y, "se": SE}
    sites = {s.name: s for s in plan(schools, data).sites}
    assert (sites["theta"].treatment, sites["tau"].treatment) == ("solved exactly", "sampled")
    posterior = infer(schools, data, key=jax.random.key(0))
    assert set(posterior.draws) == {"mu", "tau", "theta", "largest"}
    assert posterior["theta"].shape == (4, 1000, 8)
    assert not posterior.warnings
    regressed = plan(regression, {"x": DESIGN, "y": OUTCOME}).sites
    assert {s.treatment for s in regressed} == {"sampled"}  # no funnel: its Hessians would not pay
    grid = np.linspace(-12, 8, 4001)
    weights, moments = [], []
    for tau in np.exp(grid):
        precision = 1 / (tau**2 + SE**2)
        variance = 1 / (1 / 25 + precision.sum())
        mean = variance * (precision * Y).sum()
        covariance = 25.0 + np.diag(tau**2 + SE**2)
        log_weight = -0.5 * Y @ np.linalg.solve(covariance, Y) - 0.5 * np.linalg.slogdet(covariance)[1]
        weights.append(log_weight - np.log1p((tau / 5) ** 2) + np.log(tau))
        moments.append((mean, variance + mean**2))
    weights = np.exp(np.array(weights) - max(weights))
    first, second = weights @ np.array(moments) / weights.sum()
    sd, count = np.sqrt(second - first**2), 1000
    draws = np.asarray(posterior["mu"], np.float64)
    assert abs(draws.mean() - first) < 5 * sd / np.sqrt(count)
    assert abs(draws.std() - sd) < 5 * sd / np.sqrt(count)
