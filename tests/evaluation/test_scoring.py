"""The table of scores: what it holds for each kind of prediction, and comparisons with a rival."""

from __future__ import annotations

import json

import numpy as np
import numpyro.distributions as dist
import pytest
from sklearn.linear_model import BayesianRidge, LogisticRegression

from bayeslens.core.errors import InputError
from bayeslens.evaluation.scores import brier_loss, crps_loss, crps_loss_from_samples, quantile_loss
from bayeslens.evaluation.scoring import score_predictions
from bayeslens.report.score_pictures import plot_scores, score_panels

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 2))
Y = X[:, 0] + RNG.normal(size=300)
TRUTH = dist.Normal(X[:, 0], 1.0)
P = 1 / (1 + np.exp(-2 * X[:, 0]))
EVENT = np.where(RNG.uniform(size=300) < P, "yes", "no")


@pytest.fixture(scope="module")
def regression():
    return score_predictions(
        TRUTH, None, Y, thresholds=[1.0], quantile_levels=[0.5], against=dist.Normal(np.zeros(300), 1.5)
    )


@pytest.fixture(scope="module")
def binary():
    model = LogisticRegression(C=100.0).fit(X, EVENT)
    return score_predictions(model, X, EVENT, against=LogisticRegression(C=1e-3).fit(X, EVENT))


def test_regression(regression):
    expected = crps_loss(TRUTH, Y)
    assert regression["crps"] == pytest.approx(expected.mean())
    assert regression["crps_se"] == pytest.approx(expected.std(ddof=1) / np.sqrt(300))
    names = {"log_score", "crps", "interval_loss", "coverage", "width", "calibration_error"}
    assert names | {"threshold_weighted_crps_above_1", "quantile_loss_0.5"} == set(regression)
    assert regression["coverage"] == pytest.approx(0.9, abs=0.06) and regression["width"] == pytest.approx(
        3.29, abs=0.01
    )
    assert regression["quantile_loss_0.5"] == pytest.approx(np.abs(Y - X[:, 0]).mean() / 2)
    assert regression.reliability is None and regression.decision_curve is None
    assert list(regression.table.columns) == ["score", "value", "standard_error", "better"]
    json.dumps(dict(regression))
    with pytest.raises(KeyError):
        regression["brier"]


def test_decomposition_is_of_the_score(regression):
    found = regression.decomposition.set_index("component")["value"]
    assert found["loss"] == pytest.approx(regression["crps"], rel=4e-3)
    assert found["loss"] == pytest.approx(found["miscalibration"] - found["discrimination"] + found["uncertainty"])


def test_comparison(regression):
    found = regression.comparison.set_index("score")
    for name in ("log_score", "crps", "interval_loss", "discrimination"):
        assert found.loc[name, "better"] == "first", name
    assert found.loc["crps", "difference"] < 0 < found.loc["log_score", "difference"]
    assert "coverage" not in found.index and "first minus second" in str(regression)
    rival = crps_loss(dist.Normal(np.zeros(300), 1.5), Y)
    assert found.loc["crps", "difference"] == pytest.approx((crps_loss(TRUTH, Y) - rival).mean())


def test_a_predictor_does_not_differ_from_itself():
    found = score_predictions(TRUTH, None, Y, against=TRUTH).comparison
    assert (found["p_value"] == 1).all() and (found["better"] == "undecided").all()


def test_draws():
    draws = X[:, 0] + RNG.normal(size=(200, 300))
    found = score_predictions(draws, None, Y, samples=True, quantile_levels=[0.1])
    assert found["crps"] == pytest.approx(crps_loss_from_samples(draws, Y).mean())
    assert "log_score" not in found and "quantile_loss_0.1" in found
    assert found["coverage"] == pytest.approx(0.9, abs=0.06)


def test_quantiles():
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    values = np.asarray(X[:, :1] + dist.Normal(0.0, 1.0).icdf(levels), np.float64)
    found = score_predictions(values, None, Y, quantile_levels=levels)
    assert found["quantile_loss_0.25"] == pytest.approx(quantile_loss(values[:, 1], 0.25, Y).mean(), abs=1e-4)
    assert found["crps"] == pytest.approx(crps_loss(TRUTH, Y).mean(), rel=0.03)


def test_estimator_with_standard_deviations():
    found = score_predictions(BayesianRidge().fit(X, Y), X, Y, time=np.arange(300))
    assert found["crps"] == pytest.approx(0.56, abs=0.06) and found["log_score_se"] > 0


def test_binary(binary):
    probs = LogisticRegression(C=100.0).fit(X, EVENT).predict_proba(X)
    assert binary["brier"] == pytest.approx(brier_loss(probs, EVENT == "yes").mean())
    expected = {"log_score", "brier", "spherical_score", "coverage", "set_size", "calibration_error"}
    assert expected == set(binary) and binary.event == "yes"
    assert {d.score for d in binary.decompositions} == {"brier", "log"}
    assert binary.decompositions[0].loss == pytest.approx(binary["brier"])
    assert binary.reliability.decomposition.p_value > 0.01 and binary.decision_curve.advantage.max() > 0.05
    found = binary.comparison.set_index("score")
    assert found.loc["brier", "better"] == found.loc["miscalibration", "better"] == "first"
    assert found.loc["discrimination", "better"] in ("first", "undecided")


def test_classes():
    probs = RNG.dirichlet(np.ones(3), 200)
    labels = np.array([RNG.choice(3, p=p) for p in probs])
    found = score_predictions(probs, None, labels, ordered=True)
    assert "ranked_probability_loss" in found and found.decision_curve is None
    assert found.event == "the most probable class"
    assert found.decompositions[0].loss == pytest.approx(found["brier"])


def test_impossible_outcomes():
    """Probability zero for what happened: the log score is minus infinity, without an error, and is not compared."""
    probs = np.array([[1.0, 0.0]] + [[0.5, 0.5]] * 9)
    found = score_predictions(probs, None, [1] + [0, 1, 0] * 3, against=np.full((10, 2), 0.5))
    assert found["log_score"] == -np.inf and np.isnan(found["log_score_se"])
    assert len(found.decompositions) == 1 and "log_score" not in set(found.comparison["score"])


def test_counts():
    rate = np.exp(X[:, 0])
    found = score_predictions(dist.Poisson(rate), None, RNG.poisson(rate).astype(float))
    # True probabilities of 300 rows in ten bins show about 0.07; middles of cells alone would show 0.19.
    assert found["calibration_error"] < 0.12 and np.isfinite(found["crps"])


def test_groups_widen_the_errors():
    """Ten rows of one group with one error: standard errors grow by about the root of ten."""
    y = X[:, 0] + np.repeat(RNG.normal(size=30), 10)
    alone, grouped = (score_predictions(TRUTH, None, y, groups=g) for g in (None, np.arange(300) // 10))
    assert grouped["crps"] == alone["crps"] and grouped["crps_se"] > 2 * alone["crps_se"]
    assert grouped.decompositions[0].standard_errors["loss"] > 2 * alone.decompositions[0].standard_errors["loss"]


@pytest.mark.parametrize("kind", ["decomposition", "comparison"])
def test_pictures_of_regression(regression, kind):
    assert len(plot_scores(regression, kind).axes) == 1


def test_pictures_of_classes(binary):
    assert [len(score_panels(binary, k)) for k in ("reliability", "decision", "comparison", "decomposition")] == [
        1,
        1,
        1,
        0,
    ]
    assert len(plot_scores(binary).axes) == 1
    plot_scores(binary, "decision").savefig("/dev/null", format="png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: score_predictions(TRUTH, None, Y[:10]), "predictions for 300 rows and outcomes for 10"),
        (lambda r: score_predictions(np.array([[0.2, 0.9]]), None, [1]), "row 0"),
        (lambda r: score_predictions(np.full((2, 2), 0.5), None, [0, 2]), "not seen"),
        (lambda r: score_predictions(np.full((2, 2), 0.5), None, [0, 1], against=np.full((2, 3), 1 / 3)), "classes"),
        (lambda r: plot_scores(r, "decision"), "two classes"),
        (lambda r: plot_scores(r, "pie"), "unknown kind"),
    ],
)
def test_refused(regression, call, message):
    with pytest.raises(InputError, match=message):
        call(regression)
