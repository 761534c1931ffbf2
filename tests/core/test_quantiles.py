"""Student t, supports' ends, and root finding where the battery of `test_distribution.py` does not look."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.core.mixture import Mixture
from bayeslens.core.quantiles import (
    cdf,
    cumulative,
    invert_cdf,
    log_density,
    log_prob,
    logsumexp,
    mean_and_variance,
    quantile,
    student_t_cdf,
)

QUICKLY = {"xla_backend_optimization_level": 0}  # each program runs once
T_POINTS = np.concatenate([-np.geomspace(100, 0.01, 30), [0.0], np.geomspace(0.01, 100, 30)])
T_DEGREES = np.array([1.0, 2.0, 3.5, 10.0, 59.0, 60.0, 61.0, 100.0, 1e3, 1e5])


def test_student_t_cdf_matches_scipy():
    expected = st.t(T_DEGREES[:, None]).cdf(T_POINTS)
    evaluate = jax.jit(student_t_cdf)
    got = evaluate(jnp.asarray(T_POINTS), jnp.asarray(T_DEGREES)[:, None])
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # Near the median no digits are lost: the distance from one half is right to float32.
    near = np.array([1e-4, 1e-3, 1e-2])
    degrees = np.array([[1.0], [5.0], [60.0]])
    np.testing.assert_allclose(evaluate(near, degrees), st.t(degrees).cdf(near), atol=1e-7)


def test_student_t_cdf_in_float64():
    with jax.enable_x64(True):
        got = jax.jit(student_t_cdf)(jnp.asarray(T_POINTS), jnp.asarray(T_DEGREES)[:, None])
        assert got.dtype == jnp.float64
        expected = st.t(T_DEGREES[:, None]).cdf(T_POINTS)
        np.testing.assert_allclose(got, expected, atol=1e-7)


def test_traced_student_t_quantile():
    q = np.array([1e-3, 0.2, 0.5, 0.9, 0.999])
    d = dist.StudentT(jnp.array([2.0, 30.0]), jnp.array([-1.0, 5.0]), jnp.array([0.5, 2.0]))
    got = jax.jit(lambda d, q: invert_cdf(d, q[:, None]), compiler_options=QUICKLY)(d, jnp.asarray(q, jnp.float32))
    expected = st.t([2.0, 30.0], [-1.0, 5.0], [0.5, 2.0]).ppf(q[:, None])
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-3)


ENDS = [
    (lambda a: dist.Exponential(a), -0.5, 1e9),
    (lambda a: dist.Gamma(2 * a, a), -0.5, 1e9),
    (lambda a: dist.LogNormal(a, a), -0.5, 1e9),
    (lambda a: dist.HalfNormal(a), -0.5, 1e9),
    (lambda a: dist.Weibull(a, 2 * a), -0.5, 1e9),
    (lambda a: dist.InverseGamma(2 * a, a), -0.5, 1e9),
    (lambda a: dist.Beta(2 * a, 3 * a), -0.5, 1.5),
    (lambda a: dist.Uniform(a, 3 * a), 0.5, 4.0),
]


def outside(one):
    """Log density and cdf below and above each family's support."""
    results = []
    for make, below, above in ENDS:
        d = make(one)
        for y in (below * one, above * one):
            results.append((log_density(d, y)[0], cumulative(d, y)[0]))
    return results


def test_outside_the_support():
    """Nothing below, everything above, on the host and traced, with finite gradients."""
    expected = [(-np.inf, 0.0), (-np.inf, 1.0)]
    for results in (outside(np.ones(1)), jax.jit(outside, compiler_options=QUICKLY)(jnp.ones(1))):
        for number, (density, probability) in enumerate(results):
            name = type(ENDS[number // 2][0](np.ones(1))).__name__
            if ENDS[number // 2][2] < 1e9 or number % 2 == 0:
                assert (float(density), float(probability)) == expected[number % 2], name
            else:
                assert float(probability) == pytest.approx(1.0, abs=1e-6), name
    total = lambda y: cumulative(dist.LogNormal(jnp.ones(1), 1.0), y).sum()  # noqa: E731
    assert jnp.isfinite(jax.jit(jax.grad(total))(jnp.full(1, -0.5))).all()


def test_far_quantiles_of_a_far_mixture():
    # Components nine orders of magnitude apart: the bracket is wide, the answer must still be exact.
    d = dist.MixtureSameFamily(
        dist.CategoricalProbs(np.array([[0.5, 0.5]])), dist.Normal(np.array([[0.0, 1e6]]), np.array([[1e-3, 1.0]]))
    )
    got = quantile(d, [0.25, 0.75])[0]
    np.testing.assert_allclose(got, [0.0, 1e6], atol=1e-6)
    traced = dist.MixtureSameFamily(
        dist.CategoricalProbs(jnp.array([[0.4, 0.6]])), dist.Normal(jnp.array([[0.0, 10.0]]), jnp.array([[0.1, 1.0]]))
    )
    got = jax.jit(lambda d, q: invert_cdf(d, q), compiler_options=QUICKLY)(traced, jnp.array([0.2]))
    np.testing.assert_allclose(got, 0.0, atol=1e-3)


def test_discrete_quantiles_are_the_smallest_integers():
    rates = np.array([0.1, 3.0, 500.0])
    q = np.array([0.01, 0.5, 0.99])
    expected = st.poisson(rates[:, None]).ppf(q)
    np.testing.assert_array_equal(quantile(dist.Poisson(rates), q), expected)
    mixed = Mixture(np.array([1.0, 0.0]), [dist.Poisson(rates), dist.Poisson(rates + 50)])
    np.testing.assert_array_equal(quantile(mixed, q), expected)


def test_categorical_codes_and_impossible_classes():
    d = dist.CategoricalProbs(np.array([[0.25, 0.75], [1.0, 0.0]]))
    np.testing.assert_allclose(np.exp(log_prob(d, np.array([1, 1]))), [0.75, 0.0])


def test_logsumexp_of_impossible_terms():
    for xp in (np, jnp):
        got = logsumexp(xp, xp.asarray([[-np.inf, -np.inf], [0.0, -np.inf], [1000.0, 1000.0]]))
        np.testing.assert_allclose(got, [-np.inf, 0.0, 1000 + np.log(2)], rtol=1e-6)


def test_moments_that_do_not_exist_are_not_finite():
    _, variance = mean_and_variance(dist.StudentT(np.array([1.5, 3.0]), 0.0, 1.0))
    assert not np.isfinite(variance[0]) and variance[1] == pytest.approx(3.0)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, np.nan, [0.5, 2.0]])
def test_levels_outside_are_refused(q):
    with pytest.raises(InputError, match="strictly between 0 and 1"):
        quantile(dist.Normal(np.zeros(2), 1.0), q)


def test_shapes():
    d = dist.Normal(np.zeros(4), np.ones(4))
    assert quantile(d, 0.5).shape == (4, 1) and quantile(d, [0.1, 0.9]).shape == (4, 2)
    assert cdf(d, np.zeros(4)).shape == log_prob(d, np.zeros(4)).shape == (4,)
