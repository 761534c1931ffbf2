"""Risk control: the expectation bound on every table, and p-values that are p-values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.evaluation.conformal import conformal_threshold
from bayeslens.evaluation.risk_control import conformal_risk_control, risk_controlling_setting, risk_p_value


def test_expected_loss_is_controlled_on_every_table():
    """Averaged over which of the n + 1 rows is new, its loss is at most the risk, whatever the losses."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        losses = -np.sort(-rng.random((10, 30)), axis=1)
        losses[:, -1] = 0
        found = []
        for new in range(10):
            rest = np.arange(10) != new
            found.append(losses[new, conformal_risk_control(losses[rest], 0.3).index])
        assert np.mean(found) <= 0.3 + 1e-12


def test_misses_give_split_conformal():
    scores = np.random.default_rng(1).permutation(np.arange(57.0))
    thresholds = np.arange(57.0)
    chosen = conformal_risk_control(scores[:, None] > thresholds, 0.1)
    assert thresholds[chosen.index] == conformal_threshold(scores, 0.9)
    assert chosen.risk == (scores > thresholds[chosen.index]).mean()


@pytest.mark.parametrize("bound", ["betting", "hoeffding-bentkus", "binomial"])
def test_p_values_are_valid(bound):
    """At the boundary of the hypothesis a p-value is below 0.1 in at most a tenth of 2,000 tables: binomial, 1e-5."""
    rng = np.random.default_rng(2)
    losses = (rng.random((100, 2000)) < 0.2).astype(float)
    small = (risk_p_value(losses, 0.2, bound=bound) <= 0.1).sum()
    assert small <= st.binom.isf(1e-5, 2000, 0.1)
    if bound != "binomial":
        spread = np.clip(0.2 + 0.1 * rng.uniform(-1, 1, size=(100, 2000)), 0, 1)
        assert (risk_p_value(spread, 0.2, bound=bound) <= 0.1).sum() <= st.binom.isf(1e-5, 2000, 0.1)


def test_betting_profits_from_small_variance():
    losses = 0.1 + 0.02 * np.random.default_rng(3).uniform(-1, 1, size=200)
    betting, mean_only = risk_p_value(losses, 0.15)[0], risk_p_value(losses, 0.15, bound="hoeffding-bentkus")[0]
    assert betting < 0.05 < mean_only


def test_binomial_p_value_is_exact():
    losses = np.r_[np.ones(3), np.zeros(47)]
    assert risk_p_value(losses, 0.2, bound="binomial")[0] == pytest.approx(st.binom.cdf(3, 50, 0.2))
    assert risk_p_value(losses, 0.2, bound="hoeffding-bentkus")[0] >= st.binom.cdf(3, 50, 0.2)


def test_controlled_setting_fails_as_rarely_as_promised():
    """Losses of Bernoulli(1 - t): the chosen t is below 0.8 in at most 10% of 300 tables (binomial, 1e-5)."""
    rng = np.random.default_rng(4)
    grid = np.linspace(0.7, 1, 31)
    failed, chosen = 0, []
    for _ in range(300):
        t = grid[risk_controlling_setting(rng.random((200, 1)) > grid, 0.2, 0.1, bound="binomial").index]
        failed, chosen = failed + (t < 0.8 - 1e-9), [*chosen, t]
    assert failed <= st.binom.isf(1e-5, 300, 0.1)
    assert np.mean(chosen) < 0.9  # and not by choosing everything


def test_bad_input():
    with pytest.raises(InputError, match="row 1 at setting 0"):
        conformal_risk_control([[0.0], [2.0]], 0.5)
    with pytest.raises(InputError, match="row 0 grows from setting 0 to 1"):
        conformal_risk_control([[0.0, 1.0]], 0.5)
    with pytest.raises(InputError, match="9 rows or more"):
        conformal_risk_control(np.zeros((5, 1)), 0.1)
    with pytest.raises(InputError, match="certain"):
        risk_controlling_setting(np.zeros((5, 1)), 0.1, 0.05)
    with pytest.raises(InputError, match="losses of 0 and 1"):
        risk_p_value([0.5], 0.1, bound="binomial")
    with pytest.raises(InputError, match="unknown bound"):
        risk_p_value([0.5], 0.1, bound="chernoff")
