"""Discrete latents summed out beside continuous ones: gradients by hand, and draws of both by `infer`."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density

import bayeslens
from bayeslens.inference.enumeration import marginalize

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
KEY = jax.random.key(0)


def log_normal(x):
    return -0.5 * x**2 - 0.5 * np.log(2 * np.pi)


def grouped(y):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(3), 3.0).to_event(1))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def grouped_by_hand(y, weights, mu):
    parts = dist.Categorical(weights).log_prob(jnp.arange(3)) + dist.Normal(mu, 1.0).log_prob(y[:, None])
    prior = dist.Dirichlet(jnp.ones(3)).log_prob(weights) + dist.Normal(0.0, 3.0).log_prob(mu).sum()
    return prior + jax.nn.logsumexp(parts, axis=1).sum()


def learned_chain(y):
    """A hidden Markov model whose parameters are all unknown."""
    rows = numpyro.sample("rows", dist.Dirichlet(jnp.ones((3, 3))).to_event(1))
    mu = numpyro.sample("mu", dist.Normal(jnp.arange(3.0), 1.0).to_event(1))

    def step(state, seen):
        x = numpyro.sample("x", dist.Categorical(rows[state]))
        numpyro.sample("y", dist.Normal(mu[x], 1.0), obs=seen)
        return x, None

    scan(step, numpyro.sample("x0", dist.Categorical(probs=jnp.ones(3) / 3)), y)


def learned_chain_by_hand(y, rows, mu):
    def step(message, seen):
        moved = jax.nn.logsumexp(message[:, None] + jnp.log(rows), axis=0)
        return moved + dist.Normal(mu, 1.0).log_prob(seen), None

    last, _ = jax.lax.scan(step, jnp.full(3, -jnp.log(3.0)), y)
    prior = dist.Dirichlet(jnp.ones(3)).log_prob(rows).sum() + dist.Normal(jnp.arange(3.0), 1.0).log_prob(mu).sum()
    return prior + jax.nn.logsumexp(last)


@pytest.mark.parametrize(("model", "by_hand", "rows"), [
    (grouped, grouped_by_hand, 1000), (learned_chain, learned_chain_by_hand, 100)
])  # fmt: skip
def test_gradients_are_those_of_the_model_written_out(model, by_hand, rows):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        y, mu = jnp.asarray(rng.normal(1.0, 2.0, rows)), jnp.asarray([-1.0, 0.7, 2.5])
        name, table = (
            ("weights", rng.dirichlet(np.ones(3))) if model is grouped else ("rows", rng.dirichlet([1] * 3, 3))
        )
        values = {name: jnp.asarray(table), "mu": mu}

        @functools.partial(jax.jit, compiler_options=QUICK)
        def both(values):
            found = jax.value_and_grad(lambda v: log_density(marginalize(model), (y,), {}, v)[0])(values)
            return found, jax.value_and_grad(lambda v: by_hand(y, **v))(values)

        (found, slope), (exact, exact_slope) = both(values)
        np.testing.assert_allclose(found, exact, rtol=1e-12)
        for n in values:
            np.testing.assert_allclose(slope[n], exact_slope[n], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_infer_draws_a_chain_and_its_mean():
    """NUTS for the mean of one state and exact draws of the path: the mean and the path's marginals by quadrature."""
    y = np.array([-0.5, 0.2, 2.4, 3.1, 2.2, -0.1])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(2.0, 1.0))

        def step(state, seen):
            x = numpyro.sample("x", dist.Bernoulli(jnp.where(state == 1, 0.8, 0.3)))
            numpyro.sample("y", dist.Normal(mu * x, 1.0), obs=seen)
            return x, None

        scan(step, 0, y)

    posterior = bayeslens.infer(model, {"y": y}, key=KEY, engine="nuts", num_samples=1000, num_chains=2)
    paths, grid = np.array(list(itertools.product([0, 1], repeat=6))), np.linspace(-4, 8, 1201)
    before = np.concatenate([np.zeros((64, 1), int), paths[:, :-1]], axis=1)
    up = np.where(before == 1, 0.8, 0.3)
    prior = np.log(np.where(paths == 1, up, 1 - up)).sum(1)
    joint = prior[:, None] + log_normal(grid - 2.0) + log_normal(y[:, None] - paths[..., None] * grid).sum(1)
    joint = np.exp(joint - joint.max())
    joint /= joint.sum()
    mean, share = joint.sum(0) @ grid, paths.T @ joint.sum(1)
    spread = np.sqrt(joint.sum(0) @ (grid - mean) ** 2)
    # Five standard errors of 300 effective draws.
    assert abs(posterior["mu"].mean() - mean) < 5 * spread / np.sqrt(300)
    assert posterior["x"].shape == (2, 1000, 6)
    assert (np.abs(posterior["x"].mean((0, 1)) - share) < 5 * np.sqrt(share * (1 - share) / 300)).all()
