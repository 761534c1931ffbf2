"""Parametric kernels: composite likelihoods against closed forms and SciPy, learners against backpropagation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

from bayeslens.core.errors import InputError
from bayeslens.core.parametric_kernel import Layer, ParametricKernel, maximum_likelihood_learner

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running


def affine(size, scale=1.0):
    return ParametricKernel((Layer(lambda p, x: p[0] @ x + p[1], size, scale),))


def bend(size, scale=1.0):
    return ParametricKernel((Layer(lambda p, x: jnp.tanh(p[0] @ x + p[1]), size, scale),))


def weights(rng, rows, columns):
    return rng.normal(size=(rows, columns)), rng.normal(size=rows)


def test_composite_likelihood_of_affine_layers_is_closed_form():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        chain = affine(2, 0.5) >> affine(1, 0.6) >> affine(2, 0.8)
        p = weights(rng, 2, 3), weights(rng, 1, 2), weights(rng, 2, 1)
        x, y = rng.normal(size=3), rng.normal(size=2)
        mean, covariance = x, np.zeros((3, 3))
        for (a, b), scale in zip(p, (0.5, 0.6, 0.8), strict=True):
            mean, covariance = a @ mean + b, a @ covariance @ a.T + scale**2 * np.eye(len(b))
        exact = multivariate_normal(mean, covariance).logpdf(y)
        made = jax.jit(lambda p, x, y: chain.log_prob(p, x, y, nodes=40), compiler_options=QUICK)(p, x, y)
        assert float(made) == pytest.approx(exact, abs=1e-8)


def test_composite_likelihood_of_curved_layers_is_the_integral():
    with jax.enable_x64(True):
        p = ((jnp.array([[0.7]]), jnp.array([0.2])), (jnp.array([[0.8]]), jnp.array([-0.3])))
        both = bend(1, 0.4) >> bend(1, 0.5)
        made = jax.jit(lambda p: both.log_prob(p, jnp.array([1.1]), jnp.array([0.4]), nodes=64))(p)
    middle = np.tanh(0.7 * 1.1 + 0.2)
    exact, _ = quad(
        lambda b: norm(middle, 0.4).pdf(b) * norm(np.tanh(0.8 * b - 0.3), 0.5).pdf(0.4), -8, 8, epsabs=1e-12
    )
    assert float(made) == pytest.approx(np.log(exact), abs=1e-8)


def test_learner_of_a_composite_is_the_composite_of_learners():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        first, second, third = bend(4, 0.7), bend(3, 0.7), affine(2, 0.7)
        p = weights(rng, 4, 3), weights(rng, 3, 4), weights(rng, 2, 3)
        x, y = rng.normal(size=3), rng.normal(size=2)
        learn = [maximum_likelihood_learner(k, 0.1) for k in (first, second, third)]
        whole = maximum_likelihood_learner(first >> second >> third, 0.1)
        learners = whole, (learn[0] >> learn[1]) >> learn[2], learn[0] >> (learn[1] >> learn[2])

        @functools.partial(jax.jit, compiler_options=QUICK)
        def everything(p, x, y):
            return [(each.predict(p, x), each.update(p, x, y), each.request(p, x, y)) for each in learners]

        expected, *composed = everything(p, x, y)
        for made in composed:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), made, expected)

        # and the update is gradient ascent on the likelihood, by finite differences of SciPy's density
        def log_likelihood(b):
            mean = p[2][0] @ np.tanh(p[1][0] @ np.tanh(p[0][0] @ x + p[0][1]) + p[1][1]) + b
            return multivariate_normal(mean, 0.49 * np.eye(2)).logpdf(y)

        slope = [(log_likelihood(p[2][1] + d) - log_likelihood(p[2][1] - d)) / 2e-5 for d in 1e-5 * np.eye(2)]
        np.testing.assert_allclose(expected[1][2][1], p[2][1] + 0.1 * np.array(slope), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParametricKernel(()), "at least one layer"),
        (lambda: affine(1, 0.0), "positive"),
        (lambda: affine(1).log_prob((), jnp.ones(1), jnp.ones(1)), "parameters for 1 layers"),
        (lambda: (affine(9) >> affine(1)).log_prob((0, 0), jnp.ones(1), jnp.ones(1)), "nodes"),
        (lambda: maximum_likelihood_learner(affine(1) >> affine(1, 2.0), 0.1), "noise scales"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
