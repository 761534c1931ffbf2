"""Filtering two hundred chains that are seen together, at linear cost.

Claim: in a factorial hidden Markov model, exact filtering costs exponentially much in the number of chains. The Graph
Filter updates each block of chains by the likelihood factors near to it in the factor graph only. Its error, measured
block by block, falls as the neighbourhood grows and need not rise with the number of chains.

Source: L. Rimella, N. Whiteley, "Exploiting locality in high-dimensional factorial hidden Markov models" (2022).

The model is the paper's chain graph: neighbouring chains are seen through their noisy sum. With 200 chains there is an
exact answer too, for a short time: eliminating chain by chain, whose states are then whole paths, instead of time by
time. A bootstrap particle filter gets at least the running time of the Graph Filter.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from bayeslens.gallery import Evidence
from bayeslens.processes.factorial_hidden_markov_model import (
    FactorialHiddenMarkovModel,
    exact_filter,
    exact_smoother,
    graph_filter,
    graph_smoother,
    tabulate,
)

PAPER = "S318"
CLAIM = "The Graph Filter's local error falls with the neighbourhood, does not rise with dimension, at linear cost."
NOT_CHECKED = "The constants of the theorems; learning by EM; the London Underground data, which cannot be had offline."
STEPS, NOISE, STAY, SETS = 8, 0.7, 0.7, 24


def switches(chains: int) -> FactorialHiddenMarkovModel:
    """Binary chains; neighbours are seen together."""
    move = np.array([[STAY, 1 - STAY], [1 - STAY, STAY]])
    pairs = [(i, i + 1) for i in range(chains - 1)]
    return FactorialHiddenMarkovModel(np.full((chains, 2), 0.5), np.broadcast_to(move, (chains, 2, 2)), pairs)


@jax.jit
def simulate(model, key):
    """Log likelihood factors of simulated data."""
    for_states, for_noise = jax.random.split(key)
    states = model.sample(for_states, STEPS)
    sums = states[:, :-1] + states[:, 1:] + NOISE * jax.random.normal(for_noise, (STEPS, model.num_chains - 1))
    return tabulate(model, lambda y, x: dist.Normal(x.sum(), NOISE).log_prob(y), sums)


def pairs_of(model):
    """Blocks of two neighbours."""
    return [(i, i + 1) for i in range(0, model.num_chains, 2)]


def block_only(log_factors):
    """The control: factors that reach out of their block say nothing."""
    inside = np.arange(log_factors.shape[-3]) % 2 == 0
    return jnp.where(inside[:, None, None], log_factors, 0)


def along_the_chains(model, log_factors, smooth=False):
    """Exact filtering (or smoothing) by elimination from chain to chain, with paths over time as states."""
    factors, move = np.exp(np.asarray(log_factors)), np.asarray(model.transition[0])
    result = []
    for steps in [len(factors)] if smooth else range(1, len(factors) + 1):
        path = np.asarray(model.initial[0])
        for t in range(1, steps):
            path = path[..., None] * move.reshape((1,) * (t - 1) + (2, 2))

        def across(values, tables):
            for t, table in enumerate(tables):
                values = np.moveaxis(np.tensordot(values, table, (t, 0)), -1, t)
            return values / values.sum()

        left, right = [np.ones_like(path)], [np.ones_like(path)]
        for f in range(model.num_chains - 1):
            left.append(across(left[-1] * path, factors[:steps, f]))
            right.append(across(right[-1] * path, factors[:steps, -1 - f].swapaxes(1, 2)))
        for t in range(steps) if smooth else [steps - 1]:
            others = tuple(s for s in range(steps) if s != t)
            joint = np.stack([(a * b * path).sum(others) for a, b in zip(left, reversed(right), strict=True)])
            result.append(joint / joint.sum(1, keepdims=True))
    return np.array(result)


@functools.partial(jax.jit, static_argnames="particles")
def particle_filter(model, log_factors, key, *, particles):
    """The bootstrap particle filter: move, weight by all factors, resample."""
    chains, ends = jnp.arange(model.num_chains), np.array(model.scopes).T

    def step(states, now):
        seen, key = now
        for_choice, for_move = jax.random.split(key)
        log_weights = seen[np.arange(ends.shape[1]), states[:, ends[0]], states[:, ends[1]]].sum(1)
        weights = jax.nn.softmax(log_weights)
        marginals = jnp.stack([weights @ (states == s) for s in range(2)], -1)
        grid = (jnp.arange(particles) + jax.random.uniform(for_choice)) / particles  # systematic resampling
        chosen = states[jnp.minimum(jnp.searchsorted(jnp.cumsum(weights), grid), particles - 1)]
        ones = jax.random.uniform(for_move, chosen.shape) < model.transition[chains, chosen, 1]
        return ones.astype(states.dtype), marginals

    first, *keys = jax.random.split(key, STEPS + 1)
    states = (jax.random.uniform(first, (particles, model.num_chains)) < model.initial[:, 1]).astype(jnp.int32)
    return jax.lax.scan(step, states, (log_factors, jnp.stack(keys)))[1]


def seconds(run):
    """The shortest of three runs, after one to compile."""
    jax.block_until_ready(run())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def distance(first, second):
    """Total variation of single chains."""
    return np.abs(np.asarray(first) - np.asarray(second)).sum(-1) / 2


def check(*, control: bool = False) -> Evidence:
    """Error against exact answers for 4 to 200 chains; the control ignores factors that reach out of their block."""
    numbers, seen = {}, block_only if control else (lambda log_factors: log_factors)
    with jax.enable_x64(True):
        middle = {}
        for chains in (4, 8):  # data sets side by side, exact answers on the product space
            model = switches(chains)
            data = jax.vmap(functools.partial(simulate, model))(jax.random.split(jax.random.key(0), SETS))
            exact = jax.jit(jax.vmap(lambda d, m=model: exact_filter(m, d).chains))(data)
            for radius in (0, 1, 2):
                run = functools.partial(graph_filter, model, radius=radius, blocks=pairs_of(model))
                errors = distance(jax.jit(jax.vmap(lambda d, run=run: run(seen(d)).chains))(data), exact)
                numbers[f"error, {chains} chains, radius {radius}"] = float(errors.mean())
                middle[chains, radius] = errors[:, :, chains // 2 - 1 : chains // 2 + 1].mean((1, 2))
        whole = graph_smoother(model, seen(data[0]), radius=7, blocks=[tuple(range(8))])
        exact = exact_smoother(model, data[0], blocks=[tuple(range(8))])
        numbers["one block that sees everything"] = float(
            np.abs(whole.blocks - exact.blocks).max() + abs(whole.log_likelihood - exact.log_likelihood)
        )
        numbers["exact answers, time by time against chain by chain"] = float(
            np.abs(along_the_chains(model, data[0], smooth=True) - exact.chains).max()
        )

        model = switches(200)
        data = simulate(model, jax.random.key(1))
        exact, smooth = along_the_chains(model, data), along_the_chains(model, data, smooth=True)
        for radius in (0, 1, 2):
            run = functools.partial(graph_smoother, model, radius=radius, blocks=pairs_of(model))
            filtered = graph_filter(model, seen(data), radius=radius, blocks=pairs_of(model)).chains
            numbers[f"error, 200 chains, radius {radius}"] = float(distance(filtered, exact).mean())
            numbers[f"smoothing error, 200 chains, radius {radius}"] = float(
                distance(run(seen(data)).chains, smooth).mean()
            )
        stretches = distance(filtered, exact).mean(0).reshape(10, 20).mean(1)  # far enough apart to be independent
        spread = stretches.std() / np.sqrt(10)
        centre = middle[8, 2]
        allowed = centre.mean() + 3 * np.hypot(spread, centre.std() / np.sqrt(SETS))
        numbers["error in the middle of 8 chains, radius 2"] = float(centre.mean())

    # Time, in single precision: the filter of 100 and 200 chains, then a particle filter with as much of it.
    for chains in (100, 200):
        model = switches(chains)
        known = simulate(model, jax.random.key(1)) if chains == 100 else jnp.asarray(data, jnp.float32)
        run = jax.jit(lambda d, m=model: graph_filter(m, d, radius=2, blocks=pairs_of(m)).chains)
        numbers[f"milliseconds, {chains} chains"] = 1000 * seconds(lambda run=run, known=known: run(known))
    spent, particles = 0.0, 500
    while spent < numbers["milliseconds, 200 chains"] and particles < 256_000:
        particles *= 2
        blind = functools.partial(particle_filter, model, known, jax.random.key(2), particles=particles)
        spent = 1000 * seconds(blind)
    numbers |= {"particles": float(particles), "milliseconds, particle filter": spent}
    numbers["error, 200 chains, particle filter"] = float(distance(blind(), exact).mean())

    falls = all(
        numbers[f"{kind}, 200 chains, radius {r}"] > 1.01 * numbers[f"{kind}, 200 chains, radius {r + 1}"]
        for kind in ("error", "smoothing error")
        for r in (0, 1)
    )
    best, rival = numbers["error, 200 chains, radius 2"], numbers["error, 200 chains, particle filter"]
    exactly = max(
        numbers["one block that sees everything"], numbers["exact answers, time by time against chain by chain"]
    )
    shown = (
        f"mean total variation from the exact filter with 200 chains, radius 0, 1, 2: "
        f"{', '.join(format(numbers[f'error, 200 chains, radius {r}'], '.4f') for r in (0, 1, 2))} (should fall); in "
        f"the middle of 8 chains {centre.mean():.4f} (should be the same within error); a particle filter with "
        f"{particles} particles, {spent / numbers['milliseconds, 200 chains']:.1f} times the running time, {rival:.4f} "
        f"(should be higher); "
        f"one block that sees everything differs by {exactly:.0e} (exact is 0)"
    )
    holds = exactly < 1e-10 and falls and best <= allowed and best < rival
    return Evidence(bool(holds), shown, numbers)
