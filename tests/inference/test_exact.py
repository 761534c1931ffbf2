"""Exact posteriors against closed forms, the core algebra and quadrature, and what is not conjugate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from scipy import integrate, stats

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.inference.exact import Exact, solve_exactly

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 3))
Y = X @ [1.0, 2.0, 3.0] + RNG.normal(size=30)


def regression(x, y):
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    numpyro.deterministic("total", slopes.sum() + intercept)
    numpyro.sample("y", dist.Normal(intercept + x @ slopes, 1.0), obs=y)


def every_family(k, counts, y):
    p = numpyro.sample("p", dist.Uniform(0.0, 1.0))
    rate = numpyro.sample("rate", dist.Exponential(2.0))
    with numpyro.plate("groups", 2):
        q = numpyro.sample("q", dist.Beta(2.0, 3.0))
        numpyro.sample("wins", dist.Binomial(np.array([5, 6]), q), obs=np.array([1, 2]))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    variance = numpyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    numpyro.sample("k", dist.Binomial(10, p), obs=k)
    numpyro.sample("counts", dist.Poisson(rate), obs=counts)
    numpyro.sample("classes", dist.Categorical(weights), obs=np.array([0, 1, 1]))
    numpyro.sample("y", dist.Normal(0.0, jnp.sqrt(variance)), obs=y)


@pytest.fixture(scope="module")
def fitted():
    return Exact(num_samples=4000)(conditioned_model(regression, {"x": X, "y": Y}), key=KEY)


def test_regression_is_that_of_the_core_algebra(fitted):
    design = np.column_stack([X, np.ones(30)])
    with jax.enable_x64(True):
        solution, why = solve_exactly(conditioned_model(regression, {"x": X, "y": Y}))
        prior = LinearGaussianKernel.from_covariance(np.zeros((4, 0)), np.zeros(4), np.diag([4.0, 4.0, 4.0, 1.0]))
        likelihood = LinearGaussianKernel.from_covariance(design, np.zeros(30), np.eye(30))
        posterior = likelihood.invert(prior).given(Y)
        np.testing.assert_allclose(solution.mean, posterior.mean, atol=1e-10)
        np.testing.assert_allclose(solution.covariance, posterior.covariance, atol=1e-10)
    marginal = stats.multivariate_normal(np.zeros(30), np.eye(30) + 4 * X @ X.T + 1)
    np.testing.assert_allclose(solution.log_evidence, marginal.logpdf(Y), rtol=1e-10)
    assert "affine-Gaussian block of slopes, intercept" in why


def test_draws_marginals_and_deterministic_sites(fitted):
    assert fitted["total"].shape == (1, 4000)
    np.testing.assert_allclose(fitted["total"], fitted["slopes"].sum(-1) + fitted["intercept"], rtol=1e-5)
    table = fitted.summary()
    exact = fitted.marginals["slopes"]
    np.testing.assert_allclose(table.loc["slopes[1]", "mean"], exact.mean[1], rtol=1e-6)
    # Independent draws: five standard errors, false alarms below 1e-6.
    off = np.abs(np.asarray(fitted["slopes"]).mean((0, 1)) - exact.mean)
    assert (off < 5 * np.asarray(exact.scale) / np.sqrt(4000)).all()
    assert fitted.engine == "exact" and not fitted.warnings


def test_every_family_by_its_closed_form():
    data = {"k": 7, "counts": np.array([1, 2]), "y": np.array([1.0, 2.0])}
    solution, _ = solve_exactly(conditioned_model(every_family, data))
    found = {n: s.distribution() for n, s in solution.others.items()}
    assert type(found["rate"]).__name__ == "Gamma" and type(found["variance"]).__name__ == "InverseGamma"
    expected = {
        "p": (8, 4),
        "rate": (4, 4),
        "variance": (4, 4.5),
    }
    for name, (first, second) in expected.items():
        numbers = [getattr(found[name], a) for a in sorted(found[name].arg_constraints, reverse=name == "p")]
        np.testing.assert_allclose(sorted(numbers), sorted((first, second)), rtol=1e-8)
    np.testing.assert_allclose(found["q"].concentration1, [3, 4], rtol=1e-8)
    np.testing.assert_allclose(found["q"].concentration0, [7, 7], rtol=1e-8)
    np.testing.assert_allclose(found["weights"].concentration, [2, 3, 1], rtol=1e-8)
    evidence = stats.betabinom(10, 1, 1).logpmf(7)
    evidence += np.log(integrate.quad(lambda r: 2 * np.exp(-2 * r) * stats.poisson(r).pmf([1, 2]).prod(), 0, 40)[0])
    evidence += stats.betabinom([5, 6], 2, 3).logpmf([1, 2]).sum()
    evidence += np.log(1 / 3 * 1 / 4 * 2 / 5)  # Polya's urn
    scale = lambda v: stats.invgamma(3, scale=2).pdf(v) * stats.norm(0, np.sqrt(v)).pdf([1.0, 2.0]).prod()  # noqa: E731
    evidence += np.log(integrate.quad(scale, 0, np.inf)[0])
    np.testing.assert_allclose(solution.log_evidence, evidence, rtol=1e-6)


def test_a_kalman_filter_is_found():
    def walk(y):
        def step(state, y):
            state = numpyro.sample("state", dist.Normal(0.9 * state, 0.5))
            numpyro.sample("y", dist.Normal(state, 1.0), obs=y)
            return state, None

        scan(step, 0.0, y)

    y = RNG.normal(size=12)
    solution, _ = solve_exactly(conditioned_model(walk, {"y": y}))
    inverse = np.linalg.inv(np.eye(12) - 0.9 * np.eye(12, k=-1))
    marginal = stats.multivariate_normal(np.zeros(12), 0.25 * inverse @ inverse.T + np.eye(12))
    np.testing.assert_allclose(solution.log_evidence, marginal.logpdf(y), rtol=1e-9)


def test_an_improper_prior_has_a_posterior_and_no_evidence():
    def model(y):
        mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    solution, _ = solve_exactly(conditioned_model(model, {"y": np.array([1.0, 2.0])}))
    np.testing.assert_allclose(solution.mean, [1.5], atol=1e-12)
    assert solution.log_evidence is None


def unknown_scale(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    variance = numpyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def bent(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu + 1e-3 * jnp.sin(mu), 1.0), obs=y)


def heavy(y):
    mu = numpyro.sample("mu", dist.StudentT(3.0, 0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "why"),
    [(unknown_scale, "sites together"), (bent, "sites together"), (heavy, "StudentT mu has no conjugate form")],
)
def test_what_is_not_conjugate_is_refused(model, why):
    conditioned = conditioned_model(model, {"y": np.array([1.0, 2.0])})
    solution, said = solve_exactly(conditioned)
    assert solution is None and why in said
    with pytest.raises(InputError, match="no exact posterior"):
        Exact()(conditioned, key=KEY)


def test_bad_settings():
    with pytest.raises(InputError, match="num_samples"):
        Exact(num_samples=0)
