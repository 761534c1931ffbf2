"""Splits: every row in its place, groups whole, time in order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.table import Target
from bayeslens.learners import splits as module
from bayeslens.learners.splits import folds, holdout_rows

RNG = np.random.default_rng(0)
NUMBERS = Target.from_values(RNG.normal(size=103))
LABELS = Target.from_values(np.array(["common"] * 80 + ["some"] * 20 + ["rare"] * 3))


def check_partition(parts, rows):
    for train, test in parts:
        assert not set(train) & set(test) and len(train) and len(test)
        assert len(set(train)) == len(train)
    held = np.concatenate([test for _, test in parts])
    assert sorted(held) == list(range(rows))


@pytest.mark.parametrize("target", [NUMBERS, LABELS], ids=["numbers", "labels"])
@pytest.mark.parametrize("seed", [0, 1])
def test_folds_are_a_partition(target, seed):
    parts = folds(target, num_folds=5, seed=seed)
    check_partition(parts, 103)
    again = folds(target, num_folds=5, seed=seed)
    assert all((a[1] == b[1]).all() for a, b in zip(parts, again, strict=True))
    assert any(
        (a[1] != b[1]).any()
        for a, b in zip(parts, folds(target, num_folds=5, seed=9), strict=True)
        if len(a[1]) == len(b[1])
    )


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_few_rows(rows):
    check_partition(folds(Target.from_values(np.arange(rows) ** 1.5), num_folds=5, seed=0), rows)
    check_partition(folds(Target.from_values(np.arange(rows) % 2 == 0), num_folds=5, seed=0), rows)


def test_classes_are_spread():
    for _, test in folds(LABELS, num_folds=5, seed=0):
        counts = np.bincount(LABELS.values[test].astype(int), minlength=3)
        share = dict(zip(LABELS.classes, counts, strict=True))
        assert share["common"] >= 15 and 3 <= share["some"] <= 5
    _, test = holdout_rows(103, seed=0, target=LABELS)
    assert 15 <= (LABELS.values[test] == 0).sum() <= 17


@pytest.mark.parametrize("kind", ["numbers", "text"])
def test_groups_are_never_split(kind):
    groups = RNG.integers(0, 12, 103)
    groups = groups if kind == "numbers" else np.array([f"g{g}" for g in groups], object)
    parts = folds(NUMBERS, num_folds=5, seed=0, groups=groups)
    check_partition(parts, 103)
    for train, test in [*parts, holdout_rows(103, seed=0, groups=groups)]:
        assert not set(groups[train]) & set(groups[test])
    assert len(folds(NUMBERS, num_folds=5, seed=0, groups=np.arange(103) % 3)) == 3


def test_held_out_rows_come_later():
    time = RNG.permutation(103)
    for train, test in [*folds(NUMBERS, num_folds=5, seed=0, time=time), holdout_rows(103, seed=0, time=time)]:
        assert time[train].max() < time[test].min()
    held = np.concatenate([t for _, t in folds(NUMBERS, num_folds=5, seed=0, time=time)])
    assert len(set(held)) == len(held) and time[held].min() > 0


def test_dates_order_rows():
    time = np.array(["2024-03-01", "2024-01-01", "2024-02-01", "2024-05-01", "2024-04-01"], "datetime64[D]")
    assert holdout_rows(5, seed=0, time=time)[1].tolist() == [3]


@pytest.mark.parametrize("tied", [1, 3, 10, 50])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_no_split_cuts_through_a_time(tied, share):
    # Shuffled, so that a time is not one block of rows.
    time = RNG.permutation(np.arange(100) // tied)
    numbers = Target.from_values(RNG.normal(size=100))
    parts = folds(numbers, num_folds=3, seed=0, time=time)
    for train, test in [holdout_rows(100, seed=0, time=time, share=share), *parts]:
        assert time[train].max() < time[test].min()
        assert len(set(train)) == len(train) and not set(train) & set(test)
    for (train, test), (later, _) in itertools.pairwise(parts):
        assert sorted([*train, *test]) == list(later)
    assert sorted(np.concatenate(parts[-1])) == list(range(100))


def test_cuts_are_the_nearest_between_two_times():
    # Times of 50, 20, 20 and 10 rows: cuts are possible at 50, 70 and 90.
    time = np.repeat([1, 2, 3, 4], [50, 20, 20, 10])
    for share, expected in [(0.05, 10), (0.19, 10), (0.21, 30), (0.35, 30), (0.45, 50), (0.99, 50)]:
        assert len(holdout_rows(100, seed=0, time=time, share=share)[1]) == expected
    numbers = Target.from_values(RNG.normal(size=100))
    # Without ties the cuts of three folds would be at 25, 50 and 75.
    assert [len(train) for train, _ in folds(numbers, num_folds=3, seed=0, time=time)] == [50, 70]
    assert [len(train) for train, _ in folds(numbers, num_folds=9, seed=0, time=time)] == [50, 70, 90]


def test_without_ties_folds_are_those_of_scikit_learn():
    from sklearn.model_selection import TimeSeriesSplit

    for rows, num_folds in [(103, 5), (7, 5), (3, 5), (10, 3)]:
        found = folds(Target.from_values(np.arange(rows) ** 1.5), num_folds=num_folds, seed=0, time=np.arange(rows))
        expected = list(TimeSeriesSplit(min(num_folds, rows - 1)).split(np.zeros(rows)))
        assert len(found) == len(expected)
        for got, wanted in zip(found, expected, strict=True):
            assert got[0].tolist() == wanted[0].tolist() and got[1].tolist() == wanted[1].tolist()


def test_holdout_share():
    for rows in (2, 3, 10, 999):
        train, test = holdout_rows(rows, seed=0)
        assert len(train) + len(test) == rows and len(test) == max(1, round(0.2 * rows))
        assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()


def test_large_tables_have_one_split(monkeypatch):
    monkeypatch.setattr(module, "_ONE_SPLIT_ROWS", 100)
    monkeypatch.setattr(module, "_HELD_OUT_ROWS", 10)
    ((train, test),) = folds(NUMBERS, num_folds=5, seed=0)
    assert len(test) == 10 and len(train) == 93


def test_refused():
    with pytest.raises(InputError, match="too few"):
        holdout_rows(1, seed=0)
    with pytest.raises(InputError, match="too few"):
        folds(Target.from_values([1.0, 2.0]), num_folds=5, seed=0)
    with pytest.raises(InputError, match="one group"):
        holdout_rows(5, seed=0, groups=np.zeros(5))
    with pytest.raises(InputError, match="one group"):
        folds(NUMBERS, num_folds=5, seed=0, groups=np.zeros(103))
    with pytest.raises(InputError, match="4 entries for 103 rows"):
        folds(NUMBERS, num_folds=5, seed=0, time=np.arange(4))
    with pytest.raises(InputError, match="all 5 rows have the same time, 2024"):
        holdout_rows(5, seed=0, time=np.full(5, 2024))
    with pytest.raises(InputError, match="the same time"):
        folds(NUMBERS, num_folds=5, seed=0, time=np.zeros(103))
    with pytest.raises(InputError, match="1 missing values"):
        holdout_rows(3, seed=0, time=np.array([1.0, np.nan, 2.0]))


def test_groups_and_time_together_are_refused():
    with pytest.raises(InputError, match="both groups and time"):
        holdout_rows(10, seed=0, groups=np.arange(10), time=np.arange(10))
    with pytest.raises(InputError, match="both groups and time"):
        folds(NUMBERS, num_folds=3, seed=0, groups=np.arange(103), time=np.arange(103))
