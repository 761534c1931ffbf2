"""Exported trees: equal to LightGBM's own predictions, on the host and traced, whatever is missing or unknown."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import lightgbm as lgb
import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.learners.boosted_trees import export_trees

SETTINGS = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5, "seed": 1}


def features(rows=1500, seed=0):
    """Five columns: numbers, numbers with gaps, whole numbers, many categories, three categories."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    x[rng.random(rows) < 0.2, 1] = np.nan
    x[:, 2] = np.round(4 * x[:, 2])
    x[:, 3], x[:, 4] = rng.integers(0, 70, rows), rng.integers(0, 3, rows)
    x[rng.random(rows) < 0.1, 3] = np.nan
    return x


def grow(x, outputs, rounds, **settings):
    """A booster for each output."""
    signal = np.nan_to_num(x[:, 1]) + np.sin(2 * x[:, 0]) + np.nan_to_num(x[:, 3]) % 7 + x[:, 2] * (x[:, 4] == 1)

    def one(k):
        target, data = signal * (k + 1) + k, lgb.Dataset(x, categorical_feature=[3, 4], params={"verbose": -1})
        objective = lambda predicted, data: (predicted - target, np.ones(len(x)))  # noqa: E731
        return lgb.train(SETTINGS | {"objective": objective} | settings, data, rounds)

    return [one(k) for k in range(outputs)]


def own(boosters, x, rounds=None):
    return np.stack([b.predict(x, raw_score=True, num_iteration=rounds) for b in boosters], 1)


# 70 leaves need nine bytes, 2 need one; three outputs are not a divisor of anything.
@pytest.mark.parametrize(("outputs", "leaves", "rounds"), [(1, 8, 40), (2, 31, 15), (3, 2, 30), (1, 70, 10)])
def test_equals_lightgbm(outputs, leaves, rounds):
    boosters = grow(features(), outputs, rounds, num_leaves=leaves)
    trees = export_trees(boosters, [rounds] * outputs)
    new = features(900, seed=1)
    new[:50, 3], new[50:80, 3], new[80:90, 3] = 999, -4, 70  # categories that were never seen
    new[90:99, 0] = [1e30, -1e30, 0.0, -0.0, 1e-38, -1e-38, 5e3, -5e3, 3.4e38]
    exact = own(boosters, new)
    np.testing.assert_allclose(trees(new), exact, atol=1e-6, rtol=0)
    traced = jax.jit(lambda a: trees(a))(jnp.asarray(new))
    # The traced sum is in float32.
    np.testing.assert_allclose(traced, exact, rtol=1e-5, atol=1e-5)


def test_equals_lightgbm_on_the_very_thresholds():
    x = np.round(features(), 1).astype(np.float32)
    boosters = grow(x, 1, 30)
    trees = export_trees(boosters, [30])
    edges = np.unique(trees.threshold[trees.category_set < 0])
    edges = edges[np.abs(edges) > 1e-30]  # LightGBM takes what is nearer to zero for zero
    around = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    new = np.repeat(x[:1], len(around), 0)
    for column in (0, 1, 2):
        new[:, column] = around
        np.testing.assert_allclose(trees(new), own(boosters, new), atol=1e-6, rtol=0)


def test_rows_do_not_depend_on_their_neighbours():
    x = features(9000)  # more than one chunk
    trees = export_trees(grow(x, 2, 5), [5, 5])
    whole = trees(x)
    for part in (slice(0, 1), slice(4090, 4100), slice(8999, 9000)):
        np.testing.assert_array_equal(trees(x[part]), whole[part])
    assert trees(x[:0]).shape == (0, 2)


def test_missing_only_at_prediction_is_zero_as_in_lightgbm():
    x = features()
    boosters = grow(x, 1, 20)
    new = x.copy()
    new[:, 0] = np.nan  # without a gap in training
    zero = x.copy()
    zero[:, 0] = 0
    found = export_trees(boosters, [20])(new)
    np.testing.assert_allclose(found, own(boosters, new), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(found, export_trees(boosters, [20])(zero))


def test_rounds_can_be_left_out():
    x = features()
    boosters = grow(x, 2, 12)
    assert export_trees(boosters, [5, 5]).values.shape[0] == 10
    np.testing.assert_allclose(export_trees(boosters, [5, 5])(x), own(boosters, x, 5))
    nothing = export_trees(boosters, [0, 0])
    assert nothing(x).shape == (len(x), 2) and not nothing(x).any()
    np.testing.assert_array_equal(jax.jit(lambda a: nothing(a))(jnp.asarray(x)), 0)


def test_outputs_may_have_different_numbers_of_trees():
    x = features()
    boosters = [*grow(x, 2, 6), None]
    trees = export_trees(boosters, [6, 2, 0])
    exact = np.stack([own(boosters[:1], x)[:, 0], own(boosters[1:2], x, 2)[:, 0], np.zeros(len(x))], 1)
    np.testing.assert_allclose(trees(x), exact, atol=1e-6, rtol=0)
    np.testing.assert_allclose(jax.jit(lambda a: trees(a))(jnp.asarray(x)), exact, rtol=1e-5, atol=1e-5)


# Small tables give trees of many sizes, from a lone leaf on.
@pytest.mark.parametrize("rows", [21, 40, 101, 300])
@pytest.mark.parametrize("leaves", [8, 31])
def test_trees_of_different_sizes(rows, leaves):
    x = features(rows)
    boosters = grow(x, 2, 40, num_leaves=leaves, min_data_in_leaf=10, bagging_fraction=0.5, bagging_freq=1)
    trees = export_trees(boosters, [40, 40])
    exact = own(boosters, x)
    np.testing.assert_allclose(trees(x), exact, atol=1e-6, rtol=0)
    np.testing.assert_allclose(jax.jit(lambda a: trees(a))(jnp.asarray(x)), exact, rtol=1e-5, atol=1e-5)


def test_trees_without_splits():
    x = features(30)
    boosters = grow(x, 1, 3, min_data_in_leaf=20)
    trees = export_trees(boosters, [3])
    assert trees.leaves_if_left.shape[2] == 1
    np.testing.assert_allclose(trees(x), own(boosters, x), atol=1e-9)
    assert export_trees([None, None], [5, 5])(x).shape == (30, 2)


def test_linear_leaves_are_refused():
    x = features(200)[:, :1]
    booster = lgb.train(SETTINGS | {"linear_tree": True}, lgb.Dataset(x, x[:, 0], params={"linear_tree": True}), 2)
    with pytest.raises(InputError, match="linear"):
        export_trees([booster], [2])


def test_saving_keeps_every_tree(tmp_path):
    x = features()
    trees = export_trees(grow(x, 2, 6), [6, 6])
    save(trees, tmp_path / "trees.bayes")
    np.testing.assert_array_equal(load(tmp_path / "trees.bayes")(x), trees(x))
