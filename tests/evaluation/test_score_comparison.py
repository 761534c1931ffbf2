"""Paired comparisons: identities with textbook tests, definitions, and levels by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.evaluation.score_comparison import ScoreDifference, compare_scores, diebold_mariano, mean_error

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=60), RNG.normal(size=60)


def test_independent_rows_are_the_paired_t_test():
    found, expected = compare_scores(FIRST, SECOND), st.ttest_rel(FIRST, SECOND)
    np.testing.assert_allclose([found.statistic, found.p_value], [expected.statistic, expected.pvalue])
    np.testing.assert_allclose([found.lower, found.upper], expected.confidence_interval())
    assert found.rows == 60 and found.degrees_of_freedom == 59


def test_diebold_mariano_at_one_step_is_the_paired_t_test():
    np.testing.assert_allclose(diebold_mariano(FIRST, SECOND).p_value, st.ttest_rel(FIRST, SECOND).pvalue)


def test_diebold_mariano_by_its_definition():
    d, n, h = FIRST - SECOND, 60, 3
    autocovariance = [((d - d.mean())[k:] * (d - d.mean())[: n - k]).sum() / n for k in range(h)]
    variance = (autocovariance[0] + 2 * sum(autocovariance[1:])) / n
    corrected = d.mean() / np.sqrt(variance) * np.sqrt((n + 1 - 2 * h + h * (h - 1) / n) / n)
    found = diebold_mariano(FIRST, SECOND, horizon=h)
    np.testing.assert_allclose(found.statistic, corrected)
    np.testing.assert_allclose(found.p_value, 2 * st.t(n - 1).sf(abs(corrected)))
    weighted = autocovariance[0] + 2 * (2 / 3 * autocovariance[1] + 1 / 3 * autocovariance[2])
    np.testing.assert_allclose(
        diebold_mariano(FIRST, SECOND, lags=2).standard_error, np.sqrt(weighted / n * n / (n - 1))
    )


def test_autocovariances_that_cancel():
    """An alternating series has a negative sum of autocovariances: Bartlett's weights step in."""
    d = np.resize([1.0, -1.0], 20) + np.linspace(0, 0.1, 20)
    found = diebold_mariano(d, np.zeros(20), horizon=2)
    assert "Newey-West" in found.method and found.standard_error > 0


def test_groups_of_equal_rows_count_once():
    """Rows repeated five times are one row each: the error is that of the single rows."""
    d = RNG.normal(size=30)
    repeated = mean_error(np.repeat(d, 5), groups=np.repeat(np.arange(30), 5))
    np.testing.assert_allclose(repeated.standard_error, mean_error(d).standard_error)
    assert repeated.degrees_of_freedom == 29
    alone = mean_error(d, groups=[f"g{i}" for i in range(30)])
    np.testing.assert_allclose(alone.standard_error, mean_error(d).standard_error)


def test_times_of_equal_rows_count_once():
    d = RNG.normal(size=50)
    order = RNG.permutation(150)
    panel = mean_error(np.repeat(d, 3)[order], time=np.repeat(np.arange(50), 3)[order])
    np.testing.assert_allclose(panel.standard_error, mean_error(d, time=np.arange(50)).standard_error)


def test_columns_are_independent_of_each_other():
    values = RNG.normal(size=(40, 3))
    for labels in ({}, {"groups": np.arange(40) // 4}, {"time": np.arange(40)}):
        together = mean_error(values, **labels).standard_error
        np.testing.assert_allclose(together, [mean_error(v, **labels).standard_error for v in values.T])


def rejections(test, differences):
    return sum(test(d).p_value < 0.05 for d in differences)


def test_level_of_groups():
    """2 x 400 repeats at level 5%: between 6 and 36 rejections of 400 in truth (binomial, false alarm rate 1e-4); rows
    taken as independent reject far more often, the control."""
    rng = np.random.default_rng(1)
    shared = np.repeat(rng.normal(size=(400, 25)), 6, axis=1) + rng.normal(size=(400, 150))
    groups, zeros = np.repeat(np.arange(25), 6), np.zeros(150)
    assert 6 <= rejections(lambda d: compare_scores(d, zeros, groups=groups), shared) <= 36
    assert rejections(lambda d: compare_scores(d, zeros), shared) > 60


def test_level_of_a_series():
    """400 repeats of 200 steps of a moving sum of 4, as four-step forecasts have. The tests are asymptotic: up to 9% of
    rejections are allowed, exceeded by a true 5% with probability 4e-4; the paired t test is the control."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(400, 203))
    series = sum(noise[:, k : k + 200] for k in range(4))
    zeros, time = np.zeros(200), np.arange(200)
    assert rejections(lambda d: diebold_mariano(d, zeros, horizon=4), series) <= 36
    assert rejections(lambda d: compare_scores(d, zeros, time=time), series) <= 36
    assert rejections(lambda d: diebold_mariano(d, zeros), series) > 60


def test_time_is_by_the_cosine_transforms():
    d = RNG.normal(size=40)
    used = round(0.4 * 40 ** (2 / 3))
    transforms = [np.sqrt(2 / 40) * np.cos(np.pi * j * (np.arange(40) + 0.5) / 40) @ d for j in range(1, used + 1)]
    found = mean_error(d, time=np.arange(40)[::-1])  # backwards in time is the same series
    np.testing.assert_allclose(found.standard_error, np.sqrt(np.mean(np.square(transforms)) / 40))
    assert found.degrees_of_freedom == used == 5


def test_no_difference_at_all():
    found = compare_scores(FIRST, FIRST)
    assert isinstance(found, ScoreDifference) and found.p_value == 1.0 and found.statistic == 0.0
    assert compare_scores(FIRST + 1.0, FIRST).difference == pytest.approx(1.0)
    assert "p_value" in str(found) and list(found.table["rows"]) == [60]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_scores(FIRST, SECOND[:5]), "same rows"),
        (lambda: compare_scores([1.0], [2.0]), "two rows"),
        (lambda: compare_scores([1.0, -np.inf], [0.0, 0.0]), "row 1 .*-inf"),
        (lambda: compare_scores(FIRST, SECOND, groups=np.zeros(60)), "same groups entry"),
        (lambda: compare_scores(FIRST, SECOND, groups=np.zeros(3)), "one entry for each"),
        (lambda: compare_scores(FIRST, SECOND, groups=np.arange(60), time=np.arange(60)), "not both"),
        (lambda: diebold_mariano(FIRST, SECOND, horizon=31), "horizon"),
        (lambda: diebold_mariano(FIRST, SECOND, lags=60), "lags"),
    ],
)
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
