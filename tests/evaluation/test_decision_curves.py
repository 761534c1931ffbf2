"""Decision curves: counted by hand, and their errors."""

from __future__ import annotations

import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.evaluation.decision_curves import decision_curve

RNG = np.random.default_rng(0)
P = RNG.uniform(size=300)
Y = (RNG.uniform(size=300) < P).astype(float)


def test_net_benefit_is_hits_less_alarms_at_their_price():
    curve = decision_curve(P, Y)
    for threshold, benefit, everyone in zip(curve.thresholds, curve.net_benefit, curve.treat_all, strict=True):
        acts, price = threshold <= P, threshold / (1 - threshold)
        np.testing.assert_allclose(benefit, ((acts & (Y == 1)).sum() - price * (acts & (Y == 0)).sum()) / 300)
        np.testing.assert_allclose(everyone, Y.mean() - price * (1 - Y.mean()))


def test_the_threshold_itself_acts():
    assert decision_curve([0.5, 0.4], [1.0, 1.0], thresholds=[0.5]).net_benefit[0] == 0.5


def test_standard_errors():
    """By the binomial's formula at one threshold; the spread over 2,000 repeats is within 10% (its error is 1.6%)."""
    curve = decision_curve(P, Y, thresholds=[0.3])
    hits, alarms = ((P >= 0.3) & (Y == 1)).mean(), ((P >= 0.3) & (Y == 0)).mean()
    price = 0.3 / 0.7
    variance = hits + price**2 * alarms - (hits - price * alarms) ** 2
    np.testing.assert_allclose(curve.standard_error[0], np.sqrt(variance / 299))
    rng = np.random.default_rng(1)
    p = rng.uniform(size=(2000, 300))
    y = rng.uniform(size=p.shape) < p
    repeats = np.where(p >= 0.3, np.where(y, 1.0, -price), 0.0).mean(1)
    assert abs(repeats.std() / curve.standard_error[0] - 1) < 0.1


def test_advantage_is_paired():
    """Predictions that act on everyone differ from that by nothing, with no error."""
    curve = decision_curve(np.full(300, 0.9), Y, thresholds=[0.1, 0.2])
    np.testing.assert_allclose(curve.advantage, 0.0, atol=1e-12)
    np.testing.assert_allclose(curve.advantage_standard_error, 0.0, atol=1e-12)
    assert (curve.standard_error > 0).all()


def test_calibrated_predictions_are_never_worse_than_the_defaults():
    """Within 4 standard errors at each of 99 thresholds (false alarm rate under 0.4% in all); upside-down ones are."""
    curve = decision_curve(P, Y)
    assert (curve.advantage > -4 * curve.advantage_standard_error - 1e-12).all()
    assert decision_curve(1 - P, Y).advantage.min() < -0.3


def test_table():
    curve = decision_curve(P, Y, thresholds=[0.2, 0.4], groups=np.arange(300) // 3)
    assert list(curve.table["threshold"]) == [0.2, 0.4] and "net_benefit" in str(curve)


@pytest.mark.parametrize(
    ("p", "y", "thresholds", "message"),
    [
        ([0.5, 1.2], [0, 1], None, "row 1 has the probability 1.2"),
        ([0.5, 0.2], [0, 2], None, "row 1 has the outcome 2"),
        ([0.5], [0, 1], None, "shapes"),
        ([0.5, 0.5], [0, 1], [0.0], "thresholds must lie"),
    ],
)
def test_refused(p, y, thresholds, message):
    with pytest.raises(InputError, match=message):
        decision_curve(p, y, thresholds=thresholds)
