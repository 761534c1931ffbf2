"""NGBoost under the CRPS: losses, gradients and metrics against direct integrals and sums of distribution functions."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import special, stats

from bayeslens.core.errors import InputError
from bayeslens.learners.natural_gradient import marginal_parameters, natural_gradient
from bayeslens.learners.ngboost import NGBoost
from bayeslens.learners.ngboost_families import NAMES, family_of

KEY = jax.random.key(0)
NODES = np.polynomial.legendre.leggauss(500)
# SciPy's distributions, of unconstrained parameters.
DISTRIBUTIONS = {
    "normal": lambda t: stats.norm(t[0], np.exp(t[1])),
    "lognormal": lambda t: stats.lognorm(np.exp(t[1]), scale=np.exp(t[0])),
    "student_t": lambda t: stats.t(np.exp(t[2]), t[0], np.exp(t[1])),
    "laplace": lambda t: stats.laplace(t[0], np.exp(t[1])),
    "poisson": lambda t: stats.poisson(np.exp(t[0])),
    "negative_binomial": lambda t: stats.nbinom(np.exp(t[1]), 1 / (1 + np.exp(t[0] - t[1]))),
}
COUNTS = ("poisson", "negative_binomial")
# Parameters, and targets in the middle and in both tails.
CASES = [
    ("normal", [0.3, -0.2], [-3.0, 0.4, 1.1]),
    ("normal", [0.3, 2.0], [-3.0, 0.4, 30.0]),
    ("lognormal", [0.3, -0.4], [0.1, 0.4, 2.5]),
    ("lognormal", [1.0, 0.3], [0.1, 2.7, 12.0]),
    ("student_t", [0.3, -0.2, 1.3], [-6.0, 0.31, 1.1]),
    ("student_t", [0.3, 0.7, 0.5], [-6.0, 0.31, 40.0]),
    ("student_t", [0.3, 0.7, 4.0], [-6.0, 0.31, 3.0]),
    ("laplace", [0.3, -0.2], [-3.0, 0.2, 1.1]),
    ("poisson", [0.7], [0.0, 2.0, 9.0]),
    ("poisson", [-2.0], [0.0, 1.0, 3.0]),
    ("poisson", [4.0], [30.0, 55.0, 90.0]),
    ("negative_binomial", [0.7, 0.4], [0.0, 2.0, 15.0]),
    ("negative_binomial", [-1.5, -0.8], [0.0, 1.0, 6.0]),
    ("negative_binomial", [3.0, -0.5], [0.0, 14.0, 70.0]),
    ("negative_binomial", [2.0, 3.7], [0.0, 7.0, 20.0]),
]


def grid(name, theta, value):
    """Points below and above a value, with weights: of an integral, or of a sum."""
    if name in COUNTS:
        k = np.arange(5000.0)
        return (k[k < value], 1.0), (k[k >= value], 1.0)
    # Substitute x = end +- sinh(s) outside of value and center, so that heavy tails are reached.
    nodes, weights = NODES
    tail, tail_weights = np.sinh(22.5 * (nodes + 1)), 22.5 * weights * np.cosh(22.5 * (nodes + 1))
    center = np.exp(theta[0]) if name == "lognormal" else theta[0]
    low, high = min(value, center), max(value, center)
    between = low + (high - low) * (nodes + 1) / 2, (high - low) * weights / 2
    below, above = (low - tail, tail_weights), (high + tail, tail_weights)
    if name == "lognormal":
        below = low * (nodes + 1) / 2, low * weights / 2
    join = lambda a, b: (np.r_[a[0], b[0]], np.r_[a[1], b[1]])  # noqa: E731
    return (join(below, between), above) if value > center else (below, join(between, above))


def score(name, theta, value):
    (low, low_weights), (high, high_weights) = grid(name, theta, value)
    found = DISTRIBUTIONS[name](theta)
    return (found.cdf(low) ** 2 * low_weights).sum() + (found.sf(high) ** 2 * high_weights).sum()


def slopes(function, theta):
    units = 1e-4 * np.eye(len(theta))
    return np.array([(function(theta + u) - function(theta - u)) / 2e-4 for u in units])


@pytest.mark.parametrize(("name", "theta", "values"), CASES)
def test_loss_and_gradient_are_those_of_the_direct_integral(name, theta, values):
    family, theta, y = family_of(name, score="crps"), np.array(theta), np.array(values)
    rows = np.tile(theta, (len(y), 1))
    np.testing.assert_allclose(
        family.loss(y, rows, None), [score(name, theta, v) for v in values], rtol=1e-5, atol=1e-7
    )
    exact = [slopes(lambda t, v=v: score(name, t, v), theta) for v in values]
    np.testing.assert_allclose(family.gradient(y, rows, None)[0], exact, rtol=1e-4, atol=2e-5)


def metric_of(name, theta):
    total = 0.0
    for x, weights in grid(name, theta, np.exp(theta[0]) if name == "lognormal" else theta[0]):
        tail = "cdf" if x.size and x.mean() < theta[0] else "sf"
        change = slopes(lambda t, x=x, tail=tail: getattr(DISTRIBUTIONS[name](t), tail)(x), theta)
        total = total + 2 * np.einsum("in,jn->ij", change * weights, change)
    return total


@pytest.mark.parametrize(("name", "theta"), [case[:2] for case in CASES])
def test_metric_is_that_of_the_direct_integral(name, theta):
    theta = np.array(theta)
    _, metric = family_of(name, score="crps").gradient(np.ones(1), theta[None], None)
    found, exact = np.diag(metric[0]) if metric.ndim == 2 else metric[0], metric_of(name, theta)
    # The last parameter's own entry has a floor, where it hardly matters.
    if name in ("student_t", "negative_binomial") and found[-1, -1] > exact[-1, -1] * 1.01:
        assert exact[-1, -1] < 0.01 * np.trace(exact) < 1
        found, exact = found[:-1, :-1], exact[:-1, :-1]
    np.testing.assert_allclose(found, exact, rtol=2e-3, atol=1e-4 * np.trace(exact))


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_classes_have_the_brier_score(name):
    theta = np.array([0.4]) if name == "bernoulli" else np.array([0.3, -0.5, 0.1])
    family = family_of("auto", score="crps", classes=2 if name == "bernoulli" else 3)
    shares = (lambda t: special.expit(t)) if name == "bernoulli" else special.softmax
    for label in range(len(theta) + (name == "bernoulli")):
        seen = np.array([label]) if name == "bernoulli" else np.eye(3)[label]
        brier = lambda t, seen=seen: ((shares(t) - seen) ** 2).sum()  # noqa: E731
        y, rows = np.array([label], float), theta[None]
        np.testing.assert_allclose(family.loss(y, rows, None), brier(theta))
        slope, metric = family.gradient(y, rows, None)
        np.testing.assert_allclose(slope[0], slopes(brier, theta), atol=1e-8)
        np.testing.assert_allclose(metric[0], 2 * (slopes(shares, theta) ** 2).sum(1), rtol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "bernoulli", "categorical"])
def test_extreme_parameters_stay_finite(name):
    classes = {"bernoulli": 2, "categorical": 3}.get(name)
    family = family_of(name, score="crps", classes=classes)
    size = {"bernoulli": 1, "categorical": 3}.get(name, len(next((c[1] for c in CASES if c[0] == name), [])))
    extremes = np.array(np.meshgrid(*[[-40.0, -10.0, -1.0, 0.0, 3.0, 10.0, 40.0]] * size)).reshape(size, -1).T
    targets = [0.0, 1.0] if classes else [0.0, 1.0, 50.0, 1e6] if name in COUNTS else [1e-9, 1.0, 1e9]
    for value in targets:
        y = np.full(len(extremes), value)
        assert np.isfinite(family.loss(y, extremes, None)).all()
        slope, metric = family.gradient(y, extremes, None)
        assert np.isfinite(slope).all() and np.isfinite(metric).all()


def draw(name, rng, rows):
    """A feature that moves all of a target's distribution, and the target."""
    x = rng.uniform(-1, 1, (rows, 2))
    move, spread = 1.5 * x[:, 0], np.exp(0.5 * x[:, 1])
    rate = np.exp(1 + move)
    return x, {
        "normal": lambda: move + spread * rng.normal(size=rows),
        "lognormal": lambda: np.exp(move + 0.5 * spread * rng.normal(size=rows)),
        "student_t": lambda: move + 0.5 * spread * rng.standard_t(3, rows),
        "laplace": lambda: move + 0.5 * spread * rng.laplace(size=rows),
        "poisson": lambda: rng.poisson(rate),
        "negative_binomial": lambda: rng.poisson(rate * rng.gamma(2, 0.5, rows)),
        "bernoulli": lambda: rng.random(rows) < special.expit(2 * move),
        "categorical": lambda: (move[:, None] * [-1, 0, 1] + rng.gumbel(size=(rows, 3))).argmax(1).astype(str),
    }[name]()


@pytest.mark.parametrize("name", [*NAMES, "bernoulli", "categorical"])
def test_boosting_beats_the_marginal(name):
    x, y = draw(name, np.random.default_rng(3), 1600)
    predictive = NGBoost(distribution=name, scoring_rule="crps", num_trees=200).fit(x[:800], y[:800], key=KEY)
    classes = None if predictive.classes is None else len(predictive.classes)
    codes = np.unique(y, return_inverse=True)[1] if classes else y
    family, values = family_of(name, score="crps", classes=classes), codes.astype(float)
    constant = marginal_parameters(family, values[:800], np.ones(800))
    found, marginal = (
        family.loss(values[800:], theta, None).mean()
        for theta in (predictive.parameters(x[800:])[0], np.tile(constant, (800, 1)))
    )
    # Features that move location and spread have to be worth a twentieth of the marginal's CRPS.
    assert found < 0.95 * marginal


@pytest.mark.parametrize("name", NAMES)
def test_marginal_fit_is_stationary(name):
    _, y = draw(name, np.random.default_rng(4), 3000)
    y, family = y.astype(float), family_of(name, score="crps")
    theta = marginal_parameters(family, y, np.ones(len(y)))
    slope = family.gradient(y, np.tile(theta, (len(y), 1)), None)[0].mean(0)
    np.testing.assert_allclose(slope, 0, atol=2e-3 * family.loss(y, np.tile(theta, (len(y), 1)), None).mean())


def test_several_targets_have_the_log_score_alone():
    with pytest.raises(InputError, match="log score"):
        family_of("multivariate_normal", score="crps", targets=2)
    step = natural_gradient(family_of("laplace", score="crps"), np.array([0.0]), np.zeros((1, 2)))
    np.testing.assert_allclose(step, [[0.0, 1.0]])
