"""Conformal predictive distributions: exactly uniform probabilities, and a distribution close to them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, quantile
from bayeslens.core.saving import load, save
from bayeslens.evaluation.conformal_predictive_distribution import ConformalPredictiveSystem


def test_randomized_pit_is_uniform_on_every_table():
    """Of n + 1 exchangeable outcomes, the new one falls into each of n + 1 equal cells of [0, 1] equally often."""
    y = np.random.default_rng(0).standard_cauchy(20)
    location, scale = np.linspace(-1, 1, 20), np.linspace(1, 3, 20)
    cells = []
    for new in range(20):
        rest = np.arange(20) != new
        system = ConformalPredictiveSystem.fit(location[rest], scale[rest], y[rest])
        one = slice(new, new + 1)
        cells.append(system.pit(location[one], scale[one], y[one], key=jax.random.key(new))[0])
    assert sorted(np.floor(20 * np.array(cells)).astype(int)) == list(range(20))


def test_ties_are_spread_over_their_cells():
    system = ConformalPredictiveSystem.fit(np.zeros(9), 1.0, np.zeros(9))
    pit = system.pit(np.zeros(4000), 1.0, np.zeros(4000), key=jax.random.key(0))
    # A Kolmogorov-Smirnov statistic of 0.04 at 4,000 draws has a false alarm rate below 1e-5.
    assert np.abs(np.sort(pit) - np.arange(4000) / 4000).max() < 0.04


@pytest.mark.parametrize("rows", [2, 50, 1000])
def test_distribution_agrees_with_the_system(rows):
    rng = np.random.default_rng(1)
    system = ConformalPredictiveSystem.fit(np.zeros(rows), 1.0, rng.normal(size=rows))
    location, scale = np.array([0.0, 5.0]), np.array([1.0, 2.0])
    d = system(location, scale)
    inside = np.array([0.3, 5.0])
    if rows > 2:
        pit = system.pit(location, scale, inside, key=jax.random.key(0))
        np.testing.assert_allclose(cdf(d, inside), pit, atol=1 / (rows + 1) + 1 / 199 * (rows > 199))
    middle = quantile(d, [0.5])[:, 0]
    np.testing.assert_allclose(middle, location + scale * np.median(system.errors), atol=0.05 if rows > 2 else 1e-6)


def test_round_trip(tmp_path):
    system = ConformalPredictiveSystem.fit(np.zeros(5), 1.0, np.arange(5.0))
    save(system, tmp_path / "s.bayes")
    assert (load(tmp_path / "s.bayes").errors == system.errors).all()


def test_bad_input():
    with pytest.raises(InputError, match="positive in row 1"):
        ConformalPredictiveSystem.fit(np.zeros(3), [1.0, 0.0, 1.0], np.ones(3))
    with pytest.raises(InputError, match="row 2 is NaN"):
        ConformalPredictiveSystem.fit(np.zeros(3), 1.0, [1.0, 1.0, np.nan])
    with pytest.raises(InputError, match="two calibration rows"):
        ConformalPredictiveSystem.fit(np.zeros(1), 1.0, np.ones(1))
