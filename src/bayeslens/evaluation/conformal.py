"""Split conformal intervals and sets: coverage that holds whatever the model, from held-out rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from bayeslens.core.errors import InputError


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
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie strictly between 0 and 1, got {coverage}")
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise InputError(f"conformal scores must be a vector with at least one row, got shape {scores.shape}")
    order = np.argsort(scores)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    # The new row counts as one at infinity; the tolerance undoes rounding in (n + 1) * coverage.
    mass = np.cumsum(weights[order]) / (weights.sum() + weights.mean())
    index = np.searchsorted(mass, coverage - 1e-12)
    return float(scores[order][index]) if index < len(scores) else float("inf")


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


def class_scores(probs: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Adaptive (APS) score of every class: probability of all classes likelier than it, plus half its own.

    Source: Romano, Sesia and Candes 2020, with the random tie-break replaced by its mean, so that sets are
    reproducible.

    >>> class_scores(np.array([[0.7, 0.2, 0.1]])).round(2).tolist()
    [[0.35, 0.8, 0.95]]
    """
    probs = np.asarray(probs, np.float64)
    order = np.argsort(-probs, axis=1, kind="stable")
    ordered = np.take_along_axis(probs, order, 1)
    scores = np.cumsum(ordered, 1) - ordered / 2
    result = np.empty_like(scores)
    np.put_along_axis(result, order, scores, 1)
    return result


def prediction_sets(probs: Any, threshold: float) -> Bool[np.ndarray, "rows classes"]:
    """Classes whose score is within the threshold; the likeliest class always belongs.

    >>> prediction_sets(np.array([[0.7, 0.2, 0.1]]), 0.8).tolist()
    [[True, True, False]]
    """
    probs = np.asarray(probs)
    inside = class_scores(probs) <= threshold + 1e-12
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
