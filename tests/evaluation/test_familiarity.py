"""Unfamiliar rows: distances by brute force, and how often a familiar row is flagged."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.stats as st
from scipy.spatial.distance import cdist

from bayeslens.evaluation.familiarity import Familiarity

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 3)) * [1.0, 10.0, 100.0]


def test_distance_is_that_to_the_third_neighbour():
    familiarity = Familiarity.fit(X)
    new = RNG.normal(size=(50, 3)) * 50
    standardized = familiarity.table.dense(new), familiarity.table.dense(X)
    expected = np.sort(cdist(*standardized), 1)[:, 2]
    np.testing.assert_allclose(familiarity.distance(new), expected, rtol=1e-3)
    itself = np.sort(np.sort(cdist(standardized[1], standardized[1]), 1)[:, 3])
    np.testing.assert_allclose(familiarity.distances, itself, rtol=1e-2, atol=1e-3)


def test_new_rows_of_the_same_kind_are_rarely_flagged():
    """P-values are near uniform: at 10%, within 4 standard errors and the finite reference's bias (2%)."""
    familiarity = Familiarity.fit(X)
    new = RNG.normal(size=(2000, 3)) * [1.0, 10.0, 100.0]
    share = (familiarity.p_value(new) <= 0.1).mean()
    assert abs(share - 0.1) < 0.02 + 4 * st.binom(2000, 0.1).std() / 2000
    assert familiarity.unfamiliar(new).mean() < 0.01


def test_far_rows_and_new_categories_are_flagged():
    frame = pd.DataFrame({"x": X[:, 0], "kind": RNG.choice(["a", "b"], 400)})
    familiarity = Familiarity.fit(frame)
    new = pd.DataFrame({"x": [0.0, 30.0, 0.0, 0.0], "kind": ["a", "a", "new", None]})
    assert familiarity.unfamiliar(new).tolist()[:3] == [False, True, True]
    assert familiarity.p_value(new)[1] == 1 / 401


def test_small_and_large_tables():
    tiny = Familiarity.fit(np.array([[0.0], [1.0]]))
    assert tiny.distance(np.array([[0.5]])).shape == (1,) and not tiny.unfamiliar(np.array([[0.5]])).any()
    large = Familiarity.fit(RNG.normal(size=(5000, 2)))
    assert large.reference.shape == (2000, 2)
    assert large.unfamiliar(np.zeros((0, 2))).shape == (0,)
