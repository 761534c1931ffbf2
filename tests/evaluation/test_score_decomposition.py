"""Decompositions: identities to rounding, isotonic fits by their definitions, errors against refitted jackknives."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import kstest

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import Empirical
from bayeslens.evaluation.isotonic import isotonic_mean
from bayeslens.evaluation.score_decomposition import (
    COMPONENTS,
    decompose_classes,
    decompose_crps,
    decompose_mean,
    decompose_probability,
    decompose_quantile,
    log_loss,
    reliability_diagram,
)
from bayeslens.evaluation.scores import brier_loss, crps_loss, quantile_loss

RNG = np.random.default_rng(0)
P = RNG.uniform(0.02, 0.98, 400).round(2)  # ties
Y = (RNG.uniform(size=400) < P**2).astype(float)  # too high
LOC = RNG.normal(size=400)
OUTCOME = LOC + RNG.normal(size=400)
PROBS = RNG.dirichlet(np.ones(3), 400)
TWO = dist.Normal(LOC[:2], 1.0)
LABELS = np.array([RNG.choice(3, p=p) for p in PROBS])


CASES = {
    "brier": lambda **k: decompose_probability(P, Y, **k),
    "log": lambda **k: decompose_probability(P, Y, score="log", **k),
    "classes": lambda **k: decompose_classes(PROBS, LABELS, **k),
    "mean": lambda **k: decompose_mean(LOC + 0.5, OUTCOME, **k),
    "quantile": lambda **k: decompose_quantile(LOC, 0.8, OUTCOME, **k),
    "crps": lambda **k: decompose_crps(dist.Normal(LOC[:80], 2.0), OUTCOME[:80], **k),
}
LOSS = {
    "brier": lambda: (P - Y) ** 2,
    "log": lambda: -np.log(np.where(Y == 1, P, 1 - P)),
    "classes": lambda: brier_loss(PROBS, LABELS),
    "mean": lambda: (LOC + 0.5 - OUTCOME) ** 2,
    "quantile": lambda: quantile_loss(LOC, 0.8, OUTCOME),
}


@pytest.mark.parametrize("name", CASES)
def test_components_add_up(name):
    found = CASES[name]()
    np.testing.assert_allclose(
        found.loss, found.miscalibration - found.discrimination + found.uncertainty, rtol=0, atol=1e-12
    )
    assert found.miscalibration >= 0 and 0 <= found.discrimination <= found.uncertainty + 1e-12
    if name in LOSS:
        np.testing.assert_allclose(found.loss, LOSS[name]().mean())
    assert list(found.table["component"]) == list(COMPONENTS) and "miscalibration" in str(found)
    assert all(e > 0 for e in found.standard_errors.values())


def test_extremes():
    perfect = decompose_probability(Y, Y)
    assert perfect.miscalibration == 0 and perfect.discrimination == pytest.approx(perfect.uncertainty)
    constant = decompose_probability(np.full(400, 0.5), Y)
    assert constant.discrimination == 0
    np.testing.assert_allclose(constant.miscalibration, (0.5 - Y.mean()) ** 2)
    # Any increasing map keeps the discrimination, and recalibrated forecasts have no miscalibration.
    np.testing.assert_allclose(
        decompose_probability(P**3, Y).discrimination, decompose_probability(P, Y).discrimination
    )
    assert decompose_probability(isotonic_mean(P, Y), Y).miscalibration == pytest.approx(0, abs=1e-15)
    two = decompose_classes(np.stack([1 - P, P], 1), Y)
    np.testing.assert_allclose(two.miscalibration, 2 * decompose_probability(P, Y).miscalibration)


@pytest.mark.parametrize("forecast", ["normal", "few", "draws"])
def test_crps_is_its_integral(forecast):
    """The integral over thresholds agrees with the CRPS to a few thousandths, and with that of the climatology."""
    rows = 40 if forecast == "few" else 400
    distribution = dist.Normal(LOC[:rows] + 0.3, 1.5)
    if forecast == "draws":
        distribution = Empirical(LOC[:, None] + 0.3 + RNG.normal(size=(400, 60)))
    y = OUTCOME[:rows]
    found = decompose_crps(distribution, y)
    exact = crps_loss(distribution, y).mean()
    if forecast == "draws":
        draws = np.asarray(distribution.values)
        exact = (
            np.abs(draws - y[:, None]).mean(1) - np.abs(draws[:, :, None] - draws[:, None]).mean((1, 2)) / 2
        ).mean()
    np.testing.assert_allclose(found.loss, exact, rtol=4e-3)
    np.testing.assert_allclose(found.uncertainty, np.abs(y[:, None] - y).mean() / 2, rtol=4e-3)
    weights = np.gradient(found.thresholds)
    np.testing.assert_allclose(found.by_threshold[:, 3] @ weights, found.uncertainty, rtol=0.05)


@pytest.mark.parametrize("name", ["brier", "log", "mean"])
def test_standard_errors_are_those_of_a_delete_one_jackknife(name):
    """Refitting 200 times; the infinitesimal jackknife leaves second-order terms out: 15%, and 1% for loss and R."""
    kept = slice(0, 200)
    functions = {
        "brier": lambda k: decompose_probability(P[kept][k], Y[kept][k], resamples=0),
        "log": lambda k: decompose_probability(P[kept][k], Y[kept][k], score="log", resamples=0),
        "mean": lambda k: decompose_mean(LOC[kept][k] + 0.5, OUTCOME[kept][k]),
    }
    function = functions[name]
    without = [function(np.arange(200) != i) for i in range(200)]
    values = np.array([[getattr(w, c) for c in COMPONENTS] for w in without])
    refitted = np.sqrt(199 / 200 * ((values - values.mean(0)) ** 2).sum(0))
    found = function(np.arange(200))
    ratio = np.array([found.standard_errors[c] for c in COMPONENTS]) / refitted
    np.testing.assert_allclose(ratio[[0, 3]], 1, rtol=0.02)
    np.testing.assert_allclose(ratio[[1, 2]], 1, rtol=0.15)


def test_standard_errors_are_the_spread_over_data_sets():
    """300 data sets of 500 rows; the spread itself is known to 4%: within 20% (false alarm rate under 1e-5)."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(300):
        p = rng.uniform(size=500)
        found.append(decompose_probability(p, (rng.uniform(size=500) < p**2).astype(float), resamples=0))
    for name in COMPONENTS:
        spread = np.std([getattr(f, name) for f in found])
        claimed = np.mean([f.standard_errors[name] for f in found])
        assert abs(claimed / spread - 1) < 0.2, name


@pytest.mark.parametrize("name", ["brier", "crps"])
def test_groups_and_time_reach_the_errors(name):
    rows = len(CASES[name]().by_row)
    alone, grouped = CASES[name](), CASES[name](groups=np.arange(rows) // 8)
    timed = CASES[name](time=np.arange(rows))
    assert grouped.loss == timed.loss == alone.loss
    assert grouped.standard_errors["loss"] != alone.standard_errors["loss"] != timed.standard_errors["loss"]


def test_miscalibration_falls_and_discrimination_stays_under_recalibration():
    """A Normal forecast half as wide as the truth, against the right one: the same ranks, another calibration."""
    right, narrow = (decompose_crps(dist.Normal(LOC, s), OUTCOME) for s in (1.0, 0.5))
    assert narrow.miscalibration > 2 * right.miscalibration
    np.testing.assert_allclose(narrow.discrimination, right.discrimination, rtol=0.05)


@pytest.mark.parametrize("name", ["log", "classes", pytest.param("crps", marks=pytest.mark.slow)])
def test_miscalibration_by_chance(name):
    """Of 60 calibrated data sets (30 for the CRPS): miscalibration less its expectation by chance is zero on average,
    within 4 standard errors (false alarm rate 6e-5), and p-values are uniform (Kolmogorov-Smirnov, 1e-3)."""
    rng = np.random.default_rng(5)
    repeats, resamples = (30, 9) if name == "crps" else (60, 19)
    gaps, p_values = [], []
    for i in range(repeats):
        settings = {"resamples": resamples, "key": jax.random.key(i)}
        if name == "crps":
            loc = rng.normal(size=60)
            found = decompose_crps(dist.Normal(loc, 1.0), loc + rng.normal(size=60), **settings)
        else:
            probs = rng.dirichlet(np.ones(3 if name == "classes" else 2), 150)
            labels = (rng.uniform(size=(150, 1)) > np.cumsum(probs, 1)[:, :-1]).sum(1)
            if name == "classes":
                found = decompose_classes(probs, labels, **settings)
            else:
                found = decompose_probability(probs[:, 1], labels, score="log", **settings)
        gaps.append(found.miscalibration - found.expected_miscalibration)
        p_values.append(found.p_value - rng.uniform() / (resamples + 1))  # they come in steps
        assert found.miscalibration > 0
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / np.sqrt(repeats)
    assert kstest(p_values, "uniform").pvalue > 1e-3


def test_miscalibration_beyond_chance():
    assert decompose_crps(dist.Normal(LOC + 0.5, 1.0), OUTCOME).p_value == 1 / 40
    assert decompose_classes(PROBS[:, ::-1], LABELS).p_value == 1 / 100
    assert (
        decompose_mean(LOC, OUTCOME).p_value is None and decompose_crps(TWO, OUTCOME[:2], resamples=0).p_value is None
    )


def test_log_loss_at_the_ends():
    np.testing.assert_array_equal(log_loss(np.array([0.0, 1.0]), np.array([0.0, 1.0])), [0.0, 0.0])


# ---- reliability diagrams --------------------------------------------------------------------------------------------


def test_diagram_of_miscalibrated_probabilities():
    found = reliability_diagram(P, Y)
    np.testing.assert_allclose(found.observed[np.searchsorted(found.predicted, P)], isotonic_mean(P, Y))
    assert found.p_value == 1 / 401 and found.rows.sum() == 400
    assert (np.diff(found.lower) >= 0).all() and (found.lower <= found.upper).all()
    assert ((found.observed < found.lower) | (found.observed > found.upper)).mean() > 0.3
    table = found.table
    assert table["rows"].sum() == 400 and (np.diff(table["observed"]) > 0).all() and "by_chance" in str(found)


def test_calibrated_probabilities_pass_as_often_as_promised():
    """150 calibrated data sets of 200 rows: p-values uniform by Kolmogorov-Smirnov (false alarm rate 1e-3), the band
    holds about 90% of the curve, and chance's miscalibration is what they show (4 standard errors)."""
    rng = np.random.default_rng(4)
    p_values, inside, gaps = [], [], []
    for i in range(150):
        p = rng.uniform(size=200).round(2)
        y = (rng.uniform(size=200) < p).astype(float)
        found = reliability_diagram(p, y, resamples=99, key=jax.random.key(i))
        p_values.append(found.p_value)
        inside.append(((found.observed >= found.lower - 1e-12) & (found.observed <= found.upper + 1e-12)).mean())
        gaps.append(found.decomposition.miscalibration - found.decomposition.expected_miscalibration)
    assert kstest(p_values, "uniform").pvalue > 1e-3
    assert 0.85 < np.mean(inside) < 0.96
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / np.sqrt(150)


def test_diagram_is_reproducible():
    first, second = (reliability_diagram(P, Y, resamples=20) for _ in range(2))
    np.testing.assert_array_equal(first.upper, second.upper)
    assert first.decomposition.expected_miscalibration == second.decomposition.expected_miscalibration


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decompose_probability([0.5, 0.0], [1, 1], score="log"), "row 1 .*infinite"),
        (lambda: decompose_probability([0.5, 0.1], [1, 0], score="accuracy"), "unknown score"),
        (lambda: decompose_probability([0.5, np.nan], [1, 0]), "row 1 has the probability nan"),
        (lambda: decompose_mean([0.5, np.nan], [1, 0]), "row 1 .*nan"),
        (lambda: decompose_quantile([0.5, 1.0], 1.5, [1, 0]), "level must"),
        (lambda: decompose_quantile([0.5], 0.5, [1, 0]), "shapes"),
        (lambda: decompose_classes(PROBS[:2], [0, 3]), "row 1 has the class code 3"),
        (lambda: decompose_classes(PROBS[:2], [0]), "one label per row"),
        (lambda: decompose_crps(TWO, [0.0, np.inf]), "1 of them not finite"),
        (lambda: decompose_crps(TWO, [0.0]), "one finite outcome per row"),
        (lambda: reliability_diagram([0.5, 2.0], [0, 1]), "row 1 has the probability 2"),
        (lambda: reliability_diagram(P, Y, coverage=90), "coverage must lie"),
    ],
)
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
