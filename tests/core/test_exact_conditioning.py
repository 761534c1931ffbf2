"""The language of exact conditions against regression, Gaussian process and Kalman formulas, in any order."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from bayeslens.core.errors import InputError
from bayeslens.core.exact_conditioning import Machine, run


def test_bayesian_linear_regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=20)

    def program(machine):
        weights = machine.normal(0.0, 2.0, shape=(3,))
        machine.condition(x @ weights + machine.normal(0.0, 0.5, shape=(20,)), y)
        return weights

    posterior = run(program)
    covariance = np.linalg.inv(np.eye(3) / 4 + x.T @ x / 0.25)
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-9)
    np.testing.assert_allclose(posterior.mean, covariance @ x.T @ y / 0.25, rtol=1e-9)
    exact = multivariate_normal(np.zeros(20), 4 * x @ x.T + 0.25 * np.eye(20)).logpdf(y)
    assert posterior.log_evidence == pytest.approx(exact, rel=1e-10)


def test_gaussian_process_regression():
    """Noise-free data on a smooth kernel: the joint of twelve near points is almost singular."""
    x, new = np.linspace(0, 3, 12), np.array([0.7, 1.95])
    kernel = lambda a, b: np.exp(-((a[:, None] - b) ** 2) / 2)  # noqa: E731
    everything = np.concatenate([x, new])
    root = np.linalg.cholesky(kernel(everything, everything) + 1e-8 * np.eye(14))
    y = np.sin(x)

    def program(machine):
        f = root @ machine.normal(0.0, 1.0, shape=(14,))
        machine.condition(f[:12], y)
        return f[12:]

    full = root @ root.T
    gain = np.linalg.solve(full[:12, :12], full[:12, 12:]).T
    posterior = run(program)
    np.testing.assert_allclose(posterior.mean, gain @ y, atol=1e-7)
    np.testing.assert_allclose(posterior.covariance, full[12:, 12:] - gain @ full[:12, 12:], atol=1e-9)


def test_kalman_filter():
    rng = np.random.default_rng(1)
    a, q, r = np.array([[1.0, 0.5], [0.0, 0.9]]), np.array([0.1, 0.3]), 0.7
    observations = rng.normal(size=15)

    def program(machine):
        state = machine.normal(0.0, 1.0, shape=(2,))
        for y in observations:
            state = machine.normal(a @ state, q)
            machine.condition(machine.normal(state[0], r), y)
        return state

    mean, covariance, log_evidence = np.zeros(2), np.eye(2), 0.0
    for y in observations:
        mean, covariance = a @ mean, a @ covariance @ a.T + np.diag(q**2)
        variance = covariance[0, 0] + r**2
        log_evidence += norm(mean[0], variance**0.5).logpdf(y)
        gain = covariance[:, 0] / variance
        mean, covariance = mean + gain * (y - mean[0]), covariance - np.outer(gain, covariance[0])
    posterior = run(program)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-10)
    np.testing.assert_allclose(posterior.covariance, covariance, atol=1e-10)
    assert posterior.log_evidence == pytest.approx(log_evidence, rel=1e-10)


def conditions_in_order(order, rows, offsets, target):
    machine = Machine()
    z = machine.normal(0.0, 1.0, shape=(6,))
    for i in order:
        machine.condition(rows[i] @ z, offsets[i])
    return machine.posterior(target @ z)


def test_conditions_commute():
    """Random programs in random orders, redundant conditions and wide units included, against one batch."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        rows = rng.normal(size=(5, 6))
        rows[3], rows[4] = rows[0] - 2 * rows[1], 3 * rows[2]  # these say nothing new
        rows *= 10.0 ** rng.integers(-4, 5, size=(5, 1))
        offsets, target = rows @ rng.normal(size=6), rng.normal(size=(3, 6))
        first = conditions_in_order(range(5), rows, offsets, target)
        basis = np.linalg.svd(rows[:3] / np.linalg.norm(rows[:3], axis=1, keepdims=True), full_matrices=False)[2]
        np.testing.assert_allclose(first.covariance, target @ (np.eye(6) - basis.T @ basis) @ target.T, atol=1e-9)
        point = np.linalg.lstsq(rows[:3], offsets[:3], rcond=None)[0]
        np.testing.assert_allclose(first.mean, target @ basis.T @ basis @ point, atol=1e-6)
        for _ in range(3):
            other = conditions_in_order(rng.permutation(5), rows, offsets, target)
            np.testing.assert_allclose(other.mean, first.mean, atol=1e-6)
            np.testing.assert_allclose(other.covariance, first.covariance, atol=1e-8)
            assert other.log_evidence == pytest.approx(first.log_evidence, rel=1e-6)


def test_programs_may_draw_after_conditioning():
    def program(machine):
        x = machine.normal(1.0, 2.0)
        machine.condition(x, 3.0)
        y = machine.normal(x, 1.0)
        machine.condition(x, 3.0)  # known already
        return [x, y, x - 3]

    posterior = run(program)
    np.testing.assert_allclose(posterior.mean, [3, 3, 0], atol=1e-14)
    np.testing.assert_allclose(posterior.covariance, np.diag([0, 1, 0]), atol=1e-14)


def test_zero_variances():
    def constants(machine):
        x = machine.normal(2.0, 0.0)
        machine.condition(x, 2.0)
        machine.condition(x + 0.1 + 0.2 - x, 0.3)  # equal up to rounding
        return x

    assert run(constants) == (2.0, 0.0, 0.0)
    for left, right in [(2.0, 3.0), (2.0, 2.0 + 1e-6)]:
        with pytest.raises(InputError, match="no support"):
            run(lambda machine, left=left, right=right: machine.condition(machine.normal(left, 0.0), right))

    def contradiction(machine):
        x, y = machine.normal(0.0, 1.0, shape=(2,)), machine.normal(0.0, 1e-6)
        machine.condition(x[0], x[1])
        machine.condition(x[0], y)  # shrinks x to a millionth: equality of x[0] and x[1] must not be forgotten
        machine.condition(x[1] - x[0], 1e-9)

    with pytest.raises(InputError, match="no support"):
        run(contradiction)


def test_what_cancels_up_to_rounding_says_nothing():
    def program(machine):
        x = machine.normal(5.0, 2.0)
        machine.condition(0.1 * x + 0.2 * x, 0.3 * x)  # the coefficients differ by 5e-17: no news about x
        return x

    assert run(program) == (5.0, 4.0, 0.0)


def test_equal_variables_may_replace_each_other():
    """After x =:= y the two are one: the paper's substitution law."""

    def program(swap):
        def body(machine):
            x, y = machine.normal(0.0, 1.0), machine.normal(1.0, 2.0)
            machine.condition(x, y)
            machine.condition((y if swap else x) + machine.normal(0.0, 1.0), 3.0)
            return [x, y, 2 * (y if swap else x)]

        return body

    for one, other in zip(run(program(False)), run(program(True)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_phrasing_changes_evidence_by_units_only():
    def program(scale):
        def body(machine):
            x, y = machine.normal(0.0, 1.0), machine.normal(0.0, 1.0)
            machine.condition(scale * x, scale * y)
            return x

        return body

    assert run(program(1.0)).covariance == pytest.approx(0.5)
    assert run(program(4.0)).covariance == pytest.approx(0.5)
    assert run(program(1.0)).log_evidence - run(program(4.0)).log_evidence == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda machine: machine.normal(0.0, 1.0) * machine.normal(0.0, 1.0), "multiply"),
        (lambda machine: 1 / machine.normal(0.0, 1.0), None),
        (lambda machine: machine.normal(0.0, machine.normal(0.0, 1.0)), "standard deviation"),
        (lambda machine: machine.normal(0.0, -1.0), "negative"),
        (lambda machine: machine.normal(np.nan, 1.0), "missing"),
        (lambda machine: machine.condition(machine.normal(0.0, 1.0), np.inf), "missing"),
    ],
)
def test_bad_input(program, message):
    with pytest.raises(InputError if message else TypeError, match=message):
        run(program)
