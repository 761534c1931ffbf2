"""Splits of a table's rows that respect groups and order: scikit-learn's splitters, chosen by one rule."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pandas as pd

from bayeslens.core.errors import InputError
from bayeslens.core.table import Target

_ONE_SPLIT_ROWS = 20_000  # above this, one held-out part tells enough
_HELD_OUT_ROWS = 50_000


def seed_from(key: Any) -> int:
    """A seed for libraries that draw by NumPy or for themselves.

    >>> seed_from(jax.random.key(0)) == seed_from(jax.random.key(0))
    True
    """
    return int(jax.random.randint(key, (), 0, 2**31 - 1))


def holdout_rows(
    rows: int, *, seed: int, target: Target | None = None, groups: Any = None, time: Any = None, share: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out row numbers: the last rows in `time`, whole `groups`, or rows at random.

    Rows of one time stay together, so that every held-out row is later than every training row; the held-out share
    is then the nearest to `share` that this allows.

    >>> holdout_rows(5, seed=0, time=[3, 1, 2, 5, 4])[1].tolist()
    [3]
    >>> holdout_rows(5, seed=0, time=[1, 1, 2, 2, 2])[1].tolist()
    [2, 3, 4]

    Raises:
        InputError: fewer than two rows, two groups or two times; times that are missing or do not fit the rows;
            both groups and time.
    """
    _check_one(groups, time)
    if rows < 2:
        raise InputError(f"{rows} row is too few to hold some out: give a separate test table or more rows")
    if time is not None:
        order, (cut,) = _order(time, rows, [rows - max(1, round(share * rows))])
        return np.sort(order[:cut]), np.sort(order[cut:])
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    if groups is not None:
        if len(set(groups)) < 2:
            raise InputError("all rows are in one group: no group can be held out")
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
        train, test = next(splitter.split(np.zeros(rows), groups=np.asarray(groups)))
        return np.sort(train), np.sort(test)
    labels = _stratify(target, 2)
    if labels is not None and round(share * rows) < len(np.unique(labels)):
        labels = None
    train, test = train_test_split(
        np.arange(rows), test_size=max(1, round(share * rows)), random_state=seed, stratify=labels
    )
    return np.sort(train), np.sort(test)


def folds(
    target: Target, *, num_folds: int, seed: int, groups: Any = None, time: Any = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and held-out row numbers of each fold.

    Tables of over 20,000 rows get one split with at most 50,000 held-out rows. With `time` the folds are expanding
    windows, so that the first rows are never held out; rows of one time stay together, and there are fewer folds
    where there are few times.

    >>> [len(test) for _, test in folds(Target.from_values(np.arange(10.0)), num_folds=5, seed=0)]
    [2, 2, 2, 2, 2]
    >>> target, time = Target.from_values(np.arange(6.0)), [1, 1, 2, 2, 3, 3]
    >>> [(train.tolist(), test.tolist()) for train, test in folds(target, num_folds=5, seed=0, time=time)]
    [([0, 1], [2, 3]), ([0, 1, 2, 3], [4, 5])]

    Raises:
        InputError: too few rows, groups or times; times that are missing or do not fit the rows.
    """
    _check_one(groups, time)
    rows = len(target.values)
    if rows < 3:
        raise InputError(f"{rows} rows are too few to cross-validate: at least 3 are needed")
    num_folds = min(num_folds, rows)
    if rows > _ONE_SPLIT_ROWS:
        share = min(0.2, _HELD_OUT_ROWS / rows)
        return [holdout_rows(rows, seed=seed, target=target, groups=groups, time=time, share=share)]
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    if time is not None:
        windows = min(num_folds, rows - 1)
        length = rows // (windows + 1)
        order, cuts = _order(time, rows, rows - length * np.arange(windows, 0, -1))
        ends = itertools.pairwise([*cuts, rows])
        return [(np.sort(order[:start]), np.sort(order[start:end])) for start, end in ends]
    if groups is not None:
        count = len(set(groups))
        if count < 2:
            raise InputError("all rows are in one group: groups cannot be cross-validated")
        splitter = GroupKFold(min(num_folds, count), shuffle=True, random_state=seed)
        return list(splitter.split(np.zeros(rows), groups=np.asarray(groups)))
    labels = _stratify(target, num_folds)
    if labels is not None:
        return list(StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(labels, labels))
    return list(KFold(num_folds, shuffle=True, random_state=seed).split(np.zeros(rows)))


def _check_one(groups: Any, time: Any) -> None:
    if groups is not None and time is not None:
        raise InputError("a split cannot respect both groups and time: give the one that new rows will differ in")


def _order(time: Any, rows: int, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows by time, and the cuts between two times that are nearest to the `wanted` ones, each once."""
    time = np.asarray(time)
    if len(time) != rows:
        raise InputError(f"time has {len(time)} entries for {rows} rows")
    if pd.isna(time).any():
        raise InputError(f"time has {int(pd.isna(time).sum())} missing values: fill them or drop those rows")
    order = np.argsort(time, kind="stable")
    ordered = time[order]
    between = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    if len(between) == 0:
        raise InputError(
            f"all {rows} rows have the same time, {ordered[0]}: no later rows can be held out; leave out time"
        )
    nearest = np.abs(between - np.asarray(wanted)[:, None]).argmin(1)
    return order, np.unique(between[nearest])


def _stratify(target: Target | None, least: int) -> np.ndarray | None:
    """Labels to stratify by; rare classes are pooled, since each stratum needs `least` rows."""
    if target is None or target.classes is None:
        return None
    codes = target.values.astype(int)
    counts = np.bincount(codes, minlength=len(target.classes))
    rare = counts[codes] < least
    if not rare.any():
        return codes
    pooled = np.where(rare, -1, codes)
    return pooled if rare.sum() >= least else np.where(rare, counts.argmax(), codes)
