"""Calibration: maps that leave the calibrated alone and mend the rest, and errors with right standard errors."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core.distribution import concatenate
from bayeslens.core.errors import InputError
from bayeslens.core.quantile import cdf, log_prob
from bayeslens.evaluation.calibration import (
    QuantileMap,
    Temperature,
    expected_calibration_error,
    pit_calibration_error,
    reliability,
)

RNG = np.random.default_rng(0)


def test_uniform_pit_is_left_alone():
    moved = QuantileMap.fit((np.arange(2000) + 0.5) / 2000)
    np.testing.assert_allclose(moved.levels, moved.knots, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 20, 5000])
def test_map_is_increasing_from_zero_to_one(rows):
    moved = QuantileMap.fit(RNG.beta(0.3, 5, rows))
    assert (np.diff(moved.levels) > 0).all() and moved.levels[0] == 0 and moved.levels[-1] == 1


def test_recalibration_makes_pit_uniform():
    """Predictions three quarters as wide as they should be. A KS statistic of 0.03 has a false alarm rate of 1e-3;
    the map of 4,000 rows is held to that."""
    y = RNG.normal(size=8000)
    narrow = dist.Normal(np.zeros(4000), 0.75)
    moved = QuantileMap.fit(cdf(narrow, y[:4000]))
    before, after = st.kstest(cdf(narrow, y[4000:]), "uniform"), st.kstest(cdf(moved(narrow), y[4000:]), "uniform")
    assert before.pvalue < 1e-10 and after.statistic < 0.03
    gain = log_prob(moved(narrow), y[4000:]).mean() - log_prob(narrow, y[4000:]).mean()
    # The truth gains this much; the map recovers most of it.
    best = -st.norm.entropy() - log_prob(narrow, y[4000:]).mean()
    assert 0.8 * best < gain < 1.1 * best


def test_tails_get_bins_as_far_out_as_there_are_rows():
    # One value in fifty beyond 0.9999, none between 0.99 and that, the others even.
    levels = {rows: [] for rows in (500, 5000, 50_000)}
    for rows, found in levels.items():
        moved = QuantileMap.fit(np.concatenate([np.full(rows // 50, 0.99995), np.linspace(0, 0.99, rows - rows // 50)]))
        found.extend(np.interp([0.99, 0.999, 0.9999], moved.knots, moved.levels))
        assert moved.knots.shape == (21,)
    np.testing.assert_allclose(levels[50_000], 0.98, atol=1e-3)
    # One row is not to be expected beyond 0.9999 of 5,000 rows, nor beyond 0.999 of 500: there the map is straight.
    np.testing.assert_allclose(levels[5000][:2], 0.98, atol=5e-3)
    np.testing.assert_allclose(levels[5000][2], 0.9 + 0.1 * levels[5000][1], atol=1e-5)
    np.testing.assert_allclose(levels[500][1:], [0.9 + 0.1 * levels[500][0], 0.99 + 0.01 * levels[500][0]], atol=1e-5)


def test_maps_of_any_tables_can_stand_in_one():
    rows = [QuantileMap.fit(RNG.uniform(size=n) ** 2)(dist.Normal(np.zeros(2), 1.0)) for n in (9, 300, 20_000)]
    joined = concatenate(rows)
    expected = np.concatenate([cdf(d, np.array([-1.0, 0.5])) for d in rows])
    np.testing.assert_allclose(cdf(joined, np.tile([-1.0, 0.5], 3)), expected, rtol=1e-6)


def test_map_of_few_rows_is_near_the_identity():
    moved = QuantileMap.fit(np.array([0.2, 0.9]))
    assert np.abs(moved.levels - moved.knots).max() < 0.2


@pytest.mark.parametrize("bad", [[-0.1, 0.5], [0.5, 1.1], [np.nan]])
def test_pit_outside_is_refused(bad):
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        QuantileMap.fit(bad)


def test_temperature_recovers_the_power():
    """Labels drawn from probabilities p, predictions p^k renormalized: the fitted power is 1/k within 4 se."""
    probs = RNG.dirichlet(np.ones(3), 20_000)
    labels = (RNG.random((20_000, 1)) > np.cumsum(probs, 1)).sum(1)
    for power in (0.5, 1.0, 3.0):
        rough = probs**power / (probs**power).sum(1, keepdims=True)
        fitted = Temperature.fit(rough, labels)
        assert fitted.inverse * power == pytest.approx(1.0, abs=0.05)
        np.testing.assert_allclose(fitted(dist.CategoricalProbs(rough)).probs, probs, atol=0.02)


def test_temperature_of_few_rows_is_near_one():
    assert 0.8 < Temperature.fit(np.array([[0.9, 0.1]] * 2), [0, 1]).inverse < 1.0


def test_temperature_keeps_the_order_and_survives_certainty():
    probs = np.array([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]])
    scaled = np.asarray(Temperature.fit(probs, [1, 1])(dist.CategoricalProbs(probs)).probs)
    assert np.isfinite(scaled).all() and (scaled.argmax(1) == probs.argmax(1)).all()
    np.testing.assert_allclose(scaled.sum(1), 1.0, rtol=1e-6)


def test_pit_error_is_a_total_variation_distance():
    assert pit_calibration_error(np.full(50, 0.05)).value == pytest.approx(0.9)
    half = np.concatenate([np.linspace(0.001, 0.499, 500)])
    assert pit_calibration_error(half).value == pytest.approx(0.5)


def test_standard_errors_match_repetition():
    """The spread over 600 repetitions, within 15% (five standard errors of a standard deviation)."""
    values, errors = zip(*[pit_calibration_error(RNG.beta(2, 2, 400)) for _ in range(600)], strict=True)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.15)


def test_reliability():
    probability, outcome = RNG.random(1003), RNG.random(1003) < 0.3
    curve = reliability(probability, outcome, bins=10)
    assert curve.rows.sum() == 1003 and np.ptp(curve.rows) <= 1
    np.testing.assert_allclose((curve.rows * curve.observed).sum(), outcome.sum())
    np.testing.assert_allclose((curve.rows * curve.predicted).sum(), probability.sum())
    assert (np.diff(curve.predicted) >= 0).all()
    assert len(reliability([0.5, 0.6], [0, 1], bins=10).rows) == 2


def test_expected_calibration_error():
    probs = np.tile([[0.7, 0.3]], (1000, 1))
    labels = np.arange(1000) % 2  # right half the time
    error = expected_calibration_error(probs, labels, bins=1)
    assert error.value == pytest.approx(0.2) and error.standard_error == pytest.approx(np.sqrt(0.25 / 1000))
    # Over-confidence on one half and under-confidence on the other do not cancel.
    probs = np.concatenate([np.tile([[0.9, 0.1]], (500, 1)), np.tile([[0.6, 0.4]], (500, 1))])
    labels = np.concatenate([np.arange(500) % 4 == 0, np.arange(500) % 4 == 0]).astype(int)
    assert expected_calibration_error(probs, labels, bins=2).value == pytest.approx(0.15)
