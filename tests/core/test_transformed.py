"""Recalibration, cells and quantile distributions: what they promise beyond the battery."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, invert_cdf, log_prob, mean_and_variance, quantile
from bayeslens.core.transformed import Dequantized, QuantileDistribution, Recalibrated, through_rounding_cells

KNOTS = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
BENT = np.array([0.0, 0.2, 0.6, 0.8, 1.0])


def test_identity_recalibration_changes_nothing():
    base = dist.Normal(np.array([0.0, 3.0]), np.array([1.0, 2.0]))
    d = Recalibrated(base, KNOTS, KNOTS)
    y = np.array([0.7, -2.0])
    np.testing.assert_allclose(log_prob(d, y), log_prob(base, y))
    np.testing.assert_allclose(cdf(d, y), cdf(base, y))
    np.testing.assert_allclose(quantile(d, [0.01, 0.4]), quantile(base, [0.01, 0.4]), rtol=1e-9)
    mean, variance = mean_and_variance(d)
    np.testing.assert_allclose(mean, base.loc, atol=1e-6)
    np.testing.assert_allclose(variance, base.scale**2, rtol=1e-2)  # quadrature of the quantile function


def test_recalibrated_cdf_is_the_map_of_the_cdf():
    base = dist.Gamma(np.array([2.0]), 1.0)
    d = Recalibrated(base, KNOTS, BENT)
    for y in (0.05, 1.0, 3.0, 30.0):
        before = cdf(base, np.array([y]))
        np.testing.assert_allclose(cdf(d, np.array([y])), np.interp(before, KNOTS, BENT), rtol=1e-9)
    # The density is outside zero where the base's is.
    assert log_prob(d, np.array([-1.0]))[0] == -np.inf and cdf(d, np.array([-1.0]))[0] == 0.0


def test_knots_per_row():
    base = dist.Normal(np.zeros(2), 1.0)
    d = Recalibrated(base, np.stack([KNOTS, KNOTS]), np.stack([KNOTS, BENT]))
    np.testing.assert_allclose(cdf(d, np.zeros(2)), [0.5, 0.6])


@pytest.mark.parametrize("base", [dist.Poisson(np.array([0.5, 7.0])), dist.GammaPoisson(np.array([1.5, 7.0]), 0.5)])
def test_cells_have_the_probability_of_their_integer(base):
    d = Dequantized(base)
    for k in range(6):
        cell = cdf(d, np.full(2, k + 0.5)) - cdf(d, np.full(2, k - 0.5))
        np.testing.assert_allclose(cell, np.exp(log_prob(base, np.full(2, k))), atol=1e-12)
        np.testing.assert_allclose(np.exp(log_prob(d, np.full(2, k + 0.3))), cell, atol=1e-12)
    assert (log_prob(d, np.full(2, -0.6)) == -np.inf).all() and (cdf(d, np.full(2, -0.6)) == 0).all()
    mean, variance = mean_and_variance(d)
    np.testing.assert_allclose(mean, mean_and_variance(base)[0])
    np.testing.assert_allclose(variance, mean_and_variance(base)[1] + 1 / 12)
    assert through_rounding_cells(base).base is base and through_rounding_cells(d) is d


def test_quantile_distribution_goes_through_its_quantiles():
    levels, values = np.array([0.1, 0.25, 0.8]), np.array([[-1.0, 0.5, 0.7], [10.0, 20.0, 90.0]])
    d = QuantileDistribution(levels, values)
    np.testing.assert_allclose(quantile(d, levels), values)
    for i in range(3):
        np.testing.assert_allclose(cdf(d, values[:, i]), levels[i])
    # The tails continue the density of the outermost intervals.
    for end, inside in ((0, 1e-9), (-1, -1e-9)):
        at = values[:, end]
        step = np.sign(inside) * 1e-9
        np.testing.assert_allclose(log_prob(d, at - step), log_prob(d, at + step), rtol=1e-6)


def test_quantile_distribution_of_many_levels_tends_to_its_source():
    levels = np.arange(1, 200) / 200
    source = st.norm(3.0, 2.0)
    d = QuantileDistribution(levels, source.ppf(levels)[None])
    y = np.linspace(-1, 7, 50)
    got = np.array([cdf(d, np.array([v]))[0] for v in y])
    np.testing.assert_allclose(got, source.cdf(y), atol=2e-3)
    mean, variance = mean_and_variance(d)
    np.testing.assert_allclose([mean[0], variance[0]], [3.0, 4.0], rtol=0.02)


def test_recalibrated_passes_through_jit():
    d = Recalibrated(dist.Normal(jnp.zeros(2), 1.0), jnp.asarray(KNOTS), jnp.asarray(BENT))
    got = jax.jit(lambda d, q: (d.log_prob(invert_cdf(d, q)), d.cdf(invert_cdf(d, q))))(d, jnp.array([0.3, 0.7]))
    np.testing.assert_allclose(got[1], [0.3, 0.7], atol=1e-5)
    assert jnp.isfinite(got[0]).all()


def test_refused():
    with pytest.raises(InputError, match="at least two quantiles"):
        QuantileDistribution(np.array([0.5]), np.array([[1.0]]))
    with pytest.raises(InputError, match="one per level"):
        QuantileDistribution(np.array([0.2, 0.5]), np.array([[1.0, 2.0, 3.0]]))
