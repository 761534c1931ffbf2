"""Relaxed categorical draws against exact probabilities, densities and enumerated gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions.batch_util import promote_batch_shape
from scipy import integrate, stats

from bayeslens.core.distribution import put_together, take_apart, take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.inference.relaxation import (
    GumbelSoftmax,
    categorical_expectation,
    categorical_gradient,
    gumbel_softmax,
)

KEY = jax.random.key(0, impl="rbg")  # quick to compile
PROBS = np.array([0.5, 0.3, 0.2])
LOGITS = jnp.asarray(np.log(PROBS) + 1.7)  # any constant may be added
SITES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)


def cost(y):
    """Nonlinear in both sites together."""
    return jnp.tanh(2 * (WEIGHTS * y).sum()) + (y[0] * y[1] * WEIGHTS[0]).sum()


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_the_largest_entry_falls_where_it_should(temperature):
    draws = gumbel_softmax(jnp.broadcast_to(LOGITS, (20_000, 3)), key=KEY, temperature=temperature)
    counts = np.bincount(np.asarray(draws.argmax(-1)), minlength=3)
    # False alarms: 1e-4 each.
    assert stats.chisquare(counts, PROBS * 20_000).pvalue > 1e-4
    np.testing.assert_allclose(draws.sum(-1), 1, atol=1e-5)


def test_straight_through_is_one_hot_with_the_gradient_of_the_relaxed_draw():
    logits = jnp.broadcast_to(LOGITS, (50, 3))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(50, 3)), jnp.float32)
    hard = gumbel_softmax(logits, key=KEY, temperature=0.7, straight_through=True)
    soft = gumbel_softmax(logits, key=KEY, temperature=0.7)
    assert set(np.unique(hard)) == {0.0, 1.0} and (hard.argmax(-1) == soft.argmax(-1)).all()

    @jax.jit
    def both(a):
        total = lambda a, s: (weights * gumbel_softmax(a, key=KEY, temperature=0.7, straight_through=s)).sum()  # noqa: E731
        return [jax.grad(total)(a, s) for s in (False, True)]

    through = both(logits)
    np.testing.assert_allclose(through[0], through[1], atol=1e-6)
    assert float(jnp.abs(through[0]).max()) > 0.01


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_the_density_integrates_to_one_on_the_simplex(temperature):
    # Coordinates in which the density is smooth and has light tails: log ratios to the last entry.
    nodes = np.linspace(-60, 60, 601) / min(temperature, 1.0) / 2
    a, b = np.meshgrid(nodes, nodes)
    with jax.enable_x64(True):
        y = jax.nn.softmax(jnp.stack([a, b, np.zeros_like(a)], -1))
        jacobian = jnp.log(y).sum(-1)  # d(y1, y2) / d(log ratios) is the product of all entries
        d = GumbelSoftmax(temperature, jnp.asarray(np.log(PROBS) + 1.7))
        density = np.asarray(jnp.exp(d.log_prob(y) + jacobian))
    total = integrate.trapezoid(integrate.trapezoid(density, nodes), nodes)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_two_categories_are_a_relaxed_bernoulli():
    with jax.enable_x64(True):
        y = jnp.array([0.01, 0.3, 0.9])
        ours = GumbelSoftmax(0.4, jnp.array([0.8, 0.0])).log_prob(jnp.stack([y, 1 - y], -1))
        np.testing.assert_allclose(ours, dist.RelaxedBernoulli(0.4, logits=0.8).log_prob(y), rtol=1e-10)


def test_draws_have_the_density():
    d = GumbelSoftmax(0.8, LOGITS)
    # Ratios of independent Gumbel variables: the log ratio of two entries is logistic.
    y = d.sample(KEY, (5000,))
    ratio = np.asarray(jnp.log(y[:, 0] / y[:, 2]))
    # False alarm: 1e-4.
    assert stats.kstest(ratio, stats.logistic(np.log(2.5) / 0.8, 1 / 0.8).cdf).pvalue > 1e-4
    # E[q / p] = 1 for another density q of bounded ratio, over the same simplex: six standard errors, 1e-8.
    weights = np.exp(np.asarray(dist.Dirichlet(jnp.array([2.0, 2.0, 2.0])).log_prob(y) - d.log_prob(y)))
    assert abs(weights.mean() - 1) < 6 * weights.std() / np.sqrt(len(weights))


@pytest.mark.slow
def test_batches_pass_through_jit_vmap_plates_and_files(tmp_path):
    d = GumbelSoftmax(jnp.array([0.5, 1.0])[:, None], jnp.zeros((4, 3)))
    assert d.batch_shape == (2, 4) and d.event_shape == (3,) and d.has_rsample
    y = d.sample(KEY, (7,))
    assert y.shape == (7, 2, 4, 3) and d.log_prob(y).shape == (7, 2, 4)
    assert bool(d.support(y).all())
    np.testing.assert_allclose(jax.jit(lambda d, y: d.log_prob(y))(d, y), d.log_prob(y), rtol=1e-4, atol=1e-5)
    mapped = promote_batch_shape(jax.vmap(lambda t: GumbelSoftmax(t, LOGITS))(jnp.array([0.5, 1.0])))
    assert mapped.batch_shape == (2,)
    np.testing.assert_allclose(
        mapped.log_prob(jnp.full(3, 1 / 3)),
        [float(GumbelSoftmax(t, LOGITS).log_prob(jnp.full(3, 1 / 3))) for t in (0.5, 1.0)],
        rtol=1e-5,
    )
    assert take_rows(d, slice(1, 2)).batch_shape == (1, 4)
    np.testing.assert_allclose(put_together(take_apart(d)).log_prob(y), d.log_prob(y), rtol=1e-6)
    np.testing.assert_allclose(d.expand((3, 2, 4)).log_prob(y[:, None]).shape, (7, 3, 2, 4))
    save(d, tmp_path / "d.bayes")
    np.testing.assert_array_equal(load(tmp_path / "d.bayes").log_prob(y), d.log_prob(y))

    def model():
        with numpyro.plate("rows", 4):
            numpyro.sample("y", GumbelSoftmax(1.0, LOGITS))

    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, KEY)).get_trace()
    assert trace["y"]["value"].shape == (4, 3)


@pytest.mark.slow
def test_low_temperatures_stay_finite():
    d = GumbelSoftmax(0.01, LOGITS)
    y = d.sample(KEY, (1000,))
    assert bool(jnp.isfinite(d.log_prob(y)).all()) and bool(jnp.isfinite(y).all())
    slope = jax.jit(jax.grad(lambda a: GumbelSoftmax(0.01, a).sample(KEY, (100,)).sum(0)[0]))(LOGITS)
    assert bool(jnp.isfinite(slope).all())


@jax.jit
def exact(logits):
    """By hand: softmax of each site, all nine assignments."""
    first, second = jax.nn.softmax(logits)
    costs = jax.vmap(lambda a: jax.vmap(lambda b: cost(jnp.stack([a, b])))(jnp.eye(3)))(jnp.eye(3))
    return first @ costs @ second


def test_enumeration_is_exact():
    assert float(categorical_expectation(cost, SITES, estimator="enumerated")) == pytest.approx(
        float(exact(SITES)), abs=1e-6
    )
    np.testing.assert_allclose(
        categorical_gradient(cost, SITES, estimator="enumerated"), jax.grad(exact)(SITES), atol=1e-6
    )


def test_estimators_have_the_bias_that_is_said():
    slope = np.asarray(jax.grad(exact)(SITES))
    keys = jax.random.split(KEY, 20_000)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def gradients(estimator, temperature, num_samples):
        settings = {"estimator": estimator, "temperature": temperature, "num_samples": num_samples}
        return jax.vmap(lambda k: categorical_gradient(cost, SITES, key=k, **settings))(keys)

    unbiased = gradients("reinforce", 1.0, 3)
    # Six numbers at five standard errors: false alarms below 1e-5.
    assert (np.abs(unbiased.mean(0) - slope) < 5 * unbiased.std(0) / np.sqrt(len(keys))).all()
    hot, warm, cold = (gradients("gumbel_softmax", t, 1) for t in (3.0, 0.7, 0.2))
    far = [np.linalg.norm(g.mean(0) - slope) for g in (hot, warm, cold)]
    assert far[0] > far[1] > far[2]
    assert hot.var(0).sum() < warm.var(0).sum() < cold.var(0).sum()
    values = jax.jit(jax.vmap(lambda k: categorical_expectation(cost, SITES, key=k, temperature=5.0)))(keys)
    # Straight through, values have no bias at any temperature: five standard errors, 1e-6.
    assert abs(float(values.mean()) - float(exact(SITES))) < 5 * float(values.std()) / np.sqrt(len(keys))


def test_gradients_of_what_the_function_closes_over():
    slope = jax.grad(lambda w: categorical_expectation(lambda y: (w * y).sum() ** 2, SITES, estimator="enumerated"))
    by_draws = jax.jit(
        jax.grad(
            lambda w: categorical_expectation(
                lambda y: (w * y).sum() ** 2, SITES, key=KEY, estimator="reinforce", num_samples=40_000
            )
        )
    )
    # Entries of order one, with errors of about 2 / sqrt(40,000): five of them.
    np.testing.assert_allclose(slope(WEIGHTS), by_draws(WEIGHTS), atol=0.06)


def test_bad_input():
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        gumbel_softmax(LOGITS, key=KEY, temperature=0.0)
    with pytest.raises(InputError, match="at least two categories"):
        GumbelSoftmax(1.0, jnp.zeros((3, 1)))
    with pytest.raises(InputError, match="unknown estimator 'rebar'"):
        categorical_gradient(cost, SITES, key=KEY, estimator="rebar")
    with pytest.raises(InputError, match="give key="):
        categorical_expectation(cost, SITES)
    with pytest.raises(InputError, match="num_samples=1 is too few"):
        categorical_gradient(cost, SITES, key=KEY, estimator="reinforce")
    with pytest.raises(InputError, match="more than 65536 assignments"):
        categorical_gradient(cost, jnp.zeros((11, 3)), estimator="enumerated")
