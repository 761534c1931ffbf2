"""Conformal predictive distributions: whole distributions whose probabilities are calibrated by a theorem."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator
from bayeslens.core.transformed import QuantileDistribution
from bayeslens.evaluation.conformal import check_scores

_MOST_LEVELS = 199  # of one row's distribution


class ConformalPredictiveSystem(eqx.Module):
    """A split conformal predictive system: held-out standardized errors, sorted, as the shape of every prediction.

    The randomized distribution function Q(y) at the outcome is uniform on [0, 1] when calibration rows and the new row
    are exchangeable, whatever the model; the `Distribution` that a call gives lies within 1 / (rows + 1) of it.

    Source: V. Vovk, I. Petej, I. Nouretdinov, V. Manokhin, A. Gammerman, "Computationally efficient versions of
    conformal predictive distributions" (2020); V. Vovk, J. Shen, V. Manokhin, M. Xie, "Nonparametric predictive
    distributions based on conformal prediction" (2019).
    """

    errors: Float[np.ndarray, " rows"]

    @classmethod
    def fit(cls, location: Any, scale: Any, y: Any) -> ConformalPredictiveSystem:
        """Keep (y - location) / scale of held-out rows.

        Args:
            location: predictions of held-out rows, shape (rows,).
            scale: what the errors are measured in, shape (rows,) or a number; positive.
            y: outcomes, shape (rows,).

        Raises:
            InputError: fewer than two rows, missing values or a scale that is not positive.

        >>> system = ConformalPredictiveSystem.fit(np.zeros(9), 1.0, np.arange(9.0))
        >>> d = system(np.array([10.0]), 1.0)
        >>> round(float(d.quantile(np.array([0.5]))[0]), 3)
        14.0
        """
        errors = np.sort(check_scores((np.asarray(y, np.float64) - np.asarray(location)) / _positive(scale)))
        if len(errors) < 2:
            raise InputError("a conformal predictive system needs at least two calibration rows")
        return cls(errors)

    def __call__(self, location: Any, scale: Any) -> QuantileDistribution:
        """The distribution of every new row: its i-th of n quantiles, at level i / (n + 1), is location + scale error.

        With more than 199 calibration rows the quantiles at 199 evenly spaced ranks are kept. Beyond the outermost
        errors, where there is no evidence, the tails are exponential.

        Args:
            location: predictions of new rows, shape (new_rows,).
            scale: shape (new_rows,) or a number.
        """
        rows = len(self.errors)
        kept = np.unique(np.linspace(0, rows - 1, min(rows, _MOST_LEVELS)).round().astype(int))
        location = np.asarray(location, np.float64)
        scale = np.broadcast_to(_positive(scale), location.shape)
        errors = self.errors[kept]
        # Equal errors would be a jump: keep them a rounding error apart.
        errors = errors + 1e-9 * (1 + np.abs(errors).max()) * np.arange(len(kept))
        return QuantileDistribution((kept + 1) / (rows + 1), location[:, None] + scale[:, None] * errors)

    def pit(self, location: Any, scale: Any, y: Any, *, key: Any) -> Float[np.ndarray, " new_rows"]:
        """The randomized distribution function at the outcomes: exactly uniform under exchangeability.

        Args:
            location: predictions of new rows, shape (new_rows,).
            scale: shape (new_rows,) or a number.
            y: their outcomes, shape (new_rows,).
            key: a `jax.random.key`, for the smoothing of the jumps.

        >>> import jax
        >>> system = ConformalPredictiveSystem.fit(np.zeros(9), 1.0, np.arange(9.0))
        >>> p = system.pit(np.zeros(1), 1.0, np.array([3.5]), key=jax.random.key(0))
        >>> bool(0.4 < p[0] < 0.5)
        True
        """
        error = (np.asarray(y, np.float64) - np.asarray(location)) / _positive(scale)
        below = np.searchsorted(self.errors, error, "left")
        equal = np.searchsorted(self.errors, error, "right") - below
        return (below + host_generator(key).random(np.shape(error)) * (equal + 1)) / (len(self.errors) + 1)


def _positive(scale: Any) -> Float[np.ndarray, "..."]:
    scale = np.asarray(scale, np.float64)
    if not (scale > 0).all():
        where = f" in row {int((~(scale > 0)).argmax())}" if scale.ndim else ""
        raise InputError(f"the scale must be positive{where}: use 1.0 where the model gives none")
    return scale
