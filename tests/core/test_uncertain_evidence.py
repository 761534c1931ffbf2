"""Three readings of uncertain evidence, by enumeration, on a grid, and where they must agree."""

import jax
import numpy as np
import pytest
from scipy.stats import norm

from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.core.uncertain_evidence import update_on_uncertain_evidence

RULES = ("jeffrey", "virtual", "distributional")
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running

compiled = jax.jit(update_on_uncertain_evidence, static_argnums=3, compiler_options=QUICK)


def enumerate_posterior(prior, f, q, rule):
    """The paper's three formulas in loops."""
    xs, ys = range(len(prior)), range(len(q))
    if rule == "jeffrey":
        result = np.zeros(len(prior))
        for y in ys:
            evidence = sum(prior[x] * f[x, y] for x in xs)
            for x in xs:
                result[x] += q[y] * prior[x] * f[x, y] / evidence if q[y] > 0 else 0
        return result
    if rule == "virtual":
        weights = np.array([prior[x] * sum(q[y] * f[x, y] for y in ys) for x in xs])
    else:
        weights = np.array([prior[x] * np.prod([f[x, y] ** q[y] for y in ys]) for x in xs])
    return weights / weights.sum()


@pytest.mark.parametrize("rule", RULES)
def test_finite_against_enumeration(rule):
    rng = np.random.default_rng(0)
    prior, f, q = rng.dirichlet(np.ones(4), 100), rng.dirichlet(np.ones(5), (100, 4)), rng.dirichlet(np.ones(5), 100)
    f[:, 1, 2] = 0  # zeros in the model, and in the evidence
    f /= f.sum(-1, keepdims=True)
    q[:50, 2] = 0
    q /= q.sum(-1, keepdims=True)
    prior[:, 3] = 0
    prior /= prior.sum(-1, keepdims=True)

    def update(prior, f, q):
        state = FiniteKernel.state
        return update_on_uncertain_evidence(state(prior), FiniteKernel(f), state(q), rule).probs

    exact = np.stack([enumerate_posterior(*case, rule) for case in zip(prior, f, q, strict=True)])
    with jax.enable_x64(True):
        made = jax.jit(jax.vmap(update), compiler_options=QUICK)(prior, f, q)
        np.testing.assert_allclose(made, exact, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_gaussian_on_a_grid(rule):
    """One-dimensional, by sums over fine grids of x and y: nothing Gaussian is used but the densities."""
    x, y = np.linspace(-12, 12, 1201), np.linspace(-15, 15, 1501)
    prior, q, f = norm(0.5, 1.5).pdf(x), norm(2.0, 0.8).pdf(y), norm(1.3 * x[:, None] - 0.2, 0.9).pdf(y)
    if rule == "jeffrey":
        joint = prior[:, None] * f
        density = (joint / joint.sum(0) * q).sum(1)
    elif rule == "virtual":
        density = prior * (f * q).sum(1)
    else:
        density = prior * np.exp((q / q.sum() * norm(1.3 * x[:, None] - 0.2, 0.9).logpdf(y)).sum(1))
    density /= density.sum()
    mean = density @ x
    posterior = compiled(
        LinearGaussianKernel([[]], [0.5], [[1.5]]),
        LinearGaussianKernel([[1.3]], [-0.2], [[0.9]]),
        LinearGaussianKernel([[]], [2.0], [[0.8]]),
        rule,
    )
    assert posterior.mean.item() == pytest.approx(mean, abs=1e-4)
    assert posterior.covariance.item() == pytest.approx(density @ (x - mean) ** 2, abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_certain_evidence_is_ordinary_conditioning(rule):
    prior, f = FiniteKernel.state([0.5, 0.3, 0.2]), FiniteKernel([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    sure = FiniteKernel.state([0.0, 1.0])
    assert compiled(prior, f, sure, rule).isclose(f.condition(prior, 1)[0])
    prior, f = LinearGaussianKernel([[]], [0.5], [[1.5]]), LinearGaussianKernel([[1.3]], [-0.2], [[0.9]])
    sure = LinearGaussianKernel([[]], [2.0], [[0.0]])
    assert compiled(prior, f, sure, rule).isclose(f.condition(prior, [2.0])[0])


def test_what_each_reading_promises():
    """Jeffrey: y then has the reported distribution. Virtual: reports commute; Jeffrey's do not."""
    joint = FiniteKernel.state([[0.3, 0.1], [0.2, 0.4]])  # x is the pair itself, y its first or second part
    first = FiniteKernel(np.eye(4).reshape(2, 2, 2, 2).sum(3), source_ndim=2)
    second = FiniteKernel(np.eye(4).reshape(2, 2, 2, 2).sum(2), source_ndim=2)
    a, b = FiniteKernel.state([0.9, 0.1]), FiniteKernel.state([0.2, 0.8])
    after = compiled(joint, first, a, "jeffrey")
    np.testing.assert_allclose(first.push(after).probs, a.probs, rtol=1e-6)

    def both(rule, *order):
        state = joint
        for kernel, report in order:
            state = compiled(state, kernel, report, rule)
        return np.asarray(state.probs)

    orders = [((first, a), (second, b)), ((second, b), (first, a))]
    np.testing.assert_allclose(*(both("virtual", *order) for order in orders), rtol=1e-5)
    assert np.abs(np.subtract(*(both("jeffrey", *order) for order in orders))).max() > 0.01


def test_several_dimensions_and_degenerate_evidence():
    """Virtual evidence on part of y: exact about the first coordinate, vague about the second."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 2)), rng.normal(size=2)
    prior = LinearGaussianKernel(np.zeros((2, 0)), np.zeros(2), np.eye(2))
    kernel = LinearGaussianKernel(a, b, np.eye(2))
    report = LinearGaussianKernel(np.zeros((2, 0)), np.array([0.3, -1.0]), np.diag([0.0, 2.0]))
    posterior = compiled(prior, kernel, report, "virtual")
    s = a @ a.T + np.eye(2) + np.diag([0.0, 4.0])
    np.testing.assert_allclose(posterior.mean, a.T @ np.linalg.solve(s, [0.3, -1.0] - b), atol=1e-5)
    np.testing.assert_allclose(posterior.covariance, np.eye(2) - a.T @ np.linalg.solve(s, a), atol=1e-5)


state, table = FiniteKernel.state, FiniteKernel
impossible = table([[1.0, 0.0], [1.0, 0.0]])
known = LinearGaussianKernel([[1.0]], [0.0], [[0.0]])
normal = LinearGaussianKernel([[]], [0.0], [[1.0]])


@pytest.mark.parametrize(
    ("prior", "kernel", "evidence", "rule", "message"),
    [
        (state([0.5, 0.5]), impossible, state([0.5, 0.5]), "jeffrey", "rules out"),
        (state([0.5, 0.5]), impossible, state([0.0, 1.0]), "virtual", "rules out"),
        (state([0.5, 0.5]), impossible, state([0.5, 0.5]), "distributional", "rules out"),
        (normal, known, normal, "distributional", "rules out"),
        (LinearGaussianKernel([[]], [0.0], [[0.0]]), known, normal, "jeffrey", "rules out"),
        (state([0.5, 0.5]), impossible, state([0.5, 0.5]), "pearl", "unknown interpretation"),
        (state([0.5, 0.5]), impossible, state([1.0]), "virtual", "target"),
        (state([0.5, 0.5]), impossible, normal, "virtual", "all finite"),
    ],
)
def test_bad_input(prior, kernel, evidence, rule, message):
    with pytest.raises(InputError, match=message):
        update_on_uncertain_evidence(prior, kernel, evidence, rule)
