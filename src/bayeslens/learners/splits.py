"""Splits of a table's rows that respect groups and order: scikit-learn's splitters, chosen by one rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.table import Target

_ONE_SPLIT_ROWS = 20_000  # above this, one held-out part tells enough
_HELD_OUT_ROWS = 50_000


def holdout_rows(
    rows: int, *, seed: int, target: Target | None = None, groups: Any = None, time: Any = None, share: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out row numbers: the last rows in `time`, whole `groups`, or rows at random.

    >>> holdout_rows(5, seed=0, time=[3, 1, 2, 5, 4])[1].tolist()
    [3]

    Raises:
        InputError: fewer than two rows or two groups.
    """
    if rows < 2:
        raise InputError(f"{rows} row is too few to hold some out: give a separate test table or more rows")
    if time is not None:
        order = _order(time, rows)
        cut = rows - max(1, round(share * rows))
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
    windows, so that the first rows are never held out.

    >>> [len(test) for _, test in folds(Target.from_values(np.arange(10.0)), num_folds=5, seed=0)]
    [2, 2, 2, 2, 2]

    Raises:
        InputError: too few rows or groups.
    """
    rows = len(target.values)
    if rows < 3:
        raise InputError(f"{rows} rows are too few to cross-validate: at least 3 are needed")
    num_folds = min(num_folds, rows)
    if rows > _ONE_SPLIT_ROWS:
        share = min(0.2, _HELD_OUT_ROWS / rows)
        return [holdout_rows(rows, seed=seed, target=target, groups=groups, time=time, share=share)]
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, TimeSeriesSplit

    if time is not None:
        order = _order(time, rows)
        splitter = TimeSeriesSplit(min(num_folds, rows - 1))
        return [(np.sort(order[a]), np.sort(order[b])) for a, b in splitter.split(order)]
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


def _order(time: Any, rows: int) -> np.ndarray:
    time = np.asarray(time)
    if len(time) != rows:
        raise InputError(f"time has {len(time)} entries for {rows} rows")
    return np.argsort(time, kind="stable")


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
