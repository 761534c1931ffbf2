"""Proper scores of draws of several outcomes at once: do they also get right how the outcomes go together?

The multivariate log score is `scores.log_score`, for distributions whose event is a vector.

Sources: T. Gneiting, A. E. Raftery, "Strictly proper scoring rules, prediction, and estimation" (2007), for the energy
score; M. Scheuerer, T. M. Hamill, "Variogram-based proper scoring rules for probabilistic forecasts of multivariate
quantities" (2015); C. Ferro, "Fair scores for ensemble forecasts" (2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError
from bayeslens.evaluation.scores import crps_loss_from_samples

_BLOCK = 2**21  # numbers in the largest temporary array, 16 MB


def energy_loss(
    samples: Float[np.ndarray, "draws rows dimension"], y: Any, *, fair: bool = True
) -> Float[np.ndarray, " rows"]:
    """Energy score of draws of vectors, E|X - y| - E|X - X'|/2 with Euclidean distances. A loss, in the units of y.

    In one dimension it is the CRPS. It sees means and spreads well, dependence less: use `variogram_loss` beside it.
    All pairs of draws are used, in blocks of bounded memory. Coordinates in unlike units should be standardized.

    Args:
        samples: draws of every row.
        y: outcomes, shape (rows, dimension).
        fair: leave each draw's distance to itself out, which makes the loss unbiased for that of the distribution
            which the draws are from; see `crps_loss_from_samples`.

    >>> energy_loss(np.array([[[0.0, 0.0]], [[6.0, 8.0]]]), np.array([[3.0, 4.0]])).tolist()
    [0.0]

    Raises:
        InputError: fewer than two draws, values that are not finite, or shapes that do not agree.
    """
    draws, y = _checked(samples, y)
    if draws.shape[2] == 1:
        return crps_loss_from_samples(draws[..., 0], y[:, 0], fair=fair)
    count = len(draws)
    to_outcome = np.linalg.norm(draws - y, axis=-1).mean(0)
    # Centred, so that squared lengths and products cancel without loss.
    centred = np.ascontiguousarray(np.moveaxis(draws - draws.mean(0), 0, 1))
    squares = (centred**2).sum(-1)
    pairs = np.zeros(len(y))
    several, taken = max(1, _BLOCK // count**2), min(count, max(1, _BLOCK // count))
    for row in range(0, len(y), several):
        rows = slice(row, row + several)
        for start in range(0, count, taken):
            some = slice(start, start + taken)
            distance = centred[rows, some] @ np.swapaxes(centred[rows], 1, 2)
            distance *= -2
            distance += squares[rows, some, None]
            distance += squares[rows, None, :]
            np.sqrt(np.maximum(distance, 0, out=distance), out=distance)
            pairs[rows] += distance.sum((1, 2))
    return to_outcome - 0.5 * pairs / (count * (count - 1 if fair else count))


def variogram_loss(
    samples: Float[np.ndarray, "draws rows dimension"], y: Any, *, order: float = 0.5, fair: bool = True
) -> Float[np.ndarray, " rows"]:
    """Variogram score of draws of vectors: squared errors of E|X_i - X_j|^order, summed over all ordered pairs i, j.

    It sees wrong dependence between outcomes well, and nothing of an error that all of them share: use `energy_loss`
    beside it. Proper, not strictly so.

    Args:
        samples: draws of every row.
        y: outcomes, shape (rows, dimension), at least two dimensions, in comparable units.
        order: power of the differences; 0.5, the source's choice, is the least upset by outliers.
        fair: subtract what the draws' sampling error adds on average, so that the loss is unbiased for that of the
            distribution which the draws are from.

    >>> draws = np.array([[[0.0, 1.0]], [[0.0, 1.0]]])
    >>> variogram_loss(draws, np.array([[0.0, 4.0]])).tolist()  # two ordered pairs, each (2 - 1)^2
    [2.0]

    Raises:
        InputError: fewer than two draws or dimensions, values that are not finite, or shapes that do not agree.
    """
    draws, y = _checked(samples, y)
    count, _, dimension = draws.shape
    if dimension < 2:
        raise InputError("a variogram loss compares outcomes with each other: it needs two dimensions or more")
    total = np.zeros(len(y))
    several = max(1, _BLOCK // (count * dimension))
    for row in range(0, len(y), several):
        x, observed = draws[:, row : row + several], y[row : row + several]
        for i in range(dimension - 1):
            power = np.abs(x[..., i + 1 :] - x[..., i, None]) ** order
            error = np.abs(observed[:, i + 1 :] - observed[:, i, None]) ** order - power.mean(0)
            each = error**2 - (power.var(0, ddof=1) / count if fair else 0.0)
            total[row : row + several] += 2 * each.sum(-1)
    return total


def _checked(samples: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    draws, y = np.asarray(samples, np.float64), np.asarray(y, np.float64)
    if draws.ndim != 3 or y.shape != draws.shape[1:]:
        raise InputError(
            f"draws must have shape (draws, rows, dimension) and outcomes (rows, dimension); got {draws.shape} "
            f"and {y.shape}"
        )
    if len(draws) < 2:
        raise InputError(f"scores of draws need at least two of them, got {len(draws)}: draw more")
    wrong = ~(np.isfinite(draws).all((0, 2)) & np.isfinite(y).all(1))
    if wrong.any():
        raise InputError(f"row {int(wrong.argmax())} holds values that are not finite: drop it or mend its forecast")
    return draws, y
