"""h-calibration: recalibration of classifiers that never changes which class comes first.

Source: W. Huang, G. Cao, J. Xia, J. Chen, H. Wang, J. Zhang, "h-calibration: rethinking classifier recalibration with
probabilistic error-bounded objective" (2025).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.evaluation.calibration import Temperature, checked_probabilities

_CLUSTERS = 15  # of probabilities, whose losses count alike: as in the source
_MAX_EVENTS = 200_000  # pairs of row and class in the fit


class HCalibration(eqx.Module):
    """An increasing piecewise linear map of log-probabilities, renormalized, fitted to the h-calibration loss.

    The map is the same for all classes and strictly increasing, so that the order of the classes within a row, and
    with it the accuracy, stays what it was. `knots` are surprises, -log(probability), from 0 up; `slopes[i]` holds
    from `knots[i]` on.
    """

    knots: Float[np.ndarray, " segments"]
    slopes: Float[np.ndarray, " segments"]
    floor: float

    @classmethod
    def fit(
        cls,
        probs: Float[np.ndarray, "rows classes"],
        labels: Any,
        *,
        window: int = 200,
        error_bound: float = 0.0,
        segments: int = 10,
        num_steps: int = 150,
    ) -> HCalibration:
        """Minimize the loss (see `h_calibration_loss`) by Adam, from the best temperature on.

        Args:
            probs: held-out class probabilities.
            labels: class codes, shape (rows,).
            window: neighbours in order of probability over which predictions and outcomes are averaged; 200 as in
                the source, at most a tenth of all pairs of row and class.
            error_bound: gaps up to this cost nothing (h in the source's title); the source's experiments take 0.
            segments: pieces of the map, finer where more probability lies.
            num_steps: of Adam, all rows in each; the best step is kept.

        >>> rng = np.random.default_rng(0)
        >>> probs = rng.dirichlet(np.ones(3), 500)
        >>> labels = (rng.random((500, 1)) > np.cumsum(probs, 1)).sum(1)
        >>> sharp = probs**3 / (probs**3).sum(1, keepdims=True)
        >>> bool(HCalibration.fit(sharp, labels, num_steps=20).slopes.mean() < 0.7)
        True
        """
        probs, labels = checked_probabilities(probs, labels)
        if window < 1 or error_bound < 0 or segments < 1:
            raise InputError("window and segments must be at least 1, and error_bound at least 0")
        rows = min(len(probs), max(1, _MAX_EVENTS // probs.shape[1]))
        kept = np.linspace(0, len(probs) - 1, rows).round().astype(int)
        probs, labels = probs[kept], labels[kept]
        # Zeros, as of a forest, count for half the least positive probability: their logarithm would rule otherwise.
        floor = float(np.clip(probs[probs > 0].min() / 2, 1e-30, 0.5 / probs.shape[1]))
        window = max(1, min(window, probs.size // 10))
        surprise = _surprise(probs, floor)
        knots = _knots(surprise, segments)
        lengths = _lengths(surprise, knots)
        outcome = np.eye(probs.shape[1])[labels]
        start = np.full(segments, np.log(Temperature.fit(probs, labels).inverse))
        # Steps of 0.03 in log-slope, with Adam's usual decays.
        best, slopes, first, second, position = np.inf, np.exp(start), np.zeros(segments), np.zeros(segments), start
        for step in range(1, num_steps + 1):
            rates = np.exp(position)
            scores = -(lengths @ rates)
            mapped = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
            loss, by_probs = h_calibration_loss(mapped, outcome, window=window, error_bound=error_bound)
            if loss < best:
                best, slopes = loss, rates
            by_scores = mapped * (by_probs - (mapped * by_probs).sum(1, keepdims=True))
            gradient = -np.einsum("rc,rcs->s", by_scores, lengths) * rates
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            scale = np.sqrt(second / (1 - 0.999**step)) + 1e-12
            position = np.clip(position - 0.03 * first / (1 - 0.9**step) / scale, np.log(0.02), np.log(50))
        return cls(knots, slopes, floor)

    def __call__(self, distribution: Distribution) -> Distribution:
        """The recalibrated Categorical."""
        probs = np.asarray(distribution.probs, np.float64)
        scores = -(_lengths(_surprise(probs, self.floor), self.knots) @ self.slopes)
        mapped = np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
        # Two probabilities may become equal by rounding: the class that came first must still do so.
        before, after = (np.expand_dims(p.argmax(-1), -1) for p in (probs, mapped))
        largest = np.take_along_axis(mapped, after, -1)
        np.put_along_axis(mapped, before, np.where(before == after, largest, np.nextafter(largest, 2.0)), -1)
        return build(dist.CategoricalProbs, probs=mapped)


def h_calibration_loss(
    probs: Float[np.ndarray, "rows classes"],
    outcome: Float[np.ndarray, "rows classes"],
    *,
    window: int = 200,
    error_bound: float = 0.0,
) -> tuple[float, Float[np.ndarray, "rows classes"]]:
    """How far predictions and outcomes differ in windows of neighbouring probabilities, and its gradient.

    All pairs of row and class are put in order of their probability. At each, predictions and outcomes are averaged
    over the window around it, and their gap counts as far as it exceeds the error bound. Gaps are averaged within
    clusters of the probabilities, and over clusters, so that the many small probabilities do not outvote the rest.
    The gradient takes order and clusters as given, which they are almost everywhere.

    The source's code also averages over leaving out the rows of one class. That is not done here: with few classes
    of unequal size it makes calibrated probabilities look wrong.

    Args:
        probs: class probabilities.
        outcome: one-hot labels.
        window: neighbours averaged over; a pair stands in the middle of its window.
        error_bound: gaps up to this cost nothing.

    Returns:
        The loss, and its gradient with respect to `probs`.

    >>> loss, gradient = h_calibration_loss(np.array([[0.6, 0.4]]), np.array([[1.0, 0.0]]), window=2)
    >>> gradient.shape
    (1, 2)
    """
    flat = np.ravel(probs)
    order = np.argsort(flat, kind="stable")
    sorted_probs = flat[order]
    gap = _moving_mean(sorted_probs - np.ravel(outcome)[order], window)
    weight = _cluster_weights(sorted_probs)
    excess = np.maximum(np.abs(gap) - error_bound, 0.0)
    gradient = np.empty_like(flat)
    gradient[order] = _moving_mean(weight * np.sign(gap) * (excess > 0), window)
    return float(weight @ excess), gradient.reshape(np.shape(probs))


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window // 2` neighbours on each side; beyond the ends there is nothing, which counts as 0.

    It is its own transpose.
    """
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    return (total[np.minimum(at + half + 1, len(values))] - total[np.maximum(at - half, 0)]) / (2 * half + 1)


def _cluster_weights(sorted_probs: np.ndarray) -> np.ndarray:
    """Weights that sum to 1, alike for all clusters: k-means in one dimension, from equal steps on."""
    centers = np.linspace(sorted_probs[0], sorted_probs[-1], _CLUSTERS)
    total = np.concatenate([[0.0], np.cumsum(sorted_probs)])
    for _ in range(5):
        edges = np.concatenate([[0], np.searchsorted(sorted_probs, (centers[1:] + centers[:-1]) / 2), [len(total) - 1]])
        rows = np.diff(edges)
        centers = np.where(rows > 0, np.diff(total[edges]) / np.maximum(rows, 1), centers)
    return np.repeat(1 / np.maximum(rows, 1) / np.count_nonzero(rows), rows)


def _surprise(probs: np.ndarray, floor: float) -> np.ndarray:
    return -np.log(np.maximum(probs, floor))


def _knots(surprise: np.ndarray, segments: int) -> np.ndarray:
    """Quantiles of the surprises, weighted by the root of their probability: between rows and probability mass."""
    flat = np.sort(surprise, axis=None)
    mass = np.cumsum(np.exp(-flat / 2))
    inner = flat[np.searchsorted(mass, mass[-1] * np.arange(1, segments) / segments)]
    return np.maximum.accumulate(np.concatenate([[0.0], inner]))


def _lengths(surprise: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """How far each surprise reaches into each segment, shape (..., segments)."""
    ends = np.append(knots[1:], np.inf)
    return np.clip(surprise[..., None] - knots, 0.0, ends - knots)
