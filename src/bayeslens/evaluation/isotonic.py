"""Isotonic regression: the best increasing function of one variable, for means and for quantiles.

Sources: R. E. Barlow, D. J. Bartholomew, J. M. Bremner, H. D. Brunk, "Statistical inference under order restrictions"
(1972), for pooling adjacent violators; Q. F. Stout, "Isotonic regression via partitioning" (2013).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float


def isotonic_mean(forecast: Any, values: Any) -> Float[np.ndarray, " rows"]:
    """The best increasing function of the forecasts, under squared error, at every row; equal forecasts stay equal.

    For events it is also best under the log loss and every other proper one.

    >>> isotonic_mean([0.1, 0.5, 0.3], [0.0, 1.0, 1.0]).tolist()
    [0.0, 1.0, 1.0]
    """
    _, index, counts = np.unique(np.asarray(forecast, np.float64), return_inverse=True, return_counts=True)
    return pooled_adjacent_violators(np.bincount(index, np.asarray(values, np.float64)) / counts, counts)[index]


def pooled_adjacent_violators(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Increasing least squares fit to means in order, by pooling adjacent violators.

    >>> pooled_adjacent_violators(np.array([1.0, 0.0, 2.0]), np.array([1, 3, 1])).tolist()
    [0.25, 0.25, 2.0]
    """
    from scipy.optimize import isotonic_regression

    return isotonic_regression(means, weights=counts).x


def isotonic_quantile(forecast: Any, values: Any, level: float) -> Float[np.ndarray, " rows"]:
    """The best increasing function of the forecasts, under the quantile loss, at every row; the lowest of several.

    Exact, by halving the range of values: which rows lie above the middle one is the best cut of a running sum
    (Stout 2013).

    >>> isotonic_quantile([1, 2, 3, 4], [5.0, 1.0, 2.0, 9.0], 0.5).tolist()
    [1.0, 1.0, 2.0, 9.0]
    """
    distinct, index = np.unique(np.asarray(forecast, np.float64), return_inverse=True)
    order = np.argsort(index, kind="stable")
    levels, code = np.unique(np.asarray(values, np.float64), return_inverse=True)
    code = code[order]
    start = np.searchsorted(index[order], np.arange(len(distinct) + 1))  # the first row of each distinct forecast
    fitted = np.empty(len(distinct))
    waiting = [(0, len(distinct), 0, len(levels) - 1)]
    while waiting:
        first, last, low, high = waiting.pop()
        if low == high:
            fitted[first:last] = levels[low]
            continue
        middle = (low + high) // 2
        slope = np.cumsum((code[start[first] : start[last]] <= middle) - level)
        # Above the middle lie the last forecasts whose sum of slopes is least; ties go below.
        upto = np.concatenate([[0.0], slope[start[first + 1 : last + 1] - start[first] - 1]])
        cut = first + len(upto) - 1 - int(np.argmax(upto[::-1] >= upto.max() - 1e-9))
        if cut > first:
            waiting.append((first, cut, low, middle))
        if cut < last:
            waiting.append((cut, last, middle + 1, high))
    return fitted[index]
