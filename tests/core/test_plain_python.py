"""Plain functions inside models, called from compiled programs, in batches and through executors."""

import concurrent.futures
import math
import multiprocessing
import threading

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayeslens
from bayeslens.core.errors import InputError
from bayeslens.core.plain_python import black_box


def norm(x, power):
    return float(sum(abs(v) ** power for v in x) ** (1 / power))


def test_values_under_jit_and_nested_vmap():
    found = black_box(norm)
    x, power = np.random.default_rng(0).normal(size=(3, 4, 5)), np.array([1.0, 2.0, 4.0])
    batched = jax.jit(jax.vmap(jax.vmap(found, (0, None))))(x, power)
    exact = [[norm(x[i, j], power[i]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(batched, exact, rtol=1e-6)
    # An argument without a batch is repeated.
    np.testing.assert_allclose(jax.vmap(found, (0, None))(x[0], 2.0), np.linalg.norm(x[0], axis=1), rtol=1e-6)


def test_double_precision_is_kept_and_arrays_come_back():
    both = black_box(lambda x: [math.pi * x, -x], shape=(2,))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jax.vmap(both)(jnp.array([1.0, 2.0])), [[math.pi, -1], [2 * math.pi, -2]])


def test_calls_are_spread_over_an_executor():
    both_there = threading.Barrier(2, timeout=30)  # passes only if two calls run at the same time

    def meet(x):
        both_there.wait()
        return x + 1

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        found = jax.vmap(black_box(meet, executor=executor))(jnp.arange(4.0))
    np.testing.assert_array_equal(found, [1, 2, 3, 4])


def test_processes():
    # Forking a process in which JAX has threads may hang.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        found = jax.vmap(black_box(math.sqrt, executor=executor))(jnp.array([1.0, 4.0]))
    np.testing.assert_array_equal(found, [1, 2])


def test_bad_input():
    with pytest.raises(InputError, match="needs a function, got int"):
        black_box(3)
    with pytest.raises(InputError, match=r"is a int: give a concurrent\.futures\.Executor"):
        black_box(norm, executor=4)
    with pytest.raises(Exception, match=r"gave a result of shape \(2,\), not \(\)"):
        jax.block_until_ready(black_box(lambda x: [x, x])(1.0))


# In models


def free_fall(height):
    return math.sqrt(2 * 9.81 * max(height, 0.0))


def model_of(speed):
    def model(y):
        height = numpyro.sample("height", dist.Gamma(2.0, 0.5))
        numpyro.sample("y", dist.Normal(speed(height), 0.5), obs=y)

    return model


def test_a_simulator_on_a_dask_cluster():
    """The posterior by tempered particles, whose simulations a cluster runs, against quadrature."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        speed = black_box(free_fall, executor=client.get_executor())
        posterior = bayeslens.infer(
            model_of(speed), {"y": 9.0}, key=jax.random.key(0), num_particles=32, num_islands=4, max_moves=10
        )
    assert posterior.engine == "smc" and "plain Python" in posterior.plan.sites[0].why
    height = np.linspace(1e-3, 20, 20_000)
    density = np.exp(dist.Gamma(2.0, 0.5).log_prob(height) + dist.Normal(np.sqrt(2 * 9.81 * height), 0.5).log_prob(9.0))
    mean = (density * height).sum() / density.sum()
    deviation = np.sqrt((density * height**2).sum() / density.sum() - mean**2)
    # At least a quarter of the 128 particles count: five standard errors, false alarm below 1e-6.
    weights = np.exp(posterior.log_weights - posterior.log_weights.max())
    found = np.average(np.asarray(posterior["height"]), weights=weights)
    assert abs(found - mean) < 5 * deviation / np.sqrt(32)


def test_engines_that_need_gradients_say_so():
    with pytest.raises(InputError, match="has no gradient, and engine nuts needs one: use engine smc"):
        bayeslens.infer(model_of(black_box(free_fall)), {"y": 9.0}, key=jax.random.key(0), engine="nuts")
