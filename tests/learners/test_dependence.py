"""Partial dependence of functions that are known: additive ones, whose members and bands are known too."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.distributions import Distribution

from bayeslens.core.learner import Predictive
from bayeslens.core.table import Table
from bayeslens.learners.dependence import partial_dependence

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "size": RNG.normal(size=80),
        "kind": np.where(RNG.random(80) < 0.3, "b", "a"),
        "count": RNG.integers(0, 5, 80),
        "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(RNG.permutation(80), "D"),
        "same": 1.0,
    }
)
LOOSE = {"a": 0.0, "b": 4.0}
WEIGHTS = np.array([0.04, 0.2, 0.7, 0.06])
SLOPES = np.array([1.0, 2.0, 3.0, 4.0])


def effect(frame: pd.DataFrame) -> np.ndarray:
    """The part that members agree on."""
    days = (frame["day"] - pd.Timestamp("2024-01-01")) / pd.Timedelta(days=1)
    return (frame["kind"].map(LOOSE) + 0.1 * frame["count"] ** 2 + 0.001 * days).to_numpy(float)


class Additive(Predictive):
    """Four members with slopes of their own in `size`; classes make it the logistic of the same sum."""

    table: Table
    classes: tuple | None = None

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        values = SLOPES[:, None] * x["size"].fillna(0.0).to_numpy() + effect(x)
        if self.classes is None:
            return dist.Normal(values, 1.0), WEIGHTS
        high = 1 / (1 + np.exp(-values))
        return dist.CategoricalProbs(np.stack([1 - high, high], -1)), WEIGHTS


ADDITIVE = Additive(Table.from_data(FRAME))
FOUND = {d.column: d for d in partial_dependence(ADDITIVE, FRAME)}


def test_numeric_columns_follow_their_own_term():
    found = FOUND["size"]
    np.testing.assert_allclose(found.grid, np.quantile(FRAME["size"], np.linspace(0.02, 0.98, 16)))
    rest = effect(FRAME).mean()
    np.testing.assert_allclose(found.mean, WEIGHTS @ SLOPES * np.array(found.grid) + rest, rtol=1e-6)
    # Slopes with cumulated weights 0.04, 0.24, 0.94 and 1: the 5% quantile is the second, the 95% the fourth.
    low, high = SLOPES[1] * np.array(found.grid) + rest, SLOPES[3] * np.array(found.grid) + rest
    right = np.array(found.grid) > 0
    np.testing.assert_allclose(found.lower[right], low[right], rtol=1e-6)
    np.testing.assert_allclose(found.upper[right], high[right], rtol=1e-6)
    # Left of zero the order turns: cumulated weights 0.06, 0.76, 0.96 and 1 of slopes 4, 3, 2 and 1.
    np.testing.assert_allclose(found.lower[~right], high[~right], rtol=1e-6)
    np.testing.assert_allclose(found.upper[~right], low[~right], rtol=1e-6)


def test_whole_numbers_take_fractional_grid_points():
    found = FOUND["count"]
    assert min(found.grid) == 0 and max(found.grid) == 4
    others = FRAME["kind"].map(LOOSE).mean() + (effect(FRAME.assign(kind="a", count=0))).mean()
    expected = WEIGHTS @ SLOPES * FRAME["size"].mean() + others + 0.1 * np.array(found.grid) ** 2
    np.testing.assert_allclose(found.mean, expected, rtol=1e-6)


def test_categories_by_frequency_and_dates_in_order():
    kind, day = FOUND["kind"], FOUND["day"]
    assert kind.grid == ["a", "b"]
    np.testing.assert_allclose(kind.mean[1] - kind.mean[0], 4.0)
    assert len(day.grid) == 16 and day.grid[0] == FRAME["day"].min() and day.grid[-1] == FRAME["day"].max()
    days = (pd.Series(day.grid) - day.grid[0]) / pd.Timedelta(days=1)
    np.testing.assert_allclose(day.mean - day.mean[0], 0.001 * days, atol=1e-9)


def test_most_important_first_and_constants_not_at_all():
    found = partial_dependence(ADDITIVE, FRAME)
    assert [d.column for d in found] == ["size", "kind", "count", "day"]
    for each in found:
        assert each.importance == pytest.approx(np.std(each.mean)) and each.label == ""


def test_classes_give_the_probability_of_the_last_label():
    classes = Additive(ADDITIVE.table, ("no", "yes"))
    found = {d.column: d for d in partial_dependence(classes, FRAME)}["size"]
    assert found.label == "yes"
    values = SLOPES[:, None, None] * np.array(found.grid)[:, None] + effect(FRAME)
    np.testing.assert_allclose(found.mean, WEIGHTS @ (1 / (1 + np.exp(-values))).mean(-1), rtol=1e-6)


def test_at_most_a_hundred_rows_and_twelve_columns():
    class Counting(Predictive):
        table: Table
        classes: tuple | None = None

        def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
            seen.append(len(x))
            return dist.Normal((x.to_numpy() @ 2.0 ** np.arange(20))[None], 1.0), np.ones(1)

    seen: list[int] = []
    wide = pd.DataFrame(RNG.normal(size=(300, 20)), columns=[f"c{i}" for i in range(20)])
    found = partial_dependence(Counting(Table.from_data(wide)), wide)
    assert seen == [100 * 16 * 20]  # one call
    assert [d.column for d in found] == [f"c{i}" for i in range(19, 7, -1)]
    for each in found:  # one member: a band of no width
        np.testing.assert_array_equal(each.lower, each.upper)
    chosen = [partial_dependence(Counting(Table.from_data(wide)), wide, seed=s)[0].mean for s in (0, 0, 1)]
    assert (chosen[0] == chosen[1]).all() and (chosen[0] != chosen[2]).any()


def test_missing_values_are_no_grid_points_and_nothing_usable_gives_nothing():
    holes = FRAME.assign(size=FRAME["size"].where(FRAME.index % 3 > 0))
    found = {d.column: d for d in partial_dependence(ADDITIVE, holes)}["size"]
    np.testing.assert_allclose(found.grid, np.quantile(holes["size"].dropna(), np.linspace(0.02, 0.98, 16)))
    np.testing.assert_allclose(found.mean, WEIGHTS @ SLOPES * np.array(found.grid) + effect(FRAME).mean(), rtol=1e-6)
    assert partial_dependence(ADDITIVE, FRAME[["same"]]) == ()
