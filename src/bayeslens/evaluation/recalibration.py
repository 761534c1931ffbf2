"""Recalibration: maps from predicted to better calibrated class probabilities, and the choice among them.

Every map is fitted on held-out rows and called on a Categorical distribution. `calibrating.calibrate` chooses one for
a predictive by cross-validated log score. `Temperature` and `QuantileMap` are in `calibration`, h-calibration is in
`h_calibration`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.evaluation.calibration import checked_probabilities, smoothed_isotonic

_PRIOR_ROWS = 20.0  # see `Temperature`: how many rows the prior around no change is worth


class Platt(eqx.Module):
    """Two classes: the log-odds times a slope plus an intercept, (Platt 1999, on log-odds)."""

    slope: Float[np.ndarray, ""]
    intercept: Float[np.ndarray, ""]
    floor: float

    @classmethod
    def fit(cls, probs: Float[np.ndarray, "rows 2"], labels: Any, *, prior_rows: float = _PRIOR_ROWS) -> Platt:
        """Maximize the held-out log score, with Normal priors around no change worth `prior_rows` rows.

        Raises:
            InputError: not two classes.

        >>> p = Platt.fit(np.tile([[0.9, 0.1], [0.1, 0.9]], (100, 1)), np.tile([0, 1, 1, 1], 50))
        >>> bool(p.slope < 1), bool(p.intercept > 0)
        (True, True)
        """
        probs, labels = _two_classes(cls, probs, labels)
        prior = np.full(1, prior_rows)
        slope, intercept, floor = _logistic(lambda f: _log_odds(probs, f)[:, None], labels, prior, prior_rows / 4)
        return cls(slope[0], np.asarray(intercept), floor)

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        return _binary(self.slope * _log_odds(_probs(distribution), self.floor) + self.intercept)


class BetaCalibration(eqx.Module):
    """Two classes: log-odds = a ln p - b ln(1 - p) + c with a, b >= 0, so that both ends bend on their own.

    Source: M. Kull, T. Silva Filho, P. Flach, "Beta calibration" (2017).
    """

    slopes: Float[np.ndarray, " 2"]
    intercept: Float[np.ndarray, ""]
    floor: float

    @classmethod
    def fit(
        cls, probs: Float[np.ndarray, "rows 2"], labels: Any, *, prior_rows: float = _PRIOR_ROWS
    ) -> BetaCalibration:
        """Maximize the held-out log score, with Normal priors around no change worth `prior_rows` rows.

        Raises:
            InputError: not two classes.

        >>> rough = np.tile([[0.9, 0.1], [0.1, 0.9]], (100, 1))
        >>> BetaCalibration.fit(rough, np.tile([0, 1, 1, 1], 50)).slopes.shape
        (2,)
        """
        probs, labels = _two_classes(cls, probs, labels)
        prior = np.full(2, prior_rows / 2)
        slopes, intercept, floor = _logistic(lambda f: _log_both(probs, f), labels, prior, prior_rows / 4, True)
        return cls(slopes, np.asarray(intercept), floor)

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        return _binary(_log_both(_probs(distribution), self.floor) @ self.slopes + self.intercept)


class VectorScaling(eqx.Module):
    """Log-probabilities times a slope per class plus an intercept per class (Guo et al. 2017)."""

    slopes: Float[np.ndarray, " classes"]
    intercepts: Float[np.ndarray, " classes"]
    floor: float

    @classmethod
    def fit(
        cls, probs: Float[np.ndarray, "rows classes"], labels: Any, *, prior_rows: float = _PRIOR_ROWS
    ) -> VectorScaling:
        """Maximize the held-out log score, with Normal priors around no change worth `prior_rows` rows.

        >>> rough = np.tile([[0.8, 0.1, 0.1]], (300, 1))
        >>> v = VectorScaling.fit(rough, np.arange(300) % 3)
        >>> bool(v.intercepts[0] < v.intercepts[1])
        True
        """
        weights, intercepts, floor = _softmax_regression(probs, labels, prior_rows, diagonal=True)
        return cls(np.diag(weights).copy(), intercepts, floor)

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        return _categorical(_softmax(self.slopes * _log_probs(_probs(distribution), self.floor) + self.intercepts))


class DirichletCalibration(eqx.Module):
    """Log-probabilities times a matrix plus an intercept per class: matrix scaling shrunk towards no change.

    Off-diagonal entries and intercepts are regularized, after M. Kull et al., "Beyond temperature scaling: obtaining
    well-calibrated multiclass probabilities with Dirichlet calibration" (2019).
    """

    weights: Float[np.ndarray, "classes classes"]
    intercepts: Float[np.ndarray, " classes"]
    floor: float

    @classmethod
    def fit(
        cls, probs: Float[np.ndarray, "rows classes"], labels: Any, *, prior_rows: float = _PRIOR_ROWS
    ) -> DirichletCalibration:
        """Maximize the held-out log score, with Normal priors around no change.

        The diagonal's prior is worth `prior_rows` rows, that of an off-diagonal entry as many times more as there
        are other classes, so that a row of the matrix moves as much as in `VectorScaling`.

        >>> rough = np.tile([[0.8, 0.1, 0.1]], (300, 1))
        >>> DirichletCalibration.fit(rough, np.arange(300) % 3).weights.shape
        (3, 3)
        """
        return cls(*_softmax_regression(probs, labels, prior_rows, diagonal=False))

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        return _categorical(_softmax(_log_probs(_probs(distribution), self.floor) @ self.weights.T + self.intercepts))


class Isotonic(eqx.Module):
    """The best increasing map of each class's probability, linear between its steps, and renormalized.

    `knots` and `levels` are padded by their last entries. Half a row of the other outcome stands beyond each end of
    the held-out rows, so that no probability becomes 0 or 1. Two classes share one map.

    Source: B. Zadrozny, C. Elkan, "Transforming classifier scores into accurate multiclass probability estimates"
    (2002).
    """

    knots: Float[np.ndarray, "maps knots"]
    levels: Float[np.ndarray, "maps knots"]

    @classmethod
    def fit(cls, probs: Float[np.ndarray, "rows classes"], labels: Any) -> Isotonic:
        """Least squares under monotonicity, by pooling adjacent violators; rows of equal probability count together.

        >>> m = Isotonic.fit(np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]]), [0, 1, 0, 1])
        >>> m(dist.CategoricalProbs(np.array([[0.5, 0.5]]))).probs.round(2).tolist()
        [[0.5, 0.5]]
        """
        probs, labels = checked_probabilities(probs, labels)
        maps = [_isotonic(probs[:, k], labels == k) for k in _mapped(probs)]
        longest = max(len(x) for x, _ in maps)
        knots, levels = (
            np.stack([np.pad(pair[i], (0, longest - len(pair[i])), mode="edge") for pair in maps]) for i in (0, 1)
        )
        return cls(knots, levels)

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        return _each_class(_probs(distribution), [_interpolated(*m) for m in zip(self.knots, self.levels, strict=True)])


class HistogramBinning(eqx.Module):
    """Every probability becomes the frequency of its bin; bins hold equal numbers of rows (Zadrozny and Elkan 2001).

    Frequencies are Jeffreys posterior means, (hits + 1/2) / (rows + 1), so that no probability becomes 0 or 1.
    """

    edges: Float[np.ndarray, "maps edges"]
    frequencies: Float[np.ndarray, "maps bins"]

    @classmethod
    def fit(cls, probs: Float[np.ndarray, "rows classes"], labels: Any, *, bins: int = 10) -> HistogramBinning:
        """Count the outcomes of each bin, for every class against the rest.

        >>> probs = np.array([[0.9, 0.1]] * 9 + [[0.2, 0.8]] * 9)
        >>> m = HistogramBinning.fit(probs, [1] * 9 + [0] * 9, bins=2)
        >>> m(dist.CategoricalProbs(probs[:1])).probs.round(2).tolist()
        [[0.05, 0.95]]
        """
        probs, labels = checked_probabilities(probs, labels)
        edges, frequencies = [], []
        for k in _mapped(probs):
            inner = np.quantile(probs[:, k], np.arange(1, bins) / bins, method="inverted_cdf")
            bin_of = np.searchsorted(inner, probs[:, k], side="left")
            rows, hits = (np.bincount(bin_of, w, minlength=bins) for w in (None, (labels == k).astype(float)))
            edges.append(inner)
            frequencies.append((hits + 0.5) / (rows + 1))
        return cls(np.stack(edges), np.stack(frequencies))

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        pairs = zip(self.edges, self.frequencies, strict=True)
        return _each_class(_probs(distribution), [lambda p, e=e, f=f: f[np.searchsorted(e, p)] for e, f in pairs])


# Fitting


def _logistic(
    features_at: Callable[[float], np.ndarray],
    labels: np.ndarray,
    prior: np.ndarray,
    intercept_prior: float,
    positive: bool = False,
) -> tuple[np.ndarray, float, float]:
    """Logistic regression whose slopes are drawn to 1 and whose intercept to 0 with these precisions.

    Returns slopes, intercept, and the floor of the probabilities under which this fits best.
    """
    middle, precision = np.append(np.ones(len(prior)), 0.0), np.append(prior, intercept_prior)
    bounds = [(0.0 if positive else None, None)] * len(prior) + [(None, None)]

    def fit(floor: float) -> tuple:
        design = np.column_stack([features_at(floor), np.ones(len(labels))])

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            score, gap = design @ theta, theta - middle
            value = np.logaddexp(0, score).sum() - labels @ score + 0.5 * precision @ gap**2
            return value, design.T @ (expit(score) - labels) + precision * gap

        found = minimize(loss, middle, jac=True, method="L-BFGS-B", bounds=bounds)
        return found.fun, (found.x[:-1], float(found.x[-1]), floor)

    return _best_floor(fit, len(labels))


def _softmax_regression(
    probs: Any, labels: Any, prior_rows: float, *, diagonal: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights and intercepts of softmax regression on log-probabilities, drawn to the identity, and the floor."""
    probs, labels = checked_probabilities(probs, labels)
    classes = probs.shape[1]
    outcome, identity = np.eye(classes)[labels], np.eye(classes)
    precision = prior_rows * np.where(identity > 0, 1.0, classes - 1.0)
    start = np.append(np.ones(classes) if diagonal else identity.ravel(), np.zeros(classes))

    def parts(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = np.diag(theta[:classes]) if diagonal else theta[:-classes].reshape(classes, classes)
        return weights, theta[-classes:]

    def fit(floor: float) -> tuple:
        features = _log_probs(probs, floor)

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            weights, intercepts = parts(theta)
            gap = weights - identity
            scores = features @ weights.T + intercepts
            total = logsumexp(scores, axis=1)
            value = total.sum() - (scores * outcome).sum() + 0.5 * (precision * gap**2).sum()
            value += prior_rows / 8 * (intercepts**2).sum()
            residual = np.exp(scores - total[:, None]) - outcome
            by_weight = residual.T @ features + precision * gap
            by_intercept = residual.sum(0) + prior_rows / 4 * intercepts
            return value, np.append(np.diag(by_weight) if diagonal else by_weight.ravel(), by_intercept)

        found = minimize(loss, start, jac=True, method="L-BFGS-B")
        return found.fun, (*parts(found.x), floor)

    return _best_floor(fit, len(labels))


def _best_floor(fit: Callable[[float], tuple], rows: int) -> Any:
    """What fits best among floors from half a row's worth down to that of certainty.

    Zeros of a forest say little more than that there were few trees; 1e-9 from a network may be meant.
    """
    return min((fit(floor) for floor in np.geomspace(0.5 / rows, 1e-9, 4)), key=lambda pair: pair[0])[1]


def _isotonic(probability: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots and levels of the increasing map: the two ends of every step."""
    values, level = smoothed_isotonic(probability, event)
    turn = np.append(True, np.diff(level) > 0)
    ends = turn | np.append(turn[1:], True)
    return values[ends], level[ends]


def _interpolated(knots: np.ndarray, levels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda p: np.interp(p, knots, levels)


# Small helpers


def _probs(distribution: Distribution) -> np.ndarray:
    return np.asarray(distribution.probs, np.float64)


def _categorical(probs: np.ndarray) -> Distribution:
    return build(dist.CategoricalProbs, probs=probs)


def _binary(log_odds: np.ndarray) -> Distribution:
    return _categorical(np.stack([expit(-log_odds), expit(log_odds)], -1))


def _softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores - logsumexp(scores, axis=-1, keepdims=True))


def _log_probs(probs: np.ndarray, floor: float) -> np.ndarray:
    return np.log(np.maximum(probs, floor))


def _log_both(probs: np.ndarray, floor: float) -> np.ndarray:
    return np.stack([_log_probs(probs[..., 1], floor), -_log_probs(probs[..., 0], floor)], -1)


def _log_odds(probs: np.ndarray, floor: float) -> np.ndarray:
    return _log_both(probs, floor).sum(-1)


def _mapped(probs: np.ndarray) -> range:
    """Classes with a map of their own: the second of two, or all."""
    return range(1, 2) if probs.shape[1] == 2 else range(probs.shape[1])


def _each_class(probs: np.ndarray, maps: list[Callable]) -> Distribution:
    if len(maps) == 1:
        second = maps[0](probs[..., 1])
        return _categorical(np.stack([1 - second, second], -1))
    mapped = np.stack([m(probs[..., k]) for k, m in enumerate(maps)], -1)
    return _categorical(mapped / mapped.sum(-1, keepdims=True))


def _two_classes(cls: type, probs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    probs, labels = checked_probabilities(probs, labels)
    if probs.shape[1] != 2:
        raise InputError(f"{cls.__name__} is for two classes, got {probs.shape[1]}: use VectorScaling")
    return probs, labels
