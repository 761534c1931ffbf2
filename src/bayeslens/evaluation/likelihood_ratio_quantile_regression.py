"""Thresholds that cover under an unknown covariate shift: likelihood-ratio regularized quantile regression (LR-QR)."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Float
from scipy.special import expit

from bayeslens.core.errors import InputError
from bayeslens.evaluation.conformal import check_coverage, check_scores

_BANDWIDTHS = (0.3, 0.1, 0.03, 0.01)  # of the smoothed quantile loss, in units of the scores' quantile
_NEWTON_STEPS = 30
_LOG_RANGE = 6.0  # of beta, around one over the scores' quantile
_FOLDS, _GRID = 3, 10
_LEAST_EIGENVALUE = 1e-3  # directions with less of the largest variance are dropped: thresholds would run away there


class LikelihoodRatioQuantileRegression(eqx.Module):
    """A threshold for every row, linear in its features, whose coverage holds where the features are distributed as in
    the target: a set holds every outcome with score at most `threshold(features)`.

    Coverage under a shift with likelihood ratio r holds for every minimizer of the quantile loss over functions that
    include r. Over all linear functions of many features that minimizer overfits; so it is pulled towards those whose
    multiple beta h is near r, by the penalty E_source[(beta h)^2] - 2 E_target[beta h], which is
    E_source[(beta h - r)^2] up to a constant, yet needs no r.

    `mixing` maps centred features to uncorrelated ones. `beta` times the threshold approximates the likelihood ratio.
    `regularization` is the weight of the penalty, lambda, which was used.

    Source: S. Joshi, S. Kiyani, G. Pappas, E. Dobriban, H. Hassani, "Conformal inference under high-dimensional
    covariate shifts via likelihood-ratio regularization" (2025).
    """

    center: Float[np.ndarray, " features"]
    mixing: Float[np.ndarray, "features components"]
    coefficients: Float[np.ndarray, " components_and_one"]
    beta: float
    regularization: float

    @classmethod
    def fit(
        cls,
        features: Any,
        scores: Any,
        target_features: Any,
        coverage: float,
        *,
        regularization: float | None = None,
    ) -> LikelihoodRatioQuantileRegression:
        """Learn the threshold from scored source rows and target rows without outcomes.

        Args:
            features: of calibration rows from the source, shape (rows, features). An intercept is added. More features
                let more shifts be expressed, at the price of noise: the top of a network, or a table's own columns.
            scores: their nonconformity scores, shape (rows,).
            target_features: of unlabelled target rows, shape (target_rows, features).
            coverage: wanted probability in the target.
            regularization: lambda, for scores in units of their quantile at `coverage`. By default the one of ten
                values for which the objective's gradient is smallest on held-out rows in three folds, as in the paper.
                They reach up to (n_source (1/n_source + 1/n_target))^(-1/3), the order that balances the errors of both
                terms, divided by the second moment of the likelihood ratio's linear projection, so that a strong shift
                does not overrule the scores, and down to a hundredth of that; the paper leaves the constant open.
                Zero is plain quantile regression.

        Raises:
            InputError: shapes that do not fit, missing values, or fewer rows than ten.

        >>> rng = np.random.default_rng(0)
        >>> source, target = rng.normal(size=(400, 3)), rng.normal(size=(400, 3)) + [1.0, 0, 0]
        >>> scores = np.exp(0.5 * source[:, 0]) * np.abs(rng.normal(size=400))
        >>> threshold = LikelihoodRatioQuantileRegression.fit(source, scores, target, 0.9)
        >>> bool(threshold(target).mean() > np.quantile(scores, 0.9))
        True
        """
        check_coverage(coverage)
        features, target = _check_features(features, target_features)
        scores = check_scores(scores)
        if len(scores) != len(features) or len(scores) < 10 or not np.isfinite(scores).all():
            raise InputError(
                f"needed are ten rows or more with a finite score each; got {len(features)} rows and {len(scores)} "
                f"scores, {int(np.isinf(scores).sum())} of them infinite"
            )
        if regularization is not None and regularization < 0:
            raise InputError(f"regularization must be at least 0, got {regularization}")
        center, mixing = _whiten(features)
        source, target = _basis(features, center, mixing), _basis(target, center, mixing)
        unit = float(np.quantile(np.abs(scores), coverage)) or 1.0
        scaled = scores / unit
        if regularization is None:
            regularization = _choose(source, scaled, target, coverage)
        found = _solve(source, scaled, _Moments.of(source, target), coverage, regularization)
        return cls(center, mixing, unit * found.coefficients, found.beta / unit, float(regularization))

    def __call__(self, features: Any) -> Float[np.ndarray, " rows"]:
        """The threshold of every row.

        Args:
            features: shape (rows, features).
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.center):
            raise InputError(f"needed are features of shape (rows, {len(self.center)}), got {features.shape}")
        return _basis(features, self.center, self.mixing) @ self.coefficients

    def likelihood_ratio(self, features: Any) -> Float[np.ndarray, " rows"]:
        """beta times the threshold: what the fit takes the ratio of target to source density for; may be negative."""
        return self.beta * self(features)


class _Moments(NamedTuple):
    """Second moments of the basis in the source, and its mean in the target."""

    square: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray) -> _Moments:
        return cls(source.T @ source / len(source), target.mean(0))


class _Solution(NamedTuple):
    coefficients: np.ndarray
    beta: float


def _check_features(features: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = {"features": np.asarray(features, np.float64), "target_features": np.asarray(target, np.float64)}
    for name, array in arrays.items():
        if array.ndim != 2 or len(array) == 0:
            raise InputError(f"{name} must have shape (rows, features) with at least one row, got {array.shape}")
        if not np.isfinite(array).all():
            row = int((~np.isfinite(array)).any(1).argmax())
            raise InputError(f"row {row} of {name} has missing or infinite entries: impute or drop them")
    source, target = arrays.values()
    if source.shape[1] != target.shape[1]:
        raise InputError(f"source rows have {source.shape[1]} features, target rows {target.shape[1]}: give the same")
    return source, target


def _whiten(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and map to uncorrelated components of unit variance, so that no component dominates a gradient's norm.

    Directions in which the source hardly varies are left out: the paper bounds coefficients, to the same end.
    """
    center = features.mean(0)
    _, singular, directions = np.linalg.svd((features - center) / np.sqrt(len(features)), full_matrices=False)
    kept = singular**2 > _LEAST_EIGENVALUE * max(float(singular[0]) ** 2, 1e-300) if len(singular) else singular > 0
    return center, directions[kept].T / singular[kept]


def _basis(features: np.ndarray, center: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(features)), (features - center) @ mixing])


def _newton(
    basis: np.ndarray,
    scores: np.ndarray,
    moments: _Moments,
    coverage: float,
    regularization: float,
    beta: float,
    start: np.ndarray,
    bandwidth: float,
) -> np.ndarray:
    """The best coefficients for one beta: a convex problem, with the quantile loss smoothed by a logistic kernel."""
    quadratic = 2 * regularization * beta**2 * moments.square
    linear = 2 * regularization * beta * moments.mean
    # Quantile regression alone may have no unique minimizer: this picks the small one.
    quadratic = quadratic + 1e-8 * np.eye(len(start))

    def objective(c: np.ndarray) -> float:
        error = scores - basis @ c
        loss = coverage * error + bandwidth * np.logaddexp(0, -error / bandwidth)
        return float(loss.mean() + 0.5 * c @ quadratic @ c - linear @ c)

    current, value = start, objective(start)
    for _ in range(_NEWTON_STEPS):
        below = expit((basis @ current - scores) / bandwidth)
        gradient = basis.T @ (below - coverage) / len(scores) + quadratic @ current - linear
        curvature = (below * (1 - below) / (bandwidth * len(scores)))[:, None]
        step = np.linalg.solve(basis.T @ (curvature * basis) + quadratic + 1e-6 * np.eye(len(start)), gradient)
        decrease, size = float(gradient @ step), 1.0
        if decrease < 1e-10:
            break
        while size > 1e-6:
            proposal = current - size * step
            reached = objective(proposal)
            if reached <= value - 1e-4 * size * decrease:
                break
            size /= 2
        else:
            break
        current, value = proposal, reached
    return current


def _solve(
    basis: np.ndarray,
    scores: np.ndarray,
    moments: _Moments,
    coverage: float,
    regularization: float,
    start: _Solution | None = None,
) -> _Solution:
    """Both minimizers: for every beta the coefficients are unique, and beta is a root of the profile's derivative."""
    if start is None:
        kept = np.zeros(basis.shape[1])
        kept[0] = np.quantile(scores, coverage)
        beta = 1.0 / max(kept[0], 1e-12)
        for bandwidth in _BANDWIDTHS:
            kept = _newton(basis, scores, moments, coverage, regularization, beta, kept, bandwidth)
    else:
        kept, beta = start

    def best_beta(coefficients: np.ndarray) -> float:
        return float(moments.mean @ coefficients / max(coefficients @ moments.square @ coefficients, 1e-24))

    if regularization == 0:
        return _Solution(kept, best_beta(kept))

    def slope(log_beta: float) -> float:
        nonlocal kept
        b = np.exp(log_beta)
        kept = _newton(basis, scores, moments, coverage, regularization, b, kept, _BANDWIDTHS[-1])
        return float(b - best_beta(kept))

    # As in the paper beta stays within an interval: beyond it thresholds vanish beside the scores, or dwarf them.
    middle = float(-np.log(max(np.quantile(scores, coverage), 1e-12)))
    least, most = middle - _LOG_RANGE, middle + _LOG_RANGE
    here = float(np.clip(np.log(beta), least, most))
    first, width = slope(here), 0.1
    while True:  # the slope is negative for small beta and positive for large, unless thresholds are negative
        there = float(np.clip(here - np.sign(first) * width, least, most))
        second = slope(there)
        if second * first <= 0:
            break
        if there in (least, most) or not np.isfinite(second):
            return _Solution(kept, float(np.exp(there)))
        here, first, width = there, second, 2 * width
    # Regula falsi (Illinois): tolerates that a warm start moves the slope in its last digits.
    for _ in range(20):
        if abs(there - here) < 2e-3 or first == second:
            break
        middle = there - second * (there - here) / (second - first)
        value = slope(middle)
        if not np.isfinite(value):
            break
        if abs(value) < 1e-4 * np.exp(middle):
            there = middle
            break
        here, first = (there, second) if value * second < 0 else (here, first / 2)
        there, second = middle, value
    return _Solution(kept, float(np.exp(there)))


def _choose(source: np.ndarray, scores: np.ndarray, target: np.ndarray, coverage: float) -> float:
    """Lambda by cross-validation of the gradient's norm, whose smallness is what coverage follows from."""
    rows, new = len(source), len(target)
    of_all = _Moments.of(source, target)
    # The penalty reaches lambda times the second moment of the ratio: a strong shift would overrule the scores.
    second_moment = of_all.mean @ np.linalg.lstsq(of_all.square, of_all.mean, rcond=None)[0]
    largest = (rows * (1 / rows + 1 / new)) ** (-1 / 3) / max(float(second_moment), 1.0)
    grid = np.geomspace(largest / 100, largest, _GRID)
    generator = np.random.default_rng(0)  # only splits rows
    folds = [generator.permutation(np.arange(n) % _FOLDS) for n in (rows, new)]
    norms = np.zeros(_GRID)
    for k in range(_FOLDS):
        train, held = (folds[0] != k, folds[1] != k), (folds[0] == k, folds[1] == k)
        if not held[1].any() or not train[1].any():
            held = train = (held[0], np.ones(new, bool))
        moments = _Moments.of(source[train[0]], target[train[1]])
        found = None
        for i, regularization in enumerate(grid):
            found = _solve(source[train[0]], scores[train[0]], moments, coverage, regularization, found)
            norms[i] += _held_out_norm(
                source[held[0]], scores[held[0]], target[held[1]], coverage, regularization, found
            )
    return float(grid[norms.argmin()])


def _held_out_norm(
    source: np.ndarray, scores: np.ndarray, target: np.ndarray, coverage: float, regularization: float, at: _Solution
) -> float:
    moments = _Moments.of(source, target)
    within = scores <= source @ at.coefficients
    pull = at.beta * moments.square @ at.coefficients - moments.mean
    of_threshold = source.T @ (within - coverage) / len(scores) + 2 * regularization * at.beta * pull
    of_beta = 2 * regularization * at.coefficients @ pull
    return float(np.sqrt(of_threshold @ of_threshold + of_beta**2))
