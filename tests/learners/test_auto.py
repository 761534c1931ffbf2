"""The automatic learner: what it tries, what it leaves out and says why, and what its stack is made of."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import log_prob, mean_and_variance, quantile
from bayeslens.core.table import Target
from bayeslens.learners.auto import Auto, candidates
from bayeslens.learners.linear import BayesianLinearRegression, BayesianLogisticRegression
from bayeslens.learners.ngboost import NGBoost

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 3))
Y = 2 * X[:, 0] - X[:, 1] + 0.5 * RNG.normal(size=240)
TWO = (("linear", BayesianLinearRegression()), ("boosted", NGBoost(num_trees=40)))


def names(values, rows=500):
    return [name for name, _ in candidates(Target.from_values(values), rows)]


def test_candidates_suit_the_target():
    assert "ngboost_negative_binomial" in names(RNG.poisson(2.0, 500).astype(float))
    assert "ngboost_negative_binomial" not in names(RNG.normal(size=500))
    assert "ngboost_lognormal" in names(np.exp(RNG.normal(size=500)))
    assert "ngboost_lognormal" not in names(RNG.normal(size=500) + 100)
    assert names(RNG.choice(["a", "b"], 500))[0] == "logistic"
    assert "logistic" not in names(RNG.choice(["a", "b"], 500), rows=200_000)


def test_the_stack_is_better_than_a_poor_member():
    found = Auto(learners=TWO).fit(X, Y, key=KEY)
    board = {e["learner"]: e for e in found.leaderboard}
    assert set(board) == {"stack", "linear", "boosted"}
    assert board["stack"]["log_score"] > board["boosted"]["log_score"]
    assert board["linear"]["weight"] > 0.7
    assert board["linear"]["weight"] + board["boosted"]["weight"] == pytest.approx(1.0, abs=1e-3)
    fresh = RNG.normal(size=(4000, 3))
    y = 2 * fresh[:, 0] - fresh[:, 1] + 0.5 * RNG.normal(size=4000)
    # The best possible is -0.5 log(2 pi e 0.25) = -0.726; a standard error of the mean is 0.011.
    assert log_prob(found(fresh), y).mean() > -0.78
    bounds = quantile(found(fresh), [0.05, 0.95])
    # 240 rows tell a 90% level to within 2% (one standard error).
    assert 0.84 < ((bounds[:, 0] < y) & (y < bounds[:, 1])).mean() < 0.96


def test_one_learner_is_not_called_a_stack():
    found = Auto(learners=TWO[:1]).fit(X, Y, key=KEY)
    assert [e["learner"] for e in found.leaderboard] == ["linear"]
    assert found.leaderboard[0]["weight"] == 1.0


def test_what_does_not_fit_the_time_is_left_out_and_said_so():
    three = (*TWO, ("another", NGBoost(num_trees=5)))
    board = {e["learner"]: e for e in Auto(learners=three, time_budget=0.0).fit(X, Y, key=KEY).leaderboard}
    assert "time budget of 0 s" in board["another"]["note"] and "log_score" not in board["another"]
    assert board["boosted"]["note"] == ""  # the two quickest always run


def test_a_learner_that_cannot_is_left_out_and_said_so():
    learners = (("linear", BayesianLinearRegression()), ("positive", NGBoost(distribution="lognormal")))
    board = {e["learner"]: e for e in Auto(learners=learners).fit(X, Y, key=KEY).leaderboard}
    assert board["positive"]["note"].startswith("skipped: lognormal needs positive targets")
    with pytest.raises(InputError, match="no learner could be fitted"):
        Auto(learners=learners[1:]).fit(X, Y, key=KEY)


def test_weights_reach_stacking_and_learners():
    """Half of the rows follow another line; with next to no weight they change nothing."""
    odd = np.arange(240) % 2 == 1
    y = np.where(odd, -Y, Y)
    weights = np.where(odd, 1e-6, 1.0)
    found = Auto(learners=TWO[:1]).fit(X, y, key=KEY, weights=weights)
    mean, _ = mean_and_variance(found.stack(X))
    np.testing.assert_allclose(mean, 2 * X[:, 0] - X[:, 1], atol=0.35)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_of_classes_hold_their_coverage(coverage):
    fresh = RNG.normal(size=(4000, 3))
    label = lambda x: np.where(x[:, 0] + RNG.logistic(size=len(x)) > 0, "yes", "no")  # noqa: E731
    learners = (("logistic", BayesianLogisticRegression()),)
    found = Auto(learners=learners, coverage=coverage).fit(X, label(X), key=KEY)
    sets = found.prediction_sets(found(fresh), coverage)
    held = sets[np.arange(4000), Target.with_classes(label(fresh), found.classes).values.astype(int)].mean()
    # Conformal coverage of 240 rows varies by sqrt(0.16 / 240) = 2.6%: three of them, one false alarm in 400.
    assert abs(held - coverage) < 0.08
