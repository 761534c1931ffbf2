"""Similarity-distance-magnitude activations: how far a classifier can be trusted, from its training rows.

Sources: A. Schmaltz, "Similarity-Distance-Magnitude universal verification" (2025), and "Similarity-Distance-Magnitude
activations" (2025), whose form of the high-reliability region is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar

from bayeslens.core.errors import InputError

_MOST_NEIGHBOURS = 1000  # as in the source's code
_CHUNK = 1024  # rows whose distances are held at once


class SDMOutput(NamedTuple):
    """What is known of each row.

    `probs` are the activations, `predicted` the classifier's classes, `similarity` counts neighbours (q), `distance`
    is the share of calibration rows at least as far from training (d), and `rescaled_similarity` is the lesser of the
    count and (2 + q) to the power of the predicted class's activation.
    """

    probs: Float[np.ndarray, "rows classes"]
    predicted: Int[np.ndarray, " rows"]
    similarity: Float[np.ndarray, " rows"]
    distance: Float[np.ndarray, " rows"]
    rescaled_similarity: Float[np.ndarray, " rows"]


class SimilarityDistanceMagnitude(eqx.Module):
    """A softmax whose base grows with similar training rows and whose exponent shrinks with distance from them.

    The activation of class i is (2 + q)^(d z_i), normalized, for scaled logits z. q is the number of nearest training
    rows, counted until the first exception, that have the predicted class as their label and were given it by the
    classifier. d is the share of calibration rows that lie at least as far from their nearest training row, least
    over classes: 1 near the training rows, 0 far out, where the activation is uniform. The predicted class stays.

    `select` names the rows in the high-reliability region: similar enough (`least_similarity`), and with the
    predicted class as the only one that reaches its threshold.
    """

    support: Float[np.ndarray, "rows features"]
    support_class: Int[np.ndarray, " rows"]
    distances: tuple[Float[np.ndarray, " rows"], ...]
    scale: float
    thresholds: Float[np.ndarray, " classes"]
    least_similarity: float
    accuracy: float

    @classmethod
    def fit(
        cls,
        features: Float[np.ndarray, "rows features"],
        logits: Float[np.ndarray, "rows classes"],
        labels: Any,
        calibration_features: Float[np.ndarray, "held_out features"],
        calibration_logits: Float[np.ndarray, "held_out classes"],
        calibration_labels: Any,
        *,
        accuracy: float = 0.95,
    ) -> SimilarityDistanceMagnitude:
        """Remember the training rows; find the logits' scale and the high-reliability region on held-out rows.

        The sources train a last layer under this activation, which gives its logits their scale. Here the classifier
        is as it is, and its logits are multiplied by the number that maximizes the log score of the activations of
        the calibration rows.

        A candidate for the least similarity is accepted where, among the calibration rows that reach it, every
        class's threshold, the (1 - accuracy) quantile of the activation of the true class, is at least `accuracy`.
        The least such candidate is taken; where there is none, nothing is ever selected.

        Args:
            features: what the classifier sees of its training rows, for instance its last hidden layer.
            logits: its logits for them.
            labels: their class codes.
            calibration_features, calibration_logits, calibration_labels: the same for rows not trained on.
            accuracy: wanted of the selected rows, whatever their class.

        Raises:
            InputError: shapes that do not fit, features that are not finite, or an accuracy that a guess reaches.

        >>> y = np.arange(400) % 2
        >>> x = np.random.default_rng(0).normal(4.0 * y - 2, 0.5)[:, None]
        >>> logits = np.hstack([-x, x])
        >>> parts = (x[:200], logits[:200], y[:200]), (x[200:], logits[200:], y[200:])
        >>> sdm = SimilarityDistanceMagnitude.fit(*parts[0], *parts[1])
        >>> sdm.select(np.array([[2.0], [90.0]]), np.array([[-2.0, 2.0], [-90.0, 90.0]])).tolist()
        [True, False]
        """
        features, logits, labels = _checked(features, logits, labels)
        held_out = _checked(calibration_features, calibration_logits, calibration_labels)
        classes = logits.shape[1]
        if held_out[0].shape[1] != features.shape[1] or held_out[1].shape[1] != classes:
            raise InputError("training and calibration rows need the same features and classes")
        if not 1 / classes < accuracy < 1:
            raise InputError(f"accuracy must lie between 1/classes = {1 / classes:.3g} and 1, got {accuracy}")
        # A training row speaks for a class only if its label and its prediction agree on it.
        support_class = np.where(logits.argmax(1) == labels, labels, -1)
        blank = cls(features, support_class, (), 1.0, np.ones(classes), np.inf, accuracy)
        similarity, nearest = blank._neighbours(held_out[0], held_out[1].argmax(1))
        truth, rows = held_out[2], np.arange(len(held_out[2]))
        distances = tuple(np.sort(nearest[(truth == k) & (similarity > 0)]) for k in range(classes))

        def activated(log_scale: float) -> SDMOutput:
            scaled = cls(
                features, support_class, distances, float(np.exp(log_scale)), np.ones(classes), np.inf, accuracy
            )
            return scaled._activated(held_out[1], similarity, nearest)

        def loss(log_scale: float) -> float:
            return -np.log(np.maximum(activated(log_scale).probs[rows, truth], 1e-300)).mean()

        log_scale = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x
        found = activated(log_scale)
        thresholds, least = _region(found.probs[rows, truth], found.rescaled_similarity, truth, classes, accuracy)
        return cls(features, support_class, distances, float(np.exp(log_scale)), thresholds, least, accuracy)

    def __call__(
        self, features: Float[np.ndarray, "rows features"], logits: Float[np.ndarray, "rows classes"]
    ) -> SDMOutput:
        """Activations of new rows, and what they are made from."""
        features, logits, _ = _checked(features, logits, np.zeros(len(features), int))
        return self._activated(logits, *self._neighbours(features, logits.argmax(1)))

    def select(
        self, features: Float[np.ndarray, "rows features"], logits: Float[np.ndarray, "rows classes"]
    ) -> Bool[np.ndarray, " rows"]:
        """Rows whose prediction can be relied on; the others are to be abstained from."""
        found = self(features, logits)
        reached = found.probs >= self.thresholds
        alone = reached.sum(1) == 1
        own = reached[np.arange(len(reached)), found.predicted]
        # Less than one neighbour is none: such rows are out of distribution.
        similar = (found.rescaled_similarity >= 1) & (found.rescaled_similarity >= self.least_similarity)
        return similar & alone & own

    def _neighbours(self, features: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Similarity and distance to the nearest training row."""
        count = min(_MOST_NEIGHBOURS, len(self.support))
        squares = np.square(self.support).sum(1)
        similarity, nearest = np.empty(len(features)), np.empty(len(features))
        for start in range(0, len(features), _CHUNK):
            part = slice(start, start + _CHUNK)
            x = features[part]
            distance = np.square(x).sum(1)[:, None] + squares - 2 * x @ self.support.T
            order = np.argpartition(distance, count - 1, axis=1)[:, :count]
            order = np.take_along_axis(order, np.argsort(np.take_along_axis(distance, order, 1), 1), 1)
            same = self.support_class[order] == predicted[part, None]
            similarity[part] = np.where(same.all(1), count, same.argmin(1))
            nearest[part] = np.sqrt(np.maximum(distance[np.arange(len(x)), order[:, 0]], 0.0))
        return similarity, nearest

    def _activated(self, logits: np.ndarray, similarity: np.ndarray, nearest: np.ndarray) -> SDMOutput:
        shares = [
            1 - np.searchsorted(d, nearest, side="left") / len(d) if len(d) else np.zeros(len(nearest))
            for d in self.distances
        ]
        distance = np.min(shares, axis=0)
        scores = (logits - logits.max(1, keepdims=True)) * (self.scale * distance * np.log(2 + similarity))[:, None]
        probs = np.exp(scores)
        probs /= probs.sum(1, keepdims=True)
        predicted = logits.argmax(1)
        power = (2 + similarity) ** probs[np.arange(len(probs)), predicted]
        return SDMOutput(probs, predicted, similarity, distance, np.minimum(similarity, power))


def _region(
    true_activation: np.ndarray, rescaled: np.ndarray, truth: np.ndarray, classes: int, accuracy: float
) -> tuple[np.ndarray, float]:
    """The thresholds of the least similarity at which all of them reach the accuracy."""
    for candidate in np.unique(rescaled[rescaled >= 1]):
        inside = rescaled >= candidate
        threshold = np.zeros(classes)
        for k in range(classes):
            of_class = np.sort(true_activation[inside & (truth == k)])
            if len(of_class):
                threshold[k] = of_class[min(int((1 - accuracy) * len(of_class)), len(of_class) - 1)]
        if (threshold >= accuracy).all():
            return threshold, float(candidate)
    return np.ones(classes), float("inf")


def _checked(features: Any, logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features, logits = np.asarray(features, np.float64), np.asarray(logits, np.float64)
    labels = np.asarray(labels)
    if features.ndim != 2 or logits.ndim != 2 or len(features) != len(logits) or labels.shape != logits.shape[:1]:
        raise InputError(
            "need features of shape (rows, features), logits of shape (rows, classes) and a label per row, got "
            f"{features.shape}, {logits.shape} and {labels.shape}"
        )
    for name, array in (("features", features), ("logits", logits)):
        wrong = ~np.isfinite(array).all(1)
        if wrong.any():
            raise InputError(f"the {name} of row {wrong.argmax()} are not finite: leave that row out")
    wrong = ~np.isin(labels, np.arange(logits.shape[1]))
    if wrong.any():
        raise InputError(f"the label of row {wrong.argmax()} is {labels[wrong.argmax()]}: give class codes from 0 on")
    return features, logits, labels.astype(int)
