"""Degrees that are proved are those of the polynomials, and never less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens.inference.polynomial_degree import BEYOND, polynomial_degrees

X, S = jnp.arange(1.0, 4.0), jnp.array([0.5, 1.5, 2.5])
INDEX = np.array([2, 0, 1])


def autoregression(x, s):
    def step(before, inputs):
        now, scale = inputs
        return now, -(((now - 0.5 * before) / scale) ** 2)

    return jax.lax.scan(step, 0.0, (x, s))[1].sum()


def growing(x, s):
    return jax.lax.scan(lambda carry, now: (carry * now, None), 1.0, x)[0]


@pytest.mark.parametrize(
    "function, degree",
    [
        (lambda x, s: jnp.exp(s) + INDEX, 0),
        (lambda x, s: jnp.cumsum(x)[INDEX] / s, 1),
        (lambda x, s: jnp.linalg.solve(jnp.diag(s), jnp.ones(3)) @ x, 1),
        (lambda x, s: jax.scipy.linalg.solve_triangular(jnp.diag(s), x, lower=True), 1),
        (lambda x, s: jnp.where(s > 1, x, 2.0 * x), 1),
        (lambda x, s: jnp.concatenate([x, s]).reshape(2, 3).T[::-1], 1),
        (lambda x, s: jax.lax.cond(s[0] > 1, lambda: x, lambda: s), 1),
        (lambda x, s: (x * s) ** 2 - x, 2),
        (lambda x, s: jnp.outer(x, x), 2),
        (lambda x, s: jnp.where((x == x) & (x < jnp.inf) | (x != jnp.inf), 1.0, 0.0) * 0 + x, BEYOND),
        (lambda x, s: jnp.where((x == x) & (x != jnp.inf), jnp.square(x), jnp.nan), 2),
        (autoregression, 2),
        (growing, BEYOND),
        (lambda x, s: x**3, BEYOND),
        (lambda x, s: s / x, BEYOND),
        (lambda x, s: jnp.where(x > 1, x, s), BEYOND),
        (lambda x, s: jnp.maximum(x, s), BEYOND),
        (lambda x, s: s[x.astype(int)], BEYOND),
        (lambda x, s: jnp.linalg.cholesky(jnp.diag(x)), BEYOND),
        (lambda x, s: jax.lax.while_loop(lambda v: v.sum() < 9, lambda v: v + x, s), BEYOND),
    ],
)  # fmt: skip
def test_degrees(function, degree):
    assert polynomial_degrees(function, X, S) == [degree]


def test_quadratics_have_constant_second_derivatives():
    """What is said to be of degree two has the same Hessian everywhere: an oracle by automatic differentiation."""
    assert polynomial_degrees(autoregression, X, S) == [2]
    hessian = jax.hessian(autoregression)
    np.testing.assert_allclose(hessian(X, S), hessian(-3 * X + 1, S), rtol=1e-6)
    assert not np.allclose(hessian(X, S), hessian(X, 2 * S))
