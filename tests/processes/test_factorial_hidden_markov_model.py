"""The Graph Filter against enumeration, against its definition, and against an exact answer in sixty dimensions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

from bayeslens.core.errors import InputError
from bayeslens.processes.factorial_hidden_markov_model import (
    FactorialHiddenMarkovModel,
    exact_filter,
    exact_smoother,
    graph_filter,
    graph_smoother,
    local_total_variation,
    tabulate,
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def random_model(rng, scopes, chains, states=2):
    rows = rng.dirichlet(np.ones(states), (chains, states + 1))
    return FactorialHiddenMarkovModel(rows[:, 0], rows[:, 1:], scopes)


def random_factors(rng, model, steps):
    return rng.normal(size=(steps, len(model.scopes), *[model.num_states] * model.width))


def seen(model, log_factors, t, state, factors=None):
    """Log likelihood of the observations at one time, by looking up each factor."""
    total = 0.0
    for f in range(len(model.scopes)) if factors is None else factors:
        index = [state[i] for i in model.scopes[f]]
        total += log_factors[(t, f, *index, *[0] * (model.width - len(index)))]
    return total


# The exact filter, by summing over all paths


def test_exact_answers_are_sums_over_all_paths():
    rng = np.random.default_rng(0)
    model = random_model(rng, [(0, 2), (1,), (2, 1)], 3)
    log_factors = random_factors(rng, model, 3)
    states = list(itertools.product(range(2), repeat=3))
    initial, transition = np.asarray(model.initial), np.asarray(model.transition)
    filtered, smoothed = np.zeros((3, 3, 2)), np.zeros((3, 3, 2))
    for steps in (1, 2, 3):
        total = 0.0
        for path in itertools.product(states, repeat=steps):
            p = np.prod([initial[i, path[0][i]] for i in range(3)])
            for t in range(steps):
                p *= np.exp(seen(model, log_factors, t, path[t]))
                if t:
                    p *= np.prod([transition[i, path[t - 1][i], path[t][i]] for i in range(3)])
            total += p
            for i in range(3):
                filtered[steps - 1, i, path[-1][i]] += p
                if steps == 3:
                    smoothed[range(3), i, [x[i] for x in path]] += p
    filtered /= filtered.sum(-1, keepdims=True)
    exact = exact_smoother(model, log_factors)
    np.testing.assert_allclose(exact_filter(model, log_factors).chains, filtered, atol=1e-12)
    np.testing.assert_allclose(exact.chains, smoothed / total, atol=1e-12)
    np.testing.assert_allclose(exact.log_likelihood, np.log(total), atol=1e-12)


# The graph filter, by its definition


def distance(model, block, factor):
    """Distance from a factor to a block in the bipartite graph, by breadth-first search."""
    reached, steps = set(model.scopes[factor]), 1
    while not reached & set(block):
        wider = reached.union(*(s for s in model.scopes if reached & set(s)))
        if wider == reached:
            return np.inf
        reached, steps = wider, steps + 2
    return steps


def defined(model, log_factors, blocks, radius):
    """Filter and smoother straight from the paper, with tables over all chains."""
    states = list(itertools.product(range(model.num_states), repeat=model.num_chains))
    own = [list(itertools.product(range(model.num_states), repeat=len(b))) for b in blocks]
    initial, transition = np.asarray(model.initial), np.asarray(model.transition)
    predicted = [[{x: np.prod([initial[i, x[j]] for j, i in enumerate(b)]) for x in o}
                  for b, o in zip(blocks, own, strict=True)]]  # fmt: skip
    moves = [
        np.array([[np.prod([transition[i, x[j], z[j]] for j, i in enumerate(b)]) for z in o] for x in o])
        for b, o in zip(blocks, own, strict=True)
    ]
    filtered = []
    for t in range(len(log_factors)):
        now = []
        for k, block in enumerate(blocks):
            near = [f for f in range(len(model.scopes)) if distance(model, block, f) <= 2 * radius + 1]
            table = dict.fromkeys(own[k], 0.0)
            for x in states:
                prior = np.prod([predicted[t][j][tuple(x[i] for i in b)] for j, b in enumerate(blocks)])
                table[tuple(x[i] for i in block)] += prior * np.exp(seen(model, log_factors, t, x, near))
            values = np.array(list(table.values()))
            now.append(values / values.sum())
        filtered.append(now)
        predicted.append([dict(zip(o, p @ m, strict=True)) for o, p, m in zip(own, now, moves, strict=True)])
    smoothed = [filtered[-1]]
    for t in range(len(log_factors) - 2, -1, -1):
        ahead = [np.array(list(p.values())) for p in predicted[t + 1]]
        parts = zip(filtered[t], moves, smoothed[0], ahead, strict=True)
        smoothed.insert(0, [f * (m @ (s / a)) for f, m, s, a in parts])
    return filtered, smoothed


def padded(beliefs, blocks, states):
    """Block by block, as the library lays it out."""
    size = max(map(len, blocks))
    result = np.zeros((len(beliefs), len(blocks), states**size))
    for t, now in enumerate(beliefs):
        for k, values in enumerate(now):
            result[t, k, :: states ** (size - len(blocks[k]))] = values
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scopes", "blocks", "states", "radius"),
    [
        ([(0, 1), (2, 1), (2, 3), (3, 4)], [(0,), (1,), (2,), (3,), (4,)], 2, 0),
        ([(0, 1), (2, 1), (2, 3), (3, 4)], [(3, 0), (4, 1, 2)], 2, 0),
        ([(0, 1), (1, 2), (3,), (2, 0, 3)], [(2, 0), (1,), (3,)], 3, 1),
        ([(4, 0), (0, 1), (1, 2), (2, 3)], [(0,), (1,), (4, 3), (2,)], 2, 1),
    ],
)
def test_the_graph_filter_does_what_the_paper_defines(scopes, blocks, states, radius):
    rng = np.random.default_rng(1)
    model = random_model(rng, scopes, 1 + max(map(max, scopes)), states)
    log_factors = random_factors(rng, model, 3)
    filtered, smoothed = defined(model, log_factors, blocks, radius)
    ours = graph_filter(model, log_factors, radius=radius, blocks=blocks)
    np.testing.assert_allclose(ours.blocks, padded(filtered, blocks, states), atol=1e-12)
    np.testing.assert_allclose(ours.chains.sum(-1), 1, atol=1e-12)
    again = graph_smoother(model, log_factors, radius=radius, blocks=blocks)
    np.testing.assert_allclose(again.blocks, padded(smoothed, blocks, states), atol=1e-12)
    for k, block in enumerate(blocks):  # chains are the margins of their blocks
        table = np.reshape(smoothed[0][k], (states,) * len(block))
        for j, chain in enumerate(block):
            margin = table.sum(tuple(a for a in range(len(block)) if a != j))
            np.testing.assert_allclose(again.chains[0, chain], margin, atol=1e-12)


def test_one_block_that_sees_everything_is_exact():
    rng = np.random.default_rng(2)
    model = random_model(rng, [(0, 1), (1, 2), (2, 3)], 4, 2)
    log_factors = random_factors(rng, model, 5)
    ours = graph_smoother(model, log_factors, radius=3, blocks=[(0, 1, 2, 3)])
    exact = exact_smoother(model, log_factors, blocks=[(0, 1, 2, 3)])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_blocks_that_do_not_interact_are_exact():
    """Islands of different sizes, each a block: also the layout of blocks that are smaller than the largest."""
    rng = np.random.default_rng(3)
    model = random_model(rng, [(0, 1), (1, 2), (4, 3), (5,)], 6)
    log_factors, islands = random_factors(rng, model, 4), [(3, 4), (0, 1, 2), (5,)]
    ours = graph_smoother(model, log_factors, radius=1, blocks=islands)
    exact = exact_smoother(model, log_factors, blocks=islands)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
def test_the_first_update_is_exact_once_all_factors_are_near():
    """At the first time the chains are independent beforehand, so that only the locality is approximate."""
    rng = np.random.default_rng(4)
    model = random_model(rng, [(i, i + 1) for i in range(5)], 6)
    log_factors = random_factors(rng, model, 1)
    exact = exact_filter(model, log_factors)
    errors = [local_total_variation(graph_filter(model, log_factors, radius=r), exact).max() for r in range(5)]
    assert errors[4] < 1e-12 < errors[3] < errors[0]
    whole = graph_filter(model, log_factors, radius=4).log_likelihood
    np.testing.assert_allclose(whole, exact.log_likelihood, atol=1e-12)


# Many chains, where another order of elimination is exact


def switches(chains):
    """Each chain keeps its state with probability 0.7; pairs of neighbours are seen through their noisy sum."""
    move = np.array([[0.7, 0.3], [0.3, 0.7]])
    scopes = [(i, i + 1) for i in range(chains - 1)]
    return FactorialHiddenMarkovModel(np.full((chains, 2), 0.5), np.broadcast_to(move, (chains, 2, 2)), scopes)


@functools.partial(jax.jit, static_argnames=("steps", "noise"))
def simulate(model, key, steps, noise=0.7):
    for_states, for_noise = jax.random.split(key)
    states = model.sample(for_states, steps)
    sums = states[:, :-1] + states[:, 1:] + noise * jax.random.normal(for_noise, (steps, model.num_chains - 1))
    return tabulate(model, lambda y, x: dist.Normal(x.sum(), noise).log_prob(y), sums)


def along_the_chains(model, log_factors):
    """Exact smoothing from chain to chain: whole paths, 2^time of them, are the states; and the log likelihood."""
    steps, pairs = log_factors.shape[:2]
    factors = np.exp(np.asarray(log_factors))
    move, start = np.asarray(model.transition[0]), np.asarray(model.initial[0])
    path = start
    for t in range(1, steps):
        path = path[..., None] * move.reshape((1,) * (t - 1) + (2, 2))

    def across(values, f, back):
        for t in range(steps):
            table = factors[t, f] if not back else factors[t, f].T
            values = np.moveaxis(np.tensordot(values, table, (t, 0)), -1, t)
        return values

    left, right, log_likelihood = [np.ones_like(path)], [np.ones_like(path)], 0.0
    for f in range(pairs):
        message = across(left[-1] * path, f, False)
        log_likelihood += np.log(message.sum())
        left.append(message / message.sum())
    log_likelihood += np.log((left[-1] * path).sum())
    for f in reversed(range(pairs)):
        message = across(right[-1] * path, f, True)
        right.append(message / message.sum())
    marginals = np.zeros((steps, pairs + 1, 2))
    for i, (a, b) in enumerate(zip(left, reversed(right), strict=True)):
        joint = a * b * path / (a * b * path).sum()
        for t in range(steps):
            marginals[t, i] = joint.sum(tuple(s for s in range(steps) if s != t))
    return marginals, log_likelihood


@pytest.mark.slow
def test_the_error_falls_with_the_radius_and_not_rise_with_the_number_of_chains():
    model = switches(6)
    log_factors = simulate(model, jax.random.key(0), 6)
    exact = exact_smoother(model, log_factors)
    marginals, log_likelihood = along_the_chains(model, log_factors)
    np.testing.assert_allclose(marginals, exact.chains, atol=1e-12)  # the oracle
    np.testing.assert_allclose(log_likelihood, exact.log_likelihood, atol=1e-10)

    errors, gaps = {}, {}
    for chains, radii in ((8, (2,)), (60, (0, 1, 2))):
        model = switches(chains)
        log_factors = simulate(model, jax.random.key(1), 8)
        marginals, log_likelihood = along_the_chains(model, log_factors)
        pairs = [(i, i + 1) for i in range(0, chains, 2)]
        for radius in radii:
            ours = graph_smoother(model, log_factors, radius=radius, blocks=pairs)
            errors[chains, radius] = np.abs(ours.chains - marginals).sum(-1).mean() / 2
            gaps[chains, radius] = abs(float(ours.log_likelihood - log_likelihood)) / chains
    assert errors[60, 0] > 2 * errors[60, 1] > 2 * errors[60, 2]
    assert errors[60, 2] < 2 * errors[8, 2] and errors[60, 2] < 0.02
    assert gaps[60, 2] < 0.01 and gaps[60, 2] < gaps[60, 0]  # nats per chain


# Use


@pytest.mark.slow
def test_the_log_likelihood_as_a_factor_in_a_numpyro_model():
    model = switches(6)
    log_factors = simulate(model, jax.random.key(0), 6)

    def program(estimate):
        stay = numpyro.sample("stay", dist.Beta(2.0, 2.0))
        move = jnp.stack([jnp.stack([stay, 1 - stay]), jnp.stack([1 - stay, stay])])
        moved = FactorialHiddenMarkovModel(model.initial, jnp.broadcast_to(move, (6, 2, 2)), model.scopes)
        numpyro.factor("seen", estimate(moved, log_factors).log_likelihood)

    def slope(estimate):
        return jax.jit(jax.grad(lambda stay: log_density(program, (estimate,), {}, {"stay": stay})[0]))(0.6)

    whole = functools.partial(graph_filter, radius=5, blocks=[tuple(range(6))])
    np.testing.assert_allclose(slope(whole), slope(exact_filter), rtol=1e-9)


@pytest.mark.slow
def test_impossible_states_and_observations():
    model = FactorialHiddenMarkovModel([[1.0, 0.0], [0.5, 0.5]], [np.eye(2), np.eye(2)], [(0, 1)])
    possible = np.array([[[[-np.inf, 0.0], [0.0, 0.0]]]])
    ours = graph_filter(model, possible, radius=0)
    assert ours.chains[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    slope = jax.grad(lambda table: graph_filter(model, table, radius=0).log_likelihood)(possible)
    assert np.isfinite(slope).all()
    never = np.array([[[[-np.inf, -np.inf], [0, 0]]]])
    assert np.isneginf(graph_filter(model, never, radius=0).log_likelihood)
    missing = graph_filter(model, np.zeros((2, 1, 2, 2)), radius=0)
    np.testing.assert_allclose(missing.log_likelihood, 0, atol=1e-12)


@pytest.mark.slow
def test_single_precision():
    with jax.enable_x64(False):
        model = switches(6)
        log_factors = simulate(model, jax.random.key(0), 6)
        ours = graph_smoother(model, log_factors, radius=5, blocks=[tuple(range(6))])
        exact = exact_smoother(model, log_factors)
        assert ours.chains.dtype == jnp.float32
        np.testing.assert_allclose(ours.chains, exact.chains, atol=1e-5)


MODEL = FactorialHiddenMarkovModel([[0.5, 0.5]] * 2, [[[0.9, 0.1], [0.1, 0.9]]] * 2, [(0, 1)])
ZEROS = np.zeros((1, 1, 2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FactorialHiddenMarkovModel([0.5, 0.5], np.eye(2), [(0,)]), "shapes"),
        (lambda: FactorialHiddenMarkovModel([[0.5, 0.4]], [np.eye(2)], [(0,)]), "initial has rows"),
        (lambda: FactorialHiddenMarkovModel([[0.5, 0.5]], [np.ones((2, 2))], [(0,)]), "transition has rows"),
        (lambda: FactorialHiddenMarkovModel([[0.5, 0.5]], [np.eye(2)], []), "scopes is empty"),
        (lambda: FactorialHiddenMarkovModel([[0.5, 0.5]], [np.eye(2)], [(0, 1)]), "not a set of chains"),
        (lambda: FactorialHiddenMarkovModel([[0.5, 0.5]], [np.eye(2)], [(0, 0)]), "not a set of chains"),
        (lambda: graph_filter(MODEL, ZEROS[:, :, 0], radius=0), "tabulate"),
        (lambda: graph_filter(MODEL, ZEROS * np.nan, radius=0), "missing"),
        (lambda: graph_filter(MODEL, ZEROS, radius=-1), "radius"),
        (lambda: graph_filter(MODEL, ZEROS, radius=0, blocks=[(0,)]), "exactly once"),
        (lambda: graph_filter(switches(30), np.zeros((1, 29, 2, 2)), radius=12), "neighbourhood"),
        (lambda: exact_filter(switches(13), np.zeros((1, 12, 2, 2))), "too many"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
