"""Calibration: maps that leave the calibrated alone and mend the rest, and errors with right standard errors."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core.distribution import concatenate
from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, log_prob
from bayeslens.evaluation.calibration import (
    QuantileMap,
    Temperature,
    classwise_calibration_error,
    confidence_band,
    debiased_calibration_error,
    expected_calibration_error,
    kolmogorov_smirnov_calibration_error,
    pit_calibration_error,
    reliability,
    smooth_calibration_error,
    smoothed_isotonic,
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


# ---- errors without bias, and without bins -----------------------------------------------------------------------


def drawn(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random((len(probs), 1)) > np.cumsum(probs, 1)).sum(1).clip(max=probs.shape[1] - 1)


def softened(probs: np.ndarray, power: float) -> np.ndarray:
    return probs**power / (probs**power).sum(1, keepdims=True)


def test_debiased_errors_of_the_calibrated_are_zero_on_average():
    """500 tables of 200 calibrated rows: each mean square is within 4 standard errors of 0 (false-alarm rate 6e-5
    each), and the reported standard errors are those of the repetitions within 15%. The binned error is not."""
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(3), 200)
    top, classwise, binned = [], [], []
    for _ in range(500):
        labels = drawn(probs, rng)
        top.append(debiased_calibration_error(probs, labels, bins=10))
        classwise.append(classwise_calibration_error(probs, labels, bins=10))
        binned.append(expected_calibration_error(probs, labels, bins=10).value)
    for found, exact in ((top, True), (classwise, False)):
        squares = np.array([e.squared for e in found])
        assert abs(squares.mean()) < 4 * squares.std() / np.sqrt(500)
        reported = np.mean([e.squared_standard_error for e in found])
        assert reported == pytest.approx(squares.std(), rel=0.15) if exact else reported > 0.9 * squares.std()
    assert np.mean(binned) > 0.05


def test_debiased_error_is_the_known_one():
    """Every probability too high by 0.15, so that the squared error is 0.0225 in every bin: mean over 400 tables
    within 4 standard errors. The formula of Kumar et al. holds where the predictions of a bin are equal."""
    rng, p = np.random.default_rng(2), np.linspace(0.7, 0.95, 300)
    probs = np.stack([p, 1 - p], 1)
    squares = [debiased_calibration_error(probs, rng.random(300) > p - 0.15).squared for _ in range(400)]
    assert abs(np.mean(squares) - 0.0225) < 4 * np.std(squares) / 20
    labels = np.arange(50) % 3 == 0
    ours = debiased_calibration_error(np.tile([[0.7, 0.3]], (50, 1)), labels, bins=1).squared
    hits = 1 - labels.mean()
    assert ours == pytest.approx((hits - 0.7) ** 2 - hits * (1 - hits) / 49)


def test_root_and_its_standard_error_are_finite_at_zero():
    found = debiased_calibration_error(np.tile([[0.8, 0.2]], (20, 1)), np.arange(20) % 5 == 0)
    assert found.value == 0 and found.squared < 0 and 0 <= found.standard_error < 0.3


def test_classwise_error_sees_what_the_top_label_hides():
    """The likeliest class is as frequent as said; the other two are mistaken for each other."""
    probs = np.tile([[0.6, 0.3, 0.1]], (1000, 1))
    labels = np.repeat([0, 1, 2], [600, 100, 300])
    assert debiased_calibration_error(probs, labels).value == 0
    found = classwise_calibration_error(probs, labels, bins=1)
    assert found.value == pytest.approx(np.sqrt(0.08 / 3), abs=0.01)
    assert [round(e.value, 1) for e in found.by_class] == [0.0, 0.2, 0.2]


def test_kolmogorov_smirnov_p_values_are_uniform():
    """1,000 tables of 400 calibrated rows; steps of the walk make it conservative by less than 0.1, so that the test
    is one-sided: false-alarm rate 1e-4."""
    rng, values = np.random.default_rng(3), []
    for _ in range(1000):
        probs = rng.dirichlet(np.ones(3), 400)
        values.append(kolmogorov_smirnov_calibration_error(probs, drawn(probs, rng)).p_value)
    assert st.kstest(values, "uniform", alternative="greater").pvalue > 1e-4
    assert np.mean(np.array(values) < 0.1) > 0.05


def test_kolmogorov_smirnov_error_is_the_largest_gap():
    probs, labels = RNG.dirichlet(np.ones(3), 50), RNG.integers(0, 3, 50)
    order = np.argsort(probs.max(1))
    gaps = np.cumsum(((probs.argmax(1) == labels) - probs.max(1))[order]) / 50
    assert kolmogorov_smirnov_calibration_error(probs, labels).value == pytest.approx(np.abs(gaps).max())
    assert kolmogorov_smirnov_calibration_error(softened(probs, 8), labels).p_value < 1e-6
    certain = np.tile([[1.0, 0.0]], (5, 1))
    assert kolmogorov_smirnov_calibration_error(certain, np.zeros(5, int)).p_value == 1.0
    assert kolmogorov_smirnov_calibration_error(certain, np.ones(5, int)).p_value == 0.0


def test_smooth_error():
    """Between 0 and the true error: calibrated rows give little, a constant shift its size."""
    rng = np.random.default_rng(4)
    p = rng.uniform(0.6, 0.9, 20_000)
    probs = np.stack([p, 1 - p], 1)
    calibrated, shifted = (smooth_calibration_error(probs, rng.random(20_000) > p - gap) for gap in (0.0, 0.1))
    assert calibrated.value < 0.02
    assert shifted.value == pytest.approx(0.1, abs=4 * shifted.standard_error + 0.005)
    assert shifted.bandwidth == pytest.approx(shifted.value, abs=0.01)
    # Moving every prediction by a thousandth moves the error by no more than about that.
    moved = smooth_calibration_error(np.stack([p + 1e-3, 1 - p - 1e-3], 1), rng.random(20_000) > p - 0.1)
    assert abs(moved.value - shifted.value) < 0.02


def test_confidence_band_covers():
    """Of 40 tables the true frequency is inside a 90% band at 90% of the points, less the bias of isotonic fits."""
    rng, share = np.random.default_rng(5), []
    for i in range(40):
        p = np.sort(rng.random(400))
        band = confidence_band(p, rng.random(400) < p**2, key=jax.random.key(i), resamples=100)
        inside = (band.lower <= band.predicted**2) & (band.predicted**2 <= band.upper)
        share.append(inside.mean())
        assert (np.diff(band.lower) >= 0).all() and band.lower[0] >= 0 and band.upper[-1] <= 1
    assert 0.8 < np.mean(share) < 0.98


def test_smoothed_isotonic():
    values, level = smoothed_isotonic(np.array([0.9, 0.1, 0.1, 0.5]), np.array([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(values, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(level, [0.5 / 2.5, 2 / 2.5, 2 / 2.5])  # half a row of the other kind at each end


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.6]], [0, 1], "row 1.*sum to 1.1"),
        ([[0.5, 0.5], [np.nan, 1.0]], [0, 1], "row 1"),
        ([[1.5, -0.5]], [0], "row 0"),
        ([[0.5, 0.5]], [2], "label of row 0 is 2"),
        ([[0.5, 0.5]], [0, 1], "shape"),
    ],
)
def test_bad_probabilities(probs, labels, message):
    with pytest.raises(InputError, match=message):
        debiased_calibration_error(np.array(probs), np.array(labels))


def test_one_row_has_no_debiased_error():
    with pytest.raises(InputError, match="two rows"):
        debiased_calibration_error([[0.5, 0.5]], [0])


def test_the_order_of_rows_does_not_matter():
    """Equal probabilities in a table that is sorted by outcome."""
    probability, outcome = np.full(100, 0.3), np.arange(100) >= 70
    np.testing.assert_allclose(reliability(probability, outcome).observed, 0.3)
