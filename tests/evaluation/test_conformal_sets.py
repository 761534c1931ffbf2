"""`conformal` on tables: every method with every kind of predictor, its promise, and what it refuses."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
import scipy.stats as st
from sklearn.linear_model import BayesianRidge, LogisticRegression, Ridge

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import FixedPredictive, as_predictive
from bayeslens.core.saving import load, save
from bayeslens.evaluation.conformal import class_scores, conformal_threshold, prediction_sets, split_conformal
from bayeslens.evaluation.conformal_calibration import conformal
from bayeslens.evaluation.conformal_resampling import full_conformal_ridge
from bayeslens.learners.linear import BayesianLinearRegression

RNG = np.random.default_rng(0)
X = pd.DataFrame(
    {"a": RNG.normal(size=900), "b": RNG.normal(size=900), "kind": np.array(["u", "v"])[np.arange(900) % 2]}
)
Y = X.a.to_numpy() + np.where(X.kind == "u", 0.3, 1.5) * RNG.normal(size=900)
LABELS = np.array(["low", "middle", "top"])[np.digitize(Y, [-0.7, 0.7])]
NUMBERS = X[["a", "b"]].to_numpy()
TRAIN, CALIBRATION, NEW = slice(0, 200), slice(200, 500), slice(500, 900)
KEY = jax.random.key(0)


def exact_band(n, k, rows):
    """Covered among new rows, given n calibration rows, is beta-binomial; false alarm rate 1e-5."""
    law = st.betabinom(rows, k, n + 1 - k)
    return law.ppf(5e-6), law.isf(5e-6)


@pytest.fixture(scope="module")
def ridge():
    return Ridge().fit(NUMBERS[TRAIN], Y[TRAIN])


@pytest.fixture(scope="module")
def classifier():
    return LogisticRegression().fit(NUMBERS[TRAIN], LABELS[TRAIN])


def test_plain_numbers_get_split_conformal(ridge):
    fitted = conformal(ridge, NUMBERS[CALIBRATION], Y[CALIBRATION])
    found = fitted(NUMBERS[NEW], Y[NEW])
    scores = np.abs(Y[CALIBRATION] - ridge.predict(NUMBERS[CALIBRATION]))
    low, high = split_conformal(ridge.predict(NUMBERS[NEW]), 1.0, scores, 0.9)
    np.testing.assert_allclose(found.lower, low)
    np.testing.assert_allclose(found.upper, high)
    assert found.method == "split" and "At least 90.0%" in str(found) and "300 rows" in found.promise
    covered = exact_band(300, 271, 400)
    assert covered[0] <= found.covered.sum() <= covered[1]
    line = found.table.loc["all"]
    assert line.lower < line.observed < line.upper and line.standard_error == pytest.approx(
        np.sqrt(line.observed * (1 - line.observed) / 400)
    )


def test_brought_predictions_are_the_same(ridge):
    low = conformal(ridge, NUMBERS[CALIBRATION], Y[CALIBRATION])(NUMBERS[NEW]).lower
    brought = conformal(ridge.predict(NUMBERS[CALIBRATION]), None, Y[CALIBRATION])
    np.testing.assert_allclose(brought(ridge.predict(NUMBERS[NEW])).lower, low)


@pytest.mark.parametrize("method", ["cqr", "split"])
def test_distributions(method):
    narrow = BayesianRidge().fit(NUMBERS[TRAIN], Y[TRAIN])
    found = conformal(narrow, NUMBERS[CALIBRATION], Y[CALIBRATION], method=method)(NUMBERS[NEW], Y[NEW])
    covered = exact_band(300, 271, 400)
    assert covered[0] <= found.covered.sum() <= covered[1]
    brought = conformal(dist.Normal(np.zeros(300), np.full(300, 0.1)), None, Y[CALIBRATION], method=method)
    again = brought(dist.Normal(np.zeros(400), np.full(400, 0.1)), Y[NEW])
    assert covered[0] <= again.covered.sum() <= covered[1]


@pytest.mark.parametrize("method", ["auto", "aps", "raps", "lac"])
def test_classes(classifier, method):
    fitted = conformal(classifier, NUMBERS[CALIBRATION], LABELS[CALIBRATION], method=method, key=KEY)
    found = fitted(NUMBERS[NEW], LABELS[NEW])
    n = found.calibration_rows
    low, _ = exact_band(n, int(np.ceil(0.9 * (n + 1))), 400)
    assert found.covered.sum() >= low and found.size.mean() < 2.9
    assert set(found.labels[0]) <= {"low", "middle", "top"}
    if method in ("auto", "aps"):
        codes = np.searchsorted(classifier.classes_, LABELS[CALIBRATION])
        probs = classifier.predict_proba(NUMBERS[CALIBRATION]).astype(np.float32)
        edge = conformal_threshold(class_scores(probs)[np.arange(300), codes], 0.9)
        assert (found.sets == prediction_sets(classifier.predict_proba(NUMBERS[NEW]).astype(np.float32), edge)).all()


def test_groups_are_covered_each(ridge):
    plain = FixedPredictive(dist.Normal(ridge.predict(NUMBERS[CALIBRATION]), np.ones(300)))
    fitted = conformal(plain(None), X[CALIBRATION], Y[CALIBRATION], groups="kind")
    new = dist.Normal(ridge.predict(NUMBERS[NEW]), np.ones(400))
    found = fitted(new, Y[NEW], groups=X.kind[NEW])
    covered = exact_band(150, int(np.ceil(0.9 * 151)), 200)
    for kind in "uv":
        assert covered[0] <= found.covered[found.groups == kind].sum() <= covered[1]
    assert found.table["mean_width"]["v"] > 2 * found.table["mean_width"]["u"]
    with pytest.raises(InputError, match="row 0 is of group 'w'"):
        fitted(new, groups=["w"] * 400)
    with pytest.raises(InputError, match="give groups"):
        fitted.__class__(**{**fitted.__dict__, "groups": None})(new)


def test_known_shift(ridge):
    def ratio(x):
        return np.exp(x[:, 0])

    fitted = conformal(ridge, NUMBERS[CALIBRATION], Y[CALIBRATION], weights=ratio)
    by_array = conformal(ridge, NUMBERS[CALIBRATION], Y[CALIBRATION], weights=ratio(NUMBERS[CALIBRATION]))
    found = by_array(NUMBERS[NEW], weights=ratio(NUMBERS[NEW]))
    np.testing.assert_array_equal(fitted(NUMBERS[NEW]).upper, found.upper)
    with pytest.raises(InputError, match="likelihood ratio of every new row"):
        by_array(NUMBERS[NEW])


def test_unknown_shift(ridge):
    fitted = conformal(ridge, NUMBERS[CALIBRATION], Y[CALIBRATION], shifted=NUMBERS[NEW] + 0.5)
    found = fitted(NUMBERS[NEW], Y[NEW])
    assert found.method == "lr-qr" and "nothing is guaranteed" in found.promise and found.guarantee == 0
    assert len(np.unique((found.upper - found.lower).round(6))) > 100


@pytest.mark.parametrize("method", ["auto", "jackknife+"])
def test_refits_of_an_estimator(method):
    part = slice(0, 60) if method == "jackknife+" else slice(0, 500)
    fitted = conformal(Ridge(), NUMBERS[part], Y[part], method=method, key=KEY)
    found = fitted(NUMBERS[NEW], Y[NEW])
    assert found.method == ("jackknife+" if method == "jackknife+" else "cv+")
    assert found.guarantee < 0.81 and f"{found.guarantee:.1%}" in found.promise
    # Guaranteed less two standard errors of the new rows; in fact near 0.9, since ridge regression is stable.
    assert found.covered.mean() > 0.84


def test_refits_of_a_learner_and_of_a_classifier():
    fitted = conformal(BayesianLinearRegression(), X[TRAIN], Y[TRAIN], num_folds=4, key=KEY)
    assert fitted(X[NEW], Y[NEW]).covered.mean() > 0.84
    sets = conformal(LogisticRegression(), NUMBERS[CALIBRATION], LABELS[CALIBRATION], key=KEY)(
        NUMBERS[NEW], LABELS[NEW]
    )
    assert sets.covered.mean() > 0.84 and sets.size.mean() < 2.9


def test_full():
    found = conformal(Ridge(alpha=2.0), NUMBERS[TRAIN], Y[TRAIN], method="full")(NUMBERS[NEW])
    low, high = full_conformal_ridge(NUMBERS[TRAIN], Y[TRAIN], NUMBERS[NEW], 0.9, penalty=2.0)
    np.testing.assert_array_equal(found.lower, low)
    np.testing.assert_array_equal(found.upper, high)
    part = slice(0, 40)
    fitted = conformal(LogisticRegression(), NUMBERS[part], LABELS[part], method="full")
    sets = fitted(NUMBERS[895:], LABELS[895:])
    assert sets.sets.shape == (5, 3) and sets.sets.any(1).all()


def test_round_trip(tmp_path):
    fitted = conformal(np.zeros(300), X[CALIBRATION], Y[CALIBRATION], groups="kind")
    save(fitted, tmp_path / "c.bayes")
    new = fitted(np.zeros(400), groups=X.kind[NEW])
    np.testing.assert_array_equal(load(tmp_path / "c.bayes")(np.zeros(400), groups=X.kind[NEW]).upper, new.upper)


def test_what_is_refused(ridge, classifier):
    with pytest.raises(InputError, match="at least 9 calibration rows, got 5"):
        conformal(np.zeros(5), None, np.zeros(5) + np.arange(5))
    with pytest.raises(InputError, match="cannot be combined"):
        conformal(np.zeros(20), None, Y[:20], groups=["a"] * 20, weights=np.ones(20))
    with pytest.raises(InputError, match="'top' was not seen"):
        conformal(as_predictive(np.full((20, 2), 0.5), classes=("low", "middle")), None, np.repeat(["top", "low"], 10))
    with pytest.raises(InputError, match="needs class probabilities"):
        conformal(ridge, NUMBERS[:50], Y[:50], method="aps")
    with pytest.raises(InputError, match="needs numbers"):
        conformal(classifier, NUMBERS[:50], LABELS[:50], method="split")
    with pytest.raises(InputError, match="predicted distributions"):
        conformal(ridge, NUMBERS[:50], Y[:50], method="cqr")
    with pytest.raises(InputError, match="not fitted"):
        conformal(Ridge(), NUMBERS[:50], Y[:50], method="split")
    with pytest.raises(InputError, match="give key"):
        conformal(Ridge(), NUMBERS[:50], Y[:50])
    with pytest.raises(InputError, match="unknown method"):
        conformal(ridge, NUMBERS[:50], Y[:50], method="magic")
    with pytest.raises(InputError, match="needs shifted"):
        conformal(ridge, NUMBERS[:50], Y[:50], method="lr-qr")
    with pytest.raises(InputError, match="names no column"):
        conformal(np.zeros(50), NUMBERS[:50], Y[:50], groups="kind")
    with pytest.raises(InputError, match="predictions for 50 rows, but 49"):
        conformal(np.zeros(50), None, Y[:49])
