"""Sets whose expected loss is bounded, for losses other than a miss: conformal risk control, RCPS, learn then test."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import binom

from bayeslens.core.errors import InputError

Bound = Literal["betting", "hoeffding-bentkus", "binomial"]


class RiskControl(NamedTuple):
    """The chosen entry of the grid of settings, its mean calibration loss, and that mean's standard error."""

    index: int
    risk: float
    standard_error: float


def conformal_risk_control(losses: Any, risk: float, *, largest_loss: float = 1.0) -> RiskControl:
    """The boldest setting whose expected loss on a new row is at most `risk`.

    Chosen is the first setting from which on (n mean loss + largest loss) / (n + 1) stays within `risk`. The theorem
    wants losses that never grow along the settings, such as the share of true labels that sets leave out as the sets
    grow; with misses as losses this is split conformal prediction.

    Args:
        losses: of calibration rows at every setting, ordered from bold to cautious, shape (rows, settings).
        risk: bound on the expected loss of an exchangeable new row.
        largest_loss: that any row can have.

    Raises:
        InputError: losses that are missing, out of range or grow along the settings, or a risk that not even the last
            setting meets.

    Source: A. Angelopoulos, S. Bates, A. Fisch, L. Lei, T. Schuster, "Conformal risk control" (2024).

    >>> thresholds = np.linspace(0, 1, 101)
    >>> scores = (np.arange(99) + 0.5) / 99
    >>> float(thresholds[conformal_risk_control(scores[:, None] > thresholds, 0.1).index])
    0.91
    """
    losses = _check_losses(losses, largest_loss, monotone=True)
    rows = len(losses)
    bound = (losses.sum(0) + largest_loss) / (rows + 1)
    within = bound <= risk + 1e-12
    if not within[-1]:
        least = f"; {int(np.ceil(largest_loss / risk - 1))} rows or more are needed at best" if risk > 0 else ""
        raise InputError(
            f"not even the most cautious setting has a risk within {risk:g}: its bound is {bound[-1]:.4g} with {rows} "
            f"rows{least}; add a more cautious setting (everything), add rows or raise the risk"
        )
    return _chosen(losses, _first_lasting(within))


def risk_p_value(losses: Any, risk: float, *, bound: Bound = "betting") -> Float[np.ndarray, " settings"]:
    """P-values of "the expected loss exceeds `risk`": how surprising losses this small would be if it did.

    Args:
        losses: between 0 and 1, independent rows, shape (rows, settings) or (rows,).
        risk: the expected loss that is to be ruled out, strictly between 0 and 1.
        bound: `"betting"` (Waudby-Smith and Ramdas: adapts to the variance of the losses), `"hoeffding-bentkus"`
            (needs the mean alone), or `"binomial"` (exact, for losses of 0 and 1).

    Sources: S. Bates, A. Angelopoulos, L. Lei, J. Malik, M. Jordan, "Distribution-free, risk-controlling prediction
    sets" (2021); A. Angelopoulos, S. Bates, E. Candes, M. Jordan, L. Lei, "Learn then test" (2021); I. Waudby-Smith,
    A. Ramdas, "Estimating means of bounded random variables by betting" (2024).

    >>> risk_p_value(np.zeros(30), 0.1, bound="binomial").round(3).tolist()
    [0.042]
    """
    losses = _check_losses(losses, 1.0, monotone=False)
    if not 0 < risk < 1:
        raise InputError(f"risk must lie strictly between 0 and 1, got {risk}")
    rows, mean = len(losses), losses.mean(0)
    if bound == "binomial":
        if not np.isin(losses, (0.0, 1.0)).all():
            raise InputError("the binomial bound needs losses of 0 and 1: use bound='betting' for others")
        return binom.cdf(np.rint(losses.sum(0)), rows, risk)
    if bound == "hoeffding-bentkus":
        low = np.minimum(mean, risk)
        with np.errstate(divide="ignore", invalid="ignore"):
            first = np.where(low > 0, low * np.log(low / risk), 0.0)
            divergence = first + (1 - low) * np.log((1 - low) / (1 - risk))
        bentkus = np.e * binom.cdf(np.ceil(rows * mean - 1e-9), rows, risk)
        return np.minimum(np.minimum(np.exp(-rows * divergence), bentkus), 1.0)
    if bound != "betting":
        raise InputError(f"unknown bound {bound!r}: use betting, hoeffding-bentkus or binomial")
    # Stakes depend on earlier rows alone, so that the wealth is a supermartingale where the expected loss is above.
    count = np.arange(1, rows + 1)[:, None]
    running = (0.5 + np.cumsum(losses, 0)) / (1 + count)
    variance = (0.25 + np.cumsum((losses - running) ** 2, 0)) / (1 + count)
    before = np.concatenate([np.full((1, losses.shape[1]), 0.25), variance[:-1]])
    stake = np.minimum(np.sqrt(2 * np.log(20) / (rows * before)), 0.999 / (1 - risk))
    wealth = np.cumsum(np.log1p(stake * (risk - losses)), 0).max(0)
    return np.exp(-np.maximum(wealth, 0.0))


def risk_controlling_setting(
    losses: Any, risk: float, failure_probability: float, *, bound: Bound = "betting"
) -> RiskControl:
    """The boldest setting whose expected loss is at most `risk`, except with `failure_probability`.

    Settings are tested from the most cautious on, each at the full `failure_probability`, until one is not certain
    enough: fixed-sequence testing, so that the losses need not be monotone. Where they are, this is RCPS.

    Args:
        losses: between 0 and 1, of independent calibration rows, from bold to cautious, shape (rows, settings).
        risk: bound on the expected loss.
        failure_probability: that the calibration rows mislead, delta.
        bound: see `risk_p_value`.

    Raises:
        InputError: not even the last setting can be certified.

    >>> losses = np.random.default_rng(0).random((2000, 1)) > np.linspace(0.5, 1, 51)
    >>> found = risk_controlling_setting(losses, 0.2, 0.05, bound="binomial")
    >>> bool(0.8 < np.linspace(0.5, 1, 51)[found.index] < 0.84)
    True
    """
    losses = _check_losses(losses, 1.0, monotone=False)
    if not 0 < failure_probability < 1:
        raise InputError(f"failure_probability must lie strictly between 0 and 1, got {failure_probability}")
    certain = risk_p_value(losses, risk, bound=bound) <= failure_probability
    if not certain[-1]:
        raise InputError(
            f"not even the most cautious setting is certain to have a risk within {risk:g}: its mean loss is "
            f"{losses[:, -1].mean():.4g} over {len(losses)} rows; add rows, a more cautious setting, or raise the risk"
        )
    return _chosen(losses, _first_lasting(certain))


def _first_lasting(good: np.ndarray) -> int:
    """The first index from which on all are good."""
    return len(good) - int((~good[::-1]).argmax()) if not good.all() else 0


def _chosen(losses: np.ndarray, index: int) -> RiskControl:
    column = losses[:, index]
    error = column.std(ddof=1) / np.sqrt(len(column)) if len(column) > 1 else np.inf
    return RiskControl(index, float(column.mean()), float(error))


def _check_losses(losses: Any, largest: float, *, monotone: bool) -> Float[np.ndarray, "rows settings"]:
    losses = np.asarray(losses, np.float64)
    losses = losses[:, None] if losses.ndim == 1 else losses
    if losses.ndim != 2 or 0 in losses.shape:
        raise InputError(f"losses must have shape (rows, settings) with at least one of each, got {losses.shape}")
    wrong = ~((losses >= 0) & (losses <= largest + 1e-12))
    if wrong.any():
        row, setting = (int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"the loss of row {row} at setting {setting} is {losses[row, setting]}: losses lie between 0 and "
            f"{largest:g}; divide them by their largest possible value"
        )
    if monotone and (np.diff(losses, axis=1) > 1e-12).any():
        row, setting = (int(i) for i in np.argwhere(np.diff(losses, axis=1) > 1e-12)[0])
        raise InputError(
            f"the loss of row {row} grows from setting {setting} to {setting + 1}: order the settings from bold to "
            "cautious, or use risk_controlling_setting, which needs no order"
        )
    return losses
