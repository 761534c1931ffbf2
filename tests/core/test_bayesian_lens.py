"""Lenses: composed inverses against brute-force Bayes and the Rauch-Tung-Striebel smoother."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens.core.bayesian_lens import exact_lens
from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running


def random_rows(rng, count, source, target):
    rows = rng.gamma(0.7, size=(count, source, target)) * (rng.random((count, source, target)) > 0.4)
    rows[..., 0] += rows.sum(-1) == 0
    return rows / rows.sum(-1, keepdims=True)


def finite_chain(prior, a, b, c):
    lens = exact_lens(FiniteKernel.state(prior), FiniteKernel(a), FiniteKernel(b), FiniteKernel(c))
    step = exact_lens(lens.prior, lens.stages[0]).then(lens.stages[1]).then(lens.stages[2])
    later = exact_lens(step.stages[0].push(step.prior), *step.stages[1:])
    posterior, log_evidence = lens.condition(2)
    return {
        "inverse": lens.inverse.probs,
        "step by step": step.inverse.probs,
        "other grouping": exact_lens(lens.prior, lens.stages[0]).then(later).inverse.probs,
        "forward": lens.forward.probs,
        "predictive": lens.predictive.probs,
        "posterior": posterior.probs,
        "log evidence": log_evidence,
        "at": lens.at(FiniteKernel.state(prior[::-1])).inverse.probs,
        "side by side": (exact_lens(lens.prior, lens.stages[0]) @ exact_lens(lens.prior, lens.stages[0])).inverse.probs,
        "at once": (lens.stages[0] @ lens.stages[0]).invert(lens.prior @ lens.prior).probs,
    }


def bayes(prior, forward):
    joint = np.einsum("nx,nxy->nyx", prior, forward)
    evidence = joint.sum(-1, keepdims=True)
    return joint / np.where(evidence > 0, evidence, 1)


def test_finite_chains_against_brute_force():
    rng = np.random.default_rng(0)
    prior = random_rows(rng, 200, 1, 4)[:, 0]
    chain = [random_rows(rng, 200, *shape) for shape in ((4, 4), (4, 3), (3, 5))]
    with jax.enable_x64(True):
        made = jax.jit(jax.vmap(finite_chain), compiler_options=QUICK)(prior, *chain)
        made = {k: np.asarray(v) for k, v in made.items()}
    # every path through the chain, one by one
    forward = sum(
        chain[0][:, :, i, None] * chain[1][:, i, j, None, None] * chain[2][:, None, j]
        for i in range(4)
        for j in range(3)
    )
    exact = bayes(prior, forward)
    assert (exact.sum(-1) == 0).any()
    np.testing.assert_allclose(made["forward"], forward, atol=1e-14)
    for way in ("inverse", "step by step", "other grouping"):
        np.testing.assert_allclose(made[way], exact, atol=1e-13)
    np.testing.assert_allclose(made["posterior"], exact[:, 2], atol=1e-13)
    np.testing.assert_allclose(made["predictive"], np.einsum("nx,nxy->ny", prior, forward), atol=1e-14)
    np.testing.assert_allclose(np.exp(made["log evidence"]), made["predictive"][:, 2], atol=1e-14)
    np.testing.assert_allclose(made["at"], bayes(prior[:, ::-1], forward), atol=1e-13)
    np.testing.assert_allclose(made["side by side"], made["at once"], atol=1e-13)


def smoother(a, q, h, r, mean, covariance, observations):
    """Rauch-Tung-Striebel in textbook form: smoothed mean and covariance of the first state, and the evidence."""
    filtered, log_evidence = [], 0.0
    for t, y in enumerate(observations):
        if t:
            mean, covariance = a @ mean, a @ covariance @ a.T + q
        s = h @ covariance @ h.T + r
        error = y - h @ mean
        log_evidence -= (error @ np.linalg.solve(s, error) + np.log(np.linalg.det(2 * np.pi * s))) / 2
        gain = covariance @ h.T @ np.linalg.inv(s)
        mean, covariance = mean + gain @ error, covariance - gain @ h @ covariance
        filtered.append((mean, covariance))
    for before, p in filtered[-2::-1]:
        predicted = a @ p @ a.T + q
        gain = p @ a.T @ np.linalg.inv(predicted)
        mean, covariance = before + gain @ (mean - a @ before), p + gain @ (covariance - predicted) @ gain.T
    return mean, covariance, log_evidence


@functools.partial(jax.jit, compiler_options=QUICK)
def smooth_by_lens(a, q, h, r, mean, covariance, observations):
    """A chain that hands on what it has observed: (y1 .. yt, state) to (y1 .. yt+1, next state)."""
    steps, size = len(observations), len(mean)
    see = LinearGaussianKernel.from_covariance(h, jnp.zeros(h.shape[0]), r)
    move = LinearGaussianKernel.from_covariance(a, jnp.zeros(size), q)
    copy = LinearGaussianKernel.deterministic(jnp.concatenate([jnp.eye(size), jnp.eye(size)]))
    both = copy >> (see @ move)
    stages = [LinearGaussianKernel.identity(t * h.shape[0]) @ (both if t < steps - 1 else see) for t in range(steps)]
    lens = exact_lens(LinearGaussianKernel.state(mean, covariance), *stages)
    posterior, log_evidence = lens.condition(observations.ravel())
    return posterior.mean, posterior.covariance, log_evidence


@pytest.mark.parametrize("singular", [False, True])
def test_gaussian_chain_is_the_smoother(singular):
    rng = np.random.default_rng(3)
    noise = np.array([[0.3, 0.0], [0.2, 0.0 if singular else 0.4]])
    model = rng.normal(size=(2, 2)), noise @ noise.T, np.array([[1.0, 0.3]]), np.array([[0.2]])
    start, observations = (np.array([1.0, -1.0]), np.array([[1.0, 0.2], [0.2, 0.5]])), rng.normal(size=(3, 1))
    exact = smoother(*model, *start, observations)
    with jax.enable_x64(True):
        for ours, theirs in zip(smooth_by_lens(*model, *start, observations), exact, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_lenses_at_different_priors_do_not_compose():
    kernel = FiniteKernel([[0.5, 0.5], [0.25, 0.75]])
    first, second = (exact_lens(FiniteKernel.state(p), kernel) for p in ([0.5, 0.5], [0.1, 0.9]))
    with pytest.raises(InputError, match="not what the first lens"):
        first.then(second)
    together = first >> second.at(first.predictive)
    assert together.inverse.isclose((kernel >> kernel).invert(first.prior))


def test_impossible_data():
    # of sizes that other tests have compiled already
    rows = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    posterior, log_evidence = exact_lens(
        FiniteKernel.state([1.0, 0.0]), FiniteKernel(rows), FiniteKernel(rows)
    ).condition(1)
    assert not posterior.probs.any() and log_evidence == -np.inf
    copy = LinearGaussianKernel([[1.0], [1.0]], [0.0, 0.0], jnp.zeros((2, 1)))
    gaussian = exact_lens(LinearGaussianKernel([[]], [0.0], [[1.0]]), copy)
    posterior, log_evidence = gaussian.condition([0.0, 1.0])
    assert np.isnan(posterior.mean).all() and log_evidence == -np.inf


@pytest.mark.parametrize("stages", [(), (LinearGaussianKernel.identity(2),)])
def test_bad_input(stages):
    with pytest.raises(InputError, match="stage"):
        exact_lens(FiniteKernel.state([0.5, 0.5]), *stages)
