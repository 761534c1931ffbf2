"""Which rows are unlike the training table: distance to the nearest training rows, as a conformal p-value."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float

from bayeslens.core.table import Table, take

_REFERENCE_ROWS = 2000
_NEIGHBOURS = 3
_CHUNK = 4096


class Familiarity(eqx.Module):
    """Distances from training rows to their neighbours, against which later rows are compared.

    Features are standardized and one-hot; `distances` are those of the reference rows among themselves, sorted.
    """

    table: Table
    reference: Float[np.ndarray, "rows inputs"]
    distances: Float[np.ndarray, " rows"]

    @classmethod
    def fit(cls, data: Any, *, weights: Any = None, seed: int = 0) -> Familiarity:
        """Keep at most 2,000 training rows as reference.

        Args:
            data: the training rows, a frame or an array.
            weights: how much each row counts in the means and scales of the features, shape (rows,); None is alike.
            seed: of the choice of reference rows.

        >>> f = Familiarity.fit(np.random.default_rng(0).normal(size=(200, 2)))
        >>> f.unfamiliar(np.array([[0.0, 0.0], [50.0, -50.0]])).tolist()
        [False, True]
        """
        table = Table.from_data(data, weights)
        rows = len(data)
        kept = np.sort(np.random.default_rng(seed).permutation(rows)[:_REFERENCE_ROWS])
        reference = table.dense(take(data, kept))
        return cls(table, reference, np.sort(_neighbour_distance(reference, reference, skip=1)))

    def p_value(self, data: Any) -> Float[np.ndarray, " rows"]:
        """Share of training rows that lie at least as far from their neighbours: small means unfamiliar."""
        distance = self.distance(data)
        larger = len(self.distances) - np.searchsorted(self.distances, distance, side="left")
        return (larger + 1) / (len(self.distances) + 1)

    def distance(self, data: Any) -> Float[np.ndarray, " rows"]:
        """Distance to the third nearest reference row, in standard deviations."""
        return _neighbour_distance(self.table.dense(data), self.reference, skip=0)

    def unfamiliar(self, data: Any, distance: Any = None) -> Bool[np.ndarray, " rows"]:
        """Rows far from all training rows, or with a category never seen in training.

        Far is 1.5 times as far out as 99% of the training rows, so that small tables do not flag by chance.

        Args:
            data: rows.
            distance: what `distance(data)` gave, where it is known already.
        """
        edge = 1.5 * np.quantile(self.distances, 0.99)
        distance = self.distance(data) if distance is None else distance
        return (distance > edge) | self.table.unseen_categories(data)


def _neighbour_distance(x: np.ndarray, reference: np.ndarray, *, skip: int) -> np.ndarray:
    rank = min(_NEIGHBOURS - 1 + skip, len(reference) - 1)
    norms = np.square(reference).sum(1)
    result = []
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        squared = np.square(part).sum(1)[:, None] + norms - 2 * part @ reference.T
        result.append(np.sqrt(np.maximum(np.partition(squared, rank, axis=1)[:, rank], 0.0)))
    return np.concatenate(result) if result else np.zeros(0)
