"""Trees that are grown round by round: the same in threads, and counted where nothing can be split."""

from __future__ import annotations

import numpy as np

from bayeslens.learners import growing_trees


def test_threads_do_not_change_the_trees(monkeypatch):
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    slope = np.stack([x[:, 0], x[:, 1] ** 2, np.zeros(400)], 1)
    grown = []
    for least in (0, 10**9):
        monkeypatch.setattr(growing_trees, "_ONE_THREAD_ROWS", least)
        trees = growing_trees.GrowingTrees(x, x[:50], (), {"num_leaves": 4, "seed": 3, "feature_fraction": 0.7}, 3)
        for _ in range(5):
            trees.grow(trees.sums - slope, np.ones_like(slope))
        # The third has nothing to split; LightGBM keeps one empty tree of it.
        assert trees.counts[-1] == [5, 5, 1]
        np.testing.assert_allclose(trees.export(5)(x), trees.sums, atol=1e-6)
        np.testing.assert_allclose(trees.held_sums, trees.sums[:50], atol=1e-9)
        grown.append(trees.sums)
    np.testing.assert_array_equal(*grown)


def test_data_without_any_split():
    trees = growing_trees.GrowingTrees(np.ones((30, 2), np.float32), None, (), {}, 2)
    trees.grow(np.ones((30, 2)), np.ones((30, 2)))
    assert trees.counts == [[0, 0], [0, 0]] and not trees.export(1)(np.ones((4, 2))).any()
