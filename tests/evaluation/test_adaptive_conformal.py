"""Adaptive conformal inference: the deterministic bound against adversaries, and coverage under drift."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.evaluation.adaptive_conformal import adaptive_conformal_inference
from bayeslens.evaluation.conformal import conformal_threshold

RNG = np.random.default_rng(0)
SERIES = {
    "growing": np.arange(600.0),
    "shrinking": -np.arange(600.0),
    "constant": np.ones(600),
    "jumps": np.where(np.arange(600) // 100 % 2, 10.0, 1.0) * RNG.exponential(size=600),
    "cauchy": RNG.standard_cauchy(600),
}


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("step", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("window", [None, 50])
def test_bound_holds_for_every_series(series, step, window):
    found = adaptive_conformal_inference(SERIES[series], 0.8, step=step, window=window)
    missed = 1 - found.covered.mean()
    assert abs(missed - 0.2) <= (0.8 + step) / (step * 600) + 1e-12
    assert (found.covered == (SERIES[series] <= found.threshold)).all()


def test_level_follows_the_misses():
    found = adaptive_conformal_inference(SERIES["cauchy"], 0.9, step=0.02)
    np.testing.assert_allclose(np.diff(found.level), 0.02 * (0.1 - ~found.covered[:-1]), atol=1e-12)


def test_threshold_is_the_conformal_quantile_of_the_window():
    scores = SERIES["jumps"]
    found = adaptive_conformal_inference(scores, 0.8, step=0.01, window=40)
    for t in (30, 77, 401):
        assert found.threshold[t] == conformal_threshold(scores[max(0, t - 40) : t], 1 - found.level[t])


def test_weighed_steps_cover_without_choosing():
    """Hits of independent scores: a binomial band with false alarm rate 1e-4; under drift, within three points."""
    rng = np.random.default_rng(1)
    even = rng.exponential(size=3000)
    hits = adaptive_conformal_inference(even, 0.9).covered.sum()
    assert st.binom.ppf(5e-5, 3000, 0.9) <= hits <= st.binom.isf(5e-5, 3000, 0.9)
    drift = even * np.exp(np.sin(np.arange(3000) / 150))
    plain = np.array([drift[t] <= conformal_threshold(drift[:t], 0.9) for t in range(100, 3000)])
    adapted = adaptive_conformal_inference(drift, 0.9).covered[100:]

    def worst(covered):
        return np.abs(np.convolve(covered, np.full(200, 1 / 200), "valid") - 0.9).max()

    assert abs(adapted.mean() - 0.9) < 0.03
    assert worst(adapted) < worst(plain)  # without adaptation coverage swings with the scale


def test_bad_input():
    with pytest.raises(InputError, match="step must be positive"):
        adaptive_conformal_inference([1.0], 0.9, step=0.0)
    with pytest.raises(InputError, match="window must hold"):
        adaptive_conformal_inference([1.0], 0.9, window=0)
    with pytest.raises(InputError, match="row 1 is NaN"):
        adaptive_conformal_inference([1.0, np.nan], 0.9)
