"""What `predict` returns: the audit's numbers by hand, leave-one-out by brute force, and the summary."""

from __future__ import annotations

import json

import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
import scipy.stats as st

from bayeslens.core.foreign import FixedPredictive
from bayeslens.core.table import Table
from bayeslens.evaluation.conformal import class_scores, conformal_threshold, prediction_sets
from bayeslens.learners.result import Prediction, audit

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
RNG = np.random.default_rng(0)


def test_regression_by_hand():
    # PIT values 0.02, 0.5, 0.7 and 0.96 under their own predictions.
    loc, scale, levels = (
        np.array([0.0, 5.0, -2.0, 1.0]),
        np.array([1.0, 2.0, 0.5, 3.0]),
        np.array([0.02, 0.5, 0.7, 0.96]),
    )
    y = st.norm(loc, scale).ppf(levels)
    found = audit(dist.Normal(loc, scale), y, 0.8, None)
    np.testing.assert_allclose(found.pit, levels, rtol=1e-6)
    np.testing.assert_allclose(found.mean, loc)
    np.testing.assert_allclose(found.lower, loc - 1.2815516 * scale, rtol=1e-6)
    np.testing.assert_allclose(found.upper, loc + 1.2815516 * scale, rtol=1e-6)
    np.testing.assert_array_equal(found.y, y)
    assert found.probabilities is None
    # A central interval of level c holds PIT values within c / 2 of one half: 0, 0.2, 0.46 and 0.48 away.
    nominal, observed, error = found.interval_coverage.T
    np.testing.assert_allclose(nominal, LEVELS)
    np.testing.assert_allclose(observed, [0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75])
    np.testing.assert_allclose(error[[4, 8]], [0.5 / 2, 0.3 / 2])


def test_right_predictions_cover_as_they_say_and_narrow_ones_less():
    y = RNG.normal(size=4000)
    nominal, observed, error = audit(dist.Normal(np.zeros(4000), 1.0), y, 0.9, None).interval_coverage.T
    # Ten binomial shares with fixed data, four standard errors: false alarms below 1e-3.
    assert (np.abs(observed - nominal) < 4 * error).all()
    nominal, observed, error = audit(dist.Normal(np.zeros(4000), 0.7), y, 0.9, None).interval_coverage.T
    np.testing.assert_allclose(observed, 1 - 2 * st.norm.sf(0.7 * st.norm.isf((1 - nominal) / 2)), atol=0.035)
    assert (observed[3:] < nominal[3:] - 4 * error[3:]).all()


@pytest.mark.parametrize("rows", [3, 10, 47])
def test_class_sets_are_judged_by_leaving_one_out(rows):
    probs = RNG.dirichlet(np.array([2.0, 1.0, 0.5, 0.2]), rows)
    y = np.array([RNG.choice(4, p=p) for p in probs]).astype(float)
    y[-1] = probs[-1].argmin()  # a surprise at least
    found = audit(dist.CategoricalProbs(probs), y, 0.9, ("a", "b", "c", "d"))
    scores, hits = class_scores(probs)[np.arange(rows), y.astype(int)], []
    for level in LEVELS:
        held = []
        for row in range(rows):
            others = np.delete(scores, row)
            held.append(prediction_sets(probs[row : row + 1], conformal_threshold(others, level))[0, int(y[row])])
        hits.append(np.mean(held))
    np.testing.assert_allclose(found.interval_coverage[:, 1], hits)
    np.testing.assert_allclose(found.interval_coverage[:, 2], np.sqrt(np.array(LEVELS) * (1 - np.array(LEVELS)) / rows))
    np.testing.assert_allclose(found.probabilities, probs)
    assert found.mean is found.lower is found.upper is found.pit is None


def test_at_most_five_thousand_rows_from_first_to_last():
    loc = np.arange(12_000.0)
    found = audit(dist.Normal(loc, 1.0), loc + 0.5, 0.9, None)
    assert len(found.y) == len(found.pit) == len(found.mean) == 5000
    assert (found.y[0], found.y[-1]) == (0.5, 11_999.5)
    np.testing.assert_allclose(found.y - found.mean, 0.5)  # rows and their predictions stay together
    np.testing.assert_allclose(found.interval_coverage[4, 2], 0.5 / np.sqrt(5000))


def test_the_summary_is_plain():
    frame = pd.DataFrame({"a": [1.0]})
    prediction = Prediction(
        task="regression", target="y", learner="linear", coverage=0.9, frame=frame,
        predictive=FixedPredictive(dist.Normal(np.zeros(1), 1.0), Table.from_data(pd.DataFrame({"a": [1.0, 2.0]}))),
        metrics={"log_score": -1.0}, metrics_from="test", leaderboard=[{"learner": "linear", "weight": 1.0}],
        n_train=2, n_test=1, seconds=0.5, warnings=("one",), files={"report": "r.html"},
    )  # fmt: skip
    summary = json.loads(json.dumps(prediction.summary()))
    assert summary == {
        "task": "regression", "learner": "linear", "n_train": 2, "n_test": 1, "metrics": {"log_score": -1.0},
        "metrics_from": "test", "leaderboard": [{"learner": "linear", "weight": 1.0}], "seconds": 0.5,
        "files": {"report": "r.html"}, "warnings": ["one"],
    }  # fmt: skip


def test_class_sets_by_the_scores_of_other_rows():
    probs = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]], np.float32)
    y = np.array([0.0, 0.0, 1.0])
    none = audit(dist.CategoricalProbs(probs), y, 0.9, ("a", "b"), np.zeros(1000))
    every = audit(dist.CategoricalProbs(probs), y, 0.9, ("a", "b"), np.full(1000, 1.0))
    # Scores of 0 promise that the likeliest class is always right, which holds for the first row alone.
    assert none.interval_coverage[:, 1].max() <= 1 / 3 + 1e-9
    np.testing.assert_allclose(every.interval_coverage[:, 1], 1.0)
