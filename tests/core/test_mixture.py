"""Mixing: what stays of the parts, and members side by side."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core.distribution import put_together, take_apart, take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.mixture import Members, Mixture, member_moments, mix, mix_members, side_by_side
from bayeslens.core.quantiles import cdf, log_prob, mean_and_variance

LOC = np.array([[0.0, 1.0, 2.0], [5.0, 1.0, -2.0]])  # (members, rows)
WEIGHTS = np.array([0.25, 0.75])


def test_law_of_total_variance():
    mean, variance = mean_and_variance(mix_members(dist.Normal(LOC, 2.0), WEIGHTS))
    np.testing.assert_allclose(mean, WEIGHTS @ LOC)
    np.testing.assert_allclose(variance, 4 + WEIGHTS @ (LOC - mean) ** 2)
    mean, variance = mean_and_variance(mix([dist.Normal(LOC[0], 2.0), dist.Laplace(LOC[1], 1.0)], WEIGHTS))
    np.testing.assert_allclose(mean, WEIGHTS @ LOC)
    np.testing.assert_allclose(variance, 0.25 * 4 + 0.75 * 2 + WEIGHTS @ (LOC - mean) ** 2)


def test_mixing_members_is_mixing_a_list():
    y = np.array([0.3, 1.0, -4.0])
    members = mix_members(dist.Normal(LOC, 2.0), WEIGHTS)
    listed = mix([dist.Normal(LOC[0], 2.0), dist.Normal(LOC[1], 2.0)], WEIGHTS)
    np.testing.assert_allclose(log_prob(members, y), log_prob(listed, y), rtol=1e-6)
    np.testing.assert_allclose(cdf(members, y), cdf(listed, y), rtol=1e-6)
    groups = Members([dist.Normal(LOC, 2.0), dist.Laplace(LOC[:1], 1.0)])
    mixed = mix_members(groups, np.array([0.2, 0.3, 0.5]))
    density = 0.2 * np.exp(log_prob(dist.Normal(LOC[0], 2.0), y)) + 0.3 * np.exp(log_prob(dist.Normal(LOC[1], 2.0), y))
    density += 0.5 * np.exp(log_prob(dist.Laplace(LOC[0], 1.0), y))
    np.testing.assert_allclose(np.exp(log_prob(mixed, y)), density, rtol=1e-5)


def test_group_without_weight_is_left_out():
    groups = Members([dist.Normal(LOC, 2.0), dist.Laplace(LOC[:1], 1.0)])
    mixed = mix_members(groups, np.array([0.25, 0.75, 0.0]))
    y = np.array([0.3, 1.0, -4.0])
    np.testing.assert_allclose(log_prob(mixed, y), log_prob(mix_members(dist.Normal(LOC, 2.0), WEIGHTS), y), rtol=1e-5)


def test_categoricals_stay_categorical():
    probs = np.array([[[0.2, 0.8], [0.5, 0.5]], [[0.6, 0.4], [0.9, 0.1]]])
    for mixed in (
        mix_members(dist.CategoricalProbs(probs), WEIGHTS),
        mix([dist.CategoricalProbs(probs[0]), dist.CategoricalLogits(np.log(probs[1]))], WEIGHTS),
    ):
        assert isinstance(mixed, dist.CategoricalProbs)
        np.testing.assert_allclose(mixed.probs, np.einsum("m,mrc->rc", WEIGHTS, probs), rtol=1e-6)
    joined = side_by_side([dist.CategoricalProbs(probs), dist.CategoricalProbs(probs[:1])])
    assert joined.batch_shape == (3, 2)


def test_one_component_is_itself():
    d = dist.Normal(LOC[0], 2.0)
    assert mix([d], np.ones(1)) is d and side_by_side([d]) is d
    assert isinstance(mix_members(dist.Normal(LOC[:1], 2.0), np.ones(1)), dist.Normal)


def test_members_and_their_moments():
    groups = Members([dist.Normal(LOC, 2.0), dist.Laplace(LOC[:1], 1.0)])
    mean, variance = member_moments(groups)
    np.testing.assert_allclose(mean, np.concatenate([LOC, LOC[:1]]))
    np.testing.assert_allclose(variance[:, 0], [4.0, 4.0, 2.0])
    np.testing.assert_allclose(groups.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(groups.variance, variance, rtol=1e-6)
    y = np.array([0.3, 1.0, -4.0])
    each, together = jax.jit(lambda y: (groups.log_prob(y), groups.to_event(1).log_prob(y)))(y)
    np.testing.assert_allclose(each[1], log_prob(dist.Normal(LOC[1], 2.0), y), rtol=1e-6)
    np.testing.assert_allclose(together, each.sum(1), rtol=1e-5)
    again = put_together(take_apart(groups))
    assert again.batch_shape == (3, 3)
    assert jax.eval_shape(lambda k: groups.sample(k, (7,)), jax.random.key(0)).shape == (7, 3, 3)


def test_scalar_components_are_broadcast():
    d = Mixture(np.array([[0.3, 0.7], [0.5, 0.5]]), [dist.Normal(0.0, 1.0), dist.Laplace(2.0, 1.0)])
    assert d.batch_shape == (2,)
    turned = take_rows(d, np.array([1]))
    np.testing.assert_allclose(log_prob(turned, np.zeros(1)), log_prob(d, np.zeros(2))[1:], rtol=1e-6)
    assert jax.eval_shape(lambda k: d.sample(k, (5,)), jax.random.key(0)).shape == (5, 2)


def test_vector_events():
    root = np.linalg.cholesky(np.array([[2.0, 0.5], [0.5, 1.0]]))
    d = Mixture(
        WEIGHTS, [dist.MultivariateNormal(np.zeros(2), scale_tril=root), dist.Normal(np.ones(2), 1.0).to_event(1)]
    )
    mean, variance = d.moments()
    np.testing.assert_allclose(mean, [0.75, 0.75])
    np.testing.assert_allclose(variance, 0.25 * np.array([2.0, 1.0]) + 0.75 + 0.25 * 0.75)
    assert jax.eval_shape(lambda k: d.sample(k, (4,)), jax.random.key(0)).shape == (4, 2)
    density = 0.25 * st.multivariate_normal(np.zeros(2), root @ root.T).pdf(np.ones(2)) + 0.75 / (2 * np.pi)
    np.testing.assert_allclose(jnp.exp(jax.jit(d.log_prob)(np.ones(2))), density, rtol=1e-5)


def test_passes_through_jit_vmap_and_grad():
    d = Mixture(jnp.asarray(WEIGHTS), [dist.Normal(jnp.zeros(()), 1.0), dist.Laplace(jnp.ones(()), 1.0)])

    @jax.jit
    def everything(d, y):
        each = jax.vmap(lambda d, y: d.log_prob(y), (None, 0))(d, jnp.stack([y, y]))
        slope = jax.grad(lambda p: Mixture(p, d.components).log_prob(y))(d.probs)
        return d.log_prob(y), each, slope

    got, each, slope = everything(d, jnp.asarray(0.3))
    densities = np.array([st.norm.pdf(0.3), st.laplace.pdf(0.3 - 1)])
    np.testing.assert_allclose([got, *each], [np.log(WEIGHTS @ densities)] * 3, rtol=1e-5)
    np.testing.assert_allclose(slope, densities / (WEIGHTS @ densities), rtol=1e-5)


def test_refused():
    with pytest.raises(InputError, match="3 weights for 2"):
        Mixture(np.ones(3) / 3, [dist.Normal(), dist.Laplace()])
    with pytest.raises(InputError, match="one space"):
        Mixture(WEIGHTS, [dist.Normal(), dist.Poisson(1.0)])
