"""Programs with normal variables and exact conditions between them.

Claim: a language of normal draws, affine arithmetic and conditions x =:= y has exact posteriors. Conditions commute,
may be redundant, and fail clearly when they have no support. Regression, Gaussian processes and Kalman filters are
programs in it. That an equation has probability zero is no obstacle, but its phrasing matters: x - y =:= 0 and the
non-affine x / y =:= 1 are different conditions (Borel's paradox).

Source: D. Stein, S. Staton, "Compositional semantics for probabilistic programs with exact conditioning" (2021).
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import quad

from bayeslens.core.errors import InputError
from bayeslens.core.exact_conditioning import Machine, run
from bayeslens.gallery import Evidence

PAPER = "S379"
CLAIM = "Exact conditions on normal variables commute, fail only without support, and give the known closed forms."
NOT_CHECKED = "The equational theory as such; only its consequences are tested."


def line(x, y, order):
    """Bayesian linear regression: a slope, an intercept, and data in some order."""

    def program(machine: Machine):
        slope, intercept = machine.normal(0.0, 1.0), machine.normal(0.0, 2.0)
        for i in order:
            machine.condition(intercept + slope * x[i] + machine.normal(0.0, 0.5), y[i])
        return [slope, intercept]

    return run(program)


def smooth_curve(x, y, new, root):
    """Gaussian process regression without noise: `root @ root.T` is the kernel matrix of x and new."""

    def program(machine: Machine):
        curve = root @ machine.normal(0.0, 1.0, shape=(len(root),))
        machine.condition(curve[: len(x)], y)
        return curve[len(x) :]

    return run(program)


def filtered(observations):
    """A random walk seen through noise."""

    def program(machine: Machine):
        state = machine.normal(0.0, 1.0)
        for y in observations:
            state = machine.normal(state, 0.5)
            machine.condition(machine.normal(state, 0.8), y)
        return state

    return run(program)


def meeting(condition):
    """Two independent standard normal variables of which something is known."""

    def program(machine: Machine):
        x, y = machine.normal(0.0, 1.0), machine.normal(0.0, 1.0)
        condition(machine, x, y)
        return [x, y]

    return run(program)


def contradiction_fails(tolerate: bool) -> bool:
    """Whether x =:= y =:= x + 1 is refused. The control adds noise instead, as an approximation would."""
    try:
        meeting(lambda m, x, y: (m.condition(x, y), m.condition(y + m.normal(0.0, 1e-3 * tolerate), x + 1)))
    except InputError:
        return True
    return False


def check(*, control: bool = False) -> Evidence:
    """The language against closed forms; the control blurs equality with noise, as approximate conditioning does."""
    rng = np.random.default_rng(0)
    blur = 0.05 if control else 0.0
    x, y = rng.normal(size=12), rng.normal(size=12)
    design = np.column_stack([x, np.ones(12)])
    precision = np.diag([1.0, 0.25]) + design.T @ design / 0.25
    first, second = line(x, y, range(12)), line(x, y, rng.permutation(12))

    points = np.concatenate([np.linspace(0, 3, 6), [0.4, 2.2]])
    kernel = np.exp(-((points[:, None] - points) ** 2) / 2) + blur * np.eye(8)
    exact = np.exp(-((points[:, None] - points) ** 2) / 2)
    curve = smooth_curve(points[:6], np.sin(points[:6]), points[6:], np.linalg.cholesky(kernel))
    gain = np.linalg.solve(exact[:6, :6], exact[:6, 6:]).T

    mean, variance = 0.0, 1.0
    for observation in y:
        variance += 0.25
        mean, variance = mean + variance / (variance + 0.64) * (observation - mean), variance * 0.64 / (variance + 0.64)
    state = filtered(y)

    equal = meeting(lambda m, x, y: m.condition(x + m.normal(0.0, blur), y))
    # x / y =:= 1 instead: the density of (x, x / r) at r = 1 is |x| exp(-x^2), by change of variables
    weight = quad(lambda x: abs(x) * np.exp(-(x**2)), -9, 9)[0]
    by_ratio = quad(lambda x: x**2 * abs(x) * np.exp(-(x**2)), -9, 9)[0] / weight
    numbers = {
        "regression": float(np.abs(first.mean - np.linalg.solve(precision, design.T @ y / 0.25)).max()),
        "order of conditions": float(
            np.abs(first.mean - second.mean).max() + abs(first.log_evidence - second.log_evidence)
        ),
        "gaussian process": float(np.abs(curve.mean - gain @ np.sin(points[:6])).max()),
        "kalman filter": float(abs(state.mean - mean) + abs(state.covariance - variance)),
        "equal variables": float(np.abs(equal.covariance - 0.5).max()),
        "borel: variance by difference": float(equal.covariance[0, 0]),
        "borel: variance by ratio": by_ratio,
    }
    worst = max(list(numbers.values())[:5])
    refused = contradiction_fails(control)
    shown = (
        f"largest difference from closed forms and between orders {worst:.1e} (exact is 0); contradictions are "
        f"{'refused' if refused else 'accepted'}; given x = y the variance of x is {equal.covariance[0, 0]:.2f} by "
        f"x - y =:= 0 and {by_ratio:.2f} by x / y =:= 1"
    )
    return Evidence(bool(worst < 1e-8 and refused and abs(by_ratio - 1) < 1e-8), shown, numbers)
