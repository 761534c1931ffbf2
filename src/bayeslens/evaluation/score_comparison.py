"""Which of two predictors is better, and is that more than chance? Paired comparisons of scores, row by row.

Sources: F. X. Diebold, R. S. Mariano, "Comparing predictive accuracy" (1995); D. Harvey, S. Leybourne, P. Newbold,
"Testing the equality of prediction mean squared errors" (1997); W. K. Newey, K. D. West, "A simple, positive
semi-definite, heteroskedasticity and autocorrelation consistent covariance matrix" (1987); E. Lazarus, D. J. Lewis,
J. H. Stock, M. W. Watson, "HAR inference: recommendations for practice" (2018), for series in general; K.-Y. Liang,
S. L. Zeger, "Longitudinal data analysis using generalized linear models" (1986), for clusters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


class MeanError(NamedTuple):
    """Standard error of a mean, its degrees of freedom, and by what it was estimated."""

    standard_error: Any
    degrees_of_freedom: float
    method: str


@dataclasses.dataclass(frozen=True)
class ScoreDifference:
    """Mean of first minus second, and what chance does to it.

    Attributes:
        difference: mean over rows; of losses, negative where the first is better.
        standard_error: of that mean.
        statistic: difference over standard error, which follows a Student t if there is no difference.
        p_value: two-sided.
        lower, upper: the 95% interval.
        degrees_of_freedom: of the Student t.
        rows: how many were compared.
        method: how the standard error was estimated.
    """

    difference: float
    standard_error: float
    statistic: float
    p_value: float
    lower: float
    upper: float
    degrees_of_freedom: float
    rows: int
    method: str

    @property
    def table(self) -> pd.DataFrame:
        """One row."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(self)])

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.4g")


def mean_error(values: Any, *, groups: Any = None, time: Any = None) -> MeanError:
    """Standard error of the mean over rows, for independent rows, rows in groups, or a series.

    Groups: rows of one group may depend on each other, groups do not (cluster-robust, with the factor G/(G-1)).
    Time: rows of one time are taken together, times are taken as evenly spaced, and the long-run variance of their
    sums is the mean square of its 0.4 times^(2/3) slowest cosine transforms, which are as many degrees of freedom.
    Tests by it keep their level better than those by weighted autocovariances (Lazarus et al. 2018).

    Args:
        values: shape (rows,) or (rows, columns); each column has an error of its own.
        groups: a label for every row, shape (rows,).
        time: a time for every row, in any unit that sorts, shape (rows,).

    >>> round(float(mean_error(np.array([1.0, 2.0, 3.0])).standard_error), 4)
    0.5774

    Raises:
        InputError: fewer than two rows, groups or times, or both groups and time.
    """
    values = np.asarray(values, np.float64)
    rows = len(values)
    if groups is not None and time is not None:
        raise InputError("give groups or time, not both: time already takes the rows of one time together")
    if groups is None and time is None:
        if rows < 2:
            raise InputError(f"a standard error needs two rows or more, got {rows}")
        return MeanError(values.std(0, ddof=1) / np.sqrt(rows), rows - 1, "independent rows")
    kind, labels = ("groups", np.asarray(groups)) if time is None else ("time", np.asarray(time))
    if labels.shape != (rows,):
        raise InputError(f"{kind} must have one entry for each of the {rows} rows, got shape {labels.shape}")
    distinct, index = np.unique(labels, return_inverse=True)
    count = len(distinct)
    if count < 2:
        raise InputError(f"all rows have the same {kind} entry, {distinct[0]!r}: a standard error needs two or more")
    sums = np.zeros((count, *values.shape[1:]))
    np.add.at(sums, index, values - values.mean(0))
    if time is None:
        error = np.sqrt(count / (count - 1) * (sums**2).sum(0)) / rows
        return MeanError(error, count - 1, f"{count} groups")
    used = min(count - 1, max(1, round(0.4 * count ** (2 / 3))))
    phase = np.pi * np.arange(1, used + 1)[:, None] * (np.arange(count) + 0.5) / count
    # The sum over times has the variance count x long-run variance.
    error = np.sqrt(2 * ((np.cos(phase) @ sums) ** 2).mean(0)) / rows
    return MeanError(error, used, f"series of {count}, {used} cosine transforms")


def _long_run_variance(centred: np.ndarray, lags: int, bartlett: bool = True) -> np.ndarray:
    """Sum of the autocovariances up to `lags`, with Bartlett's weights or equal ones."""
    rows = len(centred)
    total = (centred**2).sum(0)
    for lag in range(1, lags + 1):
        weight = 1 - lag / (lags + 1) if bartlett else 1.0
        total = total + 2 * weight * (centred[lag:] * centred[:-lag]).sum(0)
    return total / rows


def compare_scores(first: Any, second: Any, *, groups: Any = None, time: Any = None) -> ScoreDifference:
    """Paired comparison of two predictors' scores or losses of the same rows: a paired t test.

    With groups or time its standard error is that of `mean_error`. `diebold_mariano` is the classical test of a series.

    Args:
        first: score of every row by the first predictor, shape (rows,).
        second: by the second.
        groups: labels of rows that may depend on each other (one patient, one site), shape (rows,).
        time: times of rows of a series or of several, shape (rows,).

    Returns:
        The mean of first minus second with its standard error, a two-sided p-value and a 95% interval.

    >>> found = compare_scores(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 2.0, 2.0]))
    >>> found.difference, round(found.standard_error, 4), round(found.p_value, 4)
    (1.0, 0.4082, 0.0917)

    Raises:
        InputError: scores of other rows, scores that are not finite, or fewer than two rows or groups.
    """
    difference = _paired(first, second)
    error = mean_error(difference, groups=groups, time=time)
    return _tested(difference, float(error.standard_error), error.degrees_of_freedom, error.method)


def diebold_mariano(first: Any, second: Any, *, horizon: int = 1, lags: int | None = None) -> ScoreDifference:
    """Diebold-Mariano test that two forecasters of a series have equal expected loss, for rows in the order of time.

    With the small-sample correction of Harvey, Leybourne and Newbold, and a Student t. At horizon 1 without lags it is
    the paired t test.

    Args:
        first: loss of every time by the first forecaster, shape (times,).
        second: by the second.
        horizon: how many steps ahead the forecasts were; the differences of ideal forecasts are then correlated up
            to horizon - 1 steps, and the long-run variance sums these autocovariances with equal weights (with
            Bartlett's where that sum is not positive), as in the sources: Bartlett's up to the same lag are too few,
            and reject too often.
        lags: use Bartlett's weights up to this lag instead (Newey and West), for forecasts that are not ideal, whose
            losses stay correlated for longer; or see `compare_scores` with time.

    >>> found = diebold_mariano(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 2.0, 2.0]))
    >>> round(found.statistic, 4)
    2.4495

    Raises:
        InputError: losses of other rows, losses that are not finite, or a horizon or lags that do not fit the series.
    """
    difference = _paired(first, second)
    rows = len(difference)
    if not 1 <= horizon <= rows // 2:
        raise InputError(f"horizon must be between 1 and half of the {rows} rows, got {horizon}")
    if lags is not None and not 0 <= lags < rows:
        raise InputError(f"lags must be between 0 and {rows - 1}, got {lags}")
    centred = difference - difference.mean()
    used = horizon - 1 if lags is None else lags
    kernel, variance = "equal weights", float(_long_run_variance(centred, used, bartlett=False))
    if lags is not None or (variance <= 0 and used > 0):
        kernel, variance = "Newey-West", float(_long_run_variance(centred, used))
    correction = (rows + 1 - 2 * horizon + horizon * (horizon - 1) / rows) / rows
    method = f"Diebold-Mariano, horizon {horizon}, {used} lags, {kernel}"
    return _tested(difference, np.sqrt(max(variance, 0.0) / rows / correction), rows - 1, method)


def _paired(first: Any, second: Any) -> Float[np.ndarray, " rows"]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise InputError(f"scores must be two vectors over the same rows, got shapes {first.shape} and {second.shape}")
    if len(first) < 2:
        raise InputError(f"a comparison needs two rows or more, got {len(first)}")
    wrong = ~(np.isfinite(first) & np.isfinite(second))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"row {row} has the scores {first[row]:g} and {second[row]:g}, and means of infinite or missing scores "
            "cannot be compared: bound the predicted probabilities away from zero, or compare another score"
        )
    return first - second


def _tested(difference: np.ndarray, error: float, freedom: float, method: str) -> ScoreDifference:
    from scipy.special import stdtr, stdtrit

    mean = float(difference.mean())
    error = 0.0 if np.ptp(difference) == 0 else float(error)
    with np.errstate(divide="ignore"):
        statistic = 0.0 if mean == 0 else float(np.divide(mean, error))
    reach = float(stdtrit(freedom, 0.975)) * error
    p_value = float(2 * stdtr(freedom, -abs(statistic)))
    return ScoreDifference(
        mean, error, statistic, p_value, mean - reach, mean + reach, float(freedom), len(difference), method
    )
