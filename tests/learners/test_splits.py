"""Splits: every row in its place, groups whole, time in order."""

from __future__ import annotations

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


def test_ties_in_time_keep_the_order():
    time = np.repeat(np.arange(10), 10)
    for train, test in [holdout_rows(100, seed=0, time=time, share=0.25), *folds(
        Target.from_values(RNG.normal(size=100)), num_folds=3, seed=0, time=time
    )]:  # fmt: skip
        assert time[train].max() <= time[test].min()


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
