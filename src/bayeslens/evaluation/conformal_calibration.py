"""Making a `Conformal`: calibrating any predictor on a table, with the method that suits it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import as_predictive
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.randomness import host_generator
from bayeslens.core.table import Table, Target, take
from bayeslens.evaluation.conformal import (
    check_coverage,
    class_scores,
    conformal_threshold,
    least_calibration_rows,
    mondrian_thresholds,
)
from bayeslens.evaluation.conformal_resampling import cross_conformal_guarantee
from bayeslens.evaluation.conformal_sets import (
    OF_CLASSES,
    REFITTED,
    Conformal,
    CrossCalibration,
    FullCalibration,
    GroupThresholds,
    OneThreshold,
    PointRegressor,
    Score,
    ShiftedThreshold,
    WeightedThreshold,
    center_of,
    column_of,
    count_rows,
    is_classification,
    outcomes_of,
    predict_rows,
)
from bayeslens.evaluation.likelihood_ratio_quantile_regression import LikelihoodRatioQuantileRegression

METHODS = ("auto", "split", "cqr", "aps", "raps", "lac", "lr-qr", "cv+", "jackknife+", "full")
_RANK_PENALTIES = (0.0, 0.001, 0.01, 0.1, 0.2, 0.5)
_TUNING_SHARE = 0.2


def conformal(
    source: Any,
    X: Any,
    y: Any,
    *,
    coverage: float = 0.9,
    method: str = "auto",
    groups: Any = None,
    weights: Any = None,
    shifted: Any = None,
    num_folds: int = 10,
    key: Any = None,
) -> Conformal:
    """Calibrate any predictor so that its intervals or sets of classes hold the outcome with a promised probability.

    Args:
        source: what predicts. Fitted (a `Predictive`, a scikit-learn estimator): X and y are then rows that it has not
            seen. Or predictions of the rows of y: class probabilities of shape (rows, classes), numbers of shape
            (rows,), or a NumPyro distribution with a row per batch entry; X is then not looked at and may be None.
            Or not fitted (a `Learner`, a scikit-learn estimator): it is fitted to X and y by the resampling methods.
        X: calibration rows, a frame or an array.
        y: their outcomes: numbers or labels.
        coverage: wanted probability; 0.9.
        method: `"split"` (error of the mean, scaled by the predicted standard deviation where there is one), `"cqr"`
            (predicted quantiles, moved), `"aps"`, `"raps"` (adaptive sets, without and with a penalty on large ranks
            that is tuned on a fifth of the rows), `"lac"` (the smallest sets on average), `"lr-qr"` (unknown covariate
            shift), `"cv+"`, `"jackknife+"`, `"full"` (refitted; full for ridge regression and for classifiers). By
            default: lr-qr with `shifted`, cv+ for what is not fitted, aps for classes, cqr for predicted distributions
            and split for predicted numbers.
        groups: the group of each row, or the name of a column of X: coverage then holds within every group.
        weights: a known covariate shift as likelihood ratios (target over source density) of the rows, or a function
            that gives them for rows like X.
        shifted: rows like X, without outcomes, from where the predictions will be used (an unknown covariate shift).
        num_folds: of cv+.
        key: a `jax.random.key`; needed for cv+, jackknife+ (folds and fits) and raps (rows for tuning).

    Returns:
        A `Conformal`: call it with new rows. Its `promise` is what is guaranteed.

    Raises:
        InputError: too few rows for the coverage (the message says how many are needed), groups with too few rows,
            labels that the predictor does not know, arguments that exclude each other, or an unknown method.

    >>> rng = np.random.default_rng(0)
    >>> y = rng.normal(size=300)
    >>> intervals = conformal(np.zeros(200), None, y[:200], coverage=0.8)(np.zeros(100), y[100:200])
    >>> bool(0.7 < intervals.table.observed["all"] < 0.9)
    True
    """
    check_coverage(coverage)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    given = [n for n, v in (("groups", groups), ("weights", weights), ("shifted", shifted)) if v is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} cannot be combined: give one of them")
    unfitted = isinstance(source, Learner) or _is_unfitted(source)
    if method in REFITTED or (method == "auto" and unfitted and shifted is None):
        if given:
            raise InputError(f"{given[0]} needs a fitted predictor and rows of its own for calibration")
        method = "cv+" if method == "auto" else method
        return _refitted(source, X, y, coverage, method, num_folds, key)
    if unfitted:
        raise InputError(f"{type(source).__name__} is not fitted: fit it on other rows, or use method='cv+'")
    brought = isinstance(source, np.ndarray | list | Distribution)
    kept = None if brought else _wrapped(source)
    prediction = predict_rows(kept, np.asarray(source) if isinstance(source, list) else source if brought else X)
    classes = _classes(kept, prediction)
    outcomes = outcomes_of(y, classes)
    if count_rows(prediction) != len(outcomes):
        raise InputError(f"there are predictions for {count_rows(prediction)} rows, but {len(outcomes)} outcomes")
    if method in ("auto", "lr-qr"):
        plain = "split" if isinstance(prediction, np.ndarray) else "cqr"
        kind = "aps" if classes is not None else plain
        method = "lr-qr" if shifted is not None or method == "lr-qr" else kind
    else:
        kind = method
    if (kind in OF_CLASSES) != (classes is not None) or (kind == "cqr" and isinstance(prediction, np.ndarray)):
        needs = (
            "class probabilities" if kind in OF_CLASSES else "predicted distributions" if kind == "cqr" else "numbers"
        )
        raise InputError(f"method {kind!r} needs {needs}, which this predictor does not give: use method='auto'")
    return _calibrated(kept, prediction, X, outcomes, classes, coverage, method, kind, groups, weights, shifted, key)


def _calibrated(
    source: Any,
    prediction: Any,
    X: Any,
    y: np.ndarray,
    classes: tuple | None,
    coverage: float,
    method: str,
    kind: str,
    groups: Any,
    weights: Any,
    shifted: Any,
    key: Any,
) -> Conformal:
    score, rows = Score(kind, coverage), np.arange(len(y))
    if kind == "raps":
        tuning = host_generator(_needed(key, method)).permutation(len(y))[: int(_TUNING_SHARE * len(y))]
        score, rows = _tuned(score, prediction.probs[tuning], y[tuning].astype(int)), np.setdiff1d(rows, tuning)
    scores = score(prediction, y)[rows]
    n = len(rows)
    if n < least_calibration_rows(coverage):
        raise InputError(
            f"coverage {coverage:g} needs at least {least_calibration_rows(coverage)} calibration rows, got {n}: add "
            "rows or lower the coverage"
        )
    column = groups if isinstance(groups, str) else None
    groups = column_of(X, column) if column is not None else groups
    most = coverage + 1 / (n + 1)
    guarantee = coverage
    if method == "lr-qr":
        if shifted is None:
            raise InputError("method 'lr-qr' needs shifted=..., rows from where the predictions will be used")
        table = Table.from_data(X)
        regression = LikelihoodRatioQuantileRegression.fit(table.dense(X), scores, table.dense(shifted), coverage)
        calibrator: Any = ShiftedThreshold(score, table, regression)
        guarantee = 0.0
        promise = (
            f"Coverage of rows distributed as the {len(shifted)} shifted ones tends to {coverage:.1%} as both tables "
            "grow, if their density relative to that of the calibration rows is linear in the features and outcomes "
            f"follow the same law given the features; nothing is guaranteed for {n} rows (LR-QR, Joshi et al. 2025)."
        )
    elif groups is not None:
        groups = np.asarray(groups)
        if len(groups) != len(y):
            raise InputError(f"there are {len(y)} calibration rows, but groups for {len(groups)}")
        calibrator = GroupThresholds(score, mondrian_thresholds(scores, groups[rows], coverage))
        promise = (
            f"At least {coverage:.1%} of exchangeable new rows of each of {len(calibrator.by_group)} groups, on "
            "average over calibration tables (Mondrian conformal prediction, Vovk et al. 2005)."
        )
    elif weights is not None:
        ratio, weights = (weights, weights(X)) if callable(weights) else (None, weights)
        calibrator = WeightedThreshold(score, scores, np.asarray(weights, np.float64)[rows], ratio)
        promise = (
            f"At least {coverage:.1%} of new rows from the shifted distribution, on average over calibration tables, "
            "if the weights are the true likelihood ratios; rows whose own weight is too large get infinite sets "
            "(weighted conformal prediction, Tibshirani et al. 2019)."
        )
    else:
        calibrator = OneThreshold(score, conformal_threshold(scores, coverage))
        promise = (
            f"At least {coverage:.1%}, and without ties among scores at most {most:.1%}, of exchangeable new rows, on "
            f"average over calibration tables of {n} rows (split conformal prediction, Vovk et al. 2005)."
        )
    return Conformal(source, calibrator, method, coverage, promise, guarantee, n, classes, column)


def _refitted(source: Any, X: Any, y: Any, coverage: float, method: str, num_folds: int, key: Any) -> Conformal:
    learner = isinstance(source, Learner)
    if not learner and not hasattr(source, "fit"):
        raise InputError(
            f"method {method!r} fits anew: give a learner or a scikit-learn estimator, not what it predicted"
        )
    if learner:
        target = Target.from_values(y, "auto" if len(source.tasks) > 1 else next(iter(source.tasks)))
    else:
        target = Target.from_values(y, "classification" if hasattr(source, "predict_proba") else "regression")
    n, classes = len(target.values), target.classes
    if method == "full":
        return _full(source, X, target, coverage)
    if n < least_calibration_rows(coverage):
        raise InputError(f"coverage {coverage:g} needs at least {least_calibration_rows(coverage)} rows, got {n}")
    num_folds = n if method == "jackknife+" else num_folds
    if not 2 <= num_folds <= n:
        raise InputError(f"num_folds must lie between 2 and the number of rows, {n}; got {num_folds}")
    key = _needed(key, method)
    folds = host_generator(key).permutation(np.arange(n) % num_folds)
    splits = [(np.flatnonzero(folds != k), np.flatnonzero(folds == k)) for k in range(num_folds)]
    if learner:
        sources = tuple(source.fit_folds(X, target, splits, key=key)[0])
    else:
        sources = tuple(_fit_estimator(source, X, target, train) for train, _ in splits)
    scores = np.empty(n)
    for fitted, (_, held) in zip(sources, splits, strict=True):
        prediction = predict_rows(fitted, take(X, held))
        if classes is not None:
            if tuple(fitted.classes) != classes:
                raise InputError("a fold lacks a class altogether: use fewer folds, or merge rare classes")
            scores[held] = class_scores(prediction.probs)[np.arange(len(held)), target.values[held].astype(int)]
        else:
            scores[held] = np.abs(target.values[held] - center_of(prediction))
    guarantee = cross_conformal_guarantee(n, num_folds, coverage)
    promise = (
        f"At least {guarantee:.1%} of exchangeable new rows whatever the model, and about {coverage:.1%} where leaving "
        f"out {'a row' if num_folds == n else 'a fold'} changes predictions little ({method} on {n} rows in "
        f"{num_folds} folds, {'Barber et al. 2021' if classes is None else 'Romano et al. 2020'})."
    )
    return Conformal(sources, CrossCalibration(scores, folds), method, coverage, promise, guarantee, n, classes)


def _full(source: Any, X: Any, target: Target, coverage: float) -> Conformal:
    if isinstance(source, Learner) or not (target.classes is not None or type(source).__name__ == "Ridge"):
        raise InputError(
            "method 'full' is for scikit-learn's Ridge, exactly, and for its classifiers: use 'cv+' for others"
        )
    X, n = np.asarray(X, np.float64), len(target.values)
    calibrator = FullCalibration(X, target.values, len(target.classes or ()))
    promise = (
        f"At least {coverage:.1%} and at most {coverage + 1 / (n + 1):.1%} (without ties) of exchangeable new rows "
        "(full conformal prediction, Vovk et al. 2005); with too few rows for the coverage everything belongs."
    )
    return Conformal(PointRegressor(source), calibrator, "full", coverage, promise, coverage, n, target.classes)


def _fit_estimator(source: Any, X: Any, target: Target, rows: np.ndarray) -> Any:
    from sklearn.base import clone

    labels = target.values[rows]
    if target.classes is not None:
        labels = np.asarray(target.classes)[labels.astype(int)]
    return _wrapped(clone(source).fit(take(X, rows), labels))


def _tuned(score: Score, probs: np.ndarray, labels: np.ndarray) -> Score:
    """The penalty with the smallest sets, beyond the ranks that hold the true class often enough."""
    probs = np.asarray(probs)
    rank = (probs > probs[np.arange(len(labels)), labels][:, None]).sum(1) + 1
    free = conformal_threshold(rank, score.coverage)
    free = int(min(free, probs.shape[1]))
    found = []
    for penalty in _RANK_PENALTIES:
        of_all = class_scores(probs, rank_penalty=penalty, free_ranks=free)
        edge = conformal_threshold(of_all[np.arange(len(labels)), labels], score.coverage)
        found.append((of_all <= edge).sum(1).mean())
    return Score(score.method, score.coverage, _RANK_PENALTIES[int(np.argmin(found))], free)


def _needed(key: Any, method: str) -> Any:
    if key is None:
        raise InputError(f"method {method!r} divides rows by chance: give key=jax.random.key(0), say")
    return key


def _is_unfitted(source: Any) -> bool:
    if not (hasattr(source, "fit") and hasattr(source, "get_params")):
        return False
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(source)
    except NotFittedError:
        return True
    except AttributeError:  # not of scikit-learn, though it looks like it: it cannot tell
        return False
    return False


def _wrapped(source: Any) -> Any:
    """A predictive, or a regressor of plain numbers."""
    if isinstance(source, PointRegressor):
        return source
    plain = not isinstance(source, Predictive) and hasattr(source, "predict") and not hasattr(source, "predict_proba")
    if plain and "return_std" not in inspect.signature(source.predict).parameters:
        return PointRegressor(source)
    return as_predictive(source)


def _classes(source: Any, prediction: Any) -> tuple | None:
    if isinstance(source, Predictive):
        return source.classes
    return tuple(range(prediction.probs.shape[-1])) if is_classification(prediction) else None
