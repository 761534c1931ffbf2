"""Conformalized quantile regression: boosted quantiles whose coverage is put right on held-out rows."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.special import ndtri

from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.table import Table, Target, take
from bayeslens.core.transformed import QuantileDistribution
from bayeslens.evaluation.conformal import conformal_threshold
from bayeslens.learners.boosted_trees import BoostedTrees, export_trees
from bayeslens.learners.linear import check_weights
from bayeslens.learners.splits import holdout_rows, seed_from

_HELD_OUT_SHARE = 0.25
_LEAVES = 8
_LEARNING_RATE = 0.1
_LEAST_SCALE = 0.01  # of a row's distribution, in standard deviations of the target
_SMOOTHING = 0.5  # weight of the normal quantiles
_LEAST_GAP = 0.25  # between two quantiles, in units of the normal one: bounds the density, and the tails from below


class ConformalizedQuantiles(Learner):
    """Conformalized quantile regression (Romano, Patterson and Candes 2019) on boosted trees.

    One LightGBM model for each level minimizes the quantile loss on three quarters of the rows. On the other quarter
    every level is shifted by the conformal quantile of its errors, outwards from the median, so that with
    exchangeable rows each central interval covers with at least its nominal probability, and at most 2/(n + 1) more
    for n held-out rows. Quantiles that cross are moved outwards too, which keeps that promise.

    Args:
        levels: probabilities of the quantiles, increasing, symmetric about 1/2 and with 1/2. Levels that the held-out
            rows cannot certify (below 1/(n + 1)) are left out.
        num_trees: of each level; 100.

    >>> import jax
    >>> X = np.random.default_rng(0).normal(size=(200, 1))
    >>> predictive = ConformalizedQuantiles(num_trees=5).fit(X, X[:, 0], key=jax.random.key(0))
    >>> low, high = predictive(X).quantile(np.array([[0.05], [0.95]]))
    >>> bool(((low < X[:, 0]) & (X[:, 0] < high)).mean() > 0.8)
    True
    """

    levels: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.975)
    num_trees: int = 100

    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any, weights: Any = None) -> ConformalizedQuantilesPredictive:
        """See `Learner.fit`; the key chooses the held-out rows, weights count in the trees and in the calibration.

        Raises:
            InputError: fewer than 8 rows, levels that are not as above, a target that is not numeric, or weights that
                do not fit.
        """
        levels = _check_levels(self.levels)
        target = Target.from_values(y, "regression")
        weights = check_weights(weights, len(target.values))
        used = np.flatnonzero(weights > 0)
        if len(used) < 8:
            raise InputError(f"conformalized quantiles need at least 8 rows with positive weight, got {len(used)}")
        if len(used) < len(weights):
            X, target, weights = take(X, used), target.rows(used), weights[used]
        weights = weights / weights.mean()  # LightGBM interpolates between rows by whether weights exceed 1
        table = Table.from_data(X, weights)
        seed = seed_from(key)
        train, held_out = holdout_rows(len(used), seed=seed, share=_HELD_OUT_SHARE)
        levels = levels[np.minimum(levels, 1 - levels) * (len(held_out) + 1) >= 1 - 1e-9]
        center, scale = _standardize(target.values, weights)
        y, features = (target.values - center) / scale, table.trees(X)
        trees = tuple(
            _boost(features[train], y[train], weights[train], level, self.num_trees, table.categorical_features)
            for level in levels
        )
        smooth = _smooth(_stack(trees, features[held_out]), levels)
        shifts = _shifts(smooth, y[held_out], levels, weights[held_out])
        return ConformalizedQuantilesPredictive(table, trees, levels, shifts, center, scale)


def _check_levels(levels: Any) -> Float[np.ndarray, " levels"]:
    array = np.asarray(levels, np.float64)
    inside = array.ndim == 1 and len(array) >= 3 and (array > 0).all() and (array < 1).all()
    if not (inside and (np.diff(array) > 0).all() and np.allclose(array + array[::-1], 1)):
        raise InputError(
            f"levels must increase strictly inside (0, 1) and be symmetric about 0.5 with 0.5 itself, got {levels}"
        )
    if len(array) % 2 == 0:
        raise InputError(f"levels must hold 0.5, got {levels}")
    return array


def _standardize(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Weighted median and standard deviation of the target (1 where it does not vary)."""
    center = np.quantile(values, 0.5, weights=weights, method="inverted_cdf")
    return float(center), float(np.sqrt(np.cov(values, ddof=0, aweights=weights)) or 1.0)


def _boost(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, level: float, num_trees: int, categorical: tuple[int, ...]
) -> BoostedTrees:
    """Trees that predict one quantile."""
    import lightgbm

    settings = {
        "objective": "quantile",
        "alpha": level,
        "num_leaves": _LEAVES,
        "learning_rate": _LEARNING_RATE,
        "min_data_in_leaf": int(np.clip(len(y) // 20, 5, 20)),
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,  # a table this size gains little from more, and waits long on a busy machine
        "verbosity": -1,
    }
    data = lightgbm.Dataset(x, y, weight=weights, categorical_feature=list(categorical), params={"verbosity": -1})
    return export_trees([lightgbm.train(settings, data, num_trees)], [num_trees])


def _stack(trees: tuple[BoostedTrees, ...], features: np.ndarray) -> Float[np.ndarray, "rows levels"]:
    return np.concatenate([each(features) for each in trees], 1).astype(np.float64)


def _scale(values: np.ndarray, levels: np.ndarray) -> Float[np.ndarray, "rows 1"]:
    """Standard deviation of the normal quantiles nearest to a row's quantiles."""
    z = ndtri(levels)
    return np.maximum(values @ z / (z @ z), _LEAST_SCALE)[:, None]


def _smooth(raw: np.ndarray, levels: np.ndarray) -> Float[np.ndarray, "rows levels"]:
    """Sorted quantiles, averaged with the normal quantiles nearest to them.

    Levels are fitted apart from each other, so that they cross, or nearly meet in a spike or a tail of no width.
    Coverage does not depend on what is done here: it is put right afterwards.
    """
    ordered = np.sort(raw, 1)
    normal = raw.mean(1, keepdims=True) + _scale(ordered, levels) * ndtri(levels)
    return (1 - _SMOOTHING) * ordered + _SMOOTHING * normal


def _outwards(values: np.ndarray, gaps: np.ndarray) -> Float[np.ndarray, "rows levels"]:
    """Increasing quantiles at least `gaps` (rows, levels - 1) apart: lower ones only go down, upper ones only up."""
    middle = values.shape[1] // 2
    rise = np.pad(np.cumsum(gaps, 1), ((0, 0), (1, 0)))
    flat = values - rise
    above = np.maximum.accumulate(flat[:, middle:], 1)
    below = np.minimum.accumulate(flat[:, middle::-1], 1)[:, ::-1]
    return np.concatenate([below[:, :-1], above], 1) + rise


def _shifts(raw: np.ndarray, y: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> Float[np.ndarray, " levels"]:
    """How far each level moves: conformal thresholds of the errors, above for upper and below for lower levels."""
    shifts = []
    for column, level in zip(raw.T, levels, strict=True):
        if level > 0.5:
            shifts.append(conformal_threshold(y - column, level, weights))
        elif level < 0.5:
            shifts.append(-conformal_threshold(column - y, 1 - level, weights))
        else:
            up, down = (conformal_threshold(s * (y - column), 0.5, weights) for s in (1, -1))
            shifts.append((up - down) / 2)
    return np.array(shifts)


class ConformalizedQuantilesPredictive(Predictive):
    """Quantiles of boosted trees, shifted by their conformal thresholds.

    `trees` has one ensemble of trees for each of the `levels`; they and the `shifts` are of the standardized target,
    (y - `center`) / `scale`.
    """

    table: Table
    trees: tuple[BoostedTrees, ...]
    levels: Float[np.ndarray, " levels"]
    shifts: Float[np.ndarray, " levels"]
    center: float
    scale: float
    classes: tuple | None = None

    def quantiles(self, x: Any) -> Float[np.ndarray, "rows levels"]:
        """The conformalized quantiles of every row, strictly increasing."""
        shifted = _smooth(_stack(self.trees, self.table.trees(x)), self.levels) + self.shifts
        gaps = _LEAST_GAP * _scale(shifted, self.levels) * np.diff(ndtri(self.levels))
        return self.center + self.scale * _outwards(shifted, gaps)

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One member: the distribution with these quantiles, which has a density everywhere."""
        return QuantileDistribution(self.levels, self.quantiles(x)[None]), np.ones(1)
