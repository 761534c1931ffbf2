"""Split conformal intervals and sets: coverage that holds whatever the model, from held-out rows.

Array-level functions; `conformal_sets.conformal` applies them to a table and a predictive.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from bayeslens.core.errors import InputError

_TOLERANCE = 1e-12  # undoes rounding in (n + 1) * coverage


def check_coverage(coverage: float) -> float:
    """The coverage, if it is a probability strictly between 0 and 1.

    Raises:
        InputError: it is not.
    """
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie strictly between 0 and 1, got {coverage}")
    return float(coverage)


def check_scores(scores: Any) -> Float[np.ndarray, " rows"]:
    """Conformal scores as float64, of which at least one is there and none is missing.

    Raises:
        InputError: no vector, no rows, or NaN; infinite scores are allowed.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise InputError(f"conformal scores must be a vector with at least one row, got shape {scores.shape}")
    if np.isnan(scores).any():
        row = int(np.isnan(scores).argmax())
        raise InputError(f"the conformal score of row {row} is NaN: drop the row, or repair the prediction or outcome")
    return scores


def least_calibration_rows(coverage: float) -> int:
    """The fewest calibration rows with which split conformal sets of this coverage are finite.

    >>> least_calibration_rows(0.9), least_calibration_rows(0.95)
    (9, 19)
    """
    check_coverage(coverage)
    return max(1, math.ceil(coverage / (1 - coverage) - 1e-9))


def conformal_threshold(scores: Any, coverage: float, weights: Any = None) -> float:
    """The (n+1)-corrected quantile of calibration scores: a new score is at most this with probability `coverage`.

    Args:
        scores: nonconformity scores of held-out rows, larger for stranger rows, shape (rows,).
        coverage: wanted probability, strictly between 0 and 1.
        weights: likelihood ratios of held-out rows under a known shift (Tibshirani et al. 2019); None is no shift.

    Returns:
        The threshold; infinity when there are too few rows for the coverage.

    Source: Vovk, Gammerman and Shafer 2005; Lei et al. 2018.

    >>> conformal_threshold(np.arange(9.0), 0.9)
    8.0
    >>> conformal_threshold(np.arange(8.0), 0.9)
    inf
    """
    check_coverage(coverage)
    scores = check_scores(scores)
    if weights is not None:
        # A new row of mean weight counts as one at infinity.
        weights = _check_weights(weights, len(scores))
        return float(weighted_thresholds(scores, weights, weights.mean(keepdims=True), coverage)[0])
    rank = math.ceil((len(scores) + 1) * (coverage - _TOLERANCE))
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= len(scores) else float("inf")


def weighted_thresholds(scores: Any, weights: Any, new_weights: Any, coverage: float) -> Float[np.ndarray, " new_rows"]:
    """Weighted conformal quantiles under a known covariate shift: one threshold for every new row.

    Args:
        scores: nonconformity scores of held-out rows, shape (rows,).
        weights: likelihood ratios, target density over source density, of the held-out rows, up to a common factor.
        new_weights: likelihood ratios of the new rows, up to the same factor, shape (new_rows,).
        coverage: wanted probability.

    Returns:
        The least score t so that rows with scores up to t hold the share `coverage` of all weight, where the new row
        counts as one at infinity; infinity where its own weight is too large.

    Raises:
        InputError: weights that are negative, not finite, all zero, or do not fit the rows.

    Source: R. Tibshirani, R. Barber, E. Candes, A. Ramdas, "Conformal prediction under covariate shift" (2019).

    >>> weighted_thresholds(np.arange(9.0), np.ones(9), np.array([1.0, 3.0]), 0.9).tolist()
    [8.0, inf]
    """
    check_coverage(coverage)
    scores = check_scores(scores)
    weights = _check_weights(weights, len(scores))
    new_weights = _check_weights(new_weights, None)
    order = np.argsort(scores)
    mass, total = np.cumsum(weights[order]), weights.sum()
    index = np.searchsorted(mass, (coverage - _TOLERANCE) * (total + new_weights))
    return np.append(scores[order], np.inf)[index]


def _check_weights(weights: Any, rows: int | None) -> Float[np.ndarray, " rows"]:
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or (rows is not None and len(weights) != rows):
        raise InputError(f"weights must have one entry per row, got shape {weights.shape} for {rows} rows")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        row = int((~(np.isfinite(weights) & (weights >= 0))).argmax())
        raise InputError(f"the weight of row {row} is {weights[row]}: likelihood ratios are finite and at least 0")
    if rows is not None and not weights.any():
        raise InputError("all weights are zero: no calibration row resembles the new ones")
    return weights


def mondrian_thresholds(scores: Any, groups: Any, coverage: float) -> dict[Any, float]:
    """One conformal threshold for every group, so that coverage holds within each (Mondrian conformal prediction).

    Args:
        scores: nonconformity scores of held-out rows, shape (rows,).
        groups: the group of each row, of any kind, shape (rows,). With class labels: label-conditional sets.
        coverage: wanted probability in every group.

    Raises:
        InputError: groups with too few rows for the coverage, named with their numbers of rows.

    Source: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic learning in a random world" (2005), chapter 4.

    >>> mondrian_thresholds(np.arange(4.0), ["a", "a", "b", "b"], 0.5)
    {'a': 1.0, 'b': 3.0}
    """
    import pandas as pd

    scores, least = check_scores(scores), least_calibration_rows(coverage)
    codes, labels = pd.factorize(np.asarray(groups), sort=True)
    if len(codes) != len(scores):
        raise InputError(f"there are {len(scores)} scores, but groups for {len(codes)} rows")
    if (codes < 0).any():
        raise InputError(
            f"the group of row {int((codes < 0).argmax())} is missing: give these rows a group of their own"
        )
    sizes = np.bincount(codes, minlength=len(labels))
    if (sizes < least).any():
        few = ", ".join(
            f"{label!r} ({size})" for label, size in zip(labels.tolist(), sizes, strict=True) if size < least
        )
        raise InputError(
            f"coverage {coverage:g} in every group needs at least {least} calibration rows in each, but these have "
            f"fewer: {few}; merge groups, add rows or lower the coverage"
        )
    return {label: conformal_threshold(scores[codes == i], coverage) for i, label in enumerate(labels.tolist())}


def split_conformal(
    location: Any, scale: Any, calibration_scores: Any, coverage: float
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Intervals location ± threshold x scale, with scores |y - location| / scale from held-out rows.

    >>> low, high = split_conformal(np.zeros(1), np.ones(1), np.arange(1.0, 20.0), 0.9)
    >>> low.tolist(), high.tolist()
    ([-18.0], [18.0])
    """
    margin = conformal_threshold(calibration_scores, coverage) * np.asarray(scale)
    return np.asarray(location) - margin, np.asarray(location) + margin


def cqr_scores(lower: Any, upper: Any, y: Any) -> Float[np.ndarray, " rows"]:
    """Conformalized quantile regression scores: how far y lies outside [lower, upper], negative inside.

    Source: Romano, Patterson and Candes 2019. New intervals are [lower - t, upper + t] with
    t = `conformal_threshold(scores, coverage)`.

    >>> cqr_scores(np.array([0.0]), np.array([1.0]), np.array([1.25])).tolist()
    [0.25]
    """
    return np.maximum(np.asarray(lower) - np.asarray(y), np.asarray(y) - np.asarray(upper))


def class_scores(
    probs: Float[np.ndarray, "rows classes"], *, rank_penalty: float = 0.0, free_ranks: int = 1
) -> Float[np.ndarray, "rows classes"]:
    """Adaptive (APS) score of every class: probability of all classes likelier than it, plus half its own.

    Args:
        probs: class probabilities.
        rank_penalty: added for every rank of a class beyond `free_ranks` (RAPS): makes large sets rarer where there
            are many improbable classes. Zero is APS.
        free_ranks: how many of the likeliest classes go without the penalty.

    Sources: Romano, Sesia and Candes 2020, with the random tie-break replaced by its mean, so that sets are
    reproducible; Angelopoulos, Bates, Malik and Jordan 2021 for the penalty.

    >>> class_scores(np.array([[0.7, 0.2, 0.1]])).round(2).tolist()
    [[0.35, 0.8, 0.95]]
    >>> class_scores(np.array([[0.7, 0.2, 0.1]]), rank_penalty=1.0).round(2).tolist()
    [[0.35, 1.8, 2.95]]
    """
    probs = np.asarray(probs, np.float64)
    order = np.argsort(-probs, axis=1, kind="stable")
    ordered = np.take_along_axis(probs, order, 1)
    scores = np.cumsum(ordered, 1) - ordered / 2
    if rank_penalty:
        scores += rank_penalty * np.maximum(np.arange(1, probs.shape[1] + 1) - free_ranks, 0)
    result = np.empty_like(scores)
    np.put_along_axis(result, order, scores, 1)
    return result


def prediction_sets(
    probs: Any, threshold: Any, *, rank_penalty: float = 0.0, free_ranks: int = 1
) -> Bool[np.ndarray, "rows classes"]:
    """Classes whose score is within the threshold; the likeliest class always belongs.

    Args:
        probs: class probabilities, shape (rows, classes).
        threshold: a number, or one for every row.
        rank_penalty: that of the scores from which the threshold was made, see `class_scores`.
        free_ranks: likewise.

    >>> prediction_sets(np.array([[0.7, 0.2, 0.1]]), 0.8).tolist()
    [[True, True, False]]
    """
    probs = np.asarray(probs)
    scores = class_scores(probs, rank_penalty=rank_penalty, free_ranks=free_ranks)
    inside = scores <= np.reshape(threshold, (-1, 1)) + 1e-12
    inside[np.arange(len(probs)), probs.argmax(1)] = True
    return inside


def highest_probability_sets(probs: Any, coverage: float) -> Bool[np.ndarray, "rows classes"]:
    """The fewest classes whose probabilities sum to at least `coverage`: right only if the probabilities are.

    >>> highest_probability_sets(np.array([[0.7, 0.2, 0.1]]), 0.9).tolist()
    [[True, True, False]]
    """
    probs = np.asarray(probs, np.float64)
    order = np.argsort(-probs, axis=1, kind="stable")
    ordered = np.take_along_axis(probs, order, 1)
    result = np.empty(probs.shape, bool)
    # A class belongs while those before it do not reach the coverage; the tolerance is that of float32 probabilities.
    np.put_along_axis(result, order, np.cumsum(ordered, 1) - ordered < coverage - 1e-6, 1)
    return result
