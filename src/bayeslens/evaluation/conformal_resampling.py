"""Conformal prediction that spends no rows on calibration: CV+, jackknife+ and full conformal prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bayeslens.core.errors import InputError
from bayeslens.evaluation.conformal import check_coverage, check_scores

_CHUNK = 4_000_000  # numbers in memory at once
_HALVINGS = 80
_FEW_ROWS = 8  # per fold: below this, sorting all at once is quicker than searching in every fold


def cross_conformal_intervals(
    predictions: Any, residuals: Any, folds: Any, coverage: float
) -> tuple[Float[np.ndarray, " new_rows"], Float[np.ndarray, " new_rows"]]:
    """CV+ intervals: from the models of a cross-validation and their held-out errors. One fold per row is jackknife+.

    The upper end is the ceil(coverage (n + 1))-th smallest of prediction of fold k(i) plus error of row i, the lower
    end likewise. With n rows in K folds coverage is at least 2 coverage - 1 - min(2 (1 - 1/K) / (n/K + 1),
    (1 - K/n) / (K + 1)), which for jackknife+ is 2 coverage - 1, whatever the model; where the model is stable it is
    near `coverage`.

    Args:
        predictions: of new rows by the model that was fitted without fold k, shape (folds, new_rows).
        residuals: absolute errors of the rows, each by the model that has not seen it, shape (rows,).
        folds: the fold, 0 to folds - 1, of every row, shape (rows,).
        coverage: 1 - alpha, of which 1 - 2 alpha is guaranteed.

    Returns:
        Lower and upper ends; infinite when there are fewer than coverage / (1 - coverage) rows.

    Raises:
        InputError: shapes or folds that do not fit, or errors that are negative or missing.

    Source: R. Barber, E. Candes, A. Ramdas, R. Tibshirani, "Predictive inference with the jackknife+" (2021).

    >>> low, high = cross_conformal_intervals(np.array([[0.0], [1.0]]), np.arange(1.0, 11.0), np.arange(10) % 2, 0.8)
    >>> low.tolist(), high.tolist()
    ([-9.0], [9.0])
    """
    check_coverage(coverage)
    residuals, predictions = check_scores(residuals), np.asarray(predictions, np.float64)
    folds = np.asarray(folds)
    if (residuals < 0).any():
        row = int((residuals < 0).argmax())
        raise InputError(f"the error of row {row} is {residuals[row]}: give absolute errors |y - prediction|")
    if folds.shape != residuals.shape or predictions.ndim != 2:
        raise InputError(
            f"needed are predictions of shape (folds, new rows) and a fold for each of {len(residuals)} rows; got "
            f"shapes {predictions.shape} and {folds.shape}"
        )
    if folds.min() < 0 or folds.max() >= len(predictions):
        raise InputError(f"folds must be numbered from 0 to {len(predictions) - 1}, one for each row of predictions")
    rank = math.ceil((len(residuals) + 1) * (coverage - 1e-12))
    if rank > len(residuals):
        infinite = np.full(predictions.shape[1], np.inf)
        return -infinite, infinite
    ranked = _by_partition if len(residuals) < _FEW_ROWS * len(predictions) else _by_search
    return -ranked(-predictions, residuals, folds, rank), ranked(predictions, residuals, folds, rank)


def _by_partition(shift: np.ndarray, values: np.ndarray, folds: np.ndarray, rank: int) -> np.ndarray:
    """The rank-th smallest of shift[fold of i] + values[i] over i, for every column of shift."""
    result = np.empty(shift.shape[1])
    step = max(1, _CHUNK // len(values))
    for start in range(0, len(result), step):
        part = shift[:, start : start + step].T[:, folds] + values
        part.partition(rank - 1, axis=1)
        result[start : start + step] = part[:, rank - 1]
    return result


def _by_search(shift: np.ndarray, values: np.ndarray, folds: np.ndarray, rank: int) -> np.ndarray:
    """The same by halving an interval, with the values of each fold sorted once: no table of rows by new rows."""
    ordered = [np.sort(values[folds == k]) for k in range(len(shift))]
    kept = [k for k in range(len(shift)) if len(ordered[k])]
    shift, ordered = shift[kept], [ordered[k] for k in kept]
    # Every fold's share of the rank: where all of them reach it so do all rows together, where none does they do not.
    shares = [math.ceil(rank * len(o) / len(values)) - 1 for o in ordered]
    at_share = np.stack([s + o[i] for s, o, i in zip(shift, ordered, shares, strict=True)])
    # Sums and differences round differently: an entry as close as this counts as equal.
    tolerance = 8 * np.finfo(float).eps * (np.abs(shift).max(0) + np.abs(values).max())
    low, high = at_share.min(0) - tolerance, at_share.max(0)
    active = np.flatnonzero(high - low > 2 * tolerance)
    for _ in range(_HALVINGS):
        middle = (low[active] + high[active]) / 2
        count = sum(np.searchsorted(o, middle - s[active], "right") for s, o in zip(shift, ordered, strict=True))
        enough = count >= rank
        high[active[enough]], low[active[~enough]] = middle[enough], middle[~enough]
        active = active[(count != rank - 1) & (high[active] - low[active] > 2 * tolerance[active])]
        if not len(active):
            break
    low -= tolerance
    next_above = [
        np.append(o, np.inf)[np.searchsorted(o, low - s, "right")] + s for s, o in zip(shift, ordered, strict=True)
    ]
    return np.min(next_above, axis=0)


def cross_conformal_sets(
    scores: Any, new_scores: Any, folds: Any, coverage: float
) -> Bool[np.ndarray, "new_rows classes"]:
    """CV+ sets of classes: a class belongs unless its score exceeds too many held-out scores of the same models.

    Args:
        scores: of every row and its own class, by the model that has not seen the row, shape (rows,).
        new_scores: of every class of the new rows by the models of all folds, shape (folds, new_rows, classes).
        folds: the fold of every row, shape (rows,).
        coverage: 1 - alpha; at least 1 - 2 alpha is guaranteed up to the small term in `cross_conformal_intervals`.

    Source: Y. Romano, M. Sesia, E. Candes, "Classification with valid and adaptive coverage" (2020).

    >>> cross_conformal_sets(np.arange(9.0), np.array([[[0.5, 8.5]]]), np.zeros(9, int), 0.9).tolist()
    [[True, False]]
    """
    check_coverage(coverage)
    scores, new_scores, folds = check_scores(scores), np.asarray(new_scores, np.float64), np.asarray(folds)
    if folds.shape != scores.shape or new_scores.ndim != 3 or folds.min() < 0 or folds.max() >= len(new_scores):
        raise InputError(
            f"needed are scores of shape (folds, new rows, classes) and a fold for each of {len(scores)} rows; got "
            f"shapes {new_scores.shape} and {folds.shape}"
        )
    below = sum(np.searchsorted(np.sort(scores[folds == k]), s - 1e-12, "left") for k, s in enumerate(new_scores))
    return below < (coverage - 1e-12) * (len(scores) + 1)


def cross_conformal_guarantee(rows: int, folds: int, coverage: float) -> float:
    """The coverage that CV+ (jackknife+ when `folds` is `rows`) has whatever the model: Barber et al. 2021, theorem 4.

    >>> round(cross_conformal_guarantee(100, 100, 0.9), 3), round(cross_conformal_guarantee(100, 10, 0.9), 3)
    (0.8, 0.718)
    """
    alpha = 1 - coverage
    slack = min(2 * (1 - 1 / folds) / (rows / folds + 1), (1 - folds / rows) / (folds + 1))
    return max(0.0, 1 - 2 * alpha - slack)


def full_conformal_ridge(
    X: Any, y: Any, X_new: Any, coverage: float, *, penalty: float = 1.0
) -> tuple[Float[np.ndarray, " new_rows"], Float[np.ndarray, " new_rows"]]:
    """Full conformal intervals of ridge regression, exactly: refitted with every possible value of the new outcome.

    A residual of the refitted model is linear in the candidate value, so the values that conform are known in closed
    form: no grid and no refit. Coverage is at least `coverage`, and all rows serve both for fitting and calibration.

    Args:
        X: features, shape (rows, columns). An intercept, which is not penalized, is added. Scale the columns with
            numbers that do not come from these rows, or exchangeability is lost a little.
        y: outcomes, shape (rows,).
        X_new: features of new rows, shape (new_rows, columns).
        coverage: wanted probability.
        penalty: the ridge penalty, at least 0.

    Returns:
        Lower and upper ends of the conforming values. Where a new row has such leverage that they are not an interval,
        the ends are infinite, which is conservative.

    Raises:
        InputError: shapes that do not fit, missing values, or a singular design without a penalty.

    Sources: I. Nouretdinov, T. Melluish, V. Vovk, "Ridge regression confidence machine" (2001); V. Vovk,
    A. Gammerman, G. Shafer, "Algorithmic learning in a random world" (2005), section 2.3.

    >>> x = np.linspace(-1, 1, 30)[:, None]
    >>> low, high = full_conformal_ridge(x, x[:, 0], np.zeros((1, 1)), 0.9, penalty=1e-6)
    >>> bool(low[0] <= 0 <= high[0]) and bool(high[0] - low[0] < 1e-6)
    True
    """
    check_coverage(coverage)
    X, y, X_new = np.asarray(X, np.float64), np.asarray(y, np.float64), np.asarray(X_new, np.float64)
    if X.ndim != 2 or X_new.ndim != 2 or y.shape != X.shape[:1] or X.shape[1] != X_new.shape[1]:
        raise InputError(f"X, y and X_new do not fit together: shapes {X.shape}, {y.shape} and {X_new.shape}")
    if not all(np.isfinite(a).all() for a in (X, y, X_new)):
        raise InputError("X, y or X_new has missing or infinite entries: impute or drop them")
    X, X_new = (np.column_stack([np.ones(len(a)), a]) for a in (X, X_new))
    gram = X.T @ X + np.diag(np.r_[0.0, np.full(X.shape[1] - 1, float(penalty))])
    if np.linalg.cond(gram) > 1e13:
        raise InputError("the columns of X are linearly dependent: give a positive penalty")
    projected = np.linalg.solve(gram, X_new.T)  # columns x new rows
    coefficients = np.linalg.solve(gram, X.T @ y)
    error, center, leverage = y - X @ coefficients, X_new @ coefficients, np.einsum("nc,cn->n", X_new, projected)
    needed = math.floor((1 - coverage) * (len(y) + 1) + 1e-9)
    if needed == 0:
        infinite = np.full(len(X_new), np.inf)
        return -infinite, infinite
    low, high = np.empty(len(X_new)), np.empty(len(X_new))
    step = max(1, _CHUNK // len(y))
    for start in range(0, len(X_new), step):
        part = slice(start, start + step)
        cross = (X @ projected[:, part]).T  # new rows x rows
        # With u the scaled distance from the prediction, the new residual is |u| and that of a row |error - cross u|.
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([error / (1 + cross), -error / (1 - cross)])
        inside = np.abs(cross) < 1
        lower = np.where(inside, ends.min(0), -np.inf)
        upper = np.where(inside, ends.max(0), np.inf)
        low[part] = np.partition(lower, needed - 1, axis=1)[:, needed - 1]
        high[part] = -np.partition(-upper, needed - 1, axis=1)[:, needed - 1]
    return center + (1 + leverage) * low, center + (1 + leverage) * high


def full_conformal_classes(
    fit_scores: Callable[[Any, Int[np.ndarray, " rows"]], Float[np.ndarray, " rows"]],
    X: Any,
    labels: Any,
    X_new: Any,
    num_classes: int,
    coverage: float,
) -> Bool[np.ndarray, "new_rows classes"]:
    """Full conformal sets of classes: one fit for every new row and class.

    Args:
        fit_scores: given rows and their class codes, fits a model that treats all of them alike, and returns the
            nonconformity score of each row with its class, larger for stranger.
        X: rows, shape (rows, columns).
        labels: class codes, shape (rows,).
        X_new: new rows, shape (new_rows, columns).
        num_classes: classes are 0 to num_classes - 1.
        coverage: wanted probability.

    Source: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic learning in a random world" (2005).

    >>> distance = lambda X, y: np.abs(X[:, 0] - np.array([X[y == 0, 0].mean(), X[y == 1, 0].mean()])[y])
    >>> X, y = np.arange(20.0)[:, None], np.repeat([0, 1], 10)
    >>> full_conformal_classes(distance, X, y, np.array([[4.0]]), 2, 0.9).tolist()
    [[True, False]]
    """
    check_coverage(coverage)
    X, X_new, labels = np.asarray(X), np.asarray(X_new), np.asarray(labels, int)
    result = np.zeros((len(X_new), num_classes), bool)
    for row, x in enumerate(X_new):
        together = np.concatenate([X, x[None]])
        for c in range(num_classes):
            scores = check_scores(fit_scores(together, np.append(labels, c)))
            p_value = (scores >= scores[-1] - 1e-12).mean()
            result[row, c] = p_value > 1 - coverage + 1e-12
    return result
