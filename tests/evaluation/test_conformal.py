"""Conformal prediction: coverage is a theorem, and is tested as one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.evaluation.conformal import (
    class_scores,
    conformal_threshold,
    cqr_scores,
    highest_probability_sets,
    least_calibration_rows,
    mondrian_thresholds,
    prediction_sets,
    split_conformal,
    weighted_thresholds,
)

ROWS, NEW, COVERAGE = 99, 200, 0.9


def threshold_by_definition(scores, coverage):
    """The ceil((n + 1) coverage)-th smallest score."""
    rank = int(np.ceil((len(scores) + 1) * coverage - 1e-9))
    return np.sort(scores)[rank - 1] if rank <= len(scores) else np.inf


@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("rows", [1, 9, 19, 99, 100, 1000])
def test_threshold_is_the_corrected_order_statistic(rows, coverage):
    scores = np.random.default_rng(rows).permutation(np.arange(rows, dtype=float))
    assert conformal_threshold(scores, coverage) == threshold_by_definition(scores, coverage)


def test_coverage_theorem():
    """Given the calibration rows, coverage is Beta(k, n + 1 - k); of new rows covered, beta-binomial.

    The number covered over 300 repetitions is compared with its exact distribution's interval of probability
    1 - 1e-6 (by the normal limit of a sum of 300), and the spread by a chi-squared test at 1e-6.
    """
    rng = np.random.default_rng(0)
    covered = np.empty(300)
    for repetition in range(300):
        y = rng.standard_t(3, ROWS + NEW)  # any distribution will do
        scores = np.abs(y - 0.7) / 2
        low, high = split_conformal(np.full(NEW, 0.7), np.full(NEW, 2.0), scores[:ROWS], COVERAGE)
        covered[repetition] = ((low <= y[ROWS:]) & (y[ROWS:] <= high)).sum()
    k = 90  # (n + 1) * coverage
    exact = st.betabinom(NEW, k, ROWS + 1 - k)
    assert exact.mean() == NEW * COVERAGE
    limit = st.norm.isf(5e-7)
    assert abs(covered.mean() - exact.mean()) < limit * exact.std() / np.sqrt(300)
    statistic = ((covered - exact.mean()) ** 2).sum() / exact.var()
    assert st.chi2.sf(statistic, 300) > 1e-6 and st.chi2.cdf(statistic, 300) > 1e-6


def test_class_sets_cover():
    """The same theorem for sets: 300 repetitions, false alarm rate below 1e-6 by the exact lower bound 1 - alpha."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(300):
        probs = rng.dirichlet(np.full(4, 0.7), ROWS + NEW)
        wrong = probs**2 / (probs**2).sum(1, keepdims=True)  # over-confident model
        labels = (rng.random((len(probs), 1)) > np.cumsum(probs, 1)).sum(1)
        scores = class_scores(wrong)[np.arange(len(probs)), labels]
        sets = prediction_sets(wrong[ROWS:], conformal_threshold(scores[:ROWS], COVERAGE))
        shares.append(sets[np.arange(NEW), labels[ROWS:]].mean())
    spread = st.betabinom(NEW, 90, 10).std() / NEW
    assert np.mean(shares) > COVERAGE - st.norm.isf(1e-6) * spread / np.sqrt(300)
    assert np.mean(shares) < COVERAGE + 0.03  # and not by giving every class


def test_weights_are_repetition_and_undo_a_shift():
    scores = np.arange(10.0)
    assert conformal_threshold(scores, 0.8, np.full(10, 3.0)) == conformal_threshold(scores, 0.8)
    assert conformal_threshold(scores, 0.5, np.r_[np.zeros(5), np.ones(5)]) > conformal_threshold(scores, 0.5)


def test_cqr():
    rng = np.random.default_rng(0)
    y = rng.normal(size=4000)
    lower, upper = np.full(4000, -0.5), np.full(4000, 0.7)  # too narrow, and lopsided
    scores = cqr_scores(lower, upper, y)
    assert ((scores <= 0) == ((lower <= y) & (y <= upper))).all()
    t = conformal_threshold(scores[:2000], 0.8)
    inside = (lower[2000:] - t <= y[2000:]) & (y[2000:] <= upper[2000:] + t)
    # False alarm rate 1e-6, exact.
    exact = st.betabinom(2000, 1601, 400)
    assert exact.ppf(5e-7) <= inside.sum() <= exact.isf(5e-7)


def test_class_scores():
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 50)
    scores = class_scores(probs)
    for row in range(50):
        for c in range(5):
            above = probs[row][probs[row] > probs[row, c]].sum()
            assert scores[row, c] == pytest.approx(above + probs[row, c] / 2)
    assert (scores.argmin(1) == probs.argmax(1)).all()


def test_sets():
    probs = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    assert prediction_sets(probs, -1.0).sum(1).tolist() == [1, 1]  # never empty
    assert prediction_sets(probs, np.inf).all()
    assert highest_probability_sets(probs, 0.7).tolist() == [[True, False, False], [True, True, False]]
    assert highest_probability_sets(probs, 1e-3).sum(1).tolist() == [1, 1]
    rng = np.random.default_rng(0).dirichlet(np.ones(4), 100)
    sets = highest_probability_sets(rng, 0.8)
    assert ((rng * sets).sum(1) >= 0.8 - 1e-6).all()
    least = np.where(sets, rng, np.inf).min(1)
    assert ((rng * sets).sum(1) - least < 0.8).all()  # without its least likely class it falls short


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1, np.nan])
def test_coverage_outside_is_refused(coverage):
    with pytest.raises(InputError, match="strictly between"):
        conformal_threshold([1.0], coverage)


def test_no_scores_are_refused():
    with pytest.raises(InputError, match="at least one row"):
        conformal_threshold([], 0.9)


@pytest.mark.parametrize("coverage", [0.3, 0.5, 0.75, 0.8])
def test_coverage_of_exchangeable_ranks_is_exact(coverage):
    """Of all orders of five scores, the last is within the threshold of the others in just this share."""
    orders = list(itertools.permutations(np.arange(5.0)))
    covered = np.mean([last <= conformal_threshold(rest, coverage) for *rest, last in orders])
    assert covered == pytest.approx(min(np.ceil(5 * coverage - 1e-9) / 5, 1.0))


def test_weighted_coverage_is_exact():
    """Weighted exchangeability: given the points, each is the new one in proportion to its weight."""
    rng = np.random.default_rng(0)
    for coverage in (0.5, 0.8):
        for _ in range(50):
            scores, weights = rng.normal(size=7), rng.exponential(size=7)
            hit = []
            for j in range(7):
                rest = np.arange(7) != j
                hit.append(
                    scores[j] <= weighted_thresholds(scores[rest], weights[rest], weights[j : j + 1], coverage)[0]
                )
            share = (weights * hit).sum() / weights.sum()
            assert coverage - 1e-12 <= share <= coverage + weights.max() / weights.sum() + 1e-12


def test_equal_weights_change_nothing():
    scores = np.random.default_rng(1).normal(size=40)
    found = weighted_thresholds(scores, np.full(40, 2.0), np.full(3, 2.0), 0.9)
    assert (found == conformal_threshold(scores, 0.9)).all()


def test_groups_get_thresholds_of_their_own():
    rng = np.random.default_rng(2)
    scores, groups = rng.normal(size=60), np.array(["b", "a", "c"])[np.arange(60) % 3]
    found = mondrian_thresholds(scores, groups, 0.8)
    assert list(found) == ["a", "b", "c"]
    assert all(found[g] == conformal_threshold(scores[groups == g], 0.8) for g in found)
    with pytest.raises(InputError, match=r"at least 9 .* 'few' \(2\)"):
        mondrian_thresholds(scores, ["few"] * 2 + ["many"] * 58, 0.9)
    with pytest.raises(InputError, match="row 1 is missing"):
        mondrian_thresholds(scores[:30], [1.0, np.nan] * 15, 0.5)


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.9, 0.95, 0.99])
def test_least_rows(coverage):
    least = least_calibration_rows(coverage)
    assert np.isfinite(conformal_threshold(np.zeros(least), coverage))
    assert least == 1 or np.isinf(conformal_threshold(np.zeros(least - 1), coverage))


def test_penalized_ranks():
    probs = np.random.default_rng(3).dirichlet(np.ones(6), 20)
    plain, penalized = class_scores(probs), class_scores(probs, rank_penalty=0.1, free_ranks=2)
    rank = (probs[:, None, :] > probs[:, :, None]).sum(2) + 1
    np.testing.assert_allclose(penalized - plain, 0.1 * np.maximum(rank - 2, 0), atol=1e-12)
    few = prediction_sets(probs, np.full(20, 0.9), rank_penalty=0.1, free_ranks=2)
    assert (few <= prediction_sets(probs, 0.9)).all() and few.sum() < prediction_sets(probs, 0.9).sum()


def test_missing_scores_and_odd_weights_are_named():
    with pytest.raises(InputError, match="row 1 is NaN"):
        conformal_threshold([0.0, np.nan], 0.5)
    with pytest.raises(InputError, match="weight of row 1 is -1"):
        weighted_thresholds([0.0, 1.0], [1.0, -1.0], [1.0], 0.5)
    with pytest.raises(InputError, match="all weights are zero"):
        weighted_thresholds([0.0, 1.0], [0.0, 0.0], [1.0], 0.5)
