"""The choice of a recalibration, and the report on it: predictives of every kind, honest errors, saving."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from scipy.special import softmax
from sklearn.naive_bayes import GaussianNB

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf
from bayeslens.core.saving import load, save
from bayeslens.evaluation.calibrating import calibrate, recalibrate
from bayeslens.report.calibration_pictures import calibration_panels
from bayeslens.report.pictures import lay_out

RNG = np.random.default_rng(0)
TRUTH = RNG.dirichlet(np.ones(3), 2000)
LABELS = (RNG.random((2000, 1)) > np.cumsum(TRUTH, 1)).sum(1).clip(max=2)
ROUGH = softmax(3 * np.log(TRUTH), axis=1)


def test_overconfidence_is_mended():
    found = calibrate(ROUGH, None, LABELS, key=jax.random.key(0))
    table = found.table.set_index(["measure", "state"])["value"]
    assert table["debiased_error", "before"] > 0.15 and table["debiased_error", "after"] < 0.04
    assert table["log_score", "after"] > table["log_score", "before"] + 0.1
    assert table.notna().all() and found.table["standard_error"].notna().all()
    np.testing.assert_allclose(found.predictive(None).probs, TRUTH, atol=0.1)
    assert found.candidates["recalibration"][0] == found.method
    assert found.diagrams[0].p_value < 0.01 < found.diagrams[1].p_value
    assert "debiased_error" in str(found) and found.method in str(found)
    drawn = calibration_panels(found)
    assert [p.title for p in drawn] == ["Before", "After, cross-validated", "Gain in log score"]
    assert len(lay_out(drawn, columns=3).axes) == 3


def test_the_calibrated_are_left_nearly_alone():
    moved = recalibrate(TRUTH, None, LABELS)
    assert np.abs(np.asarray(moved(None).probs) - TRUTH).mean() < 0.02


def test_after_is_cross_validated():
    """Labels without any relation: no map can gain, and an honest score must not show a gain of 2 standard errors."""
    probs, labels = RNG.dirichlet(np.full(3, 50.0), 200), np.arange(200) % 3
    found = calibrate(probs, None, labels, key=jax.random.key(0), method="isotonic")
    gain = found.candidates.set_index("recalibration").loc["isotonic"]
    assert gain["gain"] < 2 * gain["standard_error"]


def test_regression_by_quantiles():
    """Half as wide as they should be; KS at a false-alarm rate of 1e-3 on new rows."""
    y, new = RNG.normal(size=(2, 3000))
    narrow = dist.Normal(np.zeros(3000), 0.5)
    found = calibrate(narrow, None, y, key=jax.random.key(0))
    assert found.method == "quantile_map" and found.predictive.classes is None
    assert st.kstest(cdf(found.predictive(None), new), "uniform").statistic < 0.036
    table = found.table.set_index(["measure", "state"])["value"]
    assert table["pit_error", "after"] < 0.05 < table["pit_error", "before"]
    assert len(lay_out(calibration_panels(found)).axes) == 3
    wide = found.predictive.recalibration(dist.Normal(np.zeros(1), 0.5))
    assert float(wide.quantile(np.array(0.95))[0]) == pytest.approx(1.64, abs=0.15)


def test_counts_are_recalibrated_through_their_cells():
    y = RNG.poisson(4.0, 800).astype(float)
    found = recalibrate(dist.Poisson(np.full(800, 2.0)), None, y)
    assert found.method == "quantile_map" and np.isfinite(found(None).log_prob(y)).all()


def test_scikit_learn_estimators_with_names_of_classes():
    x = np.random.default_rng(1).normal(size=(1200, 6)).repeat(6, axis=1)  # copies make naive Bayes sure of itself
    names = np.array(["no", "yes"])[(RNG.random(1200) < 1 / (1 + np.exp(-x[:, 0]))).astype(int)]
    model = GaussianNB().fit(x[:600], names[:600])
    moved = recalibrate(model, x[600:900], names[600:900])
    truth = (names[900:] == "yes").astype(int)
    before, after = (np.asarray(p)[np.arange(300), truth] for p in (model.predict_proba(x[900:]), moved(x[900:]).probs))
    assert np.log(after).mean() > np.log(before).mean() + 0.05
    assert moved.classes == ("no", "yes") and moved.method != "none"


def test_h_calibration_keeps_every_decision_and_is_saved(tmp_path):
    moved = recalibrate(ROUGH, None, LABELS, method="h_calibration")
    np.testing.assert_array_equal(np.asarray(moved(None).probs).argmax(1), ROUGH.argmax(1))
    save(moved, tmp_path / "moved.bayes")
    np.testing.assert_array_equal(load(tmp_path / "moved.bayes")(None).probs, moved(None).probs)


def test_none_changes_nothing():
    np.testing.assert_array_equal(recalibrate(ROUGH, None, LABELS, method="none")(None).probs, ROUGH)


@pytest.mark.parametrize(
    ("method", "probs", "y", "message"),
    [
        ("plat", ROUGH, LABELS, "'plat'.*use auto"),
        ("platt", ROUGH, LABELS, "'platt'"),
        ("quantile_map", ROUGH, LABELS, "'quantile_map'"),
        ("auto", ROUGH, LABELS[:10], "10 outcomes for 2000"),
        ("auto", ROUGH[:2], [0, 5], "5 was not seen"),
        ("auto", ROUGH[:1], [0], "two rows"),
    ],
)
def test_bad_input(method, probs, y, message):
    with pytest.raises(InputError, match=message):
        recalibrate(probs, None, y, method=method)
