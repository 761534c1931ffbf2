"""R-hat, effective sample sizes and k-hat against ArviZ, and the sentences."""

from __future__ import annotations

import arviz as az
import numpy as np
import pytest

from bayeslens.inference.diagnostics import convergence, doubts_of_chains, doubts_of_weights, pareto_k


def chains(correlation, seed=0):
    """Autoregressive chains: a normal, a rounded and a skewed scalar."""
    noise = np.random.default_rng(seed).normal(size=(4, 601, 3))
    values = np.zeros_like(noise)
    for t in range(601):
        values[:, t] = (correlation * values[:, t - 1] if t else 0.0) + noise[:, t]
    values[..., 1], values[..., 2] = np.round(values[..., 1]), np.exp(values[..., 2])
    return values


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95, -0.6])
def test_convergence_is_that_of_arviz(correlation):
    values = chains(correlation)
    found = convergence(values)
    for i in range(3):
        one = values[..., i]
        np.testing.assert_allclose(found.r_hat[i], float(az.rhat(one)), rtol=1e-6)
        np.testing.assert_allclose(found.ess_bulk[i], float(az.ess(one)), rtol=0.005)
        np.testing.assert_allclose(found.ess_tail[i], float(az.ess(one, method="tail")), rtol=0.005)


def test_a_scalar_that_never_moves():
    values = chains(0.0)
    values[..., 0] = 1.0
    assert np.isnan(convergence(values).ess_bulk[0]) and np.isfinite(convergence(values).ess_bulk[1:]).all()


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_k_hat_is_that_of_arviz(scale):
    normal = np.random.default_rng(0).normal(size=10_000)
    log_weights = -0.5 * normal**2 * (1 / scale**2 - 1)
    np.testing.assert_allclose(pareto_k(log_weights), float(az.psislw(log_weights)[1]), rtol=1e-6)


def test_k_hat_at_the_edges():
    assert pareto_k(np.zeros(1000)) == -np.inf
    assert pareto_k(np.full(1000, -np.inf)) == np.inf
    assert pareto_k(np.array([0.0, 1.0])) == np.inf
    assert doubts_of_weights(np.zeros(100))[1] == ()
    assert "k-hat" in doubts_of_weights(np.random.default_rng(0).standard_cauchy(2000))[1][0]


def test_sentences():
    fine = {"x": chains(0.0)[..., 0]}
    assert doubts_of_chains(fine, {"diverging": np.zeros((4, 601), bool)}) == ()
    assert "3 transitions diverged" in doubts_of_chains(fine, {"diverging": np.arange(2404) < 3})[0]
    apart = {"x": fine["x"] + np.arange(4)[:, None]}
    assert any("chains disagree" in s for s in doubts_of_chains(apart, {}))
    assert any("effective sample size" in s for s in doubts_of_chains({"x": chains(0.95)[..., 0]}, {}))
    assert "too few draws" in doubts_of_chains({"x": fine["x"][:, :5]}, {})[0]
    assert "not finite" in doubts_of_chains({"x": np.where(fine["x"] > 2, np.inf, fine["x"])}, {})[0]
    assert doubts_of_chains({"x": np.ones((4, 100))}, {}) == ()
