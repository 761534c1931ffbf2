"""Calibrated predictors, and the intervals or sets of classes that they give; `conformal` makes them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float, Int
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import as_predictive
from bayeslens.core.learner import Predictive
from bayeslens.core.quantiles import mean_and_variance, quantile
from bayeslens.core.table import Table, Target
from bayeslens.evaluation.conformal import class_scores, cqr_scores, weighted_thresholds
from bayeslens.evaluation.conformal_resampling import (
    cross_conformal_intervals,
    cross_conformal_sets,
    full_conformal_classes,
    full_conformal_ridge,
)
from bayeslens.evaluation.likelihood_ratio_quantile_regression import LikelihoodRatioQuantileRegression

if TYPE_CHECKING:
    import pandas as pd

OF_CLASSES, REFITTED = ("aps", "raps", "lac"), ("cv+", "jackknife+", "full")


class PointRegressor(eqx.Module):
    """A fitted estimator that predicts numbers without uncertainty."""

    estimator: Any

    not_savable: ClassVar[str] = "it wraps an estimator of another library: save that with its own tools"

    def __call__(self, X: Any) -> Float[np.ndarray, " rows"]:
        """The predicted numbers."""
        return np.asarray(self.estimator.predict(X), np.float64).reshape(-1)


@dataclasses.dataclass(frozen=True)
class ConformalPrediction:
    """Intervals or sets of new rows.

    `lower` and `upper` have shape (rows,) for regression; `sets` has shape (rows, classes) for classification, with
    the labels in `classes`. `promise` says what theorem holds with which numbers. Where outcomes were given,
    `y` holds them (class codes for classification) and `covered` says which are inside; `groups` names the groups in
    which coverage was promised.
    """

    coverage: float
    method: str
    promise: str
    guarantee: float
    calibration_rows: int
    lower: Float[np.ndarray, " rows"] | None = None
    upper: Float[np.ndarray, " rows"] | None = None
    sets: Bool[np.ndarray, "rows classes"] | None = None
    classes: tuple | None = None
    y: Float[np.ndarray, " rows"] | None = None
    covered: Bool[np.ndarray, " rows"] | None = None
    groups: np.ndarray | None = None

    @property
    def size(self) -> Float[np.ndarray, " rows"]:
        """Width of every interval, in the units of the outcome, or number of classes in every set."""
        return self.upper - self.lower if self.sets is None else self.sets.sum(1).astype(np.float64)

    @property
    def labels(self) -> list[list]:
        """The labels in the set of every row."""
        if self.sets is None:
            raise InputError("these are intervals, which have lower and upper ends instead of labels")
        return [[c for c, inside in zip(self.classes, row, strict=True) if inside] for row in self.sets]

    @property
    def table(self) -> pd.DataFrame:
        """How many new rows, their mean size and, where outcomes are known, their coverage: in all and by group.

        `standard_error`, and `lower` and `upper` (a 95% Clopper-Pearson interval), are those of the observed coverage
        as an estimate of the coverage of these very sets. Those of `split`, averaged over calibration tables, have the
        promised coverage; one table with n rows deviates from it by about sqrt(coverage (1 - coverage) / n).
        """
        import pandas as pd

        parts = {"all": np.ones(len(self.size), bool)}
        if self.groups is not None:
            parts |= {str(g): self.groups == g for g in pd.unique(self.groups)}
        name = "width" if self.sets is None else "set_size"
        return pd.DataFrame(
            [self._line(inside, name) for inside in parts.values()], index=pd.Index(parts, name="rows of")
        )

    def _line(self, inside: np.ndarray, name: str) -> dict[str, Any]:
        from scipy.stats import beta

        rows, sizes = int(inside.sum()), self.size[inside]
        line: dict[str, Any] = {"rows": rows, "promised": self.coverage}
        if self.covered is not None:
            hits = int(self.covered[inside].sum())
            share = hits / rows
            line |= {
                "observed": share,
                "standard_error": float(np.sqrt(share * (1 - share) / rows)),
                "lower": float(beta.ppf(0.025, hits, rows - hits + 1)) if hits else 0.0,
                "upper": float(beta.ppf(0.975, hits + 1, rows - hits)) if hits < rows else 1.0,
            }
        spread = sizes.std(ddof=1) / np.sqrt(rows) if rows > 1 and np.isfinite(sizes).all() else np.inf
        return line | {f"mean_{name}": float(sizes.mean()), f"{name}_standard_error": float(spread)}

    def __str__(self) -> str:
        return f"{self.table.round(4).to_string()}\n{self.promise}"


class Conformal(eqx.Module):
    """A calibrated predictor: called with new rows it gives a `ConformalPrediction`; made by `conformal`.

    `source` is what predicts: a predictive, a `PointRegressor`, a tuple of those of the folds, or None where a call
    brings the predictions. `calibrator` holds what the calibration rows left: thresholds, scores or coefficients.
    """

    source: Any
    calibrator: Any
    method: str
    coverage: float
    promise: str
    guarantee: float
    rows: int
    classes: tuple | None = None
    groups: str | None = None

    def __call__(self, X: Any, y: Any = None, *, groups: Any = None, weights: Any = None) -> ConformalPrediction:
        """Intervals or sets for new rows.

        Args:
            X: new rows; or their predictions, of the same kind, where predictions were calibrated.
            y: their outcomes, if known: then the result tells the observed coverage.
            groups: the group of every row, where coverage holds by group and `groups` named no column.
            weights: likelihood ratios of the rows, where these were given as an array in calibration.

        Raises:
            InputError: a group or label that was not seen, or groups or weights that are needed and were not given.
        """
        groups = column_of(X, self.groups) if self.groups is not None and groups is None else groups
        shown = None
        if self.method in REFITTED:
            bounds = self.calibrator(self.source, X, self.coverage)
        else:
            prediction = predict_rows(self.source, X)
            thresholds = self.calibrator.thresholds(X, count_rows(prediction), groups, weights, self.coverage)
            bounds = self.calibrator.score.bounds(prediction, thresholds)
            shown = np.asarray(groups) if isinstance(self.calibrator, GroupThresholds) else None
        found: dict[str, Any] = {"classes": self.classes, "groups": shown}
        found |= {"sets": bounds} if self.classes is not None else {"lower": bounds[0], "upper": bounds[1]}
        if y is not None:
            outcome = outcomes_of(y, self.classes)
            rows = len(bounds) if self.classes is not None else len(bounds[0])
            if len(outcome) != rows:
                raise InputError(f"there are {rows} new rows, but {len(outcome)} outcomes")
            found["y"] = outcome
            if self.classes is not None:
                found["covered"] = bounds[np.arange(rows), outcome.astype(int)]
            else:
                found["covered"] = (bounds[0] <= outcome) & (outcome <= bounds[1])
        return ConformalPrediction(self.coverage, self.method, self.promise, self.guarantee, self.rows, **found)


# ---- what is measured ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Score:
    """How strange an outcome is to a prediction, and the outcomes within a threshold.

    For regression the score is the distance outside a base interval in units of `scale`: that of the outcome from the
    mean in standard deviations (`split`; in the outcome's units for plain numbers), or from the predicted interval
    (`cqr`). For classification see `class_scores`; `lac` is one minus the probability of the class.
    """

    method: str
    coverage: float
    rank_penalty: float = 0.0
    free_ranks: int = 1

    def __call__(self, prediction: Any, y: np.ndarray) -> Float[np.ndarray, " rows"]:
        """Scores of the outcomes, shape (rows,)."""
        if self.method in OF_CLASSES:
            return self.of_classes(prediction)[np.arange(len(y)), y.astype(int)]
        lower, upper, scale = self._base(prediction)
        scores = np.abs(y - lower) if lower is upper else cqr_scores(lower, upper, y)
        return scores if scale is None else scores / scale

    def of_classes(self, prediction: Any) -> Float[np.ndarray, "rows classes"]:
        """Scores of all classes."""
        probs = np.asarray(prediction.probs, np.float64)
        if self.method == "lac":
            return 1 - probs
        return class_scores(probs, rank_penalty=self.rank_penalty, free_ranks=self.free_ranks)

    def bounds(self, prediction: Any, thresholds: Float[np.ndarray, " rows"]) -> Any:
        """Sets of classes, shape (rows, classes), or lower and upper ends."""
        if self.method in OF_CLASSES:
            inside = self.of_classes(prediction) <= thresholds[:, None] + 1e-12
            inside[np.arange(len(inside)), np.asarray(prediction.probs).argmax(1)] = True
            return inside
        lower, upper, scale = self._base(prediction)
        margin = thresholds if scale is None else thresholds * scale
        lower, upper = lower - margin, upper + margin
        if (thresholds >= 0).all():
            return lower, upper
        # A base interval that is much too wide turns over: what is left of it is one point.
        over = lower > upper
        middle = 0.5 * (np.where(over, lower, 0.0) + np.where(over, upper, 0.0))
        return np.where(over, middle, lower), np.where(over, middle, upper)

    def _base(self, prediction: Any) -> tuple[Any, Any, Any]:
        if isinstance(prediction, np.ndarray):
            return prediction, prediction, None
        if self.method == "cqr":
            tail = (1 - self.coverage) / 2
            return *quantile(prediction, [tail, 1 - tail]).T, None
        mean, variance = mean_and_variance(prediction)
        if not (np.isfinite(variance).all() and (variance > 0).all()):
            raise InputError("a prediction has no finite standard deviation to scale errors with: use method='cqr'")
        return mean, mean, np.sqrt(variance)


# ---- what the calibration rows leave ------------------------------------------------------------------------------


class OneThreshold(eqx.Module):
    """The same threshold for all rows."""

    score: Score
    threshold: float

    def thresholds(self, X: Any, rows: int, groups: Any, weights: Any, coverage: float) -> np.ndarray:
        """A threshold for every row."""
        return np.broadcast_to(self.threshold, rows)


class GroupThresholds(eqx.Module):
    """A threshold for every group."""

    score: Score
    by_group: dict[Any, float]

    def thresholds(self, X: Any, rows: int, groups: Any, weights: Any, coverage: float) -> np.ndarray:
        """A threshold for every row."""
        if groups is None or len(groups) != rows:
            raise InputError(f"coverage was promised by group: give groups=..., one for each of the {rows} rows")
        values = np.asarray(groups).tolist()
        unseen = [(row, g) for row, g in enumerate(values) if g not in self.by_group]
        if unseen:
            row, group = unseen[0]
            raise InputError(
                f"row {row} is of group {group!r}, which had no calibration rows; known: {list(self.by_group)[:12]}"
            )
        return np.array([self.by_group[g] for g in values])


class WeightedThreshold(eqx.Module):
    """Scores and likelihood ratios of the calibration rows."""

    score: Score
    scores: np.ndarray
    weights: np.ndarray
    ratio: Any = None

    def thresholds(self, X: Any, rows: int, groups: Any, weights: Any, coverage: float) -> np.ndarray:
        """A threshold for every row."""
        weights = self.ratio(X) if weights is None and self.ratio is not None else weights
        if weights is None:
            raise InputError("calibration was weighted: give weights=..., the likelihood ratio of every new row")
        return weighted_thresholds(
            self.scores, self.weights, np.broadcast_to(np.asarray(weights, float), rows), coverage
        )


class ShiftedThreshold(eqx.Module):
    """A threshold that is linear in the features of a row."""

    score: Score
    table: Table
    regression: LikelihoodRatioQuantileRegression

    def thresholds(self, X: Any, rows: int, groups: Any, weights: Any, coverage: float) -> np.ndarray:
        """A threshold for every row."""
        return self.regression(self.table.dense(X))


class CrossCalibration(eqx.Module):
    """Held-out errors, or scores of classes, of a cross-validation."""

    scores: Float[np.ndarray, " rows"]
    folds: Int[np.ndarray, " rows"]

    def __call__(self, sources: tuple, X: Any, coverage: float) -> Any:
        """Ends or sets of new rows."""
        predictions = [predict_rows(s, X) for s in sources]
        if is_classification(predictions[0]):
            new = np.stack([class_scores(p.probs) for p in predictions])
            return cross_conformal_sets(self.scores, new, self.folds, coverage)
        return cross_conformal_intervals(
            np.stack([center_of(p) for p in predictions]), self.scores, self.folds, coverage
        )


class FullCalibration(eqx.Module):
    """The rows themselves: every new row is fitted with them."""

    X: np.ndarray
    y: np.ndarray
    num_classes: int

    def __call__(self, source: Any, X: Any, coverage: float) -> Any:
        """Ends or sets of new rows."""
        X = np.asarray(X, np.float64)
        if not self.num_classes:
            return full_conformal_ridge(self.X, self.y, X, coverage, penalty=float(source.estimator.alpha))
        from sklearn.base import clone

        def scores(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
            fitted = clone(source.estimator).fit(rows, labels)
            return 1 - fitted.predict_proba(rows)[np.arange(len(labels)), labels]

        return full_conformal_classes(scores, self.X, self.y.astype(int), X, self.num_classes, coverage)


# ---- predictions ---------------------------------------------------------------------------------------------------


def predict_rows(source: Any, X: Any) -> Any:
    """A distribution with a row per batch entry, or an array of numbers."""
    if source is None:
        if isinstance(X, Predictive):
            return X(None)
        if not isinstance(X, Distribution) and np.ndim(X) == 1:
            return np.asarray(X, np.float64)
        return as_predictive(X)(None)
    return source(X)


def count_rows(prediction: Any) -> int:
    """How many rows a prediction has."""
    return len(prediction) if isinstance(prediction, np.ndarray) else prediction.batch_shape[0]


def is_classification(prediction: Any) -> bool:
    """Whether class probabilities were predicted."""
    return (
        not isinstance(prediction, np.ndarray)
        and getattr(prediction, "is_discrete", False)
        and hasattr(prediction, "probs")
    )


def center_of(prediction: Any) -> np.ndarray:
    """The predicted numbers, or means."""
    return prediction if isinstance(prediction, np.ndarray) else mean_and_variance(prediction)[0]


def column_of(X: Any, name: str) -> np.ndarray:
    """The groups in a column of a frame."""
    if not hasattr(X, "columns") or name not in X.columns:
        raise InputError(f"groups={name!r} names no column of X: give a frame with it, or an array of groups")
    return X[name].to_numpy()


def outcomes_of(y: Any, classes: tuple | None) -> Float[np.ndarray, " rows"]:
    """Outcomes as numbers, or as codes of known classes; see `Target.with_classes`."""
    if classes is None and isinstance(y, np.ndarray) and y.ndim == 1 and y.dtype.kind in "fiu" and np.isfinite(y).all():
        return y.astype(np.float64)  # plain numbers need no look at what else they might be, which takes a millisecond
    return Target.with_classes(y, classes).values
