"""Conformalized quantiles: guaranteed coverage, exact shifts, increasing quantiles, awkward tables."""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, log_prob, quantile
from bayeslens.learners.boosted_trees import BoostedTrees
from bayeslens.learners.conformalized_quantiles import (
    ConformalizedQuantiles,
    ConformalizedQuantilesPredictive,
    _boost,
    _outwards,
    _shifts,
)
from bayeslens.learners.splits import holdout_rows

RNG = np.random.default_rng(0)
ROWS = 1200
X = RNG.normal(size=(ROWS + 4000, 2))
Y = 50 + 5 * (X[:, 0] ** 2 + (0.2 + np.abs(X[:, 1])) * RNG.standard_t(4, size=len(X)))
FEW = (0.05, 0.25, 0.5, 0.75, 0.95)


@pytest.fixture(scope="module")
def predictive() -> ConformalizedQuantilesPredictive:
    return ConformalizedQuantiles().fit(X[:ROWS], Y[:ROWS], key=jax.random.key(0))


def test_coverage_of_every_central_interval(predictive: ConformalizedQuantilesPredictive) -> None:
    values = predictive.quantiles(X[ROWS:])
    held_out = 300
    for i, level in enumerate(predictive.levels[:5]):
        nominal = 1 - 2 * level
        share = ((values[:, i] <= Y[ROWS:]) & (Y[ROWS:] <= values[:, -1 - i])).mean()
        # Given the held-out rows, coverage is about nominal with the variance of 300 rows, and 4,000 rows see it with
        # theirs. 3.5 standard errors: a false alarm in under 1 of 400 runs over the five levels.
        error = np.sqrt(nominal * (1 - nominal) * (1 / held_out + 1 / 4000))
        assert abs(share - nominal) < 3.5 * error + 2 / (held_out + 1)


def test_coverage_over_many_small_tables() -> None:
    rng, hits = np.random.default_rng(1), []
    learner = ConformalizedQuantiles(levels=(0.1, 0.5, 0.9), num_trees=5)
    for number in range(60):
        x = rng.normal(size=(140, 1))
        y = x[:, 0] + rng.normal(size=140)
        values = learner.fit(x[:40], y[:40], key=jax.random.key(number)).quantiles(x[40:])
        hits.append(((values[:, 0] <= y[40:]) & (y[40:] <= values[:, -1])).mean())
    # Coverage of one table given its 10 held-out rows has standard deviation of at most about 0.13; the guarantee
    # is for the mean. Four standard errors of 60 tables: a false alarm in 1 of 30,000 runs.
    assert np.mean(hits) > 0.8 - 4 * 0.13 / np.sqrt(60)


def test_shifts_are_order_statistics() -> None:
    y, raw = np.arange(1.0, 20.0), np.zeros((19, 3))
    shifts = _shifts(raw, y, np.array([0.1, 0.5, 0.9]), np.ones(19))
    # 20 * 0.9 = 18: the 18th smallest; below, the 18th largest; the median between the 10th from either end.
    np.testing.assert_array_equal(shifts, [2.0, 10.0, 18.0])


def test_weights_move_the_shifts_to_heavier_rows() -> None:
    y, raw, levels = np.arange(1.0, 20.0), np.zeros((19, 3)), np.array([0.1, 0.5, 0.9])
    equal = _shifts(raw, y, levels, np.full(19, 7.0))
    np.testing.assert_array_equal(equal, _shifts(raw, y, levels, np.ones(19)))
    heavy = _shifts(raw, y, levels, np.where(y == 4, 100.0, 1.0))
    # With the new row's 118/19 the parts are 124.2: 0.9 of them are 3 + 100 + 9 rows from below, 15 + 100 from above.
    np.testing.assert_array_equal(heavy, [4.0, 4.0, 13.0])


def test_quantiles_that_cross_move_outwards_only() -> None:
    rng = np.random.default_rng(2)
    values, gaps = rng.normal(size=(200, 7)), np.full((200, 6), 0.1)
    moved = _outwards(values, gaps)
    assert (np.diff(moved) >= 0.1 - 1e-12).all()
    np.testing.assert_allclose(moved[:, 3], values[:, 3])
    assert (moved[:, :3] <= values[:, :3] + 1e-12).all() and (moved[:, 4:] >= values[:, 4:] - 1e-12).all()
    ordered = np.cumsum(np.full((1, 7), 0.2), 1)
    np.testing.assert_allclose(_outwards(ordered, np.full((1, 6), 0.1)), ordered)


def test_trees_are_arrays_that_predict_as_lightgbm() -> None:
    import lightgbm

    x = X[:500].astype(np.float32)
    trees = _boost(x, Y[:500], np.ones(500), 0.8, 20, ())
    assert isinstance(trees, BoostedTrees)
    settings = {"objective": "quantile", "alpha": 0.8, "num_leaves": 8, "learning_rate": 0.1, "min_data_in_leaf": 20}
    settings |= {"deterministic": True, "force_row_wise": True, "num_threads": 1, "verbosity": -1}
    direct = lightgbm.train(settings, lightgbm.Dataset(x, Y[:500]), 20).predict(X[:50])
    np.testing.assert_allclose(trees(X[:50])[:, 0], direct, rtol=1e-5)


def test_the_distribution_has_these_quantiles_and_a_density_everywhere(
    predictive: ConformalizedQuantilesPredictive,
) -> None:
    distribution, values = predictive(X[:50]), predictive.quantiles(X[:50])
    assert (np.diff(values) > 0).all() and predictive.classes is None
    np.testing.assert_allclose(quantile(distribution, predictive.levels), values, rtol=1e-6)
    np.testing.assert_allclose(cdf(distribution, values[:, 3]), predictive.levels[3], rtol=1e-6)
    for y in (-1e3, 50.0, 1e3):
        assert np.isfinite(log_prob(distribution, np.full(50, y))).all()


def test_spread_follows_the_noise(predictive: ConformalizedQuantilesPredictive) -> None:
    values = predictive.quantiles(np.array([[0.0, 0.0], [0.0, 2.0]]))
    assert values[1, -1] - values[1, 0] > 2.5 * (values[0, -1] - values[0, 0])


def test_shift_and_scale_of_the_target_do_not_matter() -> None:
    learner = ConformalizedQuantiles(levels=FEW, num_trees=10)
    plain = learner.fit(X[:200], Y[:200], key=jax.random.key(0)).quantiles(X[:20])
    moved = learner.fit(X[:200], 1e6 + 8 * Y[:200], key=jax.random.key(0)).quantiles(X[:20])
    np.testing.assert_allclose((moved - 1e6) / 8, plain, rtol=1e-3)


def test_rows_of_weight_zero_do_not_exist() -> None:
    learner = ConformalizedQuantiles(levels=FEW, num_trees=5)
    weights = np.repeat([1.0, 0.0], 100)
    weighted = learner.fit(X[:200], np.where(weights > 0, Y[:200], 1e5), key=jax.random.key(0), weights=weights)
    alone = learner.fit(X[:100], Y[:100], key=jax.random.key(0))
    np.testing.assert_allclose(weighted.quantiles(X[:20]), alone.quantiles(X[:20]))


def test_a_weight_of_three_standardizes_as_three_rows() -> None:
    # The held-out rows are drawn by position, so that only what comes before them can be the same.
    learner, counts = ConformalizedQuantiles(levels=FEW, num_trees=1), 1 + np.arange(60) % 3
    weighted = learner.fit(X[:60], Y[:60], key=jax.random.key(0), weights=counts)
    repeated = learner.fit(np.repeat(X[:60], counts, 0), np.repeat(Y[:60], counts), key=jax.random.key(0))
    np.testing.assert_allclose(weighted.table.dense(X[60:80]), repeated.table.dense(X[60:80]), rtol=1e-6)
    np.testing.assert_allclose((weighted.center, weighted.scale), (repeated.center, repeated.scale), rtol=1e-12)


def test_weights_in_other_units_change_nothing() -> None:
    learner, weights = ConformalizedQuantiles(levels=FEW, num_trees=5), 1.0 + np.arange(60) % 3
    fitted = [learner.fit(X[:60], Y[:60], key=jax.random.key(0), weights=unit * weights) for unit in (1.0, 4.0)]
    np.testing.assert_allclose(fitted[0].quantiles(X[:9]), fitted[1].quantiles(X[:9]), rtol=1e-6)


def test_categories_and_missing_values() -> None:
    frame = pd.DataFrame({"a": np.where(X[:400, 0] > 0, "x", "y"), "b": X[:400, 1]})
    frame.loc[::7, "b"] = np.nan
    y = 10.0 * (frame["a"] == "x") + X[:400, 0]
    predictive = ConformalizedQuantiles(levels=FEW, num_trees=40).fit(frame, y, key=jax.random.key(0))
    new = pd.DataFrame({"a": ["x", "y", None], "b": [np.nan, 0.0, 1.0]})
    median = quantile(predictive(new), [0.5])[:, 0]
    assert median[0] > 8 and median[1] < 2 and np.isfinite(median).all()


def test_ten_rows_keep_the_levels_that_two_rows_can_certify() -> None:
    predictive = ConformalizedQuantiles().fit(X[:10], Y[:10], key=jax.random.key(0))
    held_out = len(holdout_rows(10, seed=0, share=0.25)[1])
    assert predictive.levels.min() >= 1 / (held_out + 1) and 0.5 in predictive.levels
    distribution = predictive(X[:200])
    assert np.isfinite(distribution.variance).all() and np.isfinite(log_prob(distribution, Y[:200])).all()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((0.1, 0.5), "symmetric"),
        ((0.25, 0.75), "symmetric"),
        ((0.1, 0.4, 0.6, 0.9), "0.5"),
        ((0.0, 0.5, 1.0), "inside"),
    ],
)
def test_levels_that_are_refused(levels: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConformalizedQuantiles(levels=levels).fit(X[:50], Y[:50], key=jax.random.key(0))


def test_too_few_rows_and_labels_are_refused() -> None:
    with pytest.raises(InputError, match="at least 8 rows"):
        ConformalizedQuantiles().fit(X[:7], Y[:7], key=jax.random.key(0))
    with pytest.raises(InputError, match="not numeric"):
        ConformalizedQuantiles().fit(X[:10], ["a"] * 5 + ["b"] * 5, key=jax.random.key(0))
