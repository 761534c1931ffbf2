"""Guided trees against enumeration, exact Gaussian algebra, and quadrature on a grid."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.processes.backward_filtering_forward_guiding import (
    DirectedTree,
    backward_filter,
    forward_guide,
    infer_tree,
)
from bayeslens.processes.guiding_rules import (
    FiniteMessage,
    GaussianMessage,
    LinearEquation,
    NonlinearGaussianKernel,
    StochasticDifferentialEquation,
    linearize,
    pull_back,
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def effective_sample_size(log_weights):
    weights = np.exp(log_weights - np.max(log_weights))
    return weights.sum() ** 2 / (weights**2).sum()


# Finite trees, by enumeration


def finite_tree(rng):
    """Sets of different sizes, impossible transitions, two observed leaves on one vertex, one leaf not observed."""

    def kernel(source, target):
        rows = rng.dirichlet(np.ones(target), source)
        rows[0, 0] = 0
        return FiniteKernel(rows / rows.sum(1, keepdims=True))

    return DirectedTree(
        {
            "root": (None, FiniteKernel.state(rng.dirichlet(np.ones(3)))),
            "a": ("root", kernel(3, 3)),
            "b": ("root", kernel(3, 2)),
            "c": ("a", kernel(3, 3)),
            "y1": ("c", kernel(3, 2)),
            "y2": ("c", kernel(3, 4)),
            "y3": ("b", kernel(2, 2)),
            "free": ("a", kernel(3, 2)),
        }
    )


def enumerate_tree(tree, observed):
    """Probability of each state of the latent vertices together with the observations."""
    hidden = [n for n in tree.names if n not in observed]
    table = {}
    sizes = [tree.kernels[tree.names.index(n)].target_shape[0] for n in hidden]
    for states in itertools.product(*map(range, sizes)):
        values = {**dict(zip(hidden, states, strict=True)), **observed}
        probability = 1.0
        for name, parent, kernel in zip(tree.names, tree.parents, tree.kernels, strict=True):
            row = kernel.probs if parent < 0 else kernel.probs[values[tree.names[parent]]]
            probability *= float(row[values[name]])
        table[states] = probability
    return hidden, table


def test_finite_trees_are_exact():
    tree, observed = finite_tree(np.random.default_rng(0)), {"y1": 1, "y2": 2, "y3": 0}
    hidden, table = enumerate_tree(tree, observed)
    evidence = sum(table.values())
    posterior = infer_tree(tree, observed, key=jax.random.key(0), num_particles=20_000)
    assert posterior.names == tuple(sorted(hidden)) and not posterior.warnings
    np.testing.assert_allclose(posterior.log_evidence, np.log(evidence), atol=1e-12)
    np.testing.assert_allclose(posterior.log_weights, 0, atol=1e-12)  # constant weights
    drawn = np.stack([np.asarray(posterior[n])[0] for n in hidden], 1)
    states, counts = np.unique(drawn, axis=0, return_counts=True)
    share = {tuple(s): c / 20_000 for s, c in zip(states.tolist(), counts, strict=True)}
    assert all(table[s] > 0 for s in share)
    # Each frequency within 5 standard errors: false alarms below 216 * 6e-7 = 1e-4.
    for s, probability in table.items():
        p = probability / evidence
        assert abs(share.get(s, 0) - p) < 5 * np.sqrt(p * (1 - p) / 20_000) + 1e-12


@pytest.mark.slow
def test_unobserved_leaves_do_not_change_the_evidence_and_unguided_draws_are_unbiased():
    tree, observed = finite_tree(np.random.default_rng(0)), {"y1": 1, "y3": 0}
    _, table = enumerate_tree(tree, observed)
    functions = backward_filter(tree, observed)
    np.testing.assert_allclose(functions.log_evidence, np.log(sum(table.values())), atol=1e-12)
    blind = jax.tree.map(jnp.zeros_like, functions)
    draws = forward_guide(tree, observed, blind, key=jax.random.key(1), num_particles=20_000)
    weights = np.exp(draws.log_weights)
    error = (weights.mean() - sum(table.values())) / (weights.std() / np.sqrt(20_000))
    assert abs(error) < 4  # false alarm 6e-5
    assert effective_sample_size(draws.log_weights) < 15_000


def test_an_impossible_observation():
    identity = FiniteKernel.identity((2,))
    tree = DirectedTree({"x": (None, FiniteKernel.state([0.5, 0.5])), "y": ("x", identity), "z": ("x", identity)})
    assert np.isneginf(backward_filter(tree, {"y": 0, "z": 1}).log_evidence)

    def evidence(p):
        start = FiniteKernel.state(jnp.stack([p, 1 - p]))
        inner = {"x": (None, start), "w": ("x", identity), "y": ("w", identity), "z": ("w", identity)}
        return backward_filter(DirectedTree(inner), {"y": 0, "z": 0}).log_evidence

    np.testing.assert_allclose(jax.grad(evidence)(0.25), 4)  # no NaN from the logarithms of zeros


# Linear-Gaussian trees, by the algebra of kernels


def random_kernel(rng, target, source, noise=None):
    noise = target if noise is None else noise
    return LinearGaussianKernel(
        rng.normal(size=(target, source)), rng.normal(size=target), rng.normal(size=(target, noise))
    )


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1, 0])
def test_linear_gaussian_trees_are_exact(noise):
    """Also through kernels with singular noise, or none."""
    rng = np.random.default_rng(1)
    prior = LinearGaussianKernel.state(rng.normal(size=2), np.diag([1.0, 2.0]))
    to_a, to_1, to_2 = random_kernel(rng, 2, 2, noise), random_kernel(rng, 3, 2), random_kernel(rng, 1, 2)
    tree = DirectedTree({"x": (None, prior), "a": ("x", to_a), "y1": ("a", to_1), "y2": ("x", to_2)})
    observed = {"y1": rng.normal(size=3), "y2": rng.normal(size=1)}
    both = LinearGaussianKernel.deterministic(np.vstack([np.eye(2), np.eye(2)])) >> ((to_a >> to_1) @ to_2)
    exact, log_evidence = both.condition(prior, np.concatenate([observed["y1"], observed["y2"]]))
    posterior = infer_tree(tree, observed, key=jax.random.key(0), num_particles=4000)
    np.testing.assert_allclose(posterior.log_evidence, log_evidence, rtol=1e-10)
    np.testing.assert_allclose(posterior.log_weights, 0, atol=1e-9)
    white = np.linalg.solve(np.linalg.cholesky(exact.covariance), (posterior["x"][0] - exact.mean).T)
    # Means and covariances of 4000 standard normal vectors: 5 standard errors, false alarm 5 * 6e-7.
    assert np.abs(white.mean(1)).max() < 5 / np.sqrt(4000)
    assert np.abs(np.cov(white) - np.eye(2)).max() < 5 * np.sqrt(2 / 4000)


@pytest.mark.slow
def test_rules_compose():
    """Pulling back through a composite is pulling back twice."""
    rng = np.random.default_rng(2)
    first, second = FiniteKernel(rng.dirichlet(np.ones(3), 2)), FiniteKernel(rng.dirichlet(np.ones(4), 3))
    g = FiniteMessage(jnp.asarray(rng.normal(size=4)))
    twice = pull_back(first, pull_back(second, g)[0])[0]
    np.testing.assert_allclose(pull_back(first >> second, g)[0].log_values, twice.log_values, rtol=1e-12)
    first, second = random_kernel(rng, 2, 3), random_kernel(rng, 2, 2)
    g = GaussianMessage(jnp.diag(jnp.array([2.0, 0.0])), jnp.array([1.0, -1.0]), jnp.array(0.5))
    twice, once = pull_back(first, pull_back(second, g)[0])[0], pull_back(first >> second, g)[0]
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_a_long_chain_is_the_kalman_filter():
    """Five hundred edges are one compiled scan."""
    y = np.random.default_rng(3).normal(size=500)
    move, see = LinearGaussianKernel([[0.9]], [0.1], [[0.5]]), LinearGaussianKernel([[1.0]], [0.0], [[0.8]])
    vertices, above = {}, None
    for t in range(500):
        vertices[f"x{t}"] = (above, move if t else LinearGaussianKernel.state([0.0], [[1.0]]))
        above = f"x{t}"
        vertices[f"y{t}"] = (above, see)
    functions = backward_filter(DirectedTree(vertices), {f"y{t}": y[t : t + 1] for t in range(500)})
    mean, variance, log_evidence = 0.0, 1.0, 0.0
    for t in range(500):
        if t:
            mean, variance = 0.9 * mean + 0.1, 0.81 * variance + 0.25
        log_evidence += float(dist.Normal(mean, np.sqrt(variance + 0.64)).log_prob(y[t]))
        gain = variance / (variance + 0.64)
        mean, variance = mean + gain * (y[t] - mean), (1 - gain) * variance
    np.testing.assert_allclose(functions.log_evidence, log_evidence, rtol=1e-11)


# Nonlinear kernels, by quadrature on a grid

GRID = np.linspace(-6, 6, 1201)
NOISE = 0.15


def drift(x):
    return 2 * jnp.sin(2 * x)  # wells at odd multiples of pi / 2


def diffusion(x):
    return (0.7 + 0.2 * jnp.sin(x))[:, None]


def normal(value, mean, scale):
    return np.exp(-(((value - mean) / scale) ** 2) / 2) / (scale * np.sqrt(2 * np.pi))


def edge(duration, num_steps=20):
    return StochasticDifferentialEquation(
        drift, diffusion, duration, LinearEquation([[-1.0]], [1.5], [[0.9]]), num_steps
    )


def through(duration, h, num_steps=20):
    """Pull a function on the grid back through the Euler steps."""
    step = duration / num_steps
    mean, scale = GRID + step * np.asarray(drift(GRID)), np.sqrt(step) * np.asarray(diffusion(GRID))[:, 0]
    matrix = normal(GRID[None], mean[:, None], scale[:, None]) * (GRID[1] - GRID[0])
    for _ in range(num_steps):
        h = matrix @ h
    return h


@pytest.fixture(scope="module")
def branching():
    """A diffusion that branches once: tree, data, likelihood, mean at the branch, guided and unguided draws."""
    with jax.enable_x64(True):
        see = LinearGaussianKernel([[1.0]], [0.0], [[NOISE]])
        tree = DirectedTree(
            {
                "start": (None, LinearGaussianKernel.deterministic(jnp.zeros((1, 0)), [-0.2])),
                "branch": ("start", edge(0.4)),
                "left": ("branch", edge(0.5)),
                "right": ("branch", edge(0.8)),
                "y left": ("left", see),
                "y right": ("right", see),
            }
        )
        observed = {"y left": [1.7], "y right": [1.3]}
        below = through(0.5, normal(1.7, GRID, NOISE)) * through(0.8, normal(1.3, GRID, NOISE))
        likelihood, moment = (np.interp(-0.2, GRID, through(0.4, h)) for h in (below, GRID * below))
        functions = backward_filter(tree, observed)
        guided, blind = (
            forward_guide(tree, observed, g, key=jax.random.key(0), num_particles=10_000)
            for g in (functions, jax.tree.map(jnp.zeros_like, functions))
        )
    return tree, observed, likelihood, moment / likelihood, guided, blind


@pytest.mark.slow
def test_weights_of_a_diffusion_on_a_tree_are_unbiased(branching):
    *_, likelihood, mean, guided, blind = branching
    for draws, accuracy in ((guided, 0.03), (blind, 0.2)):
        offset = draws.log_evidence - (np.log(np.mean(np.exp(draws.log_weights))))
        ratio = np.exp(draws.log_weights + offset) / likelihood
        error = ratio.std() / np.sqrt(ratio.size)
        assert abs(ratio.mean() - 1) < 4 * error < 4 * accuracy  # false alarm 6e-5 each
        weights, values = ratio / ratio.mean(), draws.values["branch"][:, 0]
        spread = np.std(weights * (values - mean)) / np.sqrt(ratio.size)
        assert abs((weights * values).mean() - mean) < 4 * spread
    unweighted = guided.values["branch"][:, 0]
    assert abs(unweighted.mean() - mean) > 10 * unweighted.std() / np.sqrt(10_000)  # the weights matter


@pytest.mark.slow
def test_guiding_has_more_effective_draws_than_forward_simulation(branching):
    guided, blind = branching[-2:]
    assert effective_sample_size(guided.log_weights) > 3 * effective_sample_size(blind.log_weights)


@pytest.mark.slow
def test_paths_end_in_their_vertices(branching):
    tree, observed, *_, guided, _ = branching
    assert guided.values["left_path"].shape == (10_000, 20, 1)
    np.testing.assert_array_equal(guided.values["left_path"][:, -1], guided.values["left"])
    posterior = infer_tree(tree, observed, key=jax.random.key(0), num_particles=10_000)
    np.testing.assert_allclose(posterior.log_weights[0], guided.log_weights, atol=1e-9)
    assert posterior["left"].shape == (1, 10_000, 1)


def test_linearization():
    linear = linearize(drift, diffusion, jnp.array([0.5]))
    np.testing.assert_allclose(linear.matrix, [[4 * np.cos(1.0)]])
    np.testing.assert_allclose(linear.matrix[0] * 0.5 + linear.offset, drift(np.array([0.5])))
    np.testing.assert_allclose(linear.diffusion, [[0.7 + 0.2 * np.sin(0.5)]])


@pytest.mark.slow
def test_a_linear_equation_that_is_its_own_auxiliary_has_equal_weights():
    linear = LinearEquation([[-1.0, 0.5], [0.0, -2.0]], [0.3, 0.1], [[0.5], [0.2]])
    itself = StochasticDifferentialEquation(
        lambda x: linear.matrix @ x + linear.offset, lambda x: linear.diffusion, 0.7, linear, 7
    )
    euler = LinearGaussianKernel(
        jnp.eye(2) + 0.1 * linear.matrix, 0.1 * linear.offset, jnp.sqrt(0.1) * linear.diffusion
    )
    prior, see = LinearGaussianKernel.state([0.0, 1.0], jnp.eye(2)), LinearGaussianKernel([[1.0, 1.0]], [0.0], [[0.3]])
    chain = euler
    for _ in range(6):
        chain = chain >> euler
    _, log_evidence = (chain >> see).condition(prior, [0.4])
    tree = DirectedTree({"x": (None, prior), "z": ("x", itself), "y": ("z", see)})
    posterior = infer_tree(tree, {"y": [0.4]}, key=jax.random.key(0), num_particles=10)
    np.testing.assert_allclose(posterior.log_evidence, log_evidence, rtol=1e-10)
    np.testing.assert_allclose(posterior.log_weights, 0, atol=1e-10)


@pytest.mark.slow
def test_nonlinear_gaussian_kernels_also_at_leaves():
    prior = LinearGaussianKernel.state([0.0], [[1.0]])
    move = NonlinearGaussianKernel(
        lambda x: 2 * jnp.sin(x), lambda x: (0.5 + 0.1 * x**2)[:, None], LinearGaussianKernel([[1.2]], [0.0], [[0.7]])
    )
    see = NonlinearGaussianKernel(
        lambda x: x + 0.2 * x**2, lambda x: 0.4 * jnp.eye(1), LinearGaussianKernel([[1.4]], [-0.2], [[0.5]])
    )
    tree = DirectedTree({"x": (None, prior), "z": ("x", move), "y": ("z", see)})
    grid = np.linspace(-8, 8, 1601)
    width = grid[1] - grid[0]
    likelihood = normal(1.5, grid + 0.2 * grid**2, 0.4)
    moved = normal(grid[None], 2 * np.sin(grid)[:, None], 0.5 + 0.1 * grid[:, None] ** 2) @ likelihood * width
    exact = (normal(grid, 0, 1) * moved).sum() * width
    posterior = infer_tree(tree, {"y": [1.5]}, key=jax.random.key(0), num_particles=50_000)
    ratio = np.exp(np.asarray(posterior.log_weights[0]) - posterior.log_weights.max())
    error = ratio.std() / ratio.mean() / np.sqrt(ratio.size)
    assert abs(np.exp(posterior.log_evidence) / exact - 1) < 4 * error < 0.1  # false alarm 6e-5
    assert move(jnp.zeros((3, 1))).batch_shape == (3,)


def test_uneven_weights_are_warned_of():
    wrong = NonlinearGaussianKernel(lambda x: x, lambda x: jnp.eye(1), LinearGaussianKernel([[-9.0]], [9.0], [[0.1]]))
    see = LinearGaussianKernel([[1.0]], [0.0], [[0.1]])
    tree = DirectedTree({"x": (None, LinearGaussianKernel.state([0.0], [[1.0]])), "z": ("x", wrong), "y": ("z", see)})
    assert "auxiliary" in infer_tree(tree, {"y": [3.0]}, key=jax.random.key(0)).warnings[0]


# Inside NumPyro


def mutation_log_evidence(rate):
    flip = FiniteKernel(jnp.array([[1 - rate, rate], [rate, 1 - rate]]))
    vertices = {"root": (None, FiniteKernel.state([0.5, 0.5])), "inner": ("root", flip)}
    vertices |= {"one": ("inner", flip), "two": ("inner", flip), "three": ("root", flip)}
    return backward_filter(DirectedTree(vertices), {"one": 0, "two": 0, "three": 1}).log_evidence


def test_gradient_through_a_finite_tree():
    def enumerated(rate):
        kernel, total = np.array([[1, 0], [0, 1]]), 0.0
        for root, inner in itertools.product(range(2), repeat=2):
            same = [kernel[root, inner], kernel[inner, 0], kernel[inner, 0], kernel[root, 1]]
            total += 0.5 * np.prod([1 - rate if s else rate for s in same])
        return np.log(total)

    slope = jax.grad(mutation_log_evidence)(0.3)
    np.testing.assert_allclose(slope, (enumerated(0.3 + 1e-6) - enumerated(0.3 - 1e-6)) / 2e-6, rtol=1e-6)


@pytest.mark.slow  # compiling NUTS
def test_the_evidence_as_a_factor_in_a_numpyro_model():
    """The mutation rate of a tree under NUTS, against quadrature over the rate."""
    log_evidence = mutation_log_evidence

    def model():
        rate = numpyro.sample("rate", dist.Beta(1.0, 3.0))
        numpyro.factor("leaves", log_evidence(rate))

    sampler = MCMC(NUTS(model), num_warmup=100, num_samples=500, progress_bar=False)
    sampler.run(jax.random.key(0))
    rates = np.linspace(0.0005, 0.9995, 1000)
    density = np.exp(jax.jit(jax.vmap(lambda r: log_evidence(r) + dist.Beta(1.0, 3.0).log_prob(r)))(rates))
    mean = (density * rates).sum() / density.sum()
    # At least 75 effective draws of 500, spread below 0.25: 4 standard errors, false alarm 6e-5.
    assert abs(sampler.get_samples()["rate"].mean() - mean) < 4 * 0.25 / np.sqrt(75)


@pytest.mark.slow
def test_gradient_through_a_linear_gaussian_tree():
    def log_evidence(scale, algebra):
        prior, see = LinearGaussianKernel.state([0.0], [[1.0]]), LinearGaussianKernel([[1.0]], [0.0], [[0.5]])
        move = LinearGaussianKernel(scale[None, None], jnp.zeros(1), jnp.ones((1, 1)))
        if algebra:
            return (move >> see).condition(prior, [1.3])[1]
        tree = DirectedTree({"x": (None, prior), "z": ("x", move), "y": ("z", see)})
        return backward_filter(tree, {"y": jnp.array([1.3])}).log_evidence

    ours, exact = (jax.grad(log_evidence)(jnp.array(0.7), algebra) for algebra in (False, True))
    np.testing.assert_allclose(ours, exact, rtol=1e-10)


# Bad input

STATE = FiniteKernel.state([0.5, 0.5])
FLIP = FiniteKernel([[0.9, 0.1], [0.1, 0.9]])


def small():
    line = LinearGaussianKernel([[1.0]], [0.0], [[1.0]])
    exact = LinearGaussianKernel.deterministic([[1.0]])
    vertices = {"x": (None, LinearGaussianKernel.state([0.0], [[1.0]])), "z": ("x", line)}
    return DirectedTree(vertices | {"y": ("z", line), "exact": ("z", exact), "sde": ("z", edge(1.0, 2))})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DirectedTree({}), "at least a root"),
        (lambda: DirectedTree({"x": ("y", FLIP)}), "first vertex"),
        (lambda: DirectedTree({"x": (None, STATE), "z": (None, STATE)}), "first vertex"),
        (lambda: DirectedTree({"x": (None, STATE), "y": ("z", FLIP)}), "not a vertex before it"),
        (lambda: DirectedTree({"x": (None, STATE), "y": ("x", FiniteKernel.identity((3,)))}), "of size 3"),
        (lambda: DirectedTree({"x": (None, FLIP)}), "starts from"),
        (lambda: DirectedTree({"x": (None, STATE), "y": ("x", FiniteKernel.copy((2,)))}), "flatten"),
        (lambda: DirectedTree({"x": (None, dist.Normal(0, 1))}), "no rules"),
        (lambda: backward_filter(small(), {}), "nothing is observed"),
        (lambda: backward_filter(small(), {"w": [1.0]}), "no vertex 'w'"),
        (lambda: backward_filter(small(), {"z": [1.0]}), "not a leaf"),
        (lambda: backward_filter(small(), {"y": 1.0}), "shape"),
        (lambda: backward_filter(small(), {"y": [np.nan]}), "missing"),
        (lambda: backward_filter(small(), {"exact": [1.0]}), "without noise"),
        (lambda: backward_filter(small(), {"sde": [1.0]}), "observed with noise"),
        (lambda: infer_tree(DirectedTree({"x": (None, STATE), "y": ("x", FLIP)}), {"y": 2}, key=None), "states are"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
